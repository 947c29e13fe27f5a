"""What a training step minimises: next-token loss, MTP loss and the indexer's distillation, from one forward pass.

Sources: MTP module and its weight, GLM-5 (arXiv 2602.15763) section 2; indexer KL, DeepSeek-V3.2 (arXiv 2512.02556)
section 2.1, the mean over the layers an indexer serves as in IndexCache (arXiv 2603.12201) section 3.2; balance of
experts, see `balance.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from indexshare.data.rows import IGNORED
from indexshare.errors import ConfigError
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import ForwardBatch, Trace
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.train.balance import Balance
from indexshare.train.cross_entropy import token_nats
from indexshare.train.distributed import global_sum
from indexshare.train.mtp import MtpLoss, Objective, mtp_loss
from indexshare.train.parallel import ContextShare


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Scalars of one step. lm, mtp: weighted nats per supervised token; index_kl: nats per query, see `index_loss`.

    With the objective "acceptance", mtp is a number of drafts; mtp_acceptance: by draft step, see `MtpLoss`.
    metrics: more to log; the balance loss (see `Balance`) of a step that trains it.
    """

    total: Tensor
    lm: Tensor
    mtp: Tensor
    index_kl: Tensor
    num_tokens: int
    expert_counts: dict[int, Tensor]
    mtp_acceptance: Tensor = field(default_factory=lambda: torch.empty(0))
    metrics: Mapping[str, float] = field(default_factory=dict)


def step_loss(
    model: GlmForCausalLM,
    token_ids: Tensor,
    targets: Tensor,
    positions: Tensor,
    loss_weights: Tensor,
    segment_starts: tuple[int, ...],
    *,
    attention: Literal["sparse", "dense"],
    trains: Literal["model", "indexer", "mtp", "all"] = "all",
    mtp_weight: float = 0.0,
    mtp_num_steps: int = 1,
    mtp_objective: Objective = "cross_entropy",
    index_weight: float = 1.0,
    index_stride: int = 1,
    index_target: Literal["selected", "visible"] = "selected",
    balance_weight: float = 0.0,
    recompute: bool = False,
    context: ContextShare | None = None,
) -> Losses:
    """Losses of one packed batch.

    token_ids, targets (next token, -100 = not supervised), positions: int64 [T] flat; loss_weights: [T], positive where
    supervised. segment_starts: offsets of the
    segments, T last; attention never crosses them. `trains`: "model" leaves the indexers out (dense attention only),
    "indexer" trains only them against the frozen model, "mtp" only the MTP layer, its indexer if index_weight is not
    zero; "all" everything. mtp_num_steps, mtp_objective: as in `mtp_loss`. The indexers' loss is taken over every
    index_stride-th token and over those that weigh more than one; over the keys that sparse attention selected, or over
    all visible ones. balance_weight: of the loss that balances experts inside each segment.
    recompute: keep only the inputs of layers for the way back (`Trace.kept_choices`).
    context: the ranks that divide the tokens of this batch, which all of them give whole. On several
    ranks the losses are this rank's part of the means over all ranks: they add up.
    """
    if trains == "mtp" and (mtp_weight <= 0.0 or model.mtp_stack is None):
        raise ConfigError("a phase that trains the MTP layer needs a model that has one, and mtp_loss_weight above 0")
    if balance_weight > 0.0 and context is not None:
        raise ConfigError("balance_loss_weight looks at whole sequences: set it to 0, or train with cp = 1")
    balance = Balance(segment_starts)
    wants_balance = balance_weight > 0.0 and trains != "indexer"
    trace = Trace(recompute=recompute, watch_router=balance if wants_balance else None)
    wants_index = trains != "model" and not (trains == "mtp" and index_weight == 0.0)
    queries = _index_queries(segment_starts, loss_weights, index_stride) if wants_index else None
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        layout=KeyLayout.packed(segment_starts),
        attention=attention,
        index_queries=None if trains == "mtp" else queries,
        index_target=index_target,
        trace=None if trains == "mtp" else trace,
    )
    zero = torch.zeros((), device=token_ids.device)
    mine, here = batch, slice(None)
    if context is not None:
        mine, here = context.part(batch), context.tokens(len(token_ids))
    num_tokens = int((targets[here] != IGNORED).sum())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains != "mtp"):
        hidden = model(mine)
    lm, mtp = zero, MtpLoss(loss=zero, acceptance=zero.new_zeros(0))
    if trains not in ("indexer", "mtp"):
        lm = _cross_entropy(model, hidden, targets[here], loss_weights[here])
    if mtp_weight > 0.0 or (trains == "indexer" and model.mtp_stack is not None):
        mtp = mtp_loss(
            model,
            hidden if context is None else context.gather(hidden),  # each rank all of it: one layer of many
            targets,
            loss_weights,
            replace(batch, index_queries=queries, trace=trace),
            num_steps=1 if trains == "indexer" else mtp_num_steps,
            objective=mtp_objective,
        )
    kl = zero
    if trace.index_losses:
        kl = index_loss(model.config, _shares_of_means(model.config, trace.index_losses, mine.index_queries, queries))
    model_loss = zero if trains == "indexer" else lm + mtp_weight * mtp.loss
    return Losses(
        total=model_loss + index_weight * kl + balance_weight * balance.loss(),
        lm=lm.detach(),
        mtp=mtp.loss.detach(),
        index_kl=kl.detach(),
        num_tokens=num_tokens,
        expert_counts=trace.expert_counts,
        mtp_acceptance=mtp.acceptance,
        metrics={"balance": float(balance.loss().detach())} if balance_weight > 0.0 else {},
    )


def index_loss(config: GlmConfig, by_layer: Mapping[int, Tensor]) -> Tensor:
    """L_multi of IndexCache: for each indexer the mean over the layers it serves, its own among them; their sum.

    by_layer: `Trace.index_losses`. It has the gradient of KL(mean attention of these layers || indexer).
    """
    groups: list[list[Tensor]] = []
    for layer, loss in sorted(by_layer.items()):
        if config.is_full(layer):
            groups.append([])
        groups[-1].append(loss)
    return torch.stack([torch.stack(group).mean() for group in groups]).sum()


def _shares_of_means(
    config: GlmConfig, by_layer: Mapping[int, Tensor], asked: list[Tensor] | None, asked_by_mtp: list[Tensor] | None
) -> dict[int, Tensor]:
    """Means over the tokens that this rank asks about, as its parts of the means over those of all ranks."""
    shares = {}
    for layer, loss in by_layer.items():
        own = torch.tensor(
            sum(map(len, (asked if layer < config.num_hidden_layers else asked_by_mtp) or ())), device=loss.device
        )
        shares[layer] = loss * (own / global_sum(own))
    return shares


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
    losses = token_nats(model, hidden.index_select(0, supervised), targets.index_select(0, supervised))
    weights = weights.index_select(0, supervised)
    return (losses * weights).sum() / global_sum(weights.sum())
