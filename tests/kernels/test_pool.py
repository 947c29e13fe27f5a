"""Caches rounded to int8: what a row keeps, and the C++ kernels on such rows against the specification on the same."""

import pytest
import torch
from paging import PagedKeys, paged_keys
from tolerances import RELATIVE, assert_near, relative_error
from torch import Tensor

from indexshare.errors import ConfigError, KernelError
from indexshare.kernels import native, ops, registry
from indexshare.kernels.cache_formats import CacheFormats, rounded_row_bytes
from indexshare.kernels.formats import quantize_activations
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.pool import QuantizedPool

BF16, FP32 = torch.bfloat16, torch.float32
INSTRUCTION_SETS = native.runnable()


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in native.TWINS:
        monkeypatch.setattr(registry.get(name), "twins", [])
    native.register(request.param)
    return request.param


def rounded(values: Tensor, rounded_dim: int, group_size: int) -> QuantizedPool:
    """A pool of these rows, written as the model writes them."""
    pool = QuantizedPool.empty(len(values), rounded_dim, values.shape[1] - rounded_dim, group_size)
    ops.cache_write(pool, torch.arange(len(values)), values)
    return pool


def rounded_keys(paged: PagedKeys) -> QuantizedPool:
    return rounded(paged.pool, paged.pool.shape[1], paged.pool.shape[1])


def whole(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Whole numbers whose largest is 127, so that rounding changes nothing: scores are exact, with many ties."""
    numbers = torch.randint(-3, 4, shape)
    where = torch.randint(shape[-1], (*shape[:-1], 1))
    return numbers.scatter(-1, where, 254 * torch.randint(2, where.shape) - 127).to(dtype)


@pytest.mark.parametrize(("rounded_dim", "plain_dim", "group_size"), [(256, 64, 128), (96, 16, 128), (21, 3, 8)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_rows_come_back_rounded(rounded_dim: int, plain_dim: int, group_size: int, dtype: torch.dtype) -> None:
    values = torch.randn(5, rounded_dim + plain_dim).to(dtype)
    pool = QuantizedPool.empty(20, rounded_dim, plain_dim, group_size)
    rows = torch.tensor([7, 3, 19, 0, 8])
    ops.cache_write(pool, rows, values)
    expected = torch.cat(
        (quantize_activations(values[:, :rounded_dim], group_size).float(), values[:, rounded_dim:].bfloat16().float()),
        dim=-1,
    )
    assert torch.equal(pool.index_select(0, rows), expected)
    assert torch.equal(pool[7:9], expected[[0, 4]])
    assert pool[1:3].isnan().any(-1).all(), "rows that nobody has written are poisoned under pytest"
    assert pool.nbytes == 20 * rounded_row_bytes(rounded_dim, plain_dim, group_size)


def test_bytes_of_a_row() -> None:
    assert rounded_row_bytes(256, 64, 128) == 256 + 2 * 8 + 128
    assert rounded_row_bytes(128, 0, 128) == 128 + 8
    assert rounded_row_bytes(20, 3, 16) == 24 + 2 * 8 + 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_makes_its_group_nan(bad: float) -> None:
    values = torch.randn(2, 48)
    values[1, 5] = bad
    back = rounded(values, 48, 16)[0:2]
    assert torch.equal(back.isnan().view(2, 3, 16).all(-1), torch.tensor([[False] * 3, [True, False, False]]))
    assert back.isnan().sum() == 16


def test_other_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the cache of index keys can hold .int8.*; not 'fp8'"):
        CacheFormats(index_keys="fp8")


@pytest.mark.parametrize("query_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("num_heads", "dim"), [(1, 16), (4, 64), (5, 16), (16, 64), (20, 16), (32, 64), (2, 256), (3, 4), (16, 1)]
)
def test_selected_sets_are_those_of_the_specification(
    isa: str, num_heads: int, dim: int, query_dtype: torch.dtype
) -> None:
    """Few and many queries, key counts that fill no block, pages in no order, top-k around what is visible."""
    name = registry.get("index_select").twins[0].name
    for num_new, num_past, topk in (
        (1, 0, 8),
        (1, 300, 8),
        (5, 100, 64),
        (40, 0, 16),
        (33, 470, 64),
        (1, 64, 64),
        (1, 65, 64),
    ):
        paged = paged_keys([num_new], [num_past], dim, 16)
        paged.pool[paged.layout.rows(0)] = whole(num_new + num_past, dim, dtype=FP32)
        keys = rounded_keys(paged)
        query = whole(num_new, num_heads, dim, dtype=query_dtype)
        weights = torch.randint(-3, 4, (num_new, num_heads)) / 4
        before = registry.hits["index_select", name]
        found = ops.index_select(query, weights, keys, paged.layout, topk)
        assert registry.hits["index_select", name] == before + 1
        assert torch.equal(found, ops.index_select.specification(query, weights, keys, paged.layout, topk))


@pytest.mark.parametrize(("num_heads", "dim"), [(4, 32), (16, 128), (3, 20)])
def test_random_scores_choose_nearly_the_same(isa: str, num_heads: int, dim: int) -> None:
    """Near ties apart, whose order depends on that of the sums."""
    paged = paged_keys([20], [3000], dim, 64)
    keys = rounded_keys(paged)
    query, weights = torch.randn(20, num_heads, dim), torch.randn(20, num_heads)
    found = ops.index_select(query, weights, keys, paged.layout, 256)
    expected = ops.index_select.specification(query, weights, keys, paged.layout, 256)
    shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, expected, strict=True))
    assert shared >= 0.999 * expected.numel()


@pytest.mark.parametrize("num_past", [30, 600])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["key", "query"])
def test_nan_is_refused(twin: str, num_past: int, bad: float, what: str) -> None:
    paged = paged_keys([1], [num_past], 16)
    query = torch.randn(1, 3, 16)
    if what == "key":
        paged.pool[paged.layout.rows(0)[3], 2] = bad
    else:
        query[0, 1, 7] = bad
    with pytest.raises(KernelError, match="NaN"):
        ops.index_select(query, torch.randn(1, 3), rounded_keys(paged), paged.layout, 8)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("num_heads", "width", "latent"), [(4, 112, 96), (16, 320, 256), (3, 32, 16), (64, 576, 512)])
def test_attention_is_that_of_the_specification(
    isa: str, num_heads: int, width: int, latent: int, dtype: torch.dtype
) -> None:
    values = torch.full((400, width), float("nan"))
    used = torch.randperm(400)[:300]
    values[used] = torch.randn(300, width)
    pool = rounded(values, latent, 128)
    for num_tokens, num_selected in ((1, 1), (1, 6), (1, 257), (9, 100)):
        selection = torch.stack(
            [used[torch.randperm(300)[:num_selected]].sort().values for _ in range(num_tokens)]
        ).int()
        if num_tokens > 2:
            selection[1, num_selected // 2 :] = -1
            selection[2, 1:] = -1
        query = torch.randn(num_tokens, num_heads, width).to(dtype)
        name = registry.get("mla_sparse").twins[0].name
        before = registry.hits["mla_sparse", name]
        found = ops.mla_sparse(query, pool, selection, 0.1, latent)
        assert found.dtype == dtype
        assert registry.hits["mla_sparse", name] == before + 1
        assert_near(found, ops.mla_sparse.specification(query.double(), pool, selection, 0.1, latent))


def test_results_are_bit_identical_for_any_number_of_threads(isa: str) -> None:
    query, weights = torch.randn(50, 4, 32).bfloat16(), torch.randn(50, 4)
    keys, latents = rounded(torch.randn(3000, 32), 32, 32), rounded(torch.randn(3000, 112), 96, 128)
    attention_query = torch.randn(50, 4, 112).bfloat16()
    table = torch.randperm(3000 // 4)[None]
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        layout = KeyLayout(sequence_starts=(0, 50), context_lengths=(3000,), page_table=table, page_size=4)
        selection = ops.index_select(query, weights, keys, layout, 100)
        results.append((selection, ops.mla_sparse(attention_query, latents, selection, 0.1, 96)))
        # Each query alone gives what it gives among others.
        for t in (0, 17, 49):
            alone = KeyLayout(sequence_starts=(0, 1), context_lengths=(2951 + t,), page_table=table, page_size=4)
            chosen = ops.index_select(query[t : t + 1], weights[t : t + 1], keys, alone, 100)
            assert torch.equal(chosen[0], selection[t])
            attended = ops.mla_sparse(attention_query[t : t + 1], latents, chosen, 0.1, 96)
            assert torch.equal(attended[0], results[-1][1][t])
    for selection, attended in results:
        assert torch.equal(selection, results[0][0])
        assert torch.equal(attended, results[0][1])


def test_dense_attention_reads_rounded_rows() -> None:
    values = torch.randn(60, 48)
    pool = rounded(values, 32, 16)
    layout = KeyLayout(sequence_starts=(0, 5), context_lengths=(60,), page_table=torch.randperm(15)[None], page_size=4)
    query, kv_b = torch.randn(5, 2, 48), torch.randn(2, 20, 32)
    wide = pool[0:60]
    assert_near(ops.mla_dense(query, pool, layout, 0.1, 32), ops.mla_dense(query, wide, layout, 0.1, 32))
    narrow = query[..., :28]
    assert_near(ops.mla_expanded(narrow, pool, kv_b, layout, 0.1), ops.mla_expanded(narrow, wide, kv_b, layout, 0.1))
    # Half a level of 254: rounding is small, but not nothing.
    error = relative_error(ops.mla_dense(query, pool, layout, 0.1, 32), ops.mla_dense(query, values, layout, 0.1, 32))
    assert RELATIVE[FP32] < error < 0.02


def test_what_a_twin_does_not_take_goes_to_the_specification(isa: str) -> None:
    refusal = registry.get("mla_sparse").twins[0].supports
    pool, selection = rounded(torch.randn(8, 48), 32, 128), torch.zeros(1, 4, dtype=torch.int32)
    assert refusal(torch.randn(1, 2, 48), pool, selection, 0.1, 32) is None
    assert "32 numbers of a row are rounded, not 16" in refusal(torch.randn(1, 2, 48), pool, selection, 0.1, 16)
    refusal = registry.get("index_select").twins[0].supports
    layout = KeyLayout.packed((0, 1))
    assert refusal(torch.randn(1, 2, 48), torch.randn(1, 2), rounded(torch.randn(8, 48), 48, 48), layout, 4) is None
    for keys in (rounded(torch.randn(8, 48), 48, 16), rounded(torch.randn(8, 48), 32, 32)):
        assert "one scale" in refusal(torch.randn(1, 2, 48), torch.randn(1, 2), keys, layout, 4)
