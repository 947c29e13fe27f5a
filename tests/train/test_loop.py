"""The training loop: exact resume after a kill, stops with a message, Muon, the schedule, atomic checkpoints."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from indexshare.errors import CheckpointError, ConfigError, TrainingError
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.recipes import tiny
from indexshare.train import checkpoint, losses, monitor
from indexshare.train.loop import Phase, TrainRecipe, TrainResult, is_spike, train
from indexshare.train.optim import (
    StackedMuon,
    build_optimizers,
    learning_rate_ratio,
    named_state,
    named_tensors,
    row_blocks,
    update_router_biases,
)

LENGTH = 24
CONFIG = tiny(vocab_size=64)
DENSE = Phase(name="dense", num_steps=4, attention="dense", trains="model", sequence_length=LENGTH, batch_size=2)
INDEXER = Phase(
    name="indexer",
    num_steps=3,
    attention="dense",
    trains="indexer",
    index_loss_weight=1.0,
    sequence_length=LENGTH,
    batch_size=2,
)
SPARSE = Phase(
    name="sparse",
    num_steps=5,
    attention="sparse",
    index_loss_weight=1.0,
    mtp_loss_weight=0.3,
    sequence_length=LENGTH,
    batch_size=2,
)
RECIPE = TrainRecipe(
    name="test",
    model=CONFIG,
    phases=(DENSE, INDEXER, SPARSE),
    seed=7,
    learning_rate_muon=0.02,
    learning_rate_adamw=0.01,
    warmup_steps=2,
    checkpoint_every=3,
    log_every=1,
)


def new_model() -> GlmForCausalLM:
    model = GlmForCausalLM(CONFIG)
    model.init_weights(RECIPE.seed)
    return model


def batches(step: int) -> Tensor:
    """[2, LENGTH] int64: counting sequences, so that there is something to learn; a function of the step."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 16, (2, 1), generator=generator)
    return (starts + torch.arange(LENGTH)) % 16


def step_loss(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
    assert isinstance(model, GlmForCausalLM)
    targets = batch.roll(-1, dims=1)
    targets[:, -1] = losses.IGNORED
    return losses.step_loss(
        model,
        batch.flatten(),
        targets.flatten(),
        torch.arange(LENGTH).repeat(len(batch)),
        torch.ones(batch.numel()),
        tuple(range(0, batch.numel() + 1, LENGTH)),
        attention=phase.attention,
        trains=phase.trains,
        mtp_weight=phase.mtp_loss_weight,
        index_weight=phase.index_loss_weight,
    )


def run(
    directory: Path,
    recipe: TrainRecipe = RECIPE,
    loss: Callable[[nn.Module, Tensor, Phase], losses.Losses] = step_loss,
    model: nn.Module | None = None,
    resume: bool = True,
    accept_recipe_change: bool = False,
    max_steps: int | None = None,
    max_minutes: float | None = None,
) -> TrainResult:
    return train(
        recipe,
        directory,
        model=model or new_model(),
        batches=batches,
        step_loss=loss,
        resume=resume,
        accept_recipe_change=accept_recipe_change,
        max_steps=max_steps,
        max_minutes=max_minutes,
        progress=False,
    )


def read_log(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def without_time(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def checkpoint_bytes(path: Path) -> tuple[bytes, bytes]:
    return (path / "model.safetensors").read_bytes(), (path / "optimizer.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert run(directory).stopped == "finished"
    return directory


def test_log_has_every_step_and_phase(whole_run: Path) -> None:
    records = read_log(whole_run)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["phase"] for record in records] == ["dense"] * 4 + ["indexer"] * 3 + ["sparse"] * 5
    assert records[-1]["tokens"] == 12 * 2 * (LENGTH - 1)
    assert all(math.isfinite(record["gradient_norm"]) and record["gradient_norm"] > 0 for record in records)


def test_killed_run_resumes_bit_identically(whole_run: Path, tmp_path: Path) -> None:
    """SIGKILL between checkpoints, in another process; the next call must repeat the uninterrupted losses exactly."""
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.use_deterministic_algorithms(True, warn_only=True)\n"
        "import test_loop as t\n"
        "def slow(model, batch, phase):\n"
        "    time.sleep(0.2)\n"
        "    return t.step_loss(model, batch, phase)\n"
        "t.run(Path(sys.argv[2]), loss=slow)\n"
    )
    arguments = [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parent), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(arguments, env=environment)
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 8):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert checkpoint.list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000006"

    result = run(tmp_path)

    assert result.stopped == "finished"
    assert without_time(read_log(tmp_path)) == without_time(read_log(whole_run))
    assert checkpoint_bytes(result.checkpoint) == checkpoint_bytes(whole_run / "checkpoints" / result.checkpoint.name)


@pytest.mark.parametrize("cut", [1, 4, 5, 7, 11])
def test_max_steps_then_resume_is_the_same_run(whole_run: Path, tmp_path: Path, cut: int) -> None:
    assert run(tmp_path, max_steps=cut).stopped == "max_steps"
    torch.manual_seed(123)  # resume must restore the generator, not inherit this
    run(tmp_path)
    assert without_time(read_log(tmp_path)) == without_time(read_log(whole_run))


def test_loss_goes_down(tmp_path: Path) -> None:
    phase = dataclasses.replace(SPARSE, num_steps=40)
    result = run(tmp_path, dataclasses.replace(RECIPE, phases=(phase,), checkpoint_every=100))
    records = read_log(tmp_path)
    assert records[0]["lm"] > 3.5
    assert result.lm_loss < 1.0
    assert records[-1]["mtp"] < 0.5 * records[0]["mtp"]


def test_bf16_autocast_keeps_fp32_weights(tmp_path: Path) -> None:
    model = new_model()
    run(tmp_path, dataclasses.replace(RECIPE, phases=(DENSE,), precision="bf16"), model=model)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert read_log(tmp_path)[-1]["lm"] < read_log(tmp_path)[0]["lm"]


def test_phase_freezes_what_it_does_not_train(tmp_path: Path) -> None:
    model = new_model()
    run(tmp_path, max_steps=DENSE.num_steps, model=model)
    before = {name: tensor.clone() for name, tensor in named_tensors(model)}
    run(tmp_path, max_steps=DENSE.num_steps + INDEXER.num_steps, model=model)
    changed = {name for name, tensor in named_tensors(model) if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".indexer." in name}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(name.endswith("e_score_correction_bias") for name in frozen)


def broken_at(step: int, scale: float) -> Callable[[nn.Module, Tensor, Phase], losses.Losses]:
    """step_loss whose total is multiplied by `scale` from the given call on."""
    num_calls = 0

    def loss(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
        nonlocal num_calls
        num_calls += 1
        result = step_loss(model, batch, phase)
        return dataclasses.replace(result, total=result.total * scale) if num_calls >= step else result

    return loss


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_nan_stops_and_names_step_and_checkpoint(tmp_path: Path, scale: float) -> None:
    model = new_model()
    with pytest.raises(
        TrainingError, match=r"step 5: .*(nan|inf).*step-00000003.*--accept-recipe-change: that resumes"
    ):
        run(tmp_path, loss=broken_at(5, scale), model=model)
    assert all(tensor.isfinite().all() for _, tensor in named_tensors(model))
    assert run(tmp_path).stopped == "finished"


def test_loss_spike_stops(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, phases=(dataclasses.replace(DENSE, num_steps=40),), learning_rate_muon=1e-4)
    with pytest.raises(TrainingError, match=r"step 22: the loss jumped to .*step-00000018"):
        run(tmp_path, recipe, loss=broken_at(21, 1000.0))


def test_one_odd_batch_is_no_spike() -> None:
    usual = [2.0] * 20
    assert not is_spike([*usual, 2.1, 2.0, 9.0])
    assert not is_spike([*usual, 9.0, 2.0, 2.0])
    assert is_spike([*usual, 9.0, 2.0, 9.0])
    assert not is_spike([*([0.01] * 20), 0.5, 0.5, 0.5])  # large as a factor, nothing in nats
    assert not is_spike([2.0, 9.0, 9.0, 9.0])


def test_signal_leaves_a_checkpoint(tmp_path: Path) -> None:
    def interrupted(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
        if phase.name == "indexer":
            os.kill(os.getpid(), signal.SIGTERM)
        return step_loss(model, batch, phase)

    handler = signal.getsignal(signal.SIGTERM)
    result = run(tmp_path, loss=interrupted)
    assert (result.stopped, result.step, result.checkpoint.name) == ("signal", 5, "step-00000005")
    assert signal.getsignal(signal.SIGTERM) is handler


def test_wall_clock_limit_leaves_a_checkpoint(tmp_path: Path) -> None:
    result = run(tmp_path, max_minutes=0.0)
    assert (result.stopped, result.step) == ("max_minutes", 0)
    assert run(tmp_path).stopped == "finished"


def test_a_finished_run_has_the_loss_of_its_last_step(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, phases=(DENSE,), log_every=3)
    first = run(tmp_path, recipe)
    again = run(tmp_path, recipe)
    assert math.isfinite(first.lm_loss)
    assert (again.stopped, again.step, again.lm_loss) == ("finished", 4, first.lm_loss)
    assert math.isnan(run(tmp_path / "other", recipe, max_steps=0).lm_loss)


def test_other_recipe_is_refused_unless_accepted(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    other = dataclasses.replace(RECIPE, learning_rate_muon=0.001, log_every=5)
    with pytest.raises(ConfigError, match=r"changed: learning_rate_muon\..*--accept-recipe-change"):
        run(tmp_path, other)
    assert run(tmp_path, other, accept_recipe_change=True).stopped == "finished"
    with pytest.raises(TrainingError, match="holds a run already"):
        run(tmp_path, resume=False)


# --- checkpoints


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


def test_damaged_or_foreign_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    model = new_model()
    path = checkpoint.save_checkpoint(tmp_path, 1, model, (), {})
    other = GlmForCausalLM(tiny(vocab_size=32))
    other.init_weights(0)
    before = other.lm_head.weight.clone()
    with pytest.raises(CheckpointError, match=r"another model: 2 tensors differ, the first is lm_head\.weight"):
        checkpoint.load_checkpoint(path, other, ())
    assert torch.equal(other.lm_head.weight, before)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_checkpoint(path, model, ())
    (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        checkpoint.read_state(path)


def test_log_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    monitor.keep_log_until(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_without_a_terminal_progress_is_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"step": 4, "phase": "dense", "lm": 2.5, "tokens_per_second": 1500.0}
    with monitor.Monitor(tmp_path / "log.jsonl", 10, 0, progress=True) as reporter:
        reporter.report(record, log=True)
        monkeypatch.setattr(monitor, "SECONDS_BETWEEN_LINES", 0.0)
        reporter.report(record, log=False)
    assert capsys.readouterr().err == "dense step 4/10  loss 2.500  1,500 tokens/s  0 min left\n"
    assert read_log(tmp_path) == [record]


def test_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for first_step in (10, 9):
        with monitor.Monitor(tmp_path / "log.jsonl", 10, first_step, progress=True):
            pass
    with monitor.Monitor(tmp_path / "log.jsonl", 10, 10, progress=False):
        pass
    assert capsys.readouterr().err == "this run finished at step 10; name another output directory to train again\n"


# --- optimizers


def test_schedule_values() -> None:
    ratios = [learning_rate_ratio(step, num_steps=101, warmup_steps=10, min_ratio=0.1) for step in range(103)]
    assert ratios[0] == pytest.approx(0.1)
    assert ratios[9] == ratios[10] == 1.0
    assert ratios[55] == pytest.approx(0.55)
    assert ratios[100] == ratios[102] == pytest.approx(0.1)
    assert ratios[10:101] == sorted(ratios[10:101], reverse=True)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((3, 12, 20), (12,)), ((3, 12, 20), (6,)), ((3, 24, 8), (24,)), ((40, 12), (7, 3)), ((8, 16), (8,))],
)
def test_stacked_muon_equals_torch_muon_on_every_matrix(shape: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    stack = nn.Parameter(torch.randn(shape))
    rows = stack.detach().clone().view(-1, sum(blocks), shape[-1])
    matrices = [nn.Parameter(part.clone()) for block in rows for part in block.split(blocks)]
    mine = StackedMuon([{"params": [stack], "row_blocks": blocks}], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn(shape)
        parts = [part for block in stack.grad.view(rows.shape) for part in block.split(blocks)]
        for matrix, part in zip(matrices, parts, strict=True):
            matrix.grad = part.clone()
        mine.step()
        theirs.step()
    expected = torch.cat([matrix.detach() for matrix in matrices]).view(shape)
    # one unit of bfloat16 in an update of size lr: the batched product may round differently
    torch.testing.assert_close(stack.detach(), expected, rtol=0, atol=1e-3)
    assert not torch.allclose(stack.detach(), rows.view(shape), atol=1e-2)


def test_every_trainable_parameter_has_one_optimizer() -> None:
    model = new_model()
    optimizers = build_optimizers(
        model, CONFIG, learning_rate_muon=0.1, learning_rate_adamw=0.1, weight_decay=0.1, muon_split=True
    )
    owner = {
        name: type(optimizer).__name__
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(owner) == sorted(names) == sorted(name for name, _, _ in named_state(optimizers))
    assert owner["model.embed_tokens.weight"] == owner["lm_head.weight"] == owner["model.norm.weight"] == "AdamW"
    assert owner["model.layers.1.mlp.gate.weight"] == owner["model.layers.0.self_attn.indexer.k_norm.bias"] == "AdamW"
    assert owner["model.layers.0.mlp.gate_proj.weight"] == owner["model.layers.6.eh_proj.weight"] == "Muon"
    assert owner["model.layers.1.mlp.experts.gate_up_proj"] == "StackedMuon"
    assert owner["model.layers.0.self_attn.kv_b_proj.weight"] == "StackedMuon"


def test_muon_split_is_per_head() -> None:
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert row_blocks(name, CONFIG, muon_split=False) is None
    assert row_blocks(name, CONFIG, muon_split=True) == (CONFIG.qk_nope_head_dim, CONFIG.v_head_dim)


def test_router_bias_moves_against_the_load() -> None:
    model = new_model()
    update_router_biases(model, {2: torch.tensor([9, 1, 5, 5]), 6: torch.tensor([0, 0, 0, 4])}, 0.001)
    bias = "model.layers.{}.mlp.gate.e_score_correction_bias"
    tensors = dict(named_tensors(model))
    torch.testing.assert_close(tensors[bias.format(2)], torch.tensor([-0.001, 0.001, 0.0, 0.0]))
    torch.testing.assert_close(tensors[bias.format(6)], torch.tensor([0.001, 0.001, 0.001, -0.001]))
    assert not tensors[bias.format(1)].any()
