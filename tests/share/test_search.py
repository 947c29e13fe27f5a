"""The search: it finds what was planted, does what the paper's algorithm does, and survives being killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import own_answers, planted_model

from indexshare.errors import ConfigError
from indexshare.model.glm import GlmForCausalLM
from indexshare.share.calibration import CalibrationRow, PatternRunner
from indexshare.share.search import STATE_FILE, PatternSearch, num_kept, uniform_pattern

PLANTED = "FSFFSSFS"
LENGTH = 40


def graded(seed: int, num_rows: int = 4) -> tuple[GlmForCausalLM, tuple[CalibrationRow, ...]]:
    """A model in which no layer shares for nothing, so that the order of removals is worth something."""
    model = planted_model("FSSFSSFS", seed, spread=1.0)
    return model, own_answers(model, num_rows, LENGTH, seed)


@pytest.mark.parametrize("method", ["greedy", "lazy"])
@pytest.mark.parametrize("pattern", [PLANTED, "FSSSFSFS", "FFSSSSSF"])
def test_the_planted_pattern_is_found(method: str, pattern: str) -> None:
    model = planted_model(pattern, seed=1)
    rows = own_answers(model, 4, LENGTH, seed=2)
    kept = f"{pattern.count('F')}/{len(pattern)}"
    result = PatternSearch(model, rows, keep=kept, method=method).search()
    assert result.pattern == pattern
    assert result.loss == pytest.approx(result.start_loss, abs=1e-6), "by construction these layers share for nothing"
    further = PatternSearch(model, rows, keep=f"{pattern.count('F') - 1}/{len(pattern)}", method=method).search()
    assert further.loss > result.loss + 1e-3, "the others choose something that matters"


def test_greedy_is_the_algorithm_of_the_paper() -> None:
    """Written out once more: each step measures every candidate with a whole forward pass and keeps the best."""
    model, rows = graded(seed=3)
    pattern, losses = "F" * 8, []
    for _ in range(6):
        measured = []
        for layer in range(1, 8):
            if pattern[layer] == "F":
                candidate = pattern[:layer] + "S" + pattern[layer + 1 :]
                runner = PatternRunner(model=model, rows=rows)
                measured.append((runner.loss(runner.run(candidate)), candidate))
        loss, pattern = min(measured)
        losses.append((pattern, loss))
    result = PatternSearch(model, rows, keep="1/4", method="greedy").search()
    assert [(removal.pattern, removal.loss) for removal in result.removals] == losses
    assert result.layer_tokens < 0.7 * result.plain_layer_tokens
    assert result.plain_layer_tokens == (1 + 7 + 6 + 5 + 4 + 3 + 2) * 8 * 4 * LENGTH


def test_lazy_takes_a_quarter_of_the_work_and_loses_little() -> None:
    shares = []
    for seed in range(2):
        model, rows = graded(seed)
        greedy = PatternSearch(model, rows, keep="1/4", method="greedy").search()
        lazy = PatternSearch(model, rows, keep="1/4").search()
        shares.append((lazy.loss - lazy.start_loss) / (greedy.loss - greedy.start_loss))
        assert lazy.layer_tokens < 0.35 * lazy.plain_layer_tokens  # of 8 layers; of more it is less
        assert lazy.pattern.count("F") == 2
        assert lazy.loss <= lazy.removals[-1].loss
    assert sum(shares) / len(shares) < 1.1


def test_every_block_keeps_its_first_indexer_and_blocks_take_turns() -> None:
    model, rows = graded(seed=4)
    result = PatternSearch(model, rows, keep="1/2", num_blocks=2).search()
    assert result.pattern[0] == result.pattern[4] == "F"
    assert [removal.layer // 4 for removal in result.removals] == [0, 1, 0, 1]
    assert result.plain_layer_tokens == (1 + 3 + 3 + 2 + 2) * 8 * 4 * LENGTH
    least = PatternSearch(model, rows, keep="1/4", num_blocks=2).search()
    assert least.pattern == "FSSSFSSS"
    with pytest.raises(ConfigError, match="one for each of the 3 blocks"):
        PatternSearch(model, rows, keep="1/4", num_blocks=3)


def test_a_model_with_few_indexers_is_searched_over_those() -> None:
    model, rows = graded(seed=5)
    for layer in (2, 5, 7):
        model.stack.layers[layer].self_attn.indexer = None
    result = PatternSearch(model, rows, keep="1/4").search()
    assert result.start_pattern == "FFSFFSFS"
    assert all(result.pattern[layer] == "S" for layer in (2, 5, 7))
    assert result.uniform_pattern == "FSSSFSSS"
    with pytest.raises(ConfigError, match="are 6 indexers, and the model has 5"):
        PatternSearch(model, rows, keep="3/4")


@pytest.mark.parametrize("method", ["greedy", "lazy"])
def test_a_search_stopped_after_any_measurement_ends_the_same(tmp_path: Path, method: str) -> None:
    model, rows = graded(seed=6)
    whole = PatternSearch(model, rows, keep="1/4", method=method).search()

    class StoppedError(Exception):
        pass

    num_left = 3

    def stop_sometimes(done: int, total: int) -> None:
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            raise StoppedError

    for _attempt in range(100):
        num_left = 3
        search = PatternSearch(model, rows, keep="1/4", method=method, directory=tmp_path, progress=stop_sometimes)
        try:
            result = search.search()
            break
        except StoppedError:
            continue
    assert result == whole
    assert json.loads((tmp_path / "result.json").read_text())["pattern"] == whole.pattern


def test_a_killed_process_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    """SIGTERM in the middle; the parent goes on from the file."""
    program = (
        "import signal, sys; from pathlib import Path; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "from test_search import graded; from indexshare.share.search import PatternSearch\n"
        "from indexshare.model import native; native.enable()  # as in this process\n"
        "model, rows = graded(seed=7, num_rows=2)\n"
        "count = iter(range(99))\n"
        "stop = lambda done, total: next(count) == 9 and signal.raise_signal(signal.SIGTERM)\n"
        "PatternSearch(model, rows, keep='1/4', directory=Path(sys.argv[3]), progress=stop).search()\n"
    )
    here = Path(__file__).parent
    paths = (str(here), str(here.parents[1] / "benchmarks"), str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "result.json").exists()
    model, rows = graded(seed=7, num_rows=2)
    state = json.loads((tmp_path / STATE_FILE).read_text())["state"]
    assert state["removals"] and state["measured"]
    continued = PatternSearch(model, rows, keep="1/4", directory=tmp_path).search()
    assert continued == PatternSearch(model, rows, keep="1/4").search()


def test_the_state_of_another_search_is_refused(tmp_path: Path) -> None:
    model, rows = graded(seed=8)
    PatternSearch(model, rows, keep="1/2", directory=tmp_path).search()
    other_rows = own_answers(model, 4, LENGTH, seed=99)
    for data, keep in ((other_rows, "1/2"), (rows, "1/4")):
        with pytest.raises(ConfigError, match="another model, other data or other options"):
            PatternSearch(model, data, keep=keep, directory=tmp_path).search()
    with torch.no_grad():  # the same shape, other weights: only the loss can tell
        model.lm_head.weight.mul_(0.5)
    with pytest.raises(ConfigError, match="another model"):
        PatternSearch(model, rows, keep="1/2", directory=tmp_path).search()
    (tmp_path / STATE_FILE).write_text('{"state": {"pattern": 3}}')
    with pytest.raises(ConfigError, match="is not the state of a search"):
        PatternSearch(model, rows, keep="1/2", directory=tmp_path).search()


def test_a_finished_search_is_not_measured_again(tmp_path: Path) -> None:
    model, rows = graded(seed=9)
    first = PatternSearch(model, rows, keep="1/2", directory=tmp_path).search()
    again = PatternSearch(model, rows, keep="1/2", directory=tmp_path).search()
    assert again == first


@pytest.mark.parametrize(("keep", "kept"), [("1/4", 20), ("0.5", 39), ("1/8", 10), ("21/78", 21)])
def test_a_share_of_the_layers_is_rounded_up(keep: str, kept: int) -> None:
    assert num_kept(keep, 78) == kept
    assert uniform_pattern(kept, 78).count("F") == kept


@pytest.mark.parametrize("keep", ["0", "-1/4", "5/4", "1/0", "quarter", ""])
def test_a_share_that_is_none_is_refused(keep: str) -> None:
    with pytest.raises(ConfigError, match="for example 1/4"):
        num_kept(keep, 8)


@pytest.mark.parametrize("num_blocks", [0, 9])
def test_blocks_are_as_many_as_layers_at_most(num_blocks: int) -> None:
    model, rows = graded(seed=1)
    with pytest.raises(ConfigError, match="blocks must be from 1 to 8"):
        PatternSearch(model, rows, keep="1/4", num_blocks=num_blocks)
