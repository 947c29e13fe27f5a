"""What trains the indexer: dense scores, the attention they should follow, and the divergence between them."""

import pytest
import torch
from paging import paged_keys
from tolerances import assert_near
from torch import Tensor

from indexshare.kernels import ops
from indexshare.kernels.layout import KeyLayout

HEADS, WIDTH = 2, 6
PACKED = KeyLayout.packed((0, 7, 11))


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def every(stride: int, layout: KeyLayout = PACKED) -> list[Tensor]:
    """Every stride-th new token of each sequence."""
    return [torch.arange(0, layout.num_new(b), stride) for b in range(layout.num_sequences)]


def doubles(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("stride", [1, 3])
def test_scores_by_the_formula(stride: int) -> None:
    paged = paged_keys([4, 5], [3, 0], 4, dtype=torch.float64)
    query, weights = doubles(9, 3, 4), doubles(9, 3)
    scores = ops.index_scores(query, weights, paged.pool, paged.layout, every(stride, paged.layout))
    for b, keys in enumerate(paged.keys):
        new = range(0, paged.layout.num_new(b), stride)
        assert scores[b].shape == (len(new), len(keys))
        for line, offset in zip(scores[b], new, strict=True):
            token = paged.layout.sequence_starts[b] + offset
            visible = paged.layout.num_past(b) + offset + 1
            expected = [
                sum(float(weights[token, j]) * max(0.0, float(query[token, j] @ key) / 2) for j in range(3))
                for key in keys[:visible]
            ]
            assert_near(line[:visible], torch.tensor(expected, dtype=torch.float64))
            assert (line[visible:] == float("-inf")).all()


def test_scores_rank_as_the_selection_does() -> None:
    query, weights, keys = torch.randn(11, 3, 4), torch.randn(11, 3), torch.randn(11, 4)
    masks = ops.selection_masks(ops.index_select(query, weights, keys, PACKED, 3), PACKED)
    for score, mask in zip(ops.index_scores(query, weights, keys, PACKED, every(1)), masks, strict=True):
        visible = score > float("-inf")
        worst = score.masked_fill(~mask, float("inf")).amin(-1)
        best_left = score.masked_fill(mask | ~visible, float("-inf")).amax(-1)
        assert (worst >= best_left).all()


def test_gradients_of_the_scores() -> None:
    def run(query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        return torch.cat(
            [
                score.nan_to_num(neginf=0.0).flatten()
                for score in ops.index_scores(query, weights, keys, PACKED, every(1))
            ]
        )

    assert torch.autograd.gradcheck(
        run, (doubles(11, 2, 4, grad=True), doubles(11, 2, grad=True), doubles(11, 4, grad=True))
    )


def some_masks(stride: int = 1) -> list[Tensor]:
    query, weights, keys = torch.randn(11, 3, 4), torch.randn(11, 3), torch.randn(11, 4)
    return ops.selection_masks(ops.index_select(query, weights, keys, PACKED, 3), PACKED, every(stride))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_target_is_the_mean_over_heads(masked: bool, stride: int) -> None:
    masks = some_masks(stride) if masked else None
    query, latents = doubles(11, HEADS, WIDTH), doubles(11, WIDTH)
    targets = ops.attention_target(query, latents, PACKED, masks, 0.3, every(stride))
    for b, target in enumerate(targets):
        start = PACKED.sequence_starts[b]
        for index, (line, offset) in enumerate(zip(target, range(0, PACKED.num_new(b), stride), strict=True)):
            seen = masks[b][index] if masks is not None else torch.arange(target.shape[1]) <= offset
            expected = torch.zeros(target.shape[1], dtype=torch.float64)
            for head in range(HEADS):
                exponents = torch.stack(
                    [
                        (0.3 * query[start + offset, head] @ latents[start + s]).exp()
                        for s in seen.nonzero()[:, 0].tolist()
                    ]
                )
                expected[seen] += exponents / exponents.sum() / HEADS
            assert_near(line, expected)


def divergence(score: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax(score)) over the keys that both have, by the definition."""
    keys = [s for s in range(len(target)) if target[s] > 0]
    choice = score[keys].exp() / score[keys].exp().sum()
    return sum((target[s] * (target[s] / choice[i]).log() for i, s in enumerate(keys)), zero())


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_divergence_and_its_gradient(masked: bool, stride: int) -> None:
    masks = some_masks(stride) if masked else None
    query, weights, keys = doubles(11, 2, 4, grad=True), doubles(11, 2, grad=True), doubles(11, 4, grad=True)
    targets = ops.attention_target(doubles(11, HEADS, WIDTH), doubles(11, WIDTH), PACKED, masks, 0.3, every(stride))
    scores = ops.index_scores(query, weights, keys, PACKED, every(stride))
    loss = ops.indexer_kl(scores, targets, masks)
    lines = [(s, t) for score, target in zip(scores, targets, strict=True) for s, t in zip(score, target, strict=True)]
    expected = sum((divergence(s, t) for s, t in lines), zero()) / len(lines)
    assert_near(loss, expected)
    assert loss.item() > 0
    ours = torch.autograd.grad(loss, (query, weights, keys), retain_graph=True)
    theirs = torch.autograd.grad(expected, (query, weights, keys))
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other)


def test_divergence_from_itself_is_zero() -> None:
    scores = ops.index_scores(doubles(11, 2, 4), doubles(11, 2), doubles(11, 4), PACKED, every(1))
    assert float(ops.indexer_kl(scores, [score.softmax(-1) for score in scores], None)) == pytest.approx(0, abs=1e-12)


def test_sum_over_layers_has_the_gradient_of_the_mean_target() -> None:
    """L_multi and L_avg of IndexCache (arXiv 2603.12201, proposition 1): each layer needs only the shared scores."""
    masks = some_masks()
    query, weights, keys = doubles(11, 2, 4, grad=True), doubles(11, 2, grad=True), doubles(11, 4, grad=True)
    layers = [
        ops.attention_target(doubles(11, HEADS, WIDTH), doubles(11, WIDTH), PACKED, masks, 0.3, every(1))
        for _ in range(4)
    ]
    scores = ops.index_scores(query, weights, keys, PACKED, every(1))
    multi = sum((ops.indexer_kl(scores, targets, masks) for targets in layers), zero()) / len(layers)
    mean = [torch.stack(per_sequence).mean(0) for per_sequence in zip(*layers, strict=True)]
    average = ops.indexer_kl(scores, mean, masks)
    assert multi.item() != pytest.approx(average.item())
    for one, other in zip(
        torch.autograd.grad(multi, (query, weights, keys), retain_graph=True),
        torch.autograd.grad(average, (query, weights, keys)),
        strict=True,
    ):
        assert_near(one, other)


@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_expanded_attention(masked: bool) -> None:
    masks = some_masks() if masked else None

    def run(query: Tensor, latents: Tensor, kv_b: Tensor) -> Tensor:
        return ops.mla_expanded(query, latents, kv_b, PACKED, 0.3, masks)

    inputs = (doubles(11, HEADS, 5, grad=True), doubles(11, WIDTH, grad=True), doubles(HEADS, 7, 4, grad=True))
    assert torch.autograd.gradcheck(run, inputs)
