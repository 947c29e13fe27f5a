"""The operations of GLM-5.2 in pure torch: the specification that every faster twin must match.

Shape legend: T new tokens, S keys of one sequence, R rows of a pool, D hidden, H heads, N nope, P rope, V value,
C latent, W = C + P (one cached row), J index heads, I index head size, K selected keys, E experts, A experts per token.
A selection is int32 [T, K]: pool rows in ascending logical order, padded with -1 at the end.
Sources: the released checkpoints, DeepSeek-V3.2 (arXiv 2512.02556) for the indexer, GLM-5 (arXiv 2602.15763).
Every buffer is cut into tiles under one workspace budget (`runtime.settings`); none grows as queries x keys.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from indexshare import runtime
from indexshare.errors import KernelError
from indexshare.kernels.formats import QuantizedWeight, multiply, quantize_activations
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.packed import PackedWeight
from indexshare.kernels.pool import Pool, QuantizedPool
from indexshare.kernels.registry import operation

Weight = Tensor | QuantizedWeight | PackedWeight
KEY_TILE = 2048
MAX_GROUP = 32
CPU_TILE_BYTES = 8 * 2**20  # gathered rows that stay in a processor's cache; larger tiles are slower
MAX_POOL_ROWS = 2**31  # a selection holds int32
NAN_SCORES = "index_select: scores hold NaN; run `indexshare doctor` on this checkpoint"


@functools.cache
def _workspace_bytes() -> int:
    return runtime.settings().workspace_bytes


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Scores and routing are fp32 also inside an autocast region."""
    return torch.autocast(tensor.device.type, enabled=False)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for norms, scores and softmax; fp64 stays fp64, so that the same code is the reference of the doctor."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@operation
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last axis, computed in fp32, returned in x's dtype. x [..., D], weight [D]."""
    wide = x.to(_compute_dtype(x))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@operation
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with bias over the last axis in fp32 (the index key's norm, eps 1e-6). x [..., I] -> same dtype."""
    wide = _compute_dtype(x)
    return F.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), bias.to(wide), eps).to(x.dtype)


@operation
def rope_table(
    positions: Tensor, rope_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, rope_dim/2] for positions [T]; angles in fp64, so that position 1,048,575 is as exact as 1."""
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float64, device=positions.device) / rope_dim
    angles = positions.to(torch.float64)[:, None] * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


@operation
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the last axis. x [T, P] or [T, H, P], cos and sin [T, P/2]; in fp32, returned in x's dtype.

    interleaved: pairs are (0,1), (2,3), ...; else (0, P/2), (1, P/2+1), ... The result is stored as two halves in both
    cases: dot products only need queries and keys to agree. GLM-5.x: interleaved in attention and indexer alike.
    """
    wide = x.to(_compute_dtype(x))
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@operation
def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out] in x's dtype; for a quantised weight see `formats.multiply`."""
    weight = weight.plain() if isinstance(weight, PackedWeight) else weight
    return multiply(x, weight, _workspace_bytes()) if isinstance(weight, QuantizedWeight) else F.linear(x, weight)


@operation
def cache_write(pool: Pool, rows: Tensor, values: Tensor) -> None:
    """pool[rows[t]] = values[t] in the pool's dtype. pool [R, W], rows int64 [T] (distinct), values [T, W]."""
    pool.index_copy_(0, rows, values.to(pool.dtype))


def _key_scores(query_TJI: Tensor, weights_TJ: Tensor, keys_SI: Tensor) -> Tensor:
    """Index scores [T, S]: sum over heads of weight * relu(query . key / sqrt(I))."""
    num_tokens, num_heads, dim = query_TJI.shape
    products = (query_TJI.reshape(-1, dim) @ keys_SI.T).view(num_tokens, num_heads, -1)
    return (weights_TJ[:, None] @ products.relu_()).squeeze(1)


def _scaled_query(query_TJI: Tensor) -> Tensor:
    return query_TJI.to(_compute_dtype(query_TJI)) * query_TJI.shape[-1] ** -0.5


@operation
def index_select(query: Tensor, weights: Tensor, keys: Pool, layout: KeyLayout, topk: int) -> Tensor:
    """The indexer: scores every visible key and keeps the top-k of each query (DeepSeek-V3.2, section 2.1).

    score[t, s] = sum_j weights[t, j] * relu(query[t, j] . key[s] / sqrt(I)), fp32, causal before the top-k.
    query [T, J, I], weights [T, J] (J^-1/2 folded in, signed), keys pool [R, I] in any float dtype or int8; then each
    query [I] is rounded too, with one scale (`quantize_activations`): a kernel sums integers
    -> int32 [T, min(topk, max context)], a selection. Ties go to the lower position. With at most topk visible keys
    all are taken, unscored. NaN scores and a pool of more than 2^31 rows raise KernelError.
    """
    assert topk > 0
    check_pool(keys)
    width = min(topk, layout.max_context)
    selection = torch.full((query.shape[0], width), -1, dtype=torch.int32, device=query.device)
    query = quantize_activations(query, query.shape[-1]) if isinstance(keys, QuantizedPool) else query
    query, weights = _scaled_query(query), weights.to(_compute_dtype(query))
    for b in range(layout.num_sequences):
        first, past = layout.sequence_starts[b], layout.num_past(b)
        rows = layout.rows(b).to(query.device)
        begin = 0
        while begin < layout.num_new(b):
            size = _query_tile(past + begin, query.shape[1], layout.num_new(b) - begin)
            visible = past + begin + size
            last_seen = torch.arange(past + begin, visible, device=query.device)
            if visible <= width:
                positions = torch.arange(visible, device=query.device).expand(size, visible)
            else:
                tile = slice(first + begin, first + begin + size)
                scores = _score_tile(query[tile], weights[tile], keys, layout, b, visible)
                future = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
                scores[:, visible - size :].masked_fill_(future, float("-inf"))
                positions = top_positions(scores, width)
            chosen = rows[positions].to(torch.int32).masked_fill_(positions > last_seen[:, None], -1)
            selection[first + begin : first + begin + size, : positions.shape[1]] = chosen
            begin += size
    return selection


def check_pool(keys: Pool) -> None:
    """Raises KernelError for a pool of more rows than a selection can address."""
    if keys.shape[0] > MAX_POOL_ROWS:
        raise KernelError(f"index_select: a pool of {keys.shape[0]:,} rows; a selection can address {MAX_POOL_ROWS:,}")


def _query_tile(context: int, num_heads: int, remaining: int) -> int:
    """Queries scored at once: their score rows and one key tile of all heads stay inside a quarter of the workspace."""
    budget = _workspace_bytes() // 4
    by_rows = budget // (12 * (context + 1))
    by_heads = budget // (8 * num_heads * KEY_TILE)
    return max(1, min(remaining, by_rows, by_heads, 128))


def _score_tile(query: Tensor, weights: Tensor, keys: Pool, layout: KeyLayout, sequence: int, visible: int) -> Tensor:
    scores = query.new_empty(query.shape[0], visible)
    with _full_precision(query):
        for start in range(0, visible, KEY_TILE):
            stop = min(start + KEY_TILE, visible)
            tile = layout.keys(keys, sequence, start, stop).to(query.dtype)
            scores[:, start:stop] = _key_scores(query, weights, tile)
    return scores


def top_positions(scores: Tensor, k: int) -> Tensor:
    """Positions [T, k] (ascending) of the k largest of each row of scores [T, S], S >= k; ties to the lower position.

    However the row is cut into groups, the k-th largest group maximum is a lower bound of the k-th largest score, so
    that one pass of maxima and comparisons leaves a few candidates for the exact choice. A group takes every n-th
    position: that is fast to reduce, and neighbours, which often score high together, fall into different groups.
    """
    num_rows, length = scores.shape
    positions = None
    group = min(MAX_GROUP, length // (2 * k))
    if group > 1:
        whole = length // group * group
        maxima = scores[:, :whole].unflatten(1, (group, -1)).amax(1)
        bound = maxima.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        if bool(bound.isnan().any()) or bool(scores[:, whole:].isnan().any()):
            raise KernelError(NAN_SCORES)
        row, column = (scores >= bound).nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=num_rows)
        slot = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
        candidates = scores.new_full((num_rows, int(counts.max())), float("-inf"))
        positions = column.new_full(candidates.shape, length)
        candidates[row, slot] = scores[row, column]
        positions[row, slot] = column
        scores = candidates
    threshold = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = scores > threshold
    ties = scores == threshold
    missing = k - above.sum(-1, keepdim=True)
    kept = (above | (ties & (ties.cumsum(-1) <= missing))).nonzero()[:, 1]
    if kept.numel() != num_rows * k:
        raise KernelError(NAN_SCORES)
    kept = kept.view(num_rows, k)
    return kept if positions is None else positions.gather(1, kept)


@operation
def mla_sparse(query: Tensor, latents: Pool, selection: Tensor, scale: float, latent_dim: int) -> Tensor:
    """Absorbed MLA over the selected rows only: gathers them, never masks the whole cache.

    query [T, H, W] (query absorbed into the latent space, then rope), latents pool [R, W], selection int32 [T, K] with
    at least one row each -> the attended latents [T, H, C = latent_dim] in query's dtype; softmax in fp32.
    """
    if torch.is_grad_enabled() and (query.requires_grad or latents.requires_grad):
        attended: Tensor = _SparseAttention.apply(query, latents, selection, scale, latent_dim)
        return attended
    return _attend_selected(query, latents, selection, scale, latent_dim)


def _selected_tiles(
    query: Tensor, latents: Pool, selection: Tensor, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For a few queries at a time: where they are, their rows [t, K], the latents there [t, K, W] and the attention
    probabilities [t, H, K]. The caller may overwrite the latents: each tile gathers its own."""
    num_tokens, num_heads, width = query.shape
    wide = _compute_dtype(query)
    per_token = 4 * selection.shape[1] * (2 * width + 2 * num_heads)
    budget = _workspace_bytes() // 4
    if query.device.type == "cpu":
        budget = min(budget, CPU_TILE_BYTES)
    tile = max(1, min(num_tokens, budget // per_token))
    for begin in range(0, num_tokens, tile):
        place = slice(begin, begin + tile)
        rows = selection[place]
        padding = rows < 0
        # Padding reads a row that is selected anyway: any other may be unwritten, and zero times NaN is NaN.
        rows = torch.where(padding, rows[:, :1], rows)
        gathered = latents.index_select(0, rows.flatten()).to(wide).view(*rows.shape, width)
        scores = (query[place].to(wide) * scale) @ gathered.transpose(1, 2)
        yield place, rows, gathered, scores.masked_fill(padding[:, None], float("-inf")).softmax(-1)


def _attend_selected(query: Tensor, latents: Pool, selection: Tensor, scale: float, latent_dim: int) -> Tensor:
    pieces = [
        (chosen @ gathered[..., :latent_dim]).to(query.dtype)
        for _, _, gathered, chosen in _selected_tiles(query, latents, selection, scale)
    ]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


class _SparseAttention(torch.autograd.Function):
    """mla_sparse for training: gathers again on the way back, so that only queries and latents are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, latents: Tensor, selection: Tensor, scale: float, latent_dim: int) -> Tensor:
        ctx.save_for_backward(query, latents, selection)
        ctx.scale, ctx.latent_dim = scale, latent_dim
        with _full_precision(query):
            result: Tensor = mla_sparse(
                query, latents, selection, scale, latent_dim
            )  # without gradients: a twin may run
            return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query, latents, selection = ctx.saved_tensors
        with _full_precision(query):
            slopes = mla_sparse_backward(query, latents, selection, gradients[0], ctx.scale)
        return *slopes, None, None, None


@operation
def mla_sparse_backward(
    query: Tensor, latents: Tensor, selection: Tensor, gradient: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of query [T, H, W] and latents [R, W] from that of what `mla_sparse` made of them, [T, H, C].

    They have the dtypes of query and latents; sums are in fp32.
    """
    wide, (width, latent_dim) = _compute_dtype(query), (query.shape[-1], gradient.shape[-1])
    latents_gradient = latents.new_zeros(latents.shape, dtype=wide)
    query_gradient = torch.empty_like(query)
    for place, rows, gathered, chosen in _selected_tiles(query, latents, selection, scale):
        out_THC = gradient[place].to(wide)
        by_choice = out_THC @ gathered[..., :latent_dim].transpose(1, 2)
        by_score = scale * chosen * (by_choice - (chosen * by_choice).sum(-1, keepdim=True))
        query_gradient[place] = (by_score @ gathered).to(query.dtype)
        # Each row serves as key (through the scores) and, in its first C numbers, as value.
        sources = torch.cat((query[place].to(wide), F.pad(out_THC, (0, width - latent_dim))), dim=1)
        torch.bmm(torch.cat((by_score, chosen), dim=1).transpose(1, 2), sources, out=gathered)
        latents_gradient.index_add_(0, rows.flatten(), gathered.flatten(0, 1))
    return query_gradient, latents_gradient.to(latents.dtype)


@operation
def mla_dense(query: Tensor, latents: Pool, layout: KeyLayout, scale: float, latent_dim: int) -> Tensor:
    """Absorbed MLA over all visible keys, with a running softmax over key tiles. Shapes as mla_sparse."""
    wide = _compute_dtype(query)
    output = []
    for b in range(layout.num_sequences):
        for begin in range(layout.sequence_starts[b], layout.sequence_starts[b + 1], 128):
            stop = min(begin + 128, layout.sequence_starts[b + 1])
            first_position = layout.num_past(b) + begin - layout.sequence_starts[b]
            seen = torch.arange(first_position, first_position + stop - begin, device=query.device)
            output.append(_running_softmax(query[begin:stop].to(wide) * scale, latents, layout, b, seen, latent_dim))
    return torch.cat(output).to(query.dtype)


def _running_softmax(
    query: Tensor, latents: Pool, layout: KeyLayout, sequence: int, last_seen: Tensor, latent_dim: int
) -> Tensor:
    visible = int(last_seen[-1]) + 1
    peak = query.new_full((*query.shape[:2], 1), float("-inf"))
    total = torch.zeros_like(peak)
    summed = query.new_zeros(*query.shape[:2], latent_dim)
    for start in range(0, visible, KEY_TILE):
        stop = min(start + KEY_TILE, visible)
        keys = layout.keys(latents, sequence, start, stop).to(query.dtype)
        scores = query @ keys.T
        hidden = torch.arange(start, stop, device=query.device) > last_seen[:, None]
        scores = scores.masked_fill(hidden[:, None], float("-inf"))
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        weights = (scores - new_peak).exp()
        rescale = (peak - new_peak).exp()
        total = total * rescale + weights.sum(-1, keepdim=True)
        summed = summed * rescale + weights @ keys[:, :latent_dim]
        peak = new_peak
    return summed / total


@operation
def mla_expanded(
    query: Tensor, latents: Pool, kv_b: Tensor, layout: KeyLayout, scale: float, masks: list[Tensor] | None = None
) -> Tensor:
    """MLA with keys and values expanded from the latents, causal over all visible keys (training, short prefill).

    query [T, H, N+P], latents pool [R, C+P], kv_b [H, N+V, C] -> [T, H, V] in query's dtype. masks: in training, the
    selected keys of each (short) sequence, bool [new, S]; gathering rows costs more than that there. Long contexts cost
    S x H x (N+P+V) numbers of transient memory: that is why sparse attention uses the absorbed form.
    """
    num_heads, expanded, latent_dim = kv_b.shape
    rope_dim = latents.shape[1] - latent_dim
    nope_dim = query.shape[-1] - rope_dim
    pieces = []
    for b in range(layout.num_sequences):
        keys = layout.keys(latents, b).to(query.dtype)
        key_value = F.linear(keys[:, :latent_dim], kv_b.reshape(-1, latent_dim))
        key_value = key_value.view(-1, num_heads, expanded).transpose(0, 1)
        key_rope = keys[:, latent_dim:].expand(num_heads, -1, -1)
        key = torch.cat((key_value[..., :nope_dim], key_rope), dim=-1)
        value = key_value[..., nope_dim:]
        new = query[layout.sequence_starts[b] : layout.sequence_starts[b + 1]].transpose(0, 1)
        pieces.append(
            _causal_attention(new, key, value, layout.num_past(b), scale, masks[b] if masks else None).transpose(0, 1)
        )
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _causal_attention(
    query_HTQ: Tensor, key_HSQ: Tensor, value_HSV: Tensor, num_past: int, scale: float, mask: Tensor | None
) -> Tensor:
    """Fused causal attention; with a past it goes by query tiles, so that the mask stays inside the workspace."""
    num_tokens, num_keys = query_HTQ.shape[1], key_HSQ.shape[1]
    value_dim = value_HSV.shape[-1]
    # The fused CPU kernel wants one width for keys and values; zero columns change nothing.
    value_HSV = F.pad(value_HSV, (0, key_HSQ.shape[-1] - value_dim)) if value_dim < key_HSQ.shape[-1] else value_HSV
    batch = [tensor[None] for tensor in (query_HTQ, key_HSQ, value_HSV)]
    if num_past == 0:
        attended = F.scaled_dot_product_attention(*batch, attn_mask=mask, is_causal=mask is None, scale=scale)
        return attended[0, ..., :value_dim]
    tile = max(1, _workspace_bytes() // 4 // (8 * num_keys))
    pieces = []
    for begin in range(0, num_tokens, tile):
        stop = min(begin + tile, num_tokens)
        visible = num_past + stop
        last_seen = torch.arange(num_past + begin, visible, device=query_HTQ.device)
        mask = torch.arange(visible, device=query_HTQ.device) <= last_seen[:, None]
        piece = F.scaled_dot_product_attention(
            batch[0][:, :, begin:stop], batch[1][:, :, :visible], batch[2][:, :, :visible], attn_mask=mask, scale=scale
        )
        pieces.append(piece[0, ..., :value_dim])
    return torch.cat(pieces, dim=1)


@operation
def moe_route(
    hidden: Tensor, weight: Tensor, bias: Tensor, num_chosen: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Sigmoid router without auxiliary loss: the bias takes part in the choice only (GLM-4.5, arXiv 2508.06471).

    hidden [T, D], weight [E, D], bias fp32 [E] -> experts int64 [T, A] (best first, ties to the lower number) and
    gates fp32 [T, A] = scale * sigmoid score, normalised over the chosen ones if asked for.
    """
    wide = _compute_dtype(hidden)
    with _full_precision(hidden):
        scores = F.linear(hidden.to(wide), weight.to(wide)).sigmoid()
    ranks = (scores.detach() + bias.to(wide)).sort(dim=-1, descending=True, stable=True).indices
    experts = ranks[:, :num_chosen].contiguous()  # the C++ kernel of `moe_experts` asks for that
    gates = scores.gather(1, experts)
    if normalise:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return experts, gates * scale


@operation
def moe_experts(hidden: Tensor, experts: Tensor, gates: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """sum_a gates[t, a] * down_e(silu(gate_e x) * up_e x) with e = experts[t, a]; tokens grouped by expert.

    hidden [T, D], experts int64 [T, A], gates [T, A], gate_up [E, 2F, D] (gate first), down [E, D, F] -> [T, D].
    Each product is that of `linear`, quantised weights included: the inputs of `down` are rounded anew.
    """
    gate_up, down = (part.plain() if isinstance(part, PackedWeight) else part for part in (gate_up, down))
    num_chosen = experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    tokens = order // num_chosen
    counts = experts.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    grouped = hidden.index_select(0, tokens).split(counts)
    outputs = [
        _expert_linear(swiglu(_expert_linear(rows, gate_up, e)), down, e) for e, rows in enumerate(grouped) if counts[e]
    ]
    scaled = torch.cat(outputs) * gates.flatten()[order, None].to(hidden.dtype)
    return torch.zeros_like(hidden).index_add(0, tokens, scaled.to(hidden.dtype))


def _expert_linear(x: Tensor, weight: Tensor | QuantizedWeight, expert: int) -> Tensor:
    """x [n, in] times the [out, in] weight of one expert, as in `linear`."""
    if isinstance(weight, QuantizedWeight):
        return multiply(x, weight.expert(expert), _workspace_bytes())
    return F.linear(x, weight[expert])


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last axis."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def selection_masks(selection: Tensor, layout: KeyLayout) -> list[Tensor]:
    """A selection of a packed layout as bool [new, S] per sequence."""
    assert layout.page_table is None, "with a cache, rows are gathered and never masked"
    masks = []
    for b in range(layout.num_sequences):
        start, stop = layout.sequence_starts[b], layout.sequence_starts[b + 1]
        rows = selection[start:stop]
        # Column 0 collects the padding and is dropped.
        mask = torch.zeros(stop - start, stop - start + 1, dtype=torch.bool, device=selection.device)
        masks.append(mask.scatter_(1, (rows.long() - start + 1).clamp(min=0), True)[:, 1:])
    return masks
