"""The indexer's choice equals a plain stable sort, whatever the tiles, pages and ties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paging import PagedKeys, paged_keys
from torch import Tensor

from indexshare.errors import KernelError
from indexshare.kernels import ops
from indexshare.kernels.layout import KeyLayout

NUM_HEADS, DIM = 3, 16
TWINS = pytest.mark.usefixtures("twin")  # the specification and each C++ twin


def whole_numbers(*shape: int, low: int = -3, high: int = 4) -> Tensor:
    """Small whole numbers: with DIM a power of 4 every score is exact in fp32, and there are many ties."""
    return torch.randint(low, high, shape).float()


def expected_positions(query: Tensor, weights: Tensor, keys: Tensor, num_visible: int, topk: int) -> list[int]:
    """One query by the formula, one key at a time, in Python floats; ties to the lower position."""
    scores = []
    for key in keys[:num_visible].tolist():
        score = 0.0
        for head, weight in enumerate(weights.tolist()):
            product = sum(a * b for a, b in zip(query[head].tolist(), key, strict=True))
            score += weight * max(0.0, product * DIM**-0.5)
        scores.append(score)
    best = sorted(range(num_visible), key=lambda position: (-scores[position], position))[:topk]
    return sorted(best)


def check(paged: PagedKeys, query: Tensor, weights: Tensor, topk: int) -> None:
    layout = paged.layout
    selection = ops.index_select(query, weights, paged.pool, layout, topk)
    assert selection.dtype == torch.int32
    assert selection.shape == (layout.num_tokens, min(topk, layout.max_context))
    for sequence, keys in enumerate(paged.keys):
        start = layout.sequence_starts[sequence]
        for new in range(layout.num_new(sequence)):
            row = selection[start + new]
            visible = layout.num_past(sequence) + new + 1
            expected = expected_positions(query[start + new], weights[start + new], keys, visible, topk)
            assert paged.position_of_rows(sequence, row) == expected, f"sequence {sequence}, new token {new}"
            assert (row[len(expected) :] == -1).all()


def whole_number_keys(num_new: list[int], num_past: list[int], page_size: int = 4) -> PagedKeys:
    paged = paged_keys(num_new, num_past, DIM, page_size)
    for sequence, keys in enumerate(paged.keys):
        keys.copy_(whole_numbers(*keys.shape))
        paged.pool[paged.layout.rows(sequence)] = keys
    return paged


@TWINS
@pytest.mark.parametrize("num_past", [0, 1, 7, 8, 9, 40])
@pytest.mark.parametrize("num_new", [1, 9])
@pytest.mark.usefixtures("small_tiles")
def test_lengths_around_top_k(num_new: int, num_past: int) -> None:
    paged = whole_number_keys([num_new], [num_past])
    check(paged, whole_numbers(num_new, NUM_HEADS, DIM), whole_numbers(num_new, NUM_HEADS), topk=8)


@TWINS
@pytest.mark.parametrize("topk", [1, 2, 8, 64])
@pytest.mark.parametrize("tiles", ["small", "large"])
def test_sequences_of_different_lengths(topk: int, tiles: str, request: pytest.FixtureRequest) -> None:
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    paged = whole_number_keys([1, 30, 3, 5], [70, 0, 1, 12], page_size=8)
    check(paged, whole_numbers(39, NUM_HEADS, DIM), whole_numbers(39, NUM_HEADS), topk)


@TWINS
def test_training_layout_has_the_batch_as_pool() -> None:
    layout = KeyLayout.packed((0, 12, 15))
    keys = whole_numbers(15, DIM)
    paged = PagedKeys(layout, [keys[:12], keys[12:]], keys)
    check(paged, whole_numbers(15, NUM_HEADS, DIM), whole_numbers(15, NUM_HEADS), topk=4)


@TWINS
def test_equal_scores_go_to_the_first_positions() -> None:
    paged = whole_number_keys([2], [50])
    check(paged, torch.zeros(2, NUM_HEADS, DIM), torch.ones(2, NUM_HEADS), topk=8)


@TWINS
def test_negative_weights_prefer_keys_that_the_relu_closes() -> None:
    paged = whole_number_keys([4], [50])
    check(paged, whole_numbers(4, NUM_HEADS, DIM), -torch.ones(4, NUM_HEADS), topk=8)


@TWINS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    paged = whole_number_keys([3], [40])
    paged.pool = paged.pool.to(dtype)
    check(paged, whole_numbers(3, NUM_HEADS, DIM).to(dtype), whole_numbers(3, NUM_HEADS), topk=8)


@TWINS
def test_scores_are_fp32_inside_autocast() -> None:
    """Differences that bfloat16 cannot hold decide."""
    paged = paged_keys([1], [99], DIM)
    paged.keys[0].copy_(torch.ones(100, DIM) * (1 + torch.arange(100) / 4096)[:, None])
    paged.pool[paged.layout.rows(0)] = paged.keys[0]
    with torch.autocast("cpu", torch.bfloat16):
        selection = ops.index_select(
            torch.ones(1, NUM_HEADS, DIM), torch.ones(1, NUM_HEADS), paged.pool, paged.layout, 5
        )
    assert paged.position_of_rows(0, selection[0]) == [95, 96, 97, 98, 99]


@given(
    data=st.data(),
    k=st.integers(1, 4),
    multiple=st.integers(1, 3 * ops.MAX_GROUP),
    tail=st.integers(0, ops.MAX_GROUP - 1),
    num_values=st.sampled_from([1, 2, 5, 1000]),
)
def test_long_rows_equal_a_stable_sort(data: st.DataObject, k: int, multiple: int, tail: int, num_values: int) -> None:
    """Groups of every size, and none; few distinct values make ties, hidden keys make -inf."""
    length = multiple * k + tail
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scores = torch.randint(num_values, (4, length), generator=generator).float()
    for row in range(4):
        scores[row, data.draw(st.integers(1, length)) :] = float("-inf")
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
    chosen = ops.top_positions(scores, k)
    visible = scores.gather(1, expected) > float("-inf")
    assert torch.equal(chosen[visible], expected[visible])
    assert (scores.gather(1, chosen)[~visible] == float("-inf")).all()


@pytest.mark.parametrize("length", [20, 32, 4 * 16 * 8, 4 * 16 * 8 + 9])
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_nan_is_refused(length: int, where: str, num_rows: int) -> None:
    """Also when one row of many holds it, and in the tail that has no group."""
    scores = torch.randn(num_rows, length)
    scores[num_rows // 2, 0 if where == "first" else -1] = float("nan")
    with pytest.raises(KernelError, match=r"NaN.*doctor"):
        ops.top_positions(scores, 8)


@TWINS
@pytest.mark.parametrize("num_past", [30, 600])
def test_nan_in_a_visible_key_is_refused(num_past: int) -> None:
    paged = paged_keys([1], [num_past], DIM)
    paged.pool[paged.layout.rows(0)[3]] = float("nan")
    with pytest.raises(KernelError, match="NaN"):
        ops.index_select(torch.randn(1, NUM_HEADS, DIM), torch.randn(1, NUM_HEADS), paged.pool, paged.layout, 8)


@TWINS
def test_a_pool_beyond_int32_is_refused() -> None:
    """Rows are handed on as int32. The pool is one row repeated with stride 0, so that the test needs no memory."""
    layout = KeyLayout.packed((0, 4))
    pool = torch.zeros(1, DIM).expand(2**31 + 1, DIM)
    with pytest.raises(KernelError, match="2,147,483,649 rows"):
        ops.index_select(torch.randn(4, NUM_HEADS, DIM), torch.randn(4, NUM_HEADS), pool, layout, 2)


@TWINS
def test_the_last_row_that_int32_can_address() -> None:
    page = 2**31 // 64 - 1
    layout = KeyLayout(sequence_starts=(0, 2), context_lengths=(64,), page_table=torch.tensor([[page]]), page_size=64)
    pool = torch.ones(1, DIM).expand(2**31, DIM)
    selection = ops.index_select(torch.ones(2, NUM_HEADS, DIM), torch.ones(2, NUM_HEADS), pool, layout, 70)
    assert selection[1, -1] == 2**31 - 1
    assert selection[0].tolist() == [*range(2**31 - 64, 2**31 - 1), -1]
