"""Gauges: their numbers are those of the model, they change nothing, and they warn once."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_training import CONFIG, RECIPE, SPARSE, checkpoint_bytes, new_model, read_log, run
from torch import Tensor, nn

from indexshare.kernels import ops
from indexshare.kernels.layout import KeyLayout
from indexshare.train import gauges


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
