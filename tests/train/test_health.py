"""Runs that break: spikes and NaN are rolled back and left out, and their origin is named."""

import dataclasses
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_training import (
    DENSE,
    INDEXER,
    LENGTH,
    RECIPE,
    SPARSE,
    batches,
    checkpoint_bytes,
    new_model,
    read_log,
    run,
    step_loss,
    without_time,
)
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from indexshare.errors import TrainingError
from indexshare.kernels import registry
from indexshare.train import checkpoint, health, loop, losses
from indexshare.train.health import find_spike, is_spike
from indexshare.train.loop import Phase
from indexshare.train.optim import named_tensors
from indexshare.train.provenance import explain_non_finite

Loss = Callable[[nn.Module, Tensor, Phase], losses.Losses]
LONG = dataclasses.replace(RECIPE, phases=(dataclasses.replace(DENSE, num_steps=30),), learning_rate_muon=1e-4)


def scaled_on(steps: set[int], scale: float, times: int = 1_000_000) -> Loss:
    """step_loss that is multiplied on the batches of these steps (from 0); on the first `times` of them only."""
    marked = [batches(step) for step in steps]
    num_scaled = 0

    def loss(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
        nonlocal num_scaled
        result = step_loss(model, batch, phase)
        if num_scaled >= times or not any(torch.equal(batch, other) for other in marked):
            return result
        num_scaled += 1
        return dataclasses.replace(result, total=result.total * scale, lm=result.lm * scale)

    return loss


# --- spikes

# Of the first 80 steps of nano's second stage: one row each of code, generated documents or tool calls.
REAL_LOSSES = [float(loss) for loss in """
    0.55 2.06 2.34 2.38 2.58 1.68 2.58 2.16 2.07 2.18 1.16 2.17 1.64 1.54 2.26 2.16 2.06 2.44 1.97 1.56 1.93 2.41 2.05
    2.12 1.53 1.22 2.47 2.48 2.01 1.56 1.17 1.37 1.84 1.71 2.45 1.04 2.42 2.38 2.31 2.26 1.19 1.86 1.99 1.47 1.45 1.62
    1.66 1.49 2.05 2.02 0.57 2.36 2.40 2.21 2.20 0.60 2.18 2.36 1.79 2.84 1.76 2.34 2.36 2.25 1.81 0.71 2.06 1.82 2.15
    2.24 1.76 2.68 2.40 2.45 2.77 2.08 1.72 2.25 1.58 2.00
""".split()]  # fmt: skip
NARROW = [2.5 + 0.15 * math.sin(7.3 * step) for step in range(80)]
# Two rows of five are code, the others documents that repeat themselves: the median and its spread see the latter only.
MIXED = [2.8 + 0.2 * math.sin(step) if step % 5 in (2, 4) else 0.14 for step in range(80)]


def alarms(sequence: list[float]) -> list[int]:
    """The steps at which a run would go back."""
    windows = (sequence[max(0, step + 1 - health.SPIKE_WINDOW) : step + 1] for step in range(len(sequence)))
    return [step for step, window in enumerate(windows) if is_spike(window)]


@pytest.mark.parametrize("usual", [REAL_LOSSES, NARROW, MIXED], ids=["real", "narrow", "mixed"])
def test_usual_noise_is_no_spike(usual: list[float]) -> None:
    assert alarms(usual) == []


@pytest.mark.parametrize(
    ("usual", "jump", "at_most"),
    [
        (NARROW, 1.0, 2),
        (NARROW, 3.0, 2),
        (REAL_LOSSES, 1.5, 4),
        (REAL_LOSSES, 2.0, 2),
        (REAL_LOSSES, 3.0, 2),
        (MIXED, 3.5, 2),
    ],
)
def test_a_jump_is_a_spike(usual: list[float], jump: float, at_most: int) -> None:
    first, *_ = alarms(usual[:70] + [loss + jump for loss in usual[70:]])
    assert 71 <= first < 70 + at_most


def test_one_odd_batch_is_no_spike() -> None:
    usual = [2.0] * 20
    assert not is_spike([*usual, 2.1, 2.0, 9.0])
    assert not is_spike([*usual, 9.0, 2.0, 2.0])
    assert is_spike([*usual, 9.0, 2.0, 9.0])
    assert not is_spike([*([0.01] * 20), 0.7, 0.7, 0.7])  # large as a factor, little in nats
    assert not is_spike([2.0, 9.0, 9.0, 9.0])


@pytest.mark.parametrize(("losses", "first"), [([9.0, 9.0], 97), ([9.0, 2.0, 9.0], 96)])
def test_left_out_is_all_from_the_step_before_the_first_high_loss(losses: list[float], first: int) -> None:
    fault = find_spike([2.0] * 20 + losses, 99)
    assert fault is not None
    assert fault.steps == range(first, 100)


def test_a_spike_is_looked_for_in_the_loss_that_the_phase_trains(tmp_path: Path) -> None:
    """The language-model loss, which other losses hide; where the model is frozen the total."""

    def jumping(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
        result = step_loss(model, batch, phase)
        is_marked = any(torch.equal(batch, batches(step)) for step in (24, 25))
        return dataclasses.replace(result, total=result.total + 20.0, lm=result.lm + (6.0 if is_marked else 0.0))

    with pytest.warns(UserWarning, match=r"step 26: the loss jumped to 6\.\d+, its median was 0\."):
        run(tmp_path / "model", LONG, loss=jumping)
    frozen = dataclasses.replace(LONG, phases=(dataclasses.replace(INDEXER, num_steps=30),))
    with pytest.warns(UserWarning, match="step 26: the loss jumped to "):
        run(tmp_path / "indexer", frozen, loss=scaled_on({24, 25}, 1e6))


def test_a_spike_is_rolled_back_and_its_batches_left_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"step 26: the loss jumped to .*step-00000021; steps 24 to 26 are left out"):
        result = run(tmp_path / "spiked", LONG, loss=scaled_on({24, 25}, 1000.0))
    assert result.stopped == "finished"  # step-24 was there: what it had of step 24 had to go, too
    records = read_log(tmp_path / "spiked")
    assert [record["step"] for record in records] == list(range(1, 31))
    left_out = [record for record in records if "skipped" in record]
    assert [record["step"] for record in left_out] == [24, 25, 26]
    assert records[-1]["tokens"] == 27 * 2 * (LENGTH - 1)

    # what is left is the run that never saw these batches
    run(tmp_path / "told", LONG, max_steps=21)
    newest = checkpoint.list_checkpoints(tmp_path / "told" / "checkpoints")[-1]
    why = left_out[0]["skipped"]
    checkpoint.update_state(newest, {"skipped": {str(step): why for step in (23, 24, 25)}})
    told = run(tmp_path / "told", LONG)
    assert without_time(read_log(tmp_path / "told")) == without_time(records)
    assert checkpoint_bytes(told.checkpoint) == checkpoint_bytes(result.checkpoint)


@pytest.mark.filterwarnings("ignore:step 5")
def test_a_run_killed_after_its_rollback_is_the_run_that_was_not(tmp_path: Path) -> None:
    """The NaN comes once, as from a failing machine: only what was written down can tell the resumed run to skip."""
    run(tmp_path / "whole", loss=scaled_on({4}, math.nan, times=1))
    once = scaled_on({4}, math.nan, times=1)
    num_calls = 0

    def killed_on_the_way_back(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
        nonlocal num_calls
        num_calls += torch.equal(batch, batches(3))
        if num_calls == 2:
            raise KeyboardInterrupt
        return once(model, batch, phase)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", loss=killed_on_the_way_back)
    assert [record["step"] for record in read_log(tmp_path / "killed")] == [1, 2, 3]
    run(tmp_path / "killed")

    assert without_time(read_log(tmp_path / "killed")) == without_time(read_log(tmp_path / "whole"))
    skipped = [record["step"] for record in read_log(tmp_path / "whole") if "skipped" in record]
    assert skipped == [5]


@pytest.mark.filterwarnings("ignore:.*rollback")
def test_when_going_back_does_not_help_the_run_stops(tmp_path: Path) -> None:
    model = new_model()
    bad = set(range(3, 12))
    with pytest.raises(
        TrainingError,
        match=r"step 7: the loss is nan: .* 3 times .*step-00000003.*run again: that goes on from the checkpoint$",
    ):
        run(tmp_path, loss=scaled_on(bad, math.nan), model=model)
    assert all(tensor.isfinite().all() for _, tensor in named_tensors(model))
    # none of step 6: no update was taken after step 3, and the one before it would have gone
    assert saved_names(tmp_path) == {"step-00000000", "step-00000003"}
    with pytest.raises(TrainingError, match=r"step 7: "):  # once more is the same
        run(tmp_path, loss=scaled_on(bad, math.nan))
    assert run(tmp_path).stopped == "finished"


@pytest.mark.filterwarnings("ignore:.*rollback")
def test_progress_gives_new_chances(tmp_path: Path) -> None:
    bad = {0, 1, 3, 4, 6, 7, 9}  # more than MAX_ROLLBACKS in all
    assert len(bad) > health.MAX_ROLLBACKS
    result = run(tmp_path, loss=scaled_on(bad, math.nan))
    assert result.stopped == "finished"
    assert {record["step"] - 1 for record in read_log(tmp_path) if "skipped" in record} == bad


# --- weights that are not finite


@contextmanager
def update_that_breaks(*steps: int) -> Generator[None]:
    """AdamW leaves a NaN in a weight in these of its steps (from 1), counted over all attempts."""
    num_steps = 0

    def plant(optimizer: torch.optim.Optimizer, arguments: object, options: object) -> None:
        nonlocal num_steps
        if isinstance(optimizer, torch.optim.AdamW):
            num_steps += 1
            if num_steps in steps:
                with torch.no_grad():
                    optimizer.param_groups[0]["params"][0].view(-1)[-1] = math.nan

    hook = register_optimizer_step_post_hook(plant)
    try:
        yield
    finally:
        hook.remove()


def saved_names(directory: Path) -> set[str]:
    return {path.name for path in (directory / "checkpoints").iterdir()}


@pytest.mark.parametrize("step", [5, 12], ids=["within", "the last"])
def test_an_update_that_breaks_the_weights_does_not_stand(tmp_path: Path, step: int) -> None:
    model = new_model()
    last = "step-00000003" if step == 5 else "step-00000009"
    expected = (
        rf"step {step}: the update made values that are not finite in \S+weight\. Back to .*{last}; step {step} is"
    )
    with pytest.warns(UserWarning, match=expected), update_that_breaks(step):
        result = run(tmp_path, model=model)
    assert result.stopped == "finished"
    assert health.find_non_finite(model) == ""
    assert [record["step"] for record in read_log(tmp_path) if "skipped" in record] == [step]
    assert saved_names(tmp_path) == {"step-00000009", "step-00000012"}
    assert run(tmp_path, model=model).step == 12  # refuses a checkpoint that is not finite


@pytest.mark.filterwarnings("ignore:.*rollback")
def test_a_run_whose_updates_all_break_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    model = new_model()
    with update_that_breaks(*range(4, 100)), pytest.raises(TrainingError, match=r"step 7: the update made .*00000003"):
        run(tmp_path, model=model)
    assert saved_names(tmp_path) == {"step-00000000", "step-00000003"}
    assert run(tmp_path, model=model).stopped == "finished"
    assert health.find_non_finite(model) == ""


def test_a_model_that_is_not_finite_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite in lm_head\.weight: start from other weights"):
        run(tmp_path, model=planted(new_model(), "lm_head.weight", -math.inf))
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_that_is_not_finite_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, update_that_breaks(3):
        patch.setattr(loop, "find_non_finite", lambda model: "")
        run(tmp_path, max_steps=3)
    with pytest.warns(UserWarning, match=r"step-00000003 has values that are not finite .*; the one before is used"):
        assert run(tmp_path).stopped == "finished"
    assert "damaged-step-00000003" in saved_names(tmp_path)


# --- where a NaN comes from


def explained(model: nn.Module, phase: Phase) -> str:
    with registry.specifications():
        return explain_non_finite(model, lambda: step_loss(model, batches(0), phase).total)


@pytest.mark.parametrize("phase", [DENSE, INDEXER, SPARSE], ids=lambda phase: phase.name)
def test_a_sound_step_has_no_origin_of_nan(phase: Phase) -> None:
    assert "which points at the machine" in explained(new_model(), phase)


def planted(model: nn.Module, name: str, value: float) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


def test_an_infinity_in_a_weight_is_named(tmp_path: Path) -> None:
    name = "model.layers.3.mlp.experts.gate_up_proj"
    answer = explained(planted(new_model(), name, math.inf), DENSE)
    assert answer.startswith(f"{name} had values that are not finite before the step; first aten.")
    assert "model.layers.3.mlp" in answer.partition("first")[2]
    assert "1 not finite" in answer


def test_the_operation_that_refuses_nan_is_not_blamed() -> None:
    """index_select raises for NaN scores; what made them comes before it."""
    answer = explained(planted(new_model(), "model.layers.0.self_attn.indexer.wk.weight", math.nan), SPARSE)
    assert answer.startswith("model.layers.0.self_attn.indexer.wk.weight had values that are not finite")
    assert "aten.mm.default in model.layers.0.self_attn.indexer.wk" in answer


@pytest.mark.parametrize(
    ("name", "operation", "place"),
    [
        ("model.layers.3.mlp.experts.gate_up_proj", "aten.mul.Tensor", "model.layers.3.mlp.experts"),
        ("model.layers.2.self_attn.kv_b_proj.weight", "aten.pow.", "model.layers.2.post_attention_layernorm"),
    ],
)
@pytest.mark.parametrize("phase", [DENSE, SPARSE], ids=lambda phase: phase.name)
def test_an_overflow_is_named_by_operation_module_and_inputs(
    name: str, operation: str, place: str, phase: Phase
) -> None:
    model = new_model()
    with torch.no_grad():
        model.get_parameter(name).mul_(1e25 if "kv_b" in name else 1e20)
    answer = explained(model, phase)
    assert answer.startswith(f"first {operation}")
    assert f" in {place} (ops.py:" in answer
    assert "made infinity from float32 " in answer


def test_a_nan_that_only_the_backward_pass_makes_is_named() -> None:
    model = new_model()

    def square_root_of_zero(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        return output + (output - output.detach()).abs().sqrt()

    model.get_submodule("model.layers.3.mlp.shared_experts").register_forward_hook(square_root_of_zero)
    assert math.isfinite(float(step_loss(model, batches(0), DENSE).total.detach()))
    answer = explained(model, DENSE)
    assert answer.startswith("first aten.div.Tensor in the backward pass (SqrtBackward0) of model.layers.3.mlp")
    assert "square_root_of_zero" in answer
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_warning_of_a_rollback_says_where(tmp_path: Path) -> None:
    model = new_model()
    layer = model.get_submodule("model.layers.2.self_attn.o_proj")
    num_calls = 0

    def overflow(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return output.exp() * 1e38 * 1e38 if num_calls in (5, 6) else output  # the fifth step, and its explanation

    layer.register_forward_hook(overflow)
    expected = r"step 5: .*first aten\.mul\.Tensor in model\.layers\.2\.self_attn\.o_proj \(test_health\.py.*overflow"
    with pytest.warns(UserWarning, match=expected):
        run(tmp_path, dataclasses.replace(RECIPE, phases=(dataclasses.replace(DENSE, num_steps=6),)), model=model)
    assert "o_proj" in read_log(tmp_path)[4]["skipped"]
