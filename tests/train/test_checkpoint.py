"""Checkpoints: written in one step or not at all, and never used when they are not what was written."""

import errno
import json
import resource
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_training import RECIPE, batches, checkpoint_bytes, new_model, read_log, run, step_loss, without_time
from torch import Tensor, nn

from indexshare.errors import CheckpointError, TrainingError
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.recipes import tiny
from indexshare.train import checkpoint, losses
from indexshare.train.loop import Phase


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    torch.set_deterministic_debug_mode("warn")
    run(directory)
    return directory


def saved_steps(directory: Path) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(directory)]


@pytest.mark.parametrize("failing", ["save_file", "_flush", "_random_state"])
def test_crash_between_writes_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    model = new_model()
    checkpoint.save_checkpoint(tmp_path, 1, model, (), {"tokens": 5})
    original, num_calls = getattr(checkpoint, failing), 0

    def crash(*arguments: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == (1 if failing == "_random_state" else 2):
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_checkpoint(tmp_path, 2, model, (), {})
    assert saved_steps(tmp_path) == ["step-00000001"]
    assert checkpoint.load_checkpoint(tmp_path / "step-00000001", model, ())["tokens"] == 5
    checkpoint.remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.save_checkpoint(tmp_path, 2, model, (), {})
    checkpoint.save_checkpoint(tmp_path, 3, model, (), {})
    assert saved_steps(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_foreign_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    path = checkpoint.save_checkpoint(tmp_path, 1, new_model(), (), {})
    other = GlmForCausalLM(tiny(vocab_size=32))
    other.init_weights(0)
    before = other.lm_head.weight.clone()
    with pytest.raises(CheckpointError, match=r"another model: 2 tensors differ, the first is lm_head\.weight"):
        checkpoint.load_checkpoint(path, other, ())
    assert torch.equal(other.lm_head.weight, before)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, Callable[[Path], None]] = {"flipped": flip_a_bit, "truncated": cut_short, "missing": Path.unlink}
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_before_anything_is_changed(tmp_path: Path, name: str, damage: str) -> None:
    model = new_model()
    path = checkpoint.save_checkpoint(tmp_path, 1, model, (), {})
    with torch.no_grad():
        model.lm_head.weight.zero_()
    DAMAGE[damage](path / name)
    with pytest.raises(checkpoint.DamagedCheckpointError, match=name.replace(".", r"\.")):
        checkpoint.load_checkpoint(path, model, ())
    assert not model.lm_head.weight.any()


def test_a_number_changed_in_the_state_is_found(tmp_path: Path) -> None:
    path = checkpoint.save_checkpoint(tmp_path, 1, new_model(), (), {"tokens": 5}) / "state.json"
    path.write_text(path.read_text().replace('"tokens": 5', '"tokens": 6'))
    with pytest.raises(checkpoint.DamagedCheckpointError, match="checksum differs"):
        checkpoint.read_state(path.parent)


def test_another_format_is_not_damage(tmp_path: Path) -> None:
    path = checkpoint.save_checkpoint(tmp_path, 1, new_model(), (), {}) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))
    with pytest.raises(CheckpointError, match="has format 1, this version reads 2") as caught:
        checkpoint.read_state(path.parent)
    assert not isinstance(caught.value, checkpoint.DamagedCheckpointError)


@pytest.mark.parametrize(("name", "damage"), [("model.safetensors", "truncated"), ("state.json", "flipped")])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(
    whole_run: Path, tmp_path: Path, name: str, damage: str
) -> None:
    run(tmp_path, max_steps=7)
    newest = tmp_path / "checkpoints" / "step-00000007"
    DAMAGE[damage](newest / name)

    with pytest.warns(UserWarning, match=r"step-00000007.*damaged-step-00000007 now; the one before is used"):
        result = run(tmp_path)

    assert (newest.parent / "damaged-step-00000007").is_dir()
    assert without_time(read_log(tmp_path)) == without_time(read_log(whole_run))
    assert checkpoint_bytes(result.checkpoint) == checkpoint_bytes(whole_run / "checkpoints" / result.checkpoint.name)


@pytest.mark.filterwarnings("ignore:.*the one before is used")
def test_without_an_intact_checkpoint_there_is_one_clear_error(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4)
    for path in checkpoint.list_checkpoints(tmp_path / "checkpoints"):
        cut_short(path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact"):
        run(tmp_path)


@contextmanager
def full_disk(room: int) -> Generator[None]:
    """No file of this process may grow beyond `room` bytes; Python ignores the signal, writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [100, 20_000])
def test_a_full_disk_loses_nothing(tmp_path: Path, room: int) -> None:
    model = new_model()
    checkpoint.save_checkpoint(tmp_path, 1, model, (), {})
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with full_disk(room), pytest.raises(TrainingError, match=rf"needs {size:,} bytes.*make room and run again"):
        checkpoint.save_checkpoint(tmp_path, 2, model, (), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.load_checkpoint(tmp_path / "step-00000001", model, ())


def test_a_run_whose_disk_fills_up_goes_on_when_there_is_room(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(tensors: object, path: Path) -> None:
        if "step-00000006" in str(path):
            path.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    original = checkpoint.save_file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", no_space)
        with pytest.raises(TrainingError, match=r"step 6 could not be written.*No space left on device"):
            run(tmp_path)
    assert saved_steps(tmp_path / "checkpoints") == ["step-00000000", "step-00000003"]
    run(tmp_path)
    assert without_time(read_log(tmp_path)) == without_time(read_log(whole_run))


def test_a_full_disk_shows_before_the_first_step(tmp_path: Path) -> None:
    def never(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
        raise AssertionError("a step was taken")

    with full_disk(20_000), pytest.raises(TrainingError, match="the checkpoint of step 0 could not be written"):
        run(tmp_path, loss=never)


def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    def fill_up(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
        if torch.equal(batch, batches(4)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        return step_loss(model, batch, phase)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(TrainingError, match=r"log\.jsonl could not be written"):
            run(tmp_path, loss=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run(tmp_path).step == RECIPE.num_steps
