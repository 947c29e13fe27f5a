"""What a step minimises: who gets gradients, what is supervised, and that selections repeat (facts for RL, too)."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from indexshare import runtime
from indexshare.kernels import index_loss, registry
from indexshare.kernels.layout import KeyLayout
from indexshare.model import glm, recipes
from indexshare.model.batch import ForwardBatch, Trace
from indexshare.model.glm import GlmForCausalLM
from indexshare.train import losses as losses_module
from indexshare.train.losses import IGNORED, Losses, step_loss

LENGTH = 40
STARTS = (0, 25, LENGTH)


def model() -> GlmForCausalLM:
    built = GlmForCausalLM(recipes.tiny())
    built.init_weights(0)
    return built


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token_ids = torch.randint(0, recipes.tiny().vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1))
    targets = token_ids.roll(-1)
    targets[[24, 39]] = IGNORED
    return token_ids, targets, torch.arange(LENGTH), torch.ones(LENGTH)


def gradients(built: GlmForCausalLM) -> set[str]:
    return {name for name, parameter in built.named_parameters() if parameter.grad is not None and parameter.grad.any()}


def test_a_frozen_indexer_gets_no_gradient_and_still_selects() -> None:
    built = model()
    losses = step_loss(built, *inputs(), STARTS, attention="sparse", trains="model", mtp_weight=0.1)
    losses.total.backward()
    assert not any(".indexer." in name for name in gradients(built))
    assert float(losses.index_kl) == 0.0
    assert any("self_attn.o_proj" in name for name in gradients(built))


def test_selections_repeat_so_that_a_recomputed_forward_pass_attends_to_the_same_keys() -> None:
    built = model()
    token_ids, _, positions, _ = inputs()
    selections = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        trace = Trace()
        built(ForwardBatch(token_ids=token_ids, positions=positions, layout=KeyLayout.packed(STARTS), trace=trace))
        selections.append(trace.selections)
    torch.set_num_threads(1)
    assert any(rows is not None for rows in selections[0].values())
    for other in selections[1:]:
        for layer, rows in selections[0].items():
            assert rows is None or torch.equal(rows, other[layer])


def test_the_indexer_loss_trains_the_indexers_alone() -> None:
    for attention in ("dense", "sparse"):
        built = model()
        losses = step_loss(built, *inputs(), STARTS, attention=attention, trains="indexer", mtp_weight=0.1)
        losses.total.backward()
        assert float(losses.index_kl) > 0.0
        trained = gradients(built)
        assert trained and all(".indexer." in name for name in trained)
        owners = {int(name.split(".")[2]) for name in trained}
        assert owners == {*built.config.full_layers, built.config.num_hidden_layers}


def test_weights_scale_and_only_supervised_tokens_count() -> None:
    built = model()
    token_ids, targets, positions, weights = inputs()

    def loss(targets: Tensor, weights: Tensor) -> Losses:
        return step_loss(
            built, token_ids, targets, positions, weights, STARTS, attention="dense", trains="model", mtp_weight=1.0
        )

    full = loss(targets, weights)
    assert full.num_tokens == LENGTH - 2
    torch.testing.assert_close(loss(targets, 3.0 * weights).lm, full.lm)
    one = torch.full_like(targets, IGNORED)
    one[7] = targets[7]
    with torch.no_grad():
        batch = ForwardBatch(
            token_ids=token_ids, positions=positions, layout=KeyLayout.packed(STARTS), attention="dense"
        )
        expected = -built.logits(built(batch)).log_softmax(-1)[7, targets[7]]
    torch.testing.assert_close(loss(one, weights).lm, expected)
    heavy = weights.clone()
    heavy[7] = 1e6
    torch.testing.assert_close(loss(targets, heavy).lm, expected, rtol=1e-3, atol=0.0)


def test_the_mtp_target_of_a_segment_end_is_not_the_next_segment() -> None:
    built = model()
    token_ids, targets, positions, weights = inputs()
    at_start = torch.full_like(targets, IGNORED)
    at_start[25] = targets[25]  # predicted by MTP from token 24, which is in the segment before: no term at all
    at_start[30] = targets[30]
    one = torch.full_like(targets, IGNORED)
    one[30] = targets[30]
    results = [
        step_loss(
            built, token_ids, chosen, positions, weights, STARTS, attention="dense", trains="model", mtp_weight=1.0
        ).mtp
        for chosen in (at_start, one)
    ]
    torch.testing.assert_close(results[0], results[1])


def losses_and_gradients(built: GlmForCausalLM, **options: object) -> tuple[Losses, dict[str, Tensor]]:
    token_ids, targets, positions, weights = inputs()
    weights[[20, 30]] = 2.0
    losses = step_loss(built, token_ids, targets, positions, weights, STARTS, mtp_weight=0.1, **options)
    losses.total.backward()
    return losses, {name: p.grad for name, p in built.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("target", ["selected", "visible"])
def test_long_sequences_gather_what_short_ones_mask(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Two ways to the same losses and gradients: a mask over all keys, and selected rows that are gathered."""
    options = {"attention": "sparse", "index_stride": 3, "index_target": target}
    masked, expected = losses_and_gradients(model().double(), **options)
    monkeypatch.setattr(glm, "MASKED_MAX_CONTEXT", 0)
    gathered, found = losses_and_gradients(model().double(), **options)
    for name in ("total", "lm", "mtp", "index_kl"):
        torch.testing.assert_close(getattr(gathered, name), getattr(masked, name))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_the_indexer_loss_over_visible_keys_sees_what_was_not_selected() -> None:
    options = {"attention": "sparse", "trains": "indexer", "index_stride": 1}
    selected, visible = (losses_and_gradients(model(), **options, index_target=t)[0] for t in ("selected", "visible"))
    dense, _ = losses_and_gradients(model(), **(options | {"attention": "dense"}))
    assert float(visible.index_kl) > 0.0
    assert float(visible.index_kl) != pytest.approx(float(selected.index_kl))
    # The first layer attends to the embeddings, whatever is selected; the ones after it to what it passed on.
    assert float(visible.index_kl) == pytest.approx(float(dense.index_kl), rel=0.2)


def test_the_indexer_loss_is_over_every_nth_token_and_those_that_weigh_more() -> None:
    _, _, _, weights = inputs()
    weights[[5, 30]] = 2.0
    chosen = losses_module._index_queries(STARTS, weights, 10)
    assert [each.tolist() for each in chosen] == [[0, 5, 10, 20], [0, 5, 10]]


def test_an_indexer_learns_from_the_mean_over_the_layers_it_serves() -> None:
    """L_multi of IndexCache: 1 / (m + 1) for each of m + 1 layers; indexers add up. tiny is F F S S F S, and MTP."""
    by_layer = {layer: torch.tensor(float(2**layer)) for layer in (5, 0, 1, 2, 3, 4, 6)}
    config = recipes.tiny()
    expected = 1 + (2 + 4 + 8) / 3 + (16 + 32) / 2 + 64
    assert float(losses_module.index_loss(config, by_layer)) == pytest.approx(expected)
    assert float(losses_module.index_loss(config, {0: torch.tensor(3.0)})) == 3.0


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("balance_weight", [0.0, 0.1])
def test_layers_that_run_again_give_the_same_gradients_and_choose_once(
    attention: Literal["sparse", "dense"], balance_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_losses = 0
    computed = index_loss._loss_and_gradients

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal num_losses
        num_losses += 1
        return computed(*arguments, **options)

    monkeypatch.setattr(index_loss, "_loss_and_gradients", counted)

    def step(recompute: bool) -> tuple[dict[str, Tensor], Losses, tuple[int, int]]:
        nonlocal num_losses
        built, before, num_losses = model(), registry.num_calls("index_select"), 0
        losses = step_loss(
            built,
            *inputs(),
            STARTS,
            attention=attention,
            mtp_weight=0.1,
            index_target="visible",
            balance_weight=balance_weight,
            recompute=recompute,
        )
        losses.total.backward()
        found = {name: weight.grad for name, weight in built.named_parameters() if weight.grad is not None}
        return found, losses, (registry.num_calls("index_select") - before, num_losses)

    plain, again = step(recompute=False), step(recompute=True)
    assert plain[0].keys() == again[0].keys()
    assert all(torch.equal(plain[0][name], again[0][name]) for name in plain[0])
    assert torch.equal(plain[1].total, again[1].total)
    assert plain[2] == again[2]
    assert again[2][1] == model().config.num_layers_with_mtp


def test_nothing_in_a_step_is_as_large_as_queries_times_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """With indexers trained over all visible keys of a row beyond the length up to which masks are made."""
    length, largest, small = 2048, [0], runtime.Settings(workspace_mib=1)
    monkeypatch.setattr(glm, "MASKED_MAX_CONTEXT", length // 4)
    monkeypatch.setattr(runtime, "settings", lambda: small)

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            outputs = func(*args, **(kwargs or {}))
            sizes = (leaf.numel() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
            largest[0] = max(largest[0], *sizes, 0)
            return outputs

    token_ids = torch.randint(0, 64, (length,))
    targets = token_ids.roll(-1)
    with Sizes(), registry.specifications():
        losses = step_loss(
            model(),
            token_ids,
            targets,
            torch.arange(length),
            torch.ones(length),
            (0, length),
            attention="sparse",
            mtp_weight=0.1,
            index_target="visible",
            index_stride=64,
        )
        losses.total.backward()
    assert float(losses.index_kl) > 0
    assert 0 < largest[0] <= 256 * length < length * length  # rows of 256 logits, or of 8 keys of 32
