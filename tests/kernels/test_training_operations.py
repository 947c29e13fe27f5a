"""Attention in training: what a mask holds, the gradients of the fused kernel under it, and of the sparse one."""

import pytest
import torch
from torch import Tensor

from indexshare.kernels import ops, registry
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


@pytest.mark.parametrize(("num_heads", "width", "latent_dim"), [(1, 32, 16), (4, 112, 96), (6, 48, 32), (18, 96, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_sparse_attention(
    twin: str, num_heads: int, width: int, latent_dim: int, dtype: torch.dtype
) -> None:
    """Against plain attention over a gathered copy, in fp64; more chosen rows than one chunk of the C++ kernel has."""
    num_tokens, num_rows, num_chosen = 21, 400, 300
    generator = torch.Generator().manual_seed(num_heads)
    query, latents = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((num_tokens, num_heads, width), (num_rows, width))
    )
    slope = torch.randn(num_tokens, num_heads, latent_dim, generator=generator).to(dtype)
    selection = torch.stack([torch.randperm(num_rows, generator=generator)[:num_chosen] for _ in range(num_tokens)])
    selection[::3, 1:] = -1
    selection[1::3, 257:] = -1
    selection = selection.int()
    plain_query, plain_latents = query.detach().double().requires_grad_(), latents.detach().double().requires_grad_()
    gathered = plain_latents[selection.clamp(min=0).long()]
    scores = 0.2 * torch.einsum("thw,tkw->thk", plain_query, gathered)
    weights = scores.masked_fill((selection < 0)[:, None], float("-inf")).softmax(-1)
    plain = torch.einsum("thk,tkc->thc", weights, gathered[..., :latent_dim])
    plain.backward(slope.double())
    hits = registry.hits["mla_sparse_backward", registry.SPECIFICATION]
    ops.mla_sparse(query, latents, selection, 0.2, latent_dim).backward(slope)
    assert (registry.hits["mla_sparse_backward", registry.SPECIFICATION] > hits) == (twin == "torch")
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for tensor, reference in ((query, plain_query), (latents, plain_latents)):
        assert tensor.grad is not None and reference.grad is not None and tensor.grad.dtype == dtype
        largest = float(reference.grad.abs().max())
        torch.testing.assert_close(tensor.grad.double(), reference.grad, atol=tolerance * largest, rtol=0.0)


def test_gradients_repeat_to_the_bit(twin: str) -> None:
    """Threads add into the same latents."""
    query, latents = torch.randn(500, 4, 32), torch.randn(90, 32)
    selection = torch.randint(0, 90, (500, 40), dtype=torch.int32)
    slope = torch.randn(500, 4, 16)
    first = ops.mla_sparse_backward(query, latents, selection, slope, 0.3)
    for _ in range(5):
        again = ops.mla_sparse_backward(query, latents, selection, slope, 0.3)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
