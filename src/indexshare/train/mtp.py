"""The loss of the MTP layer: several draft steps of every token at once, each as the engine drafts.

Step 1 reads (hidden state i, token i+1) for all tokens i: it writes the layer's keys and runs its indexer. Step k
reads (what step k-1 predicted from, token i+k) at position i+k-1 and only queries, with the keys and the selection that
step 1 made for i. It predicts token i+k+1. So training and inference see the same keys, none of them of drafted tokens.

Two objectives: cross-entropy, and the expected number of accepted drafts. Sources: MTP with shared parameters, GLM-5
(arXiv 2602.15763) section 2; IndexShare and KVShare for MTP and the end-to-end total-variation loss, GLM-5.2 blog;
acceptance 1 - TV(p, q) of a draft, rejection sampling (arXiv 2211.17192).
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from indexshare.model.batch import ForwardBatch
from indexshare.model.glm import GlmForCausalLM
from indexshare.train.cross_entropy import tile_rows, token_nats
from indexshare.train.distributed import global_sum

Objective = Literal["cross_entropy", "acceptance"]

STEP_DECAY = 0.8  # weight of a step's cross-entropy over the one before: a late draft counts only if all before do
WATCHED_TOKENS = 256  # over so many the acceptance is logged while something else is minimised


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpLoss:
    """loss: scalar; nats, or drafts that are expected to be rejected. acceptance: [steps], mean of 1 - TV(p, q) for a
    draft whose predecessors were the text's own tokens."""

    loss: Tensor
    acceptance: Tensor


def mtp_loss(
    model: GlmForCausalLM,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    batch: ForwardBatch,
    *,
    num_steps: int = 1,
    objective: Objective = "cross_entropy",
    ranks: distributed.ProcessGroup | None = None,
) -> MtpLoss:
    """The loss of `num_steps` drafts after every token of a packed batch; no step looks beyond its segment.

    hidden: [T, D] of the model after its final norm; targets: next tokens int64 [T], -100 = not supervised; weights
    [T]. "cross_entropy" is the mean over steps, each weighing STEP_DECAY of the one before, of the mean over tokens.
    "acceptance" is n - E[accepted] = n - sum_j prod_{k<=j} sum_y min(p_k(y), q_k(y)), with p the model's distribution
    and q the draft's, where n are the steps (fewer at the end of a segment or of what is supervised); its gradient
    reaches the MTP layer only, not p, `hidden` or the output matrix. Means are over the tokens of `ranks`, by default
    of all.
    """
    supervised = _supervision(targets, weights, batch.layout.sequence_starts, num_steps)
    totals = global_sum(supervised.sum(1), ranks)
    source = hidden.detach() if objective == "acceptance" else hidden
    drafts = draft_states(model, source, batch, num_steps)
    # of the token that a row is read after: what it predicts with all steps, the model itself included, is one token
    rows = supervised[0].nonzero().flatten() + 1
    if len(rows) == 0:
        return MtpLoss(loss=0.0 * drafts[0].sum(), acceptance=hidden.new_zeros(num_steps))
    if objective == "acceptance":
        accepted = _acceptance(model, hidden, drafts, rows)
        means = _step_means(accepted.detach(), rows, supervised)
        return MtpLoss(loss=_rejected(accepted, rows, supervised, totals[0]), acceptance=means)
    total = sum(
        (
            STEP_DECAY**step * _cross_entropy(model, draft, targets, supervised[step], totals[step], step + 1)
            for step, draft in enumerate(drafts)
        ),
        start=torch.zeros((), device=hidden.device),
    )
    watched = rows[:: -(-len(rows) // WATCHED_TOKENS)]
    with torch.no_grad():
        means = _step_means(_acceptance(model, hidden, drafts, watched), watched, supervised)
    return MtpLoss(loss=total / sum(STEP_DECAY**step for step in range(num_steps)), acceptance=means)


def draft_states(model: GlmForCausalLM, hidden: Tensor, batch: ForwardBatch, num_steps: int) -> list[Tensor]:
    """What each step predicts from, [T, D] after the MTP layer's own norm, for every token of a packed batch.

    Near the end of a segment later steps run out of tokens: what they give there means nothing.
    """
    draft, selected = model.mtp(hidden, _tokens_after(batch, 1), batch)
    drafts = [draft]
    for step in range(1, num_steps):
        later = replace(batch, positions=batch.positions + step, query_only=True, index_queries=None, trace=None)
        draft, _ = model.mtp(draft, _tokens_after(batch, 1 + step), later, selected)
        drafts.append(draft)
    return drafts


def _tokens_after(batch: ForwardBatch, distance: int) -> Tensor:
    """[T]: the token that many places on, at the end of a segment its last one: a row must not depend on the next."""
    bounds = pairwise(batch.layout.sequence_starts)
    last = torch.cat([torch.full((stop - start,), stop - 1) for start, stop in bounds]).to(batch.token_ids.device)
    places = torch.arange(len(last), device=last.device) + distance
    return batch.token_ids[torch.minimum(places, last)]


def _supervision(targets: Tensor, weights: Tensor, segment_starts: tuple[int, ...], num_steps: int) -> Tensor:
    """[steps, T]: what the token predicted by step k + 1 of token i weighs; 0 where there is none in the segment."""
    weights = torch.where(targets >= 0, weights, 0.0)
    left = torch.cat([torch.arange(stop - start, 0, -1) for start, stop in pairwise(segment_starts)]).to(weights.device)
    return torch.stack([torch.where(left > step, weights.roll(-step), 0.0) for step in range(1, num_steps + 1)])


def _cross_entropy(
    model: GlmForCausalLM, draft: Tensor, targets: Tensor, weights: Tensor, total: Tensor, step: int
) -> Tensor:
    """Weighted mean over tokens that weigh something, 0 for none; total: what those of all ranks weigh."""
    tokens = weights.nonzero().flatten()
    if len(tokens) == 0:
        return weights.new_zeros(())

    losses = token_nats(model, draft.index_select(0, tokens), targets.index_select(0, tokens + step))
    return (losses * weights.index_select(0, tokens)).sum() / total


class _Acceptance(torch.autograd.Function):
    """sum_y min(p(y), q(y)) [steps, m] of drafts [steps, m, D] against the model's hidden states [m, D].

    Each number depends on one draft only. So its slope [D] is found beside it, tile by tile, and nothing as wide as the
    vocabulary waits for the way back.
    """

    @staticmethod
    def forward(ctx: Any, drafts: Tensor, hidden: Tensor, model: GlmForCausalLM) -> Tensor:
        wants_slopes = ctx.needs_input_grad[0]
        slopes = torch.zeros_like(drafts)
        tiles = []
        for start in range(0, len(hidden), tile_rows(model)):
            tile = slice(start, start + tile_rows(model))
            target = model.logits(hidden[tile]).softmax(-1)
            sums = []
            for step, states in enumerate(drafts[:, tile]):
                with torch.set_grad_enabled(wants_slopes):
                    states = states.detach().requires_grad_(wants_slopes)
                    common = torch.minimum(target, model.logits(states).softmax(-1)).sum(-1)
                    if wants_slopes:
                        (slopes[step, tile],) = torch.autograd.grad(common.sum(), states)
                sums.append(common.detach())
            tiles.append(torch.stack(sums))
        ctx.save_for_backward(slopes)
        return torch.cat(tiles, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return gradients[0][..., None].to(slopes.dtype) * slopes, None, None


def _acceptance(model: GlmForCausalLM, hidden: Tensor, drafts: list[Tensor], rows: Tensor) -> Tensor:
    """[steps, m]: 1 - TV of the draft of step k + 1 from the model's distribution after token rows[m].

    The draft is that of token rows[m] - (k + 1): of the batch's first token where that is before the batch.
    """
    states = [draft.index_select(0, (rows - 1 - step).clamp(min=0)) for step, draft in enumerate(drafts)]
    result: Tensor = _Acceptance.apply(torch.stack(states), hidden.detach().index_select(0, rows), model)
    return result


def _rejected(accepted: Tensor, rows: Tensor, supervised: Tensor, total: Tensor) -> Tensor:
    """Drafts that a round of drafting is expected to lose: the weighted mean over the tokens rows - 1 it starts after.

    accepted: [steps, m] by the row that a draft competes with. A round ends where a draft is not supervised.
    """
    anchors = rows - 1
    place = torch.zeros(supervised.shape[1], dtype=torch.int64, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    weight = supervised[0, anchors]
    kept = torch.ones_like(weight, dtype=accepted.dtype)
    lost = torch.zeros_like(kept)
    for step, sums in enumerate(accepted):
        goes_on = (supervised[: step + 1, anchors] > 0).all(0)
        competes = place[(anchors + 1 + step).clamp(max=len(place) - 1)]
        kept = torch.where(goes_on, kept * sums[competes], 0.0)
        lost = lost + goes_on - kept
    return (lost * weight).sum() / total


def _step_means(accepted: Tensor, rows: Tensor, supervised: Tensor) -> Tensor:
    """[steps]: mean of each step over the rows that it has a draft for; 0 for none."""
    means = []
    for step, sums in enumerate(accepted):
        before = rows - 1 - step
        has_draft = (before >= 0) & (supervised[step, before.clamp(min=0)] > 0)
        means.append(sums[has_draft].sum() / has_draft.sum().clamp(min=1))
    return torch.stack(means)
