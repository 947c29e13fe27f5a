"""What a training step minimises: next-token loss, MTP loss and the indexer's distillation, from one forward pass.

Sources: MTP module and its weight, GLM-5 (arXiv 2602.15763) section 2; indexer KL, DeepSeek-V3.2 (arXiv 2512.02556)
section 2.1, the mean over the layers an indexer serves as in IndexCache (arXiv 2603.12201) section 3.2; balance of
experts, see `balance.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, distributed

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
from indexshare.train.pipeline import Pipeline


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
    pipeline: Pipeline | None = None,
    part_starts: tuple[int, ...] = (0,),
) -> Losses:
    """Losses of one packed batch.

    token_ids, targets (next token, -100 = not supervised), positions: int64 [T] flat; loss_weights: [T], positive where
    supervised. segment_starts: offsets of the segments, T last; attention never crosses them. `trains`: "model" leaves
    the indexers as they are, "indexer" trains only them against the frozen model, "mtp" only the MTP layer, its indexer
    if index_weight is not zero; "all" everything. mtp_num_steps, mtp_objective: as in `mtp_loss`. The indexers' loss is
    taken over every index_stride-th token and over those that weigh more than one (of long rows over fewer of these);
    over the keys that sparse attention selected, or over all visible ones. balance_weight: of the loss that balances
    experts inside each segment. recompute: keep only the inputs of layers for the way back (`Trace.kept_choices`).
    context: the ranks that divide the tokens of this batch, pipeline: the ranks that divide its layers; all of them
    give it whole. part_starts: offsets of segments at which the parts begin that stages work on at the same time.
    On several ranks the losses are this rank's part of the means over all ranks: they add up.
    """
    config = model.config
    if trains == "mtp" and (mtp_weight <= 0.0 or config.num_nextn_predict_layers == 0):
        raise ConfigError("a phase that trains the MTP layer needs a model that has one, and mtp_loss_weight above 0")
    if balance_weight > 0.0 and context is not None:
        raise ConfigError("balance_loss_weight looks at whole sequences: set it to 0, or train with cp = 1")
    wants_index = trains != "model" and not (trains == "mtp" and index_weight == 0.0)
    wants_mtp = mtp_weight > 0.0 or (trains == "indexer" and config.num_nextn_predict_layers > 0)
    num_drafts = 1 if trains == "indexer" else mtp_num_steps
    ranks = None if pipeline is None else pipeline.peers
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        layout=KeyLayout.packed(segment_starts),
        attention=attention,
        index_queries=_index_queries(segment_starts, loss_weights, index_stride) if wants_index else None,
        index_target=index_target,
    )
    passes = _Passes(recompute=recompute, wants_balance=balance_weight > 0.0 and trains != "indexer", ranks=ranks)
    bounds = tuple(pairwise((*part_starts, len(token_ids))))
    parts = [_part(batch, begin, end, context) for begin, end in bounds]
    parts = [replace(part, index_queries=None) if trains == "mtp" else passes.watch(part) for part in parts]
    here = torch.cat([_own_tokens(begin, end, context) for begin, end in bounds]).to(token_ids.device)
    zero = lent = torch.zeros((), device=token_ids.device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains != "mtp"):
        if pipeline is None:
            outputs = [model(part) for part in parts]
        else:
            wants_gradient = torch.is_grad_enabled() and trains != "indexer"
            outputs = pipeline.run(model, parts, wants_gradient=wants_gradient)
            if wants_mtp:
                lent = pipeline.lend(model, token_ids, wants_gradient=wants_gradient)
    mtp = MtpLoss(loss=zero, acceptance=zero.new_zeros(num_drafts if wants_mtp else 0))
    is_last = pipeline is None or pipeline.is_last
    if not is_last:
        lm = torch.stack(outputs).sum() + lent
    else:
        own_hidden = torch.cat(outputs)
        lm = zero
        if trains not in ("indexer", "mtp"):
            lm = _cross_entropy(model, own_hidden, targets[here], loss_weights[here], ranks)
        if wants_mtp:  # each rank all of it: one layer of many
            mtp = mtp_loss(
                model,
                own_hidden if context is None else torch.cat([context.gather(hidden) for hidden in outputs]),
                targets,
                loss_weights,
                passes.watch(batch),
                num_steps=num_drafts,
                objective=mtp_objective,
                ranks=ranks,
            )
    index_losses = passes.index_losses()
    kl = index_loss(config, index_losses) if index_losses else zero
    balance = passes.balance(zero + len(token_ids)) if balance_weight > 0.0 else zero
    model_loss = zero if trains == "indexer" else lm + mtp_weight * mtp.loss
    ran = [layer for layer, kind in enumerate(config.mlp_layer_types) if kind == "sparse" and trains != "mtp"]
    ran += [config.num_hidden_layers] * wants_mtp
    return Losses(
        total=model_loss + index_weight * kl + balance_weight * balance,
        lm=lm.detach(),
        mtp=mtp.loss.detach(),
        index_kl=kl.detach(),
        num_tokens=int((targets[here] != IGNORED).sum()) if is_last else 0,
        expert_counts=passes.expert_counts(ran, zero.new_zeros(config.n_routed_experts, dtype=torch.int64)),
        mtp_acceptance=mtp.acceptance,
        metrics={"balance": float(balance.detach())} if balance_weight > 0.0 else {},
    )


class _Passes:
    """Forward passes over parts of a batch and by the MTP layer, each with a trace of its own, and what they add up to.

    ranks: those that run the same layers, None for all.
    """

    def __init__(self, *, recompute: bool, wants_balance: bool, ranks: distributed.ProcessGroup | None) -> None:
        self._recompute, self._wants_balance, self._ranks = recompute, wants_balance, ranks
        self._passes: list[tuple[ForwardBatch, Trace, Balance]] = []

    def watch(self, batch: ForwardBatch) -> ForwardBatch:
        """The batch with a trace."""
        balance = Balance(batch.layout.sequence_starts)
        trace = Trace(recompute=self._recompute, watch_router=balance if self._wants_balance else None)
        self._passes.append((batch, trace, balance))
        return replace(batch, trace=trace)

    def index_losses(self) -> dict[int, Tensor]:
        """By layer, this rank's part of the mean over the tokens that all ranks ask about."""
        asked = [sum(map(len, batch.index_queries or ())) for batch, _, _ in self._passes]
        shares: dict[int, Tensor] = {}
        for layer in sorted({layer for _, trace, _ in self._passes for layer in trace.index_losses}):
            found = [
                (trace.index_losses[layer], num_tokens)
                for (_, trace, _), num_tokens in zip(self._passes, asked, strict=True)
                if layer in trace.index_losses
            ]
            own = torch.tensor([num_tokens for _, num_tokens in found], device=found[0][0].device)
            shares[layer] = (
                torch.stack([loss for loss, _ in found]) * (own / global_sum(own.sum(), self._ranks))
            ).sum()
        return shares

    def balance(self, num_tokens: Tensor) -> Tensor:
        """This rank's part of the mean over all tokens, of which it has that many, a scalar."""
        of_all = global_sum(num_tokens, self._ranks)
        shares = [balance.loss() * (balance.num_tokens / of_all) for _, _, balance in self._passes]
        return torch.stack(shares).sum() if shares else torch.zeros_like(of_all)

    def expert_counts(self, layers: Iterable[int], nothing: Tensor) -> dict[int, Tensor]:
        """By layer, [E]; `nothing` for those that other ranks run."""
        traces = [trace for _, trace, _ in self._passes]
        return {layer: sum((trace.expert_counts.get(layer, nothing) for trace in traces), nothing) for layer in layers}


def _part(batch: ForwardBatch, begin: int, end: int, context: ContextShare | None) -> ForwardBatch:
    """The segments from one token to another, of these on several ranks this rank's tokens."""
    starts = batch.layout.sequence_starts
    inside = [index for index, start in enumerate(starts[:-1]) if begin <= start < end]
    part = replace(
        batch,
        token_ids=batch.token_ids[begin:end],
        positions=batch.positions[begin:end],
        layout=KeyLayout.packed((*(starts[index] - begin for index in inside), end - begin)),
        index_queries=None if batch.index_queries is None else [batch.index_queries[index] for index in inside],
    )
    return part if context is None else context.part(part)


def _own_tokens(begin: int, end: int, context: ContextShare | None) -> Tensor:
    """int64: which tokens of a part are this rank's, as places in the batch."""
    tokens = torch.arange(begin, end)
    return tokens if context is None else tokens[context.tokens(end - begin)]


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


def _index_queries(segment_starts: tuple[int, ...], loss_weights: Tensor, stride: int) -> list[Tensor]:
    """Tokens of each segment over which the indexers' loss is taken: every stride-th, and those that weigh more than
    one, because what they look for is far away: all of them, of long rows (with a stride above 128) fewer."""
    places = torch.arange(len(loss_weights), device=loss_weights.device)
    weighty = (loss_weights > 1.0) & (places % max(1, stride // 128) == 0)
    return [
        ((places[: stop - start] % stride == 0) | weighty[start:stop]).nonzero().flatten()
        for start, stop in pairwise(segment_starts)
    ]


def _cross_entropy(
    model: GlmForCausalLM,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    ranks: distributed.ProcessGroup | None,
) -> Tensor:
    """Weighted mean over supervised tokens; only their logits are computed."""
    supervised = (targets != IGNORED).nonzero().flatten()
    losses = token_nats(model, hidden.index_select(0, supervised), targets.index_select(0, supervised))
    weights = weights.index_select(0, supervised)
    return (losses * weights).sum() / global_sum(weights.sum(), ranks)
