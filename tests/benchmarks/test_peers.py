"""The benchmark beside other engines, without the other engines: its own parts, and that it refuses."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import numpy as np
import peers
import pytest
from agreement import Agreement
from engine_llama import CELL, grow_state
from numpy.typing import NDArray
from peer_report import LLAMA_FLASH, LLAMA_PLAIN, Measurement, Run, plot, write_json
from workers import Worker, WorkerError

from indexshare.model.weights import load_checkpoint

FAKE_ENGINE = """
import numpy, sys
sys.path.insert(0, {benchmarks!r})
from workers import serve

class FakeEngine:
    vocab_size = 8
    def __init__(self, *, fails):
        print("a library that prints")
        self.num_read = 0
        if fails:
            raise ValueError("not this model")
    def set_depth(self, num_tokens, progress):
        progress(num_tokens, num_tokens)
        self.depth = self.num_read = num_tokens
    def read(self, token_ids):
        self.num_read += len(token_ids)
        return numpy.full(8, self.num_read, dtype=numpy.float32)
    def forget(self):
        self.num_read = self.depth
    def versions(self):
        return {{"fake": "1"}}

serve(FakeEngine)
"""


def saved_cache(num_cells: int, layers: list[NDArray[np.float16]]) -> bytes:
    cells = np.zeros(num_cells, dtype=CELL)
    cells["position"], cells["num_sequences"] = np.arange(num_cells), 1
    parts = [np.array([1, num_cells], "<u4").tobytes(), cells.tobytes(), np.array([0, len(layers)], "<u4").tobytes()]
    for rows in layers:
        parts += [np.array([1], "<i4").tobytes(), np.array([rows[0].nbytes], "<u8").tobytes(), rows.tobytes()]
    return b"".join(parts)


def test_a_grown_state_begins_with_the_real_one_and_goes_on_at_its_scale() -> None:
    generator = np.random.default_rng(0)
    latents = [generator.standard_normal((32, 12)).astype(np.float16) for _ in range(3)]
    keys = [generator.standard_normal((32, 64)).astype(np.float16)]
    state = np.frombuffer(b"magicseq" + saved_cache(32, latents) + saved_cache(32, keys), dtype=np.uint8)
    np.testing.assert_array_equal(grow_state(state, 32), state)
    grown = grow_state(state, 500).tobytes()
    expected = b"magicseq" + saved_cache(500, [np.zeros((500, 12), np.float16)] * 3)
    expected += saved_cache(500, [np.zeros((500, 64), np.float16)])
    assert len(grown) == len(expected)
    last = np.frombuffer(grown[-500 * 64 * 2 :], dtype=np.float16).reshape(500, 64)
    np.testing.assert_array_equal(last[:32], keys[0])
    assert last[32:].astype(np.float32).std() == pytest.approx(1, rel=0.1)
    assert len(np.unique(last, axis=0)) == 500
    assert grown[8 : 16 + 500 * CELL.itemsize] == expected[8 : 16 + 500 * CELL.itemsize]


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
def test_a_worker_answers_fails_with_words_and_is_stopped_between_calls(tmp_path: Path) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_ENGINE.format(benchmarks=str(Path(peers.__file__).parent)))
    with pytest.raises(WorkerError, match="ValueError: not this model"):
        Worker("fake", script, {"fails": True}, tmp_path / "log")
    told: list[tuple[int, int]] = []
    with Worker("fake", script, {"fails": False}, tmp_path / "log") as worker:
        assert worker.versions == {"fake": "1"}
        worker.call("depth", num_tokens=10, progress=lambda done, total: told.append((done, total)))
        assert worker.call("decode", num_tokens=3, most_seconds=5.0)["num_tokens"] == 3
        worker.call("logits", num_tokens=7, num_rows=3, path=str(tmp_path / "rows.npy"))
        status = Path(f"/proc/{worker._process.pid}/stat").read_text()
    assert told == [(10, 10)]
    assert np.load(tmp_path / "rows.npy", allow_pickle=False)[:, 0].tolist() == [5, 6, 7]
    assert status.rpartition(")")[2].split()[0] == "T"
    assert "a library that prints" in (tmp_path / "log").read_text()


def test_the_checkpoint_is_loaded_and_has_unit_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoints.make("tiny", tmp_path)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.make("tiny", tmp_path) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    model, _ = load_checkpoint(directory)
    monkeypatch.setitem(checkpoints.RECIPES, "tiny", lambda: checkpoints.small(index_topk=128))
    with pytest.raises(SystemExit, match="another recipe"):
        checkpoints.make("tiny", tmp_path)
    spread = {name: float(value.float().std()) for name, value in model.state_dict().items()}
    assert spread["model.layers.2.self_attn.q_b_proj.weight"] == pytest.approx(2 * 128**-0.5, rel=0.05)
    assert spread["model.layers.2.self_attn.o_proj.weight"] == pytest.approx(128**-0.5 / 4, rel=0.05)
    assert spread["model.norm.weight"] == pytest.approx(0.1, rel=0.2)


def fill(run: Run) -> None:
    for engine, speed in (("ours", 30.0), (LLAMA_FLASH, 20.0), (LLAMA_PLAIN, 10.0)):
        for depth in (0, 4096):
            one = Measurement(engine=engine, format="bf16", depth=depth, prefill_tokens=512)
            one.prefill += [speed, speed * 100, speed]
            one.prefill_others += [0.0, 0.5, 0.0]
            run.measurements.append(one)


def test_ratios_take_medians_and_the_better_setting(tmp_path: Path) -> None:
    run = Run(model="tiny", machine={"processor": "a processor", "threads": "2"})
    fill(run)
    assert run.ratio("bf16", 4096, "prefill") == pytest.approx(1.5)
    assert run.ratio("bf16", 4096, "decode") is None
    assert not run.measurements[0].was_disturbed("prefill")
    write_json(run, tmp_path / "run.json")
    assert '"prefill_median": 30.0' in (tmp_path / "run.json").read_text()


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench`")
    run = Run(model="tiny", machine={"processor": "a processor", "threads": "2"})
    fill(run)
    plot(run, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_when_engines_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Agreement(
        model="tiny16", engine="ours", format="fp32", num_tokens=9, sparse=True, kl=4.0, same_first=0.0, limit=1e-3
    )

    def disagree(*_: object) -> Iterator[Agreement]:
        yield found

    monkeypatch.setattr(peers.agreement, "check_exact", disagree)
    monkeypatch.setattr(peers.agreement, "check_near", lambda *_: iter(()))
    monkeypatch.setattr(peers, "_measure_all", lambda *_: pytest.fail("measured all the same"))
    with pytest.raises(SystemExit, match="do not agree"):
        peers.main(["--model", "tiny", "--engines", "ours", "--work", str(tmp_path)])


@pytest.mark.parametrize(("seconds", "num_tokens"), [(0.1, 512), (1.0, 128), (5.0, 64), (20.0, 64), (31.0, 0)])
def test_slow_engines_are_timed_with_fewer_tokens(seconds: float, num_tokens: int) -> None:
    assert peers._prefill_tokens(4096, seconds) == num_tokens
    assert peers._prefill_tokens(0, seconds) == 512


@pytest.mark.parametrize("arguments", ["--depths=-1", "--repeats=0", "--formats=fp7", "--engines=ours,other"])
def test_bad_arguments_are_named(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main([arguments])
    assert "error: argument --" in capsys.readouterr().err


def test_transformers_does_not_take_our_kernels_for_the_package_of_that_name(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="an oracle, which is not part of the development environment")
    beside = f"import sys; sys.path.insert(0, {str(Path(peers.__file__).parent)!r})"
    code = f"{beside}; import engine_transformers; from transformers import GlmMoeDsaForCausalLM"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
