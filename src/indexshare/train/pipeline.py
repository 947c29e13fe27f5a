"""Pipelines: each stage runs some of the layers, and hidden states travel from stage to stage, gradients back.

A shared layer uses the choice of the last full layer before it. A stage that began with one would need that choice,
int32 [T, index_topk], from the stage before; so every stage begins with a full layer and needs the hidden states alone.

Each row of a batch is a part of its own: a stage runs one part after the other, so that stages work at the same time,
and on the way back the last part first (GPipe, arXiv 1811.06965). The MTP layer lies on the last stage and the
embedding, which it borrows, on the first: the rows that it needs travel once in a step, their gradients back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from indexshare.errors import ConfigError
from indexshare.model.batch import ForwardBatch
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM, LayerStack, run_layers
from indexshare.train.distributed import Mesh, rank


def check_stages(config: GlmConfig, first_layers: tuple[int, ...]) -> None:
    """Raises ConfigError unless these (from 0, ascending) can begin stages that only hidden states pass between."""
    if first_layers[:1] != (0,) or list(first_layers) != sorted(set(first_layers)):
        raise ConfigError(f"stages begin at layer 0 and ascend, not at {first_layers}")
    for layer in first_layers:
        if layer >= config.num_hidden_layers or not config.is_full(layer):
            near = min(config.full_layers, key=lambda full: abs(full - layer))
            raise ConfigError(f"a stage cannot begin at layer {layer}, which has no indexer; the nearest is {near}")


def choose_stages(config: GlmConfig, num_stages: int) -> tuple[int, ...]:
    """First layers of stages of which the longest is as short as it can be. Raises ConfigError for too many stages."""
    full, end = config.full_layers, config.num_hidden_layers
    if not 1 <= num_stages <= len(full):
        raise ConfigError(f"{len(full)} full layers begin at most as many stages, not {num_stages}")
    # best[i]: the longest stage and the first layers when the layers from full[i] on make `stages` stages
    best = {index: (end - layer, (layer,)) for index, layer in enumerate(full)}
    for _ in range(num_stages - 1):
        best = {
            index: min(
                (max(full[after] - layer, longest), (layer, *rest))
                for after, (longest, rest) in best.items()
                if after > index
            )
            for index, layer in enumerate(full)
            if any(after > index for after in best)
        }
    return best[0][1]


def stage_layers(config: GlmConfig, num_stages: int) -> tuple[range, ...]:
    """The layers of each stage, without the MTP layer. Raises ConfigError when the model has no such stages."""
    first = choose_stages(config, num_stages)
    check_stages(config, first)
    if config.tie_word_embeddings and num_stages > 1:
        raise ConfigError("embedding and head are one matrix here, and lie on two stages: train with pp = 1")
    return tuple(map(range, first, (*first[1:], config.num_hidden_layers)))


def stage_of(name: str, config: GlmConfig, num_stages: int) -> int:
    """The stage that holds a parameter."""
    if name.startswith("model.embed_tokens."):
        return 0
    stages = stage_layers(config, num_stages)
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else config.num_hidden_layers
    return next((stage for stage, layers in enumerate(stages) if layer in layers), num_stages - 1)


class BorrowedEmbedding(nn.Module):
    """On a stage that does not hold the embedding: the rows of the step's tokens, which `Pipeline.lend` puts here."""

    def __init__(self) -> None:
        super().__init__()
        self.token_ids, self.rows = torch.empty(0, dtype=torch.int64), torch.empty(0)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.rows.index_select(0, torch.searchsorted(self.token_ids, token_ids))


def cut(model: GlmForCausalLM, num_stages: int, stage: int) -> None:
    """Leaves in `model` what one stage needs. The parameters that stay keep their names."""
    config, layers = model.config, stage_layers(model.config, num_stages)[stage]
    is_first, is_last = stage == 0, stage == num_stages - 1
    parts: Any = model  # a stage holds empty modules where others have layers, norm and head
    for index in range(len(model.model.layers)):
        if index not in layers and not (is_last and index >= config.num_hidden_layers):
            model.model.layers[index] = nn.Identity()
    if not is_last:
        parts.model.norm, parts.lm_head, model.mtp_stack = nn.Identity(), nn.Identity(), None
    if not is_first:
        parts.model.embed_tokens = BorrowedEmbedding()
    own: Any = tuple(model.model.layers[index] for index in layers)
    embedding = model.model.embed_tokens if is_first else None
    model.stack = LayerStack(config, own, model.model.norm, model.lm_head, embedding)


def names_elsewhere(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that a model has been cut off from."""
    if not isinstance(model, GlmForCausalLM) or len(model.stack.layers) == model.config.num_hidden_layers:
        return frozenset()
    with torch.device("meta"):
        whole = GlmForCausalLM(model.config)
    return frozenset(name for name, _ in whole.named_parameters()) - {name for name, _ in model.named_parameters()}


class _Send(torch.autograd.Function):
    """Hidden states to another rank -> a zero, whose way back begins with the gradient that comes from there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, to: int, send: Callable[[Tensor, int], None]) -> Tensor:
        ctx.to, ctx.shape = to, hidden.shape
        send(hidden, to)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        result = gradients[0].new_empty(ctx.shape)
        distributed.recv(result, ctx.to)
        return result, None, None


class _Receive(torch.autograd.Function):
    """Hidden states of a shape from another rank; their gradient goes back there. like: has device and dtype."""

    @staticmethod
    def forward(
        ctx: Any, like: Tensor, shape: tuple[int, int], source: int, send: Callable[[Tensor, int], None]
    ) -> Tensor:
        ctx.source, ctx.send = source, send
        result = like.new_empty(shape)
        distributed.recv(result, source)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.send(gradients[0], ctx.source)
        return gradients[0].new_zeros(()), None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """This rank's place among the stages. peers: the ranks of its stage; the others run other layers of its rows."""

    num_stages: int
    stage: int
    stage_ranks: int
    peers: distributed.ProcessGroup
    _on_the_way: list[tuple[Tensor, Any]] = field(default_factory=list)

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def run(self, model: GlmForCausalLM, parts: Sequence[ForwardBatch], *, wants_gradient: bool) -> list[Tensor]:
        """This stage's layers over each part. -> on the last stage the hidden states [T, D] of each, elsewhere zeros
        that belong to the loss: without them no gradient would be waited for."""
        self._wait()
        units = [unit for layer in model.stack.layers for unit in layer.modules() if isinstance(unit, FSDPModule)]
        if wants_gradient:
            _stay_gathered(units, True)
        outputs = []
        for index, part in enumerate(parts):
            inputs = part.token_ids
            if self.stage > 0:
                shape = (len(part.token_ids), model.config.hidden_size)
                inputs = self._receive(shape, rank() - self.stage_ranks, part.token_ids.device, wants_gradient)
            hidden = run_layers(model.stack, inputs, None, part, 0).hidden
            if hidden.requires_grad != wants_gradient:  # where nothing is trained, the next stage still sends one
                hidden = hidden.detach().requires_grad_(wants_gradient)
            if wants_gradient and index == 0:  # the last on the way back
                hidden.register_hook(lambda _: _stay_gathered(units, False))
            outputs.append(hidden if self.is_last else _Send.apply(hidden, rank() + self.stage_ranks, self._send))
        return outputs

    def lend(self, model: GlmForCausalLM, token_ids: Tensor, *, wants_gradient: bool) -> Tensor:
        """Brings the embedding of these tokens to the last stage, where `model` looks them up. -> a zero, as in `run`.

        token_ids: int64 [T], on all stages the same.
        """
        distance = (self.num_stages - 1) * self.stage_ranks
        wanted = token_ids.unique()
        if self.stage == 0:
            rows = model.model.embed_tokens(wanted)
            result: Tensor = _Send.apply(rows if wants_gradient else rows.detach(), rank() + distance, self._send)
            return result
        if self.is_last:
            borrowed: Any = model.model.embed_tokens
            shape = (len(wanted), model.config.hidden_size)
            borrowed.token_ids = wanted
            borrowed.rows = self._receive(shape, rank() - distance, token_ids.device, wants_gradient)
        return torch.zeros((), device=token_ids.device)

    def _receive(self, shape: tuple[int, int], source: int, device: torch.device, wants_gradient: bool) -> Tensor:
        like = torch.zeros((), device=device, requires_grad=wants_gradient)
        result: Tensor = _Receive.apply(like, shape, source, self._send)
        return result

    def _send(self, rows: Tensor, to: int) -> None:
        rows = rows.detach().float().contiguous()
        self._on_the_way.append((rows, distributed.isend(rows, to)))

    def _wait(self) -> None:
        """Until what was sent in the step before has been taken."""
        for _, work in self._on_the_way:
            work.wait()
        self._on_the_way.clear()


def _stay_gathered(units: Sequence[FSDPModule], is_wanted: bool) -> None:
    """Whether units keep their parameters and the sum of their gradients whole on the way back: until the last part."""
    for unit in units:
        unit.set_reshard_after_backward(not is_wanted, recurse=False)
        unit.set_requires_gradient_sync(not is_wanted, recurse=False)


def pipeline_place(mesh: Mesh, device: str) -> Pipeline | None:
    """This rank's place; None where nobody has stages."""
    if mesh.pp == 1:
        return None
    ranks = init_device_mesh(device, (mesh.pp, mesh.stage_ranks), mesh_dim_names=("pp", "stage"))
    return Pipeline(
        num_stages=mesh.pp, stage=mesh.stage, stage_ranks=mesh.stage_ranks, peers=ranks["stage"].get_group()
    )
