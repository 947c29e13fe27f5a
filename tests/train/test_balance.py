"""The sequence-level balance loss against the formulas of the paper, written out."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_training import CONFIG, RECIPE, SPARSE, batches, new_model, read_log, run
from torch import Tensor

from indexshare.train import losses
from indexshare.train.balance import sequence_balance

LENGTH = 24
STARTS = (0, 5, 6, 24)


def written_out(scores: Tensor, starts: tuple[int, ...], num_chosen: int) -> Tensor:
    """DeepSeek-V3 (17) to (20) for each sequence, with loops."""
    num_experts = scores.shape[1]
    total = torch.zeros((), dtype=scores.dtype)
    for begin, end in pairwise(starts):
        length = end - begin
        for expert in range(num_experts):
            frequency, mean_share = 0.0, torch.zeros((), dtype=scores.dtype)
            for token in range(begin, end):
                rank = int((scores[token] > scores[token, expert]).sum())
                frequency += (rank < num_chosen) * num_experts / (num_chosen * length)
                mean_share = mean_share + scores[token, expert] / scores[token].sum() / length
            total = total + frequency * mean_share * length / starts[-1]
    return total


@pytest.mark.parametrize("starts", [(0, 24), STARTS])
def test_value_and_gradient_are_those_of_the_paper(starts: tuple[int, ...]) -> None:
    logits = torch.randn(LENGTH, 8, dtype=torch.float64, requires_grad=True)
    found = sequence_balance(logits.sigmoid(), starts, 2)
    expected = written_out(logits.sigmoid(), starts, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


def test_even_use_is_one_and_one_expert_for_all_is_the_worst() -> None:
    even = torch.eye(8, dtype=torch.float64).repeat(3, 1)
    torch.testing.assert_close(sequence_balance(even, (0, 24), 1), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(
        sequence_balance(even[:1].expand(24, -1), (0, 24), 1), torch.tensor(8.0, dtype=torch.float64)
    )


def step(weight: float, trains: str = "all") -> tuple[losses.Losses, dict[str, Tensor]]:
    model = new_model()
    batch = batches(0)
    targets = batch.roll(-1, dims=1)
    result = losses.step_loss(
        model,
        batch.flatten(),
        targets.flatten(),
        torch.arange(LENGTH).repeat(2),
        torch.ones(2 * LENGTH),
        (0, LENGTH, 2 * LENGTH),
        attention="sparse",
        trains=trains,
        mtp_weight=0.3,
        mtp_num_steps=2,
        balance_weight=weight,
    )
    result.total.backward()
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_it_is_a_part_of_the_total_for_every_router() -> None:
    without, plain = step(0.0)
    with_it, balanced = step(0.5)
    assert not without.metrics
    layers = sum(name.endswith("mlp.gate.weight") for name in plain)
    assert layers == CONFIG.mlp_layer_types.count("sparse") + 1  # the MTP layer's, too
    assert with_it.metrics["balance"] >= 0.9 * layers
    assert float((with_it.total - without.total).detach()) == pytest.approx(0.5 * with_it.metrics["balance"], rel=1e-4)
    for name, gradient in plain.items():
        assert name.endswith("mlp.gate.weight") <= (not torch.allclose(gradient, balanced[name], rtol=1e-4))


def test_indexers_are_not_trained_by_it() -> None:
    assert torch.equal(step(0.0, "indexer")[0].total, step(0.5, "indexer")[0].total)


def test_a_phase_that_asks_for_it_logs_it(tmp_path: Path) -> None:
    phase = dataclasses.replace(SPARSE, num_steps=2, balance_loss_weight=0.01)
    run(tmp_path, dataclasses.replace(RECIPE, phases=(phase,), log_every=1))
    assert all(record["balance"] > 0.9 for record in read_log(tmp_path))
