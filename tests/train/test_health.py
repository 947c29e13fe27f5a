"""Runs that break: spikes and NaN are rolled back and left out, their origin is named, gauges warn in time."""

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_training import (
    CONFIG,
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

from indexshare.errors import TrainingError
from indexshare.kernels import ops, registry
from indexshare.kernels.layout import KeyLayout
from indexshare.train import checkpoint, gauges, health, losses
from indexshare.train.health import find_spike, is_spike
from indexshare.train.loop import Phase
from indexshare.train.optim import named_tensors
from indexshare.train.provenance import explain_non_finite

Loss = Callable[[nn.Module, Tensor, Phase], losses.Losses]
LONG = dataclasses.replace(RECIPE, phases=(dataclasses.replace(DENSE, num_steps=30),), learning_rate_muon=1e-4)


def scaled_on(steps: set[int], scale: float, times: int = 1_000_000) -> Loss:
    """step_loss whose total is multiplied on the batches of these steps (from 0); on the first `times` of them only."""
    marked = [batches(step) for step in steps]
    num_scaled = 0

    def loss(model: nn.Module, batch: Tensor, phase: Phase) -> losses.Losses:
        nonlocal num_scaled
        result = step_loss(model, batch, phase)
        if num_scaled >= times or not any(torch.equal(batch, other) for other in marked):
            return result
        num_scaled += 1
        return dataclasses.replace(result, total=result.total * scale)

    return loss


# --- spikes


def test_one_odd_batch_is_no_spike() -> None:
    usual = [2.0] * 20
    assert not is_spike([*usual, 2.1, 2.0, 9.0])
    assert not is_spike([*usual, 9.0, 2.0, 2.0])
    assert is_spike([*usual, 9.0, 2.0, 9.0])
    assert not is_spike([*([0.01] * 20), 0.5, 0.5, 0.5])  # large as a factor, nothing in nats
    assert not is_spike([2.0, 9.0, 9.0, 9.0])


@pytest.mark.parametrize(("losses", "first"), [([9.0, 9.0], 97), ([9.0, 2.0, 9.0], 96)])
def test_left_out_is_all_from_the_step_before_the_first_high_loss(losses: list[float], first: int) -> None:
    fault = find_spike([2.0] * 20 + losses, 99)
    assert fault is not None
    assert fault.steps == range(first, 100)


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
        match=r"step 7: the loss is nan: .* 3 times .*step-00000006.*--accept-recipe-change: that resumes",
    ):
        run(tmp_path, loss=scaled_on(bad, math.nan), model=model)
    assert all(tensor.isfinite().all() for _, tensor in named_tensors(model))
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


# --- gauges


def test_the_attention_gauge_is_the_largest_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all logits, from keys and queries spelled out; with fewer query vectors it is a part of them."""
    heads, nope, rope, value, latent, scale = 3, 4, 2, 4, 8, 0.3
    starts = (0, 5, 12)
    layout = KeyLayout.packed(starts)
    query, latents = torch.randn(12, heads, nope + rope), torch.randn(12, latent + rope)
    kv_b = torch.randn(heads, nope + value, latent)
    keys = torch.cat((torch.einsum("sc,hnc->shn", latents[:, :latent], kv_b[:, :nope]),
                      latents[:, None, latent:].expand(-1, heads, -1)), dim=-1)  # fmt: skip
    logits = torch.einsum("thq,shq->ths", query, keys).abs() * scale
    segment = torch.tensor([0] * 5 + [1] * 7)
    visible = (segment[:, None] == segment) & (torch.arange(12)[:, None] >= torch.arange(12))
    absorbed = torch.cat((torch.einsum("thn,hnc->thc", query[..., :nope], kv_b[:, :nope]), query[..., nope:]), dim=-1)
    rows = torch.full((12, 3), -1, dtype=torch.int32)
    rows[:, 0] = torch.tensor(starts)[segment]
    rows[7:, 1] = 6
    selected = torch.zeros(12, 12, dtype=torch.bool)
    selected[torch.arange(12), rows[:, 0].long()] = True
    selected[7:, 6] = True
    masks = [selected[a:b, a:b] for a, b in pairwise(starts)]
    calls = [
        (visible, lambda: ops.mla_expanded(query, latents, kv_b, layout, scale)),
        (selected, lambda: ops.mla_expanded(query, latents, kv_b, layout, scale, masks)),
        (visible, lambda: ops.mla_dense(absorbed, latents, layout, scale, latent)),
        (selected, lambda: ops.mla_sparse(absorbed, latents, rows, scale, latent)),
    ]
    for seen, call in calls:
        expected = float(logits.masked_fill(~seen[:, None], 0.0).max())
        readings = []
        for num_queries in (12 * heads, 2):
            monkeypatch.setattr(gauges, "NUM_QUERIES", num_queries)
            with gauges.Gauges(nn.Module()) as reading:
                call()
            readings.append(reading.read({}, ())["attention_logit_max"])
        assert readings[0] == [pytest.approx(expected, rel=1e-3)]
        assert 0.0 < readings[1][0] <= readings[0][0]


def test_the_router_gauges_and_norms_are_those_of_the_model(tmp_path: Path) -> None:
    model = new_model()
    phase = dataclasses.replace(SPARSE, num_steps=1)
    hidden: list[Tensor] = []
    gate = model.get_submodule("model.layers.3.mlp")
    gate.register_forward_pre_hook(lambda module, arguments: hidden.append(arguments[0].detach()))
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.gate.weight").mul_(30.0)  # the worst layer by far
        before = torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]).norm()
        weight = model.get_parameter("model.layers.3.mlp.gate.weight").clone()
    run(tmp_path, dataclasses.replace(RECIPE, phases=(phase,), log_every=1), model=model)
    (record,) = read_log(tmp_path)
    logits = hidden[0] @ weight.T
    assert record["router_logit_max"] == pytest.approx(float(logits.abs().max()), rel=1e-3)
    assert record["router_logit_mean_square"] == pytest.approx(float(logits.square().mean()), rel=1e-3)
    assert len(record["attention_logit_max"]) == CONFIG.num_hidden_layers + 1
    assert math.hypot(*record["parameter_norm"].values()) == pytest.approx(float(before), rel=1e-3)
    assert math.hypot(*record["group_gradient_norm"].values()) == pytest.approx(record["gradient_norm"], rel=1e-3)


def test_gauges_change_nothing(tmp_path: Path) -> None:
    often = run(tmp_path / "often", dataclasses.replace(RECIPE, log_every=1))
    seldom = run(tmp_path / "seldom", dataclasses.replace(RECIPE, log_every=100))
    assert checkpoint_bytes(often.checkpoint) == checkpoint_bytes(seldom.checkpoint)
    assert "attention_logit_max" in read_log(tmp_path / "seldom")[-1]


def test_a_gauge_beyond_its_limit_warns_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gauges.LIMITS, "attention_logit_max", (1e-6, "Do this"))
    with pytest.warns(
        UserWarning, match=r"step 1: attention_logit_max is .* in layer \d, above 1e-06\. Do this"
    ) as seen:
        run(tmp_path, max_steps=3)
    assert len(seen) == 1
    run(tmp_path)  # a warning would fail
