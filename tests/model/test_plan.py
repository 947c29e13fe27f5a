import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from indexshare import runtime
from indexshare.errors import ConfigError
from indexshare.kernels.cache_formats import CacheFormats
from indexshare.model.inspect import weight_bytes
from indexshare.model.plan import Machine, make_plan, render, this_machine
from indexshare.model.recipes import glm_5_2, mid, nano

GIB = 2**30
MACHINE = Machine(description="a test", memory_bytes=16 * GIB, disk_bytes=64 * GIB, bandwidth=2e10, compute=2e11)


def test_a_small_model_fits() -> None:
    plan = make_plan(nano(), "nano", 131_072, MACHINE)
    assert plan.verdict == "fits in float32 and bfloat16 and fp8 and int8 and int4"
    brain = next(row for row in plan.formats if row.weight_format == "bfloat16")
    assert brain.cache_bytes == 131_072 * (8 * 112 * 2 + 4 * 32 * 2 + 112 * 2 + 32 * 2)
    assert brain.needed_bytes > brain.weight_bytes + brain.cache_bytes + plan.workspace_bytes
    assert brain.fits_memory and brain.fits_disk


def test_files_that_are_quantised_are_not_advised_to_be() -> None:
    notes = "; ".join(make_plan(replace(nano(), quantization="compressed-tensors"), "nano", 4096, MACHINE).notes)
    assert "these files are quantised" in notes
    assert "indexshare quantize" not in notes


def test_int8_caches_are_smaller() -> None:
    formats = CacheFormats(latents="int8", index_keys="int8")
    rows = make_plan(nano(), "nano", 131_072, MACHINE, caches=formats).formats
    assert {row.cache_bytes for row in rows} == {131_072 * (9 * (96 + 8 + 2 * 16) + 5 * (32 + 8))}


def test_glm_5_2_does_not_fit_and_says_by_how_much() -> None:
    plan = make_plan(glm_5_2(), "glm-5.2", 1_048_576, MACHINE)
    assert plan.verdict == "does not fit: int4 needs 460 GiB more memory than is free"
    assert not any(row.fits_memory or row.fits_disk for row in plan.formats)
    assert any("indexer in every layer would be 2.7 times" in note for note in plan.notes)


def test_a_smaller_format_may_fit() -> None:
    config = mid()
    memory = int(weight_bytes(config, "int4") * 1.05) + 800 * runtime.MIB
    plan = make_plan(config, "mid", 4096, replace(MACHINE, memory_bytes=memory))
    assert plan.verdict == "fits in int4"


def test_more_context_is_slower_and_larger() -> None:
    short, long = (make_plan(mid(), "mid", length, MACHINE).formats[1] for length in (4096, 65_536))
    assert long.prefill_seconds > 16 * short.prefill_seconds
    assert long.decode_tokens_per_second < short.decode_tokens_per_second
    assert long.cache_bytes == 16 * short.cache_bytes


def test_short_contexts_are_dense() -> None:
    assert any("dense attention" in note for note in make_plan(nano(), "nano", 256, MACHINE).notes)


@pytest.mark.parametrize("context", [0, -1, 1_048_577])
def test_an_impossible_length_is_an_error(context: int) -> None:
    with pytest.raises(ConfigError, match="context must be between 1 and 1,048,576"):
        make_plan(nano(), "nano", context, MACHINE)


def test_this_machine_has_memory_and_disk() -> None:
    machine = this_machine()
    assert machine.memory_bytes > 0 and machine.disk_bytes > 0 and machine.compute > 0
    assert "assumed" in machine.description


def test_the_disk_is_that_of_the_nearest_directory_there_is(tmp_path: Path) -> None:
    assert this_machine("cpu", tmp_path / "not" / "yet").disk_bytes > 0


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_device_that_is_not_here_is_an_error(device: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used here"):
        this_machine(device)


def test_the_memory_of_other_kinds_of_device_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match="plan for cpu or a cuda device"):
        this_machine("meta")


def test_a_plan_for_a_cpu_needs_no_torch() -> None:
    program = (
        "import sys; from indexshare.model.plan import this_machine; this_machine(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_weights_that_are_there_need_no_disk() -> None:
    machine = replace(MACHINE, disk_bytes=0)
    assert not any(row.fits_disk for row in make_plan(nano(), "nano", 256, machine).formats)
    plan = make_plan(nano(), "nano", 256, machine, on_disk=True)
    assert plan.on_disk and all(row.fits_disk for row in plan.formats)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(plan))
    shown = capture.get()
    assert shown.count("on disk") == len(plan.formats) and "…" not in shown


def test_it_is_shown_as_a_table_and_as_json() -> None:
    plan = make_plan(glm_5_2(), "glm-5.2", 131_072, MACHINE)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(plan))
    shown = capture.get()
    assert "verdict: does not fit" in shown and "704 GiB" in shown and "…" not in shown
    assert msgspec.json.decode(msgspec.json.encode(plan))["context"] == 131_072
