"""What trains an indexer: how far its scores are from the attention of a layer that uses its choice.

Shape legend: n asked tokens, t of them in a tile, S keys of a tile, R rows of a pool, J index heads, I index head size,
H heads, W latent row, K selected keys. Sources: DeepSeek-V3.2 (arXiv 2512.02556) section 2.1; IndexCache (arXiv
2603.12201) for layers that share an indexer. Scores and targets exist for one tile at a time, inside the workspace: the
gradients of a tile are known as soon as its loss is, so that only their sums are kept for the way back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from indexshare import runtime
from indexshare.kernels import ops
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.registry import operation

# Of a tile's buffers: more leave a processor's cache. Fewer tokens read the keys of a long row again too often.
CPU_TILE_NUMBERS = 2**21
CPU_TILE_TOKENS = 4

LossAndGradients = tuple[Tensor, tuple[Tensor, ...]]


@operation
def indexer_loss(
    query: Tensor,
    weights: Tensor,
    keys: Tensor,
    attention_query: Tensor,
    latents: Tensor,
    layout: KeyLayout,
    asked: list[Tensor],
    selection: Tensor | None,
    scale: float,
    kept: list[LossAndGradients] | None = None,
) -> Tensor:
    """Mean over the asked tokens of KL(p || softmax(index scores)), a scalar in nats; p is attention, mean over heads.

    query [n, J, I] and weights [n, J] of the asked tokens, keys pool [R, I]: as in `index_select`. attention_query
    [n, H, W], absorbed, and latents pool [R, W]: as in `mla_sparse`. asked: int64 per sequence, ascending, its new
    tokens over which the loss is taken, n in all. selection: int32 [n, K], the keys that both distributions are over;
    None for all visible ones. In fp32 (fp64 stays); 0 without tokens. Gradients reach query, weights and keys, never
    the attention. kept: a list of the caller for a layer that runs twice on the same inputs: empty, it takes what was
    found, and gives it back the second time.
    """
    inputs = (query, weights, keys, attention_query.detach(), latents.detach(), layout, asked, selection, scale)
    if torch.is_grad_enabled() and (query.requires_grad or weights.requires_grad or keys.requires_grad):
        loss: Tensor = _IndexerLoss.apply(*inputs, kept)
        return loss
    return _loss_and_gradients(*inputs, with_gradients=False)[0]


@torch.no_grad()
def selected_mass(
    query: Tensor,
    weights: Tensor,
    keys: Tensor,
    attention_query: Tensor,
    latents: Tensor,
    layout: KeyLayout,
    asked: list[Tensor],
    scale: float,
    topk: int,
) -> tuple[Tensor, Tensor]:
    """Attention on the top-k keys of the indexer, and on the k keys where it is largest: fp64 [m] each, m of n tokens.

    Other arguments as in `indexer_loss`. Tokens that see at most top-k keys are left out: there is nothing to choose.
    """
    found: list[Tensor] = []
    for tile in _tiles(query, keys, attention_query, latents, layout, asked, None):
        choosing = (~tile.hidden).sum(-1) > topk
        if bool(choosing.any()):
            target = _target(tile, attention_query, scale)[choosing]
            chosen = ops.top_positions(_scores(tile, query, weights)[choosing], topk)
            pair = torch.stack((target.gather(1, chosen).sum(-1), target.topk(topk, dim=-1).values.sum(-1)))
            found.append(pair.double())
    both = torch.cat(found, dim=1) if found else query.new_zeros(2, 0, dtype=torch.float64)
    return both[0], both[1]


class _IndexerLoss(torch.autograd.Function):
    """The loss, with gradients made on the way: three small tensors are kept instead of scores."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        kept: list[LossAndGradients] | None = inputs[-1]
        if kept:
            loss, gradients = kept.pop()
        else:
            loss, gradients = _loss_and_gradients(*inputs[:-1], with_gradients=True)
            if kept is not None:
                kept.append((loss, gradients))
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]  # the decorator hides names
        scaled = (grad_outputs[0].to(kept.dtype) * kept for kept in ctx.saved_tensors)
        return *scaled, *[None] * 7


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """A few asked tokens with all the keys that any of them may see.

    place: which of the n. hidden: bool [t, S], False for the first `num_open` keys. rows: int64 in the pools, [t, S],
    or the [S] that all of them share, as a slice where they are neighbours. keys [t, S, I] or [S, I], latents likewise,
    in the precision of the computation. group: heads at once.
    """

    place: slice
    hidden: Tensor
    num_open: int
    rows: Tensor | slice
    keys: Tensor
    latents: Tensor
    group: int

    def hide(self, scores: Tensor) -> Tensor:
        """Minus infinity for hidden keys, in place. scores [t, S] or [t, H, S]."""
        hidden = self.hidden[:, self.num_open :]
        scores[..., self.num_open :].masked_fill_(hidden if scores.dim() == 2 else hidden[:, None], float("-inf"))
        return scores


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _tiles(
    query: Tensor,
    keys: Tensor,
    attention_query: Tensor,
    latents: Tensor,
    layout: KeyLayout,
    asked: list[Tensor],
    selection: Tensor | None,
) -> Iterator[_Tile]:
    """The asked tokens in tiles that fit a quarter of the workspace; at worst one token at a time, head by head."""
    wide = _wide(query)
    num_heads = max(query.shape[1], attention_query.shape[1])
    budget = runtime.settings().workspace_bytes // 4 // wide.itemsize
    first = 0
    for b, tokens in enumerate(asked):
        num_keys = layout.context_lengths[b] if selection is None else selection.shape[1]
        gathered = 0 if selection is None else 2 * (keys.shape[1] + latents.shape[1])
        # A row of each buffer below: about 6 of one number for a key, 3 for each head.
        per_token = num_keys * (6 + gathered + 3 * num_heads)
        size = max(1, budget // per_token)
        if query.device.type == "cpu":
            size = min(size, max(CPU_TILE_TOKENS, CPU_TILE_NUMBERS // per_token))
        group = max(1, min(num_heads, (budget // num_keys - 6 - gathered) // 3)) if size == 1 else num_heads
        for begin in range(0, len(tokens), size):
            some = tokens[begin : begin + size]
            place = slice(first + begin, first + begin + len(some))
            if selection is None:
                last_seen = layout.num_past(b) + some
                visible = int(last_seen[-1]) + 1
                start, num_open = layout.sequence_starts[b], int(last_seen[0]) + 1
                rows: Tensor | slice = slice(start, start + visible)
                if layout.page_table is not None:
                    rows = layout.rows(b)[:visible].to(query.device)
                hidden = torch.arange(visible, device=query.device) > last_seen[:, None]
                near, far = layout.keys(keys, b, 0, visible), layout.keys(latents, b, 0, visible)
            else:
                chosen, num_open = selection[place], 0
                hidden = chosen < 0
                # Padding reads a row that is selected anyway: what lies elsewhere need not be a number.
                rows = torch.where(hidden, chosen[:, :1], chosen).long()
                near, far = keys[rows], latents[rows]
            yield _Tile(
                place=place,
                hidden=hidden,
                num_open=num_open,
                rows=rows,
                keys=near.to(wide),
                latents=far.to(wide),
                group=group,
            )
        first += len(tokens)


def _target(tile: _Tile, attention_query: Tensor, scale: float) -> Tensor:
    """p [t, S]: attention probabilities, the mean over heads."""
    query = attention_query[tile.place].to(tile.latents.dtype) * scale
    total = torch.zeros(tile.hidden.shape, dtype=query.dtype, device=query.device)
    for heads in query.split(tile.group, dim=1):
        total += tile.hide(heads @ tile.latents.mT).softmax(-1).sum(1)
    return total / query.shape[1]


def _scaled_query(tile: _Tile, query: Tensor) -> Tensor:
    return query[tile.place].to(tile.keys.dtype) * query.shape[-1] ** -0.5


def _scores(tile: _Tile, query: Tensor, weights: Tensor) -> Tensor:
    """Index scores [t, S], -inf for hidden keys."""
    scaled, weights = _scaled_query(tile, query), weights[tile.place].to(tile.keys.dtype)
    scores = torch.zeros(tile.hidden.shape, dtype=scaled.dtype, device=scaled.device)
    for heads, weight in zip(scaled.split(tile.group, dim=1), weights.split(tile.group, dim=1), strict=True):
        scores += (weight[:, None] @ (heads @ tile.keys.mT).relu_()).squeeze(1)
    return tile.hide(scores)


@torch.no_grad()
def _loss_and_gradients(
    query: Tensor,
    weights: Tensor,
    keys: Tensor,
    attention_query: Tensor,
    latents: Tensor,
    layout: KeyLayout,
    asked: list[Tensor],
    selection: Tensor | None,
    scale: float,
    *,
    with_gradients: bool,
) -> LossAndGradients:
    """The loss, and its gradients for query, weights and keys (none without `with_gradients`)."""
    wide = _wide(query)
    num_queries = max(len(query), 1)  # 0 / 1 for none: on several ranks one may have nothing to ask
    loss = torch.zeros((), dtype=wide, device=query.device)
    query_gradient, weights_gradient = torch.zeros_like(query), torch.zeros_like(weights)
    keys_gradient = torch.zeros(keys.shape, dtype=wide, device=keys.device)
    with torch.autocast(query.device.type, enabled=False):
        for tile in _tiles(query, keys, attention_query, latents, layout, asked, selection):
            target = _target(tile, attention_query, scale)
            log_choice = _scores(tile, query, weights).log_softmax(-1)
            loss += torch.special.xlogy(target, target).sum()
            loss -= (target * log_choice.masked_fill(target == 0, 0.0)).sum()
            if with_gradients:
                by_score = (log_choice.exp_() - target) / num_queries  # of a mean of KL(p || softmax(score))
                _add_gradients(tile, by_score, query, weights, (query_gradient, weights_gradient, keys_gradient))
    gradients = (query_gradient, weights_gradient, keys_gradient.to(keys.dtype)) if with_gradients else ()
    return loss / num_queries, gradients


def _add_gradients(
    tile: _Tile, by_score: Tensor, query: Tensor, weights: Tensor, gradients: tuple[Tensor, Tensor, Tensor]
) -> None:
    """From the gradient of a tile's scores [t, S] to those of its query, weights and keys; products are made again."""
    scaled, weights = _scaled_query(tile, query), weights[tile.place].to(tile.keys.dtype)
    by_query, by_weights, by_keys = gradients
    for start in range(0, scaled.shape[1], tile.group):
        heads = slice(start, start + tile.group)
        products = (scaled[:, heads] @ tile.keys.mT).relu_()
        by_weights[tile.place, heads] = (products @ by_score[..., None]).squeeze(-1).to(by_weights.dtype)
        by_product = torch.ops.aten.threshold_backward(weights[:, heads, None] * by_score[:, None], products, 0.0)
        by_query[tile.place, heads] = (by_product @ tile.keys * query.shape[-1] ** -0.5).to(by_query.dtype)
        if tile.keys.dim() == 2:
            by_key = by_product.flatten(0, 1).mT @ scaled[:, heads].flatten(0, 1)
        else:
            by_key = (by_product.mT @ scaled[:, heads]).flatten(0, 1)
        if isinstance(tile.rows, slice):
            by_keys[tile.rows] += by_key
        else:
            by_keys.index_add_(0, tile.rows.flatten(), by_key)
