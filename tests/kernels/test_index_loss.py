"""What trains the indexer, against a plain dense computation that autograd differentiates: loss, gradients, memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paging import paged_keys
from tolerances import assert_near
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from indexshare import runtime
from indexshare.kernels import index_loss, ops
from indexshare.kernels.index_loss import indexer_loss, selected_mass
from indexshare.kernels.layout import KeyLayout

HEADS, WIDTH, INDEX_HEADS, INDEX_DIM = 3, 6, 2, 4
PACKED = KeyLayout.packed((0, 7, 11))
SCALE = 0.3


def doubles(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def every(stride: int, layout: KeyLayout = PACKED) -> list[Tensor]:
    """Every stride-th new token of each sequence."""
    return [torch.arange(0, layout.num_new(b), stride) for b in range(layout.num_sequences)]


def places(asked: list[Tensor], layout: KeyLayout) -> Tensor:
    return torch.cat([start + some for start, some in zip(layout.sequence_starts[:-1], asked, strict=True)])


def indexer(layout: KeyLayout, asked: list[Tensor], num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, head weights and keys, all to be trained."""
    count = len(places(asked, layout))
    return (
        doubles(count, INDEX_HEADS, INDEX_DIM, grad=True),
        doubles(count, INDEX_HEADS, grad=True),
        doubles(num_rows, INDEX_DIM, grad=True),
    )


def attention(count: int, num_rows: int) -> tuple[Tensor, Tensor]:
    return doubles(count, HEADS, WIDTH), doubles(num_rows, WIDTH)


def some_selection(layout: KeyLayout, asked: list[Tensor], k: int = 3) -> Tensor:
    query, weights = torch.randn(layout.num_tokens, 2, 4), torch.randn(layout.num_tokens, 2)
    return ops.index_select(query, weights, torch.randn(layout.num_tokens, 4), layout, k)[places(asked, layout)]


def plain(
    query: Tensor,
    weights: Tensor,
    keys: Tensor,
    attention_query: Tensor,
    latents: Tensor,
    layout: KeyLayout,
    asked: list[Tensor],
    selection: Tensor | None,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """The loss by its definition, token by token, and the targets."""
    total, line, targets = query.new_zeros(()), 0, []
    for b, some in enumerate(asked):
        for token in some.tolist():
            rows = layout.rows(b)[: layout.num_past(b) + token + 1]
            if selection is not None:
                rows = selection[line][selection[line] >= 0].long()
            scores = (query[line] @ keys[rows].T * INDEX_DIM**-0.5).relu()
            choice = (weights[line] @ scores).softmax(-1)
            target = (attention_query[line] @ latents[rows].T * scale).softmax(-1).mean(0)
            total = total + (target * (target / choice).log()).sum()
            targets.append(target)
            line += 1
    return total / line, targets


def with_gradients(loss: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], *rest: Any) -> list[Tensor]:
    value = loss(*inputs, *rest)
    return [value, *torch.autograd.grad(value, inputs)]


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the bytes that tiles are cut for."""

    def to(num_bytes: int) -> None:
        class Settings:
            workspace_bytes = num_bytes

        monkeypatch.setattr(runtime, "settings", Settings)

    return to


@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize("stride", [1, 3])
def test_loss_and_gradients_are_those_of_the_definition(selected: bool, stride: int) -> None:
    asked = every(stride)
    inputs = indexer(PACKED, asked, 11)
    selection = some_selection(PACKED, asked) if selected else None
    assert selection is None or ((selection < 0).any() and (selection >= 0).all(-1).any())
    rest = (*attention(len(inputs[0]), 11), PACKED, asked, selection, SCALE)
    found = with_gradients(indexer_loss, inputs, *rest)
    assert found[0] > 0
    for mine, other in zip(found, with_gradients(lambda *given: plain(*given)[0], inputs, *rest), strict=True):
        assert_near(mine, other)


@pytest.mark.parametrize("selected", [True, False])
def test_gradients_are_those_of_finite_differences(selected: bool) -> None:
    asked = every(2)
    inputs = indexer(PACKED, asked, 11)
    rest = (*attention(len(inputs[0]), 11), PACKED, asked, some_selection(PACKED, asked) if selected else None, SCALE)
    assert torch.autograd.gradcheck(lambda *given: 3 * indexer_loss(*given, *rest), inputs)


def test_keys_may_lie_in_pages_behind_a_past() -> None:
    paged = paged_keys([4, 5], [3, 0], 4, dtype=torch.float64)
    asked = every(2, paged.layout)
    query, weights, _ = indexer(paged.layout, asked, 1)
    keys = paged.pool.detach().clone().requires_grad_()
    keys.data[keys.isnan()] = 0.0  # rows of no sequence; a pool in training has none
    rest = (*attention(len(query), len(keys)), paged.layout, asked, None, SCALE)
    found = with_gradients(indexer_loss, (query, weights, keys), *rest)
    for mine, other in zip(found, with_gradients(lambda *g: plain(*g)[0], (query, weights, keys), *rest), strict=True):
        assert_near(mine, other)


@pytest.mark.parametrize("selected", [True, False])
def test_the_same_for_any_workspace(selected: bool, workspace: Callable[[int], None]) -> None:
    """From one token and one head at a time to everything at once."""
    layout = KeyLayout.packed((0, 40, 50))
    asked = every(1, layout)
    inputs = indexer(layout, asked, 50)
    selection = some_selection(layout, asked, 8) if selected else None
    rest = (*attention(50, 50), layout, asked, selection, SCALE)
    expected = with_gradients(indexer_loss, inputs, *rest)
    for num_bytes in (1, 10_000, 60_000):
        workspace(num_bytes)
        for mine, other in zip(with_gradients(indexer_loss, inputs, *rest), expected, strict=True):
            assert_near(mine, other)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation inside the block makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes() // each.element_size())
        return result


@pytest.mark.parametrize("selected", [True, False])
def test_memory_does_not_grow_as_queries_times_keys(selected: bool, workspace: Callable[[int], None]) -> None:
    workspace(50_000)
    sizes, kept = [], []
    for length in (128, 512):
        layout = KeyLayout.packed((0, length))
        asked = every(1, layout)
        inputs = indexer(layout, asked, length)
        rest = (
            *attention(length, length),
            layout,
            asked,
            some_selection(layout, asked, 8) if selected else None,
            SCALE,
        )
        saved: list[int] = []

        def save(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with LargestTensor() as mode, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            indexer_loss(*inputs, *rest).backward()
        sizes.append(mode.largest)
        kept.append(sum(saved))
    assert sizes[1] <= max(50_000 // 8, 512 * HEADS * WIDTH), "a buffer above the workspace"
    assert kept[1] == 4 * kept[0] == 512 * (INDEX_HEADS * (INDEX_DIM + 1) + INDEX_DIM)


@pytest.mark.parametrize("selected", [True, False])
def test_mean_over_layers_has_the_gradient_of_the_mean_target(selected: bool) -> None:
    """L_multi and L_avg of IndexCache (arXiv 2603.12201, proposition 1): no layer needs the targets of another."""
    asked = every(1)
    inputs = indexer(PACKED, asked, 11)
    selection = some_selection(PACKED, asked) if selected else None
    layers = [attention(11, 11) for _ in range(4)]
    multi = torch.stack([indexer_loss(*inputs, *each, PACKED, asked, selection, SCALE) for each in layers]).mean()
    targets = [plain(*inputs, *each, PACKED, asked, selection, SCALE)[1] for each in layers]
    mean, average = [torch.stack(each).mean(0) for each in zip(*targets, strict=True)], inputs[0].new_zeros(())
    line = 0
    for b, some in enumerate(asked):
        for token in some.tolist():
            rows = PACKED.rows(b)[: token + 1]
            rows = rows if selection is None else selection[line][selection[line] >= 0].long()
            scores = inputs[1][line] @ (inputs[0][line] @ inputs[2][rows].T * INDEX_DIM**-0.5).relu()
            average = average + (mean[line] * (mean[line].log() - scores.log_softmax(-1))).sum() / 11
            line += 1
    assert multi.item() > average.item() + 1e-3, "the losses differ by how far the layers are apart"
    gradients = (torch.autograd.grad(loss, inputs) for loss in (multi, average))
    for mine, other in zip(*gradients, strict=True):
        assert_near(mine, other)


def test_the_attention_gets_no_gradient() -> None:
    asked = every(1)
    inputs = indexer(PACKED, asked, 11)
    query, latents = (each.requires_grad_() for each in attention(11, 11))
    indexer_loss(*inputs, query, latents, PACKED, asked, None, SCALE).backward()
    assert query.grad is None and latents.grad is None
    assert all(each.grad is not None and each.grad.any() for each in inputs)


def test_no_tokens_no_loss() -> None:
    asked = [torch.arange(0), torch.arange(0)]
    inputs = indexer(PACKED, asked, 11)
    found = with_gradients(indexer_loss, inputs, *attention(0, 11), PACKED, asked, None, SCALE)
    assert all(not each.any() for each in found)


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = every(1)
    inputs = indexer(PACKED, asked, 11)
    rest = (*attention(11, 11), PACKED, asked, None, SCALE)
    expected = indexer_loss(*inputs, *rest).detach()
    monkeypatch.setattr(index_loss, "_add_gradients", None)
    with torch.no_grad():
        assert torch.equal(indexer_loss(*inputs, *rest), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_full_precision_also_under_autocast(dtype: torch.dtype) -> None:
    asked = every(1)
    inputs = tuple(each.detach().to(dtype).requires_grad_() for each in indexer(PACKED, asked, 11))
    rest = (*(each.to(dtype) for each in attention(11, 11)), PACKED, asked, None, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = indexer_loss(*inputs, *rest)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = with_gradients(indexer_loss, exact, *(each.double() for each in rest[:2]), *rest[2:])
    assert loss.dtype == torch.float32
    assert_near(loss, expected[0])
    for mine, other in zip(torch.autograd.grad(loss, inputs), expected[1:], strict=True):
        assert mine.dtype == dtype
        assert_near(mine, other, dtype)


def test_mass_on_the_selected_keys() -> None:
    asked = every(2)
    query, weights, keys = (each.detach() for each in indexer(PACKED, asked, 11))
    given = (query, weights, keys, *attention(len(query), 11), PACKED, asked)
    selection = ops.index_select(*spread(query, weights, asked), keys, PACKED, 2)[places(asked, PACKED)]
    targets = plain(*given, None, SCALE)[1]
    found, best, line = [], [], 0
    for b, some in enumerate(asked):
        for token in some.tolist():
            if token >= 2:
                chosen = selection[line].long() - PACKED.sequence_starts[b]
                found.append(targets[line][chosen].sum())
                best.append(targets[line].sort().values[-2:].sum())
            line += 1
    for mine, other in zip(selected_mass(*given, SCALE, 2), (found, best), strict=True):
        assert_near(mine, torch.stack(other))
    assert len(selected_mass(*given, SCALE, 7)[0]) == 0, "nobody sees more than seven keys"


def spread(query: Tensor, weights: Tensor, asked: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and weights of all tokens, those of the asked ones as given."""
    all_queries, all_weights = doubles(11, INDEX_HEADS, INDEX_DIM), doubles(11, INDEX_HEADS)
    all_queries[places(asked, PACKED)], all_weights[places(asked, PACKED)] = query, weights
    return all_queries, all_weights
