"""Attention with a mask in training: what a mask holds, and the gradients of the fused kernel under it."""

import pytest
import torch
from torch import Tensor

from indexshare.kernels import ops
from indexshare.kernels.layout import KeyLayout

HEADS, WIDTH = 2, 6
PACKED = KeyLayout.packed((0, 7, 11))


def doubles(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def some_selection() -> Tensor:
    return ops.index_select(torch.randn(11, 3, 4), torch.randn(11, 3), torch.randn(11, 4), PACKED, 3)


def test_a_mask_holds_the_selected_keys() -> None:
    selection = some_selection()
    for b, mask in enumerate(ops.selection_masks(selection, PACKED)):
        start = PACKED.sequence_starts[b]
        for token, line in enumerate(mask):
            rows = selection[start + token]
            assert (line.nonzero()[:, 0] + start).tolist() == rows[rows >= 0].tolist()


@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_expanded_attention(masked: bool) -> None:
    masks = ops.selection_masks(some_selection(), PACKED) if masked else None

    def run(query: Tensor, latents: Tensor, kv_b: Tensor) -> Tensor:
        return ops.mla_expanded(query, latents, kv_b, PACKED, 0.3, masks)

    inputs = (doubles(11, HEADS, 5, grad=True), doubles(11, WIDTH, grad=True), doubles(HEADS, 7, 4, grad=True))
    assert torch.autograd.gradcheck(run, inputs)
