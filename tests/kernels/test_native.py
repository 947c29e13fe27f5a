"""The C++ twins: the specification's results, whatever the processor, the threads and the machine they are built on.

`test_index_select.py` runs every one of its tests with each twin; here is what only compiled code can get wrong.
"""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from paging import paged_keys
from tolerances import assert_near
from torch import Tensor

from indexshare.errors import ConfigError, KernelError
from indexshare.kernels import native, ops, registry
from indexshare.kernels.layout import KeyLayout

BF16, FP32 = torch.bfloat16, torch.float32
INSTRUCTION_SETS = native.runnable()


def whole(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Whole numbers from -3 to 3: products and sums are exact in every type and order, and there are many ties."""
    return torch.randint(-3, 4, shape).to(dtype)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in native.TWINS:
        monkeypatch.setattr(registry.get(name), "twins", [])
    native.register(request.param)
    return request.param


@pytest.mark.parametrize("query_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("key_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("num_heads", "dim"), [(1, 16), (4, 64), (5, 16), (16, 64), (20, 16), (32, 64), (2, 256), (3, 4)]
)
def test_selected_sets_are_those_of_the_specification(
    isa: str, num_heads: int, dim: int, query_dtype: torch.dtype, key_dtype: torch.dtype
) -> None:
    """Few and many queries, key counts that fill no block, pages in no order, top-k around what is visible."""
    for num_new, num_past, topk in (
        (1, 0, 8),
        (1, 300, 8),
        (5, 100, 64),
        (40, 0, 16),
        (33, 470, 64),
        (1, 64, 64),
        (1, 65, 64),
    ):
        paged = paged_keys([num_new], [num_past], dim, 16, key_dtype)
        paged.pool[paged.layout.rows(0)] = whole(num_new + num_past, dim, dtype=key_dtype)
        query, weights = whole(num_new, num_heads, dim, dtype=query_dtype), whole(num_new, num_heads, dtype=FP32) / 4
        before = registry.hits["index_select", registry.get("index_select").twins[0].name]
        found = ops.index_select(query, weights, paged.pool, paged.layout, topk)
        assert registry.hits["index_select", registry.get("index_select").twins[0].name] == before + 1
        assert torch.equal(found, ops.index_select.specification(query, weights, paged.pool, paged.layout, topk))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("latent_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("num_heads", "width", "latent"), [(4, 112, 96), (16, 320, 256), (3, 32, 16), (64, 576, 512)])
def test_attention_is_that_of_the_specification(
    isa: str, num_heads: int, width: int, latent: int, dtype: torch.dtype, latent_dtype: torch.dtype
) -> None:
    pool = torch.full((400, width), float("nan"), dtype=latent_dtype)
    used = torch.randperm(400)[:300]
    pool[used] = torch.randn(300, width).to(latent_dtype)
    for num_tokens, num_selected in ((1, 1), (1, 6), (1, 257), (9, 100)):
        selection = torch.stack(
            [used[torch.randperm(300)[:num_selected]].sort().values for _ in range(num_tokens)]
        ).int()
        if num_tokens > 2:
            selection[1, num_selected // 2 :] = -1
            selection[2, 1:] = -1
        query = torch.randn(num_tokens, num_heads, width).to(dtype)
        found = ops.mla_sparse(query, pool, selection, 0.1, latent)
        assert found.dtype == dtype
        assert_near(found, ops.mla_sparse.specification(query.double(), pool.double(), selection, 0.1, latent))


def test_results_are_bit_identical_for_any_number_of_threads(isa: str) -> None:
    query, weights, keys = torch.randn(50, 4, 32).bfloat16(), torch.randn(50, 4), torch.randn(3000, 32).bfloat16()
    table = torch.randperm(3000 // 4)[None]
    attention_query, latents = torch.randn(50, 4, 112).bfloat16(), torch.randn(3000, 112).bfloat16()
    results = []
    for num_threads in (1, 2, 3, 5):
        torch.set_num_threads(num_threads)
        for num_new in (50, 1):  # many queries are shared out, the keys of a few are
            layout = KeyLayout(sequence_starts=(0, num_new), context_lengths=(3000,), page_table=table, page_size=4)
            selection = ops.index_select(query[:num_new], weights[:num_new], keys, layout, 100)
            attended = ops.mla_sparse(attention_query[:num_new], latents, selection, 0.1, 96)
            results.append((num_new, selection, attended))
    for num_new, selection, attended in results:
        _, first_selection, first_attended = next(each for each in results if each[0] == num_new)
        assert torch.equal(selection, first_selection)
        assert torch.equal(attended, first_attended)
    # A query alone gives what it gives among others.
    layout = KeyLayout(sequence_starts=(0, 50), context_lengths=(3000,), page_table=table, page_size=4)
    among = ops.mla_sparse(attention_query, latents, ops.index_select(query, weights, keys, layout, 100), 0.1, 96)
    alone = KeyLayout(sequence_starts=(0, 1), context_lengths=(2951,), page_table=table, page_size=4)
    chosen = ops.index_select(query[:1], weights[:1], keys, alone, 100)
    assert torch.equal(ops.mla_sparse(attention_query[:1], latents, chosen, 0.1, 96), among[:1])


def test_rows_beyond_two_gigabytes_are_found(isa: str) -> None:
    """Offsets, in numbers and in bytes, that do not fit 32 bits. Only pages that are written take memory."""
    num_pages, page_size, dim, latent = 2**17 + 64, 64, 256, 256

    def untouched(width: int) -> Tensor:  # torch.empty fills its memory under pytest
        return torch.from_numpy(np.empty((num_pages * page_size, width), dtype=np.uint16)).view(BF16)

    keys, latents = untouched(dim), untouched(dim + 32)
    pages = torch.tensor([[2**17 + 60, 3, 2**16 + 5, 2**17 + 2]])
    layout = KeyLayout(sequence_starts=(0, 1), context_lengths=(250,), page_table=pages, page_size=page_size)
    rows = layout.rows(0)
    assert rows.max() * dim > 2**31
    small_keys, small_latents = whole(250, dim), torch.randn(250, dim + 32).to(BF16)
    keys[rows], latents[rows] = small_keys, small_latents
    query, weights = whole(1, 4, dim), whole(1, 4, dtype=FP32)
    found = ops.index_select(query, weights, keys, layout, 50)[0].long()
    near = KeyLayout(sequence_starts=(0, 1), context_lengths=(250,), page_table=torch.arange(4)[None], page_size=64)
    expected = ops.index_select.specification(query, weights, small_keys, near, 50)
    assert torch.equal(found, rows[expected[0].long()])
    attention_query = torch.randn(1, 3, dim + 32).to(BF16)
    attended = ops.mla_sparse(attention_query, latents, found[None].int(), 0.1, latent)
    assert torch.equal(attended, ops.mla_sparse(attention_query, small_latents, expected, 0.1, latent))


def test_ascending_scores_make_every_key_a_candidate(isa: str) -> None:
    """The worst case of the threshold: each key beats all before it."""
    keys = torch.arange(5000, dtype=FP32)[:, None] * torch.ones(1, 4)
    layout = KeyLayout.packed((0, 5000))
    query = torch.ones(5000, 1, 4)
    selection = ops.index_select(query, torch.ones(5000, 1), keys, layout, 70)
    assert torch.equal(selection[-1], torch.arange(4930, 5000, dtype=torch.int32))
    descending = ops.index_select(query, -torch.ones(5000, 1), keys, layout, 70)
    assert torch.equal(descending[-1], torch.arange(70, dtype=torch.int32))


def test_what_a_twin_does_not_take_goes_to_the_specification(isa: str) -> None:
    refusals = registry.get("mla_sparse").twins[0].supports
    query, latents, selection = torch.randn(1, 2, 32), torch.randn(8, 32), torch.zeros(1, 4, dtype=torch.int32)
    assert refusals(query, latents, selection, 0.1, 16) is None
    assert "float64" in refusals(query.double(), latents.double(), selection, 0.1, 16)
    assert "multiples" in refusals(query[..., :31], latents[..., :31], selection, 0.1, 16)
    assert "multiples" in refusals(query, latents, selection, 0.1, 24)
    assert "contiguous" in refusals(query, torch.randn(32, 8).T, selection, 0.1, 16)
    assert "gradients" in refusals(query.requires_grad_(), latents, selection, 0.1, 16)
    with torch.no_grad():
        assert refusals(query, latents, selection, 0.1, 16) is None


# ---------------------------------------------------------------------------------------------------------------- build

PROGRAM = """
import warnings
warnings.simplefilter("always")
from indexshare.kernels import native, registry
print(native.enable())
print([choice.reason for choice in registry.describe(("cpu",)) if choice.operation == "mla_sparse"][0])
"""


def obey_permissions() -> None:
    """Root writes where it must not unless this right is gone; the kernel refuses others, who have not got it."""
    drop_bounding_capability, override_permissions = 24, 1
    ctypes.CDLL(None).prctl(drop_bounding_capability, override_permissions, 0, 0, 0)


def run(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"INDEXSHARE_CACHE": str(tmp_path / "cache"), **environment}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=variables,
        capture_output=True,
        text=True,
        timeout=110,
        preexec_fn=obey_permissions,
    )


def test_two_processes_build_at_once_and_the_next_finds_the_library(tmp_path: Path) -> None:
    variables = os.environ | {"INDEXSHARE_CACHE": str(tmp_path / "cache"), "INDEXSHARE_ISA": "scalar"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=110) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert all(out.startswith("None\n") for out, _ in outputs)
    assert sum("compiling the scalar kernels" in error for _, error in outputs) == 1
    again = run(tmp_path, INDEXSHARE_ISA="scalar")
    assert again.stdout.startswith("None\n")
    assert again.stderr == ""
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
    (tmp_path / "cache").chmod(0o555)
    read_only = run(tmp_path, INDEXSHARE_ISA="scalar")
    assert read_only.stdout.startswith("None\n")
    assert read_only.stderr == ""


def test_where_the_cache_cannot_be_written_the_build_is_for_this_process(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o555)
    (tmp_path / "temporary").mkdir()
    done = run(tmp_path, INDEXSHARE_ISA="scalar", TMPDIR=str(tmp_path / "temporary"))
    assert done.stdout.startswith("None\n"), done.stdout
    assert f"kept in {tmp_path / 'temporary'}" in done.stderr
    assert not list((tmp_path / "cache").iterdir())
    assert not list((tmp_path / "temporary").iterdir())


def test_without_a_compiler_the_specification_runs_and_says_why(tmp_path: Path) -> None:
    done = run(tmp_path, PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr
    assert "there is no C++ compiler" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1].startswith("the specification; there is no C++ compiler")
    assert done.stderr.count("UserWarning") == 1


def test_a_failed_build_is_told_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 1 && exit\necho 'native.cpp:1: error: no' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    done = run(tmp_path, CXX=str(broken))
    assert done.stdout.splitlines()[0] == f"{broken} failed: native.cpp:1: error: no"
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_compiler_that_hangs_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "BUILD_SECONDS", 0.5)
    pid_file = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired):
        native._run_bounded(["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"])
    time.sleep(0.1)
    status = Path(f"/proc/{pid_file.read_text().strip()}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert "can be written by other users" in run(tmp_path).stdout


def test_a_library_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.runtime, "settings", lambda: native.runtime.Settings(cache=tmp_path))

    def compile_nothing(command: list[str]) -> tuple[int, str]:
        Path(command[command.index("-o") + 1]).touch(mode=0o775)
        return 0, ""

    monkeypatch.setattr(native, "_run_bounded", compile_nothing)
    library = native.build("scalar")
    assert library.stat().st_mode & 0o077 == 0
    library.chmod(0o775)
    with pytest.raises(KernelError, match=f"{library} can be written by other users; remove it"):
        native.build("scalar")


def test_an_instruction_set_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_processor_flags", frozenset)
    monkeypatch.setattr(native.runtime, "settings", lambda: native.runtime.Settings(isa="avx512"))
    with pytest.raises(ConfigError, match="can run: scalar"):
        native.instruction_set()


def test_a_library_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(native, "build", lambda isa: damaged)
    with pytest.raises(KernelError, match="cannot be loaded"):
        native.load.__wrapped__("scalar")
