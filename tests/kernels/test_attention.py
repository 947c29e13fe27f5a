"""Attention over latents in its three forms, against the plain formula in fp64."""

import math

import pytest
import torch
from paging import PagedKeys, paged_keys
from tolerances import assert_near, relative_error
from torch import Tensor

from indexshare.kernels import ops
from indexshare.kernels.layout import KeyLayout

HEADS, LATENT, ROPE, NOPE, VALUE = 2, 6, 4, 5, 3
WIDTH = LATENT + ROPE
SCALE = (NOPE + ROPE) ** -0.5

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def attend(query: Tensor, rows: Tensor) -> Tensor:
    """One query [H, W] over rows [n, W] -> [H, C], one head and one key at a time in Python floats."""
    result = []
    for head in query.tolist():
        scores = [SCALE * sum(a * b for a, b in zip(head, row, strict=True)) for row in rows.tolist()]
        peak = max(scores)
        weights = [math.exp(score - peak) for score in scores]
        total = sum(weights)
        result.append(
            [
                sum(weight * row[channel] for weight, row in zip(weights, rows.tolist(), strict=True)) / total
                for channel in range(LATENT)
            ]
        )
    return torch.tensor(result, dtype=torch.float64)


def expected_dense(query: Tensor, paged: PagedKeys) -> Tensor:
    layout, results = paged.layout, []
    for b, keys in enumerate(paged.keys):
        for new in range(layout.num_new(b)):
            visible = keys[: layout.num_past(b) + new + 1]
            results.append(attend(query[layout.sequence_starts[b] + new].double(), visible.double()))
    return torch.stack(results)


def everything(layout: KeyLayout) -> Tensor:
    """A selection with every visible key, padded."""
    selection = torch.full((layout.num_tokens, layout.max_context), -1, dtype=torch.int32)
    for b in range(layout.num_sequences):
        for new in range(layout.num_new(b)):
            visible = layout.num_past(b) + new + 1
            selection[layout.sequence_starts[b] + new, :visible] = layout.rows(b)[:visible].int()
    return selection


@DTYPES
@pytest.mark.parametrize("tiles", ["small", "large"])
@pytest.mark.parametrize(("num_new", "num_past"), [([1], [0]), ([7], [0]), ([3, 1, 9], [5, 30, 0])])
def test_dense_and_sparse_over_everything(
    num_new: list[int], num_past: list[int], tiles: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    paged = paged_keys(num_new, num_past, WIDTH, dtype=dtype)
    query = torch.randn(sum(num_new), HEADS, WIDTH).to(dtype)
    expected = expected_dense(query, paged)
    dense = ops.mla_dense(query, paged.pool, paged.layout, SCALE, LATENT)
    sparse = ops.mla_sparse(query, paged.pool, everything(paged.layout), SCALE, LATENT)
    for result in (dense, sparse):
        assert result.dtype == dtype
        assert_near(result, expected)


@DTYPES
@pytest.mark.usefixtures("small_tiles")
def test_sparse_reads_only_the_selected_rows(dtype: torch.dtype) -> None:
    """All other rows of the pool are NaN, also the ones that padding might point at."""
    pool = torch.full((40, WIDTH), float("nan"), dtype=dtype)
    selection = torch.tensor([[7, 30, 12], [9, -1, -1], [30, 9, -1]], dtype=torch.int32)
    for row in (7, 30, 12, 9):
        pool[row] = torch.randn(WIDTH).to(dtype)
    query = torch.randn(3, HEADS, WIDTH).to(dtype)
    expected = torch.stack(
        [
            attend(one.double(), pool[[row for row in rows if row >= 0]].double())
            for one, rows in zip(query, selection.tolist(), strict=True)
        ]
    )
    assert_near(ops.mla_sparse(query, pool, selection, SCALE, LATENT), expected)


@pytest.mark.parametrize("tiles", ["small", "large"])
def test_gradients_of_sparse_attention(tiles: str, request: pytest.FixtureRequest) -> None:
    """Also for a row that several queries select, and with padding."""
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    selection = torch.tensor([[7, 2, 4], [9, -1, -1], [2, 9, -1], [2, 7, 4]], dtype=torch.int32)

    def run(query: Tensor, latents: Tensor) -> Tensor:
        return ops.mla_sparse(query, latents, selection, SCALE, LATENT)

    query = torch.randn(4, HEADS, WIDTH, dtype=torch.float64, requires_grad=True)
    latents = torch.randn(10, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (query, latents))
    assert torch.autograd.gradcheck(lambda query: run(query, latents.detach()), (query,))


def absorbed(query: Tensor, kv_b: Tensor) -> Tensor:
    """[T, H, N + P] -> [T, H, C + P]."""
    return torch.cat((torch.einsum("thn,hnc->thc", query[..., :NOPE], kv_b[:, :NOPE]), query[..., NOPE:]), dim=-1)


def value_of(attended: Tensor, kv_b: Tensor) -> Tensor:
    """[T, H, C] -> [T, H, V]."""
    return torch.einsum("thc,hvc->thv", attended, kv_b[:, NOPE:])


@pytest.mark.parametrize("tiles", ["small", "large"])
@pytest.mark.parametrize(("num_new", "num_past"), [([6], [0]), ([5, 2, 20], [0, 9, 3])])
def test_expanded_equals_absorbed(
    num_new: list[int], num_past: list[int], tiles: str, request: pytest.FixtureRequest
) -> None:
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    paged = paged_keys(num_new, num_past, WIDTH, dtype=torch.float64)
    query = torch.randn(sum(num_new), HEADS, NOPE + ROPE, dtype=torch.float64)
    kv_b = torch.randn(HEADS, NOPE + VALUE, LATENT, dtype=torch.float64)
    expected = value_of(expected_dense(absorbed(query, kv_b), paged), kv_b)
    expanded = ops.mla_expanded(query, paged.pool, kv_b, paged.layout, SCALE)
    assert_near(expanded, expected)
    single = ops.mla_expanded(query.float(), paged.pool.float(), kv_b.float(), paged.layout, SCALE)
    assert_near(single, expected)


def test_expanded_under_masks_equals_sparse() -> None:
    """Training masks what inference gathers."""
    layout = KeyLayout.packed((0, 12, 19))
    latents = torch.randn(19, WIDTH, dtype=torch.float64)
    query = torch.randn(19, HEADS, NOPE + ROPE, dtype=torch.float64)
    kv_b = torch.randn(HEADS, NOPE + VALUE, LATENT, dtype=torch.float64)
    selection = ops.index_select(torch.randn(19, 2, 4), torch.randn(19, 2), torch.randn(19, 4), layout, 3)
    masks = ops.selection_masks(selection, layout)
    expanded = ops.mla_expanded(query, latents, kv_b, layout, SCALE, masks)
    sparse = ops.mla_sparse(absorbed(query, kv_b), latents, selection, SCALE, LATENT)
    assert_near(expanded, value_of(sparse, kv_b))


def test_selection_masks_are_the_selection() -> None:
    layout = KeyLayout.packed((0, 2, 5))
    selection = torch.tensor([[0, -1], [0, 1], [2, -1], [3, -1], [2, 4]], dtype=torch.int32)
    first, second = ops.selection_masks(selection, layout)
    assert first.tolist() == [[True, False], [True, True]]
    assert second.tolist() == [[True, False, False], [False, True, False], [True, False, True]]


def test_extreme_scores_do_not_overflow(small_tiles: None) -> None:
    paged = paged_keys([4], [12], WIDTH)
    query = torch.randn(4, HEADS, WIDTH) * 1e4
    expected = expected_dense(query, paged)
    assert_near(ops.mla_dense(query, paged.pool, paged.layout, SCALE, LATENT), expected, torch.bfloat16)
    assert_near(ops.mla_sparse(query, paged.pool, everything(paged.layout), SCALE, LATENT), expected, torch.bfloat16)


@pytest.mark.parametrize("scale", [WIDTH**-0.5, 1.0])
def test_a_wrong_scale_is_noticed(scale: float) -> None:
    """The scale is that of the expanded query, 1/sqrt(N + P), in the absorbed form too; others are far off."""
    paged = paged_keys([9], [9], WIDTH)
    query = 3 * torch.randn(9, HEADS, WIDTH)
    wrong = ops.mla_dense(query, paged.pool, paged.layout, scale, LATENT)
    assert relative_error(wrong, expected_dense(query, paged)) > 1e-2
