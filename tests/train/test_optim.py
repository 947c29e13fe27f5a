"""Optimizers: Muon on stacks of matrices equals torch's, the schedule, who trains what, the router's bias."""

import pytest
import torch
from small_training import CONFIG, new_model
from torch import nn

from indexshare.train.optim import (
    StackedMuon,
    build_optimizers,
    learning_rate_ratio,
    named_state,
    named_tensors,
    row_blocks,
    update_router_biases,
)


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
