"""What a training step minimises: next-token loss, MTP loss and the indexer's distillation, from one forward pass.

Sources: MTP module and its weight, GLM-5 (arXiv 2602.15763) section 2; indexer KL, DeepSeek-V3.2 (arXiv 2512.02556)
section 2.1, summed over the layers an indexer serves as in IndexCache (arXiv 2603.12201).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from indexshare.data.rows import IGNORED
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import ForwardBatch, Trace
from indexshare.model.glm import GlmForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Scalars of one step. lm, mtp: weighted nats per supervised token; index_kl: nats per query, over all layers."""

    total: Tensor
    lm: Tensor
    mtp: Tensor
    index_kl: Tensor
    num_tokens: int
    expert_counts: dict[int, Tensor]


def step_loss(
    model: GlmForCausalLM,
    token_ids: Tensor,
    targets: Tensor,
    positions: Tensor,
    loss_weights: Tensor,
    segment_starts: tuple[int, ...],
    *,
    attention: Literal["sparse", "dense"],
    trains: Literal["model", "indexer", "all"] = "all",
    mtp_weight: float = 0.0,
    index_weight: float = 1.0,
    index_stride: int = 1,
    index_target: Literal["selected", "visible"] = "selected",
) -> Losses:
    """Losses of one packed batch.

    token_ids, targets (next token, -100 = not supervised), positions: int64 [T] flat; loss_weights: [T], positive where
    supervised. segment_starts: offsets of the
    segments, T last; attention never crosses them. `trains`: "model" leaves the indexers out (dense attention only),
    "indexer" trains only them against the frozen model, "all" both. The indexers' loss is taken over every
    index_stride-th token and over those that weigh more than one; over the keys that sparse attention selected, or over
    all visible ones.
    """
    trace = Trace()
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        layout=KeyLayout.packed(segment_starts),
        attention=attention,
        index_queries=None if trains == "model" else _index_queries(segment_starts, loss_weights, index_stride),
        index_target=index_target,
        trace=trace,
    )
    zero = torch.zeros((), device=token_ids.device)
    num_tokens = int((targets != IGNORED).sum())
    hidden = model(batch)
    lm = mtp = zero
    if trains != "indexer":
        lm = _cross_entropy(model, hidden, targets, loss_weights)
    if mtp_weight > 0.0 or trains == "indexer":
        mtp = _mtp_loss(model, hidden, targets, loss_weights, segment_starts, batch)
    kl = torch.stack(list(trace.index_losses.values())).sum() if trace.index_losses else zero
    model_loss = zero if trains == "indexer" else lm + mtp_weight * mtp
    return Losses(
        total=model_loss + index_weight * kl,
        lm=lm.detach(),
        mtp=mtp.detach(),
        index_kl=kl.detach(),
        num_tokens=num_tokens,
        expert_counts=trace.expert_counts,
    )


def _index_queries(segment_starts: tuple[int, ...], loss_weights: Tensor, stride: int) -> list[Tensor]:
    """Tokens of each segment over which the indexers' loss is taken: every stride-th, and all that weigh more than one,
    because what they look for is far away."""
    return [
        ((torch.arange(stop - start, device=loss_weights.device) % stride == 0) | (loss_weights[start:stop] > 1.0))
        .nonzero()
        .flatten()
        for start, stop in pairwise(segment_starts)
    ]


def _cross_entropy(model: GlmForCausalLM, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over supervised tokens; only their logits are computed."""
    supervised = (targets != IGNORED).nonzero().flatten()
    logits = model.logits(hidden.index_select(0, supervised))
    losses = functional.cross_entropy(logits, targets.index_select(0, supervised), reduction="none")
    weights = weights.index_select(0, supervised)
    return (losses * weights).sum() / weights.sum()


def _mtp_loss(
    model: GlmForCausalLM,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    segment_starts: tuple[int, ...],
    batch: ForwardBatch,
) -> Tensor:
    """Token i sees the embedding of token i+1 and predicts token i+2, inside its segment."""
    next_ids = batch.token_ids.roll(-1)
    after_next = targets.roll(-1)
    ends = torch.tensor(segment_starts[1:], device=targets.device) - 1
    after_next[ends] = IGNORED
    draft, _ = model.mtp(hidden, next_ids, batch)
    return _cross_entropy(model, draft, after_next, weights.roll(-1))
