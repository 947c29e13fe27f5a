"""The model spread over the ranks of a mesh: sharded parameters (FSDP2), experts and tokens at home on some ranks.

- Parameters, gradients and optimizer states lie in equal shards on all ranks; a layer is gathered before it runs,
  forward and backward, and its gradients are summed and scattered after.
- Experts are divided over `ep` first, each rank's then sharded over the other ranks. Tokens travel to their experts and
  back (all-to-all).
- Over `cp` the tokens of a batch are divided. A token's key is one latent row and in full layers one index key, which
  are small; so each rank gathers the keys of all and keeps its queries. The choice runs over gathered keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from indexshare.errors import ConfigError
from indexshare.kernels import ops
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import ForwardBatch
from indexshare.model.glm import Attention, DecoderLayer, GlmForCausalLM, MixtureOfExperts, MtpLayer
from indexshare.train.distributed import Mesh, communication_device, is_main, local, rank
from indexshare.train.pipeline import cut, stage_of


class StepModule(nn.Module):
    """Model and loss as one module: FSDP2 gathers and scatters around calls of modules, and a loss needs the head."""

    def __init__(self, model: nn.Module, step_loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.step_loss = step_loss

    def forward(self, batch: Any, phase: Any) -> tuple[Tensor, Any]:
        """-> the total, which is differentiated, and all losses."""
        losses = self.step_loss(self.model, batch, phase)
        return losses.total, losses


Weights = Iterable[tuple[str, Tensor]]


def parallelize(step: StepModule, mesh: Mesh, *, precision: str = "fp32") -> None:
    """Spreads the model in `step` over the ranks, in place; without torch.distributed nothing happens.

    Each rank has built the same whole model, on its device or on "meta": then `fill` gives it weights.
    precision "bf16": layers are gathered in BF16, gradients summed in fp32.
    Raises ConfigError when experts do not divide over `ep`, and layers not into as many stages as `pp`.
    """
    if not distributed.is_initialized():
        return
    model = step.model
    assert isinstance(model, GlmForCausalLM)
    device = communication_device().type
    cut(model, mesh.pp, mesh.stage)
    everything = init_device_mesh(device, (mesh.pp, mesh.stage_ranks), mesh_dim_names=("pp", "all"))["all"]
    by_expert = init_device_mesh(device, (mesh.pp, mesh.dp * mesh.cp, mesh.ep), mesh_dim_names=("pp", "shard", "ep"))
    if model.config.n_routed_experts % mesh.ep:
        raise ConfigError(f"{model.config.n_routed_experts} experts do not divide over ep {mesh.ep}")
    # A shared layer hands on the selection that it was given, which nobody changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32 if precision == "bf16" else None,
        cast_forward_inputs=False,
    )
    # The loop moves these, not gradients, by the same counts everywhere: a copy on each rank.
    biases = {value for name, value in model.named_parameters() if name.endswith("e_score_correction_bias")}
    sharded: list[Any] = []
    for layer in model.model.layers:
        if not isinstance(layer, DecoderLayer):
            continue  # of another stage
        is_mtp = isinstance(layer, MtpLayer)
        # a stage runs its layers several times in a step, and gathers them once
        options: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": is_mtp or mesh.pp == 1}
        if isinstance(layer.mlp, MixtureOfExperts):
            experts = layer.mlp.experts
            for name, weight in tuple(experts.named_parameters()):
                placed = distribute_tensor(weight.data, by_expert["ep"], [Shard(0)], src_data_rank=None)
                setattr(experts, name, nn.Parameter(placed))
            experts.dispatch = ExpertDispatch(by_expert["ep"].get_group())
            sharded.append(fully_shard(experts, mesh=by_expert["shard"], shard_placement_fn=_by_rows, **options))
        # Parts of the MTP layer are used outside of its call: all but attention and experts go to the root.
        part = layer.self_attn if is_mtp else layer
        sharded.append(fully_shard(part, mesh=everything, ignored_params=biases, **options))
        if layer.self_attn.indexer is not None:
            layer.self_attn.register_forward_hook(_unshard_for_index_loss(part))
    # The root, too, keeps nothing whole between forward and backward: a step may be given up there.
    sharded.append(fully_shard(step, mesh=everything, ignored_params=biases, reshard_after_forward=True))
    for module in sharded:
        module.set_gradient_divide_factor(1.0)  # losses are divided by global counts already: gradients just add up
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other


@torch.no_grad()
def fill(step: StepModule, weights: Weights) -> None:
    """Gives a model on "meta" that has been spread over ranks its weights: each rank keeps its shards of those it runs.

    weights: all names with whole values, one after the other, the same on all ranks; never all of them in memory.
    """
    step.to_empty(device=communication_device())
    waiting = dict(step.model.named_parameters())
    for name, value in weights:
        place = waiting.pop(name, None)
        if isinstance(place, DTensor):
            whole = value.to(place.device, place.dtype)
            value = distribute_tensor(whole, place.device_mesh, place.placements, src_data_rank=None).to_local()
        if place is not None:
            local(place).copy_(value)
    assert not waiting, f"no weights for {sorted(waiting)[:3]}"


def context_share(mesh: Mesh, device: str) -> ContextShare | None:
    """The ranks that divide the tokens of their common rows; None where nobody does."""
    if mesh.cp == 1:
        return None
    ranks = init_device_mesh(device, (mesh.pp, mesh.dp, mesh.cp, mesh.ep), mesh_dim_names=("pp", "dp", "cp", "ep"))
    return ContextShare(group=ranks["cp"].get_group())


def _by_rows(weight: nn.Parameter) -> Shard:
    """Experts [E, rows, columns]: whole experts lie apart already."""
    return Shard(1)


def _unshard_for_index_loss(unit: Any) -> Callable[..., None]:
    """A hook for attention: gather its layer again before the way back through its index loss.

    FSDP2 gathers when a gradient comes to a module's outputs, and the index loss is none of them.
    """

    def hook(attention: Attention, inputs: tuple[Any, ...], output: Any) -> None:
        trace = inputs[2].trace
        loss = trace.index_losses.get(attention.layer) if trace is not None else None
        if loss is not None and loss.requires_grad:
            loss.register_hook(lambda gradient: unit.unshard())

    return hook


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, `send[i]` to rank i, `receive[i]` from it; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: distributed.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        result = rows.new_empty(sum(receive), *rows.shape[1:])
        distributed.all_to_all_single(result, rows.contiguous(), receive, send, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        result = gradients[0].new_empty(sum(ctx.send), *gradients[0].shape[1:])
        distributed.all_to_all_single(result, gradients[0].contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return result, None, None, None


class ExpertDispatch:
    """`ops.moe_experts` with experts on several ranks: each token's rows go to the ranks of its experts and back."""

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.group = group

    def __call__(self, hidden: Tensor, experts: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Arguments as there, but gate_up and down are this rank's experts, which are consecutive."""
        gate_up, down = local(gate_up), local(down)
        num_local = gate_up.shape[0]
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        tokens = order // experts.shape[1]
        counts = flat.bincount(minlength=num_local * self.group.size()).view(-1, num_local)
        arriving = torch.empty_like(counts)
        distributed.all_to_all_single(arriving, counts, group=self.group)
        send, receive = counts.sum(1).tolist(), arriving.sum(1).tolist()
        sent = hidden.index_select(0, tokens)
        if torch.is_autocast_enabled(hidden.device.type):  # the experts would round it on arrival
            sent = sent.to(torch.get_autocast_dtype(hidden.device.type))
        rows = _Exchange.apply(sent, send, receive, self.group)
        labels = torch.arange(num_local, device=hidden.device).repeat(self.group.size())
        done = self._run(rows, labels.repeat_interleave(arriving.flatten()), gate_up, down)
        returned = _Exchange.apply(done, receive, send, self.group)
        scaled = returned * gates.flatten()[order, None].to(hidden.dtype)
        return torch.zeros_like(hidden).index_add(0, tokens, scaled.to(hidden.dtype))

    def _run(self, rows: Tensor, labels: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        if len(rows) == 0:
            # nobody came; weights need a gradient all the same, because the ranks that share them wait for it
            return nn.functional.linear(ops.swiglu(nn.functional.linear(rows, gate_up[0])), down[0])
        ones = torch.ones(len(rows), 1, dtype=torch.float32, device=rows.device)
        return ops.moe_experts(rows, labels[:, None], ones, gate_up, down)


def _collective(name: str, old_name: str) -> Callable[..., Any]:
    """A function of torch.distributed; torch 2.13 gave some a new name, and warns of the old one."""
    return getattr(distributed, name if hasattr(distributed, name) else old_name)


_all_gather = _collective("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")


class _Gather(torch.autograd.Function):
    """Rows [n, ...] of all ranks in order, [ranks * n, ...]; a gradient goes to the rank that its row came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        result = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
        _all_gather(result, rows.contiguous(), group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous()
        result = whole.new_empty(whole.shape[0] // ctx.group.size(), *whole.shape[1:])
        _reduce_scatter(result, whole, group=ctx.group)
        return result, None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShare:
    """One rank's part of the tokens of a flat batch, which are divided evenly among the ranks of a group."""

    group: distributed.ProcessGroup

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of this rank -> [ranks * n, ...] of all, in the order of the batch."""
        result: Tensor = _Gather.apply(rows, self.group)
        return result

    def tokens(self, num_tokens: int) -> slice:
        """Which of the batch's tokens are this rank's. Raises ConfigError when they do not divide."""
        if num_tokens % self.group.size():
            raise ConfigError(f"{num_tokens:,} tokens do not divide among {self.group.size()} ranks (cp)")
        share = num_tokens // self.group.size()
        return slice(self.group.rank() * share, (self.group.rank() + 1) * share)

    def part(self, batch: ForwardBatch) -> ForwardBatch:
        """This rank's part of a packed batch: its queries, among the keys of all."""
        tokens = self.tokens(batch.layout.num_tokens)
        starts = batch.layout.sequence_starts
        pieces = [
            (max(start, tokens.start), min(stop, tokens.stop), start, index)
            for index, (start, stop) in enumerate(pairwise(starts))
            if start < tokens.stop and stop > tokens.start
        ]
        lengths = tuple(end - start for _, end, start, _ in pieces)
        table = torch.zeros(len(pieces), max(lengths), dtype=torch.int64)
        for row, (_, end, start, _) in zip(table, pieces, strict=True):
            row[: end - start] = torch.arange(start, end)
        queries = batch.index_queries
        if queries is not None:
            inside = [(queries[index] + start, begin, end) for begin, end, start, index in pieces]
            queries = [places[(places >= begin) & (places < end)] - begin for places, begin, end in inside]
        return replace(
            batch,
            token_ids=batch.token_ids[tokens],
            positions=batch.positions[tokens],
            layout=KeyLayout(
                sequence_starts=(*(begin - tokens.start for begin, *_ in pieces), tokens.stop - tokens.start),
                context_lengths=lengths,
                page_table=table,
            ),
            index_queries=queries,
            gather=self.gather,
        )


def whole_model(model: GlmForCausalLM, mesh: Mesh) -> GlmForCausalLM:
    """The model without shards: in the main process a copy on the CPU, elsewhere one without memory. For all ranks."""
    if not distributed.is_initialized():
        return model
    with torch.device("cpu" if is_main() else "meta"):
        whole = GlmForCausalLM(model.config)
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, target in whole.named_parameters():
            stage = stage_of(name, model.config, mesh.pp)
            value = torch.empty(
                target.shape, dtype=target.dtype, device=communication_device() if is_main() else "meta"
            )
            if stage == mesh.stage:
                parameter = held[name].detach()
                value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                if stage > 0 and rank() == stage * mesh.stage_ranks:
                    distributed.send(value.contiguous(), 0)
            elif is_main():
                distributed.recv(value, stage * mesh.stage_ranks)
            if is_main():
                target.copy_(value)
    return whole
