"""Readings that tell a run in trouble before its loss does: attention and router logits, expert load, norms.

They are taken on logged steps only, from what operations and routers are called with, and change nothing. On several
ranks logits are those of this rank's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from indexshare.kernels import registry
from indexshare.kernels.layout import KeyLayout
from indexshare.model.glm import Attention, MixtureOfExperts
from indexshare.train.distributed import global_sum, local

NUM_QUERIES = 8
# 100 is where Kimi K2 (arXiv 2507.20534, section 2.1) begins to clip; fp32 routers are saturated long before 50.
LIMITS = {
    "attention_logit_max": (100.0, "Lower the learning rates, or turn muon_split on"),
    "router_logit_max": (50.0, "Lower the learning rates"),
    "expert_imbalance": (10.0, "Raise bias_update_rate or balance_loss_weight"),
}


def beyond_limits(readings: Mapping[str, Any]) -> dict[str, str]:
    """For each reading above its limit a sentence that says so and what to do."""
    sentences = {}
    for name, (limit, remedy) in LIMITS.items():
        values = readings.get(name, [])
        by_layer = values if isinstance(values, list) else [values]
        largest = max(by_layer, default=0.0)
        if largest > limit:
            place = f" in layer {by_layer.index(largest)}" if isinstance(values, list) else ""
            sentences[name] = f"{name} is {largest:g}{place}, above {limit:g}. {remedy} if it goes on rising."
    return sentences


class Gauges:
    """Context manager around the forward pass of one step; `read` afterwards.

    attention_logit_max: by layer, the largest logit of the NUM_QUERIES query vectors (of all tokens and heads) with the
    largest norm, over the keys that each attends to. The true maximum is rarely far above it and costs a product of all
    queries and keys. router_logit_max, router_logit_mean_square, expert_imbalance (work of the busiest expert over the
    mean) and busiest_expert_share (of all choices): in the worst layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layer = 0
        self._attention: dict[int, Tensor] = {}
        self._router_max: list[Tensor] = []
        self._router_square: list[Tensor] = []
        self._stack = ExitStack()

    def __enter__(self) -> Gauges:
        for module in self._model.modules():
            if isinstance(module, Attention):
                self._stack.callback(module.register_forward_pre_hook(self._enter_layer).remove)
            elif isinstance(module, MixtureOfExperts):
                self._stack.callback(module.register_forward_pre_hook(self._read_router).remove)
        self._stack.enter_context(registry.watch(self._watch))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def read(
        self, expert_counts: Mapping[int, Tensor], optimizers: Iterable[torch.optim.Optimizer]
    ) -> dict[str, float | list[float] | dict[str, float]]:
        """The readings as they are logged. Norms are by optimizer, before the gradient is clipped; expert_counts: as in
        `Losses`."""
        readings: dict[str, float | list[float] | dict[str, float]] = {
            "expert_imbalance": round(_imbalance(expert_counts), 3),
            "busiest_expert_share": round(_busiest_share(expert_counts), 4),
            "parameter_norm": _norms(optimizers, of_gradients=False),
            "group_gradient_norm": _norms(optimizers, of_gradients=True),
        }
        if self._attention:
            readings["attention_logit_max"] = [
                float(f"{float(value):.4g}") for _, value in sorted(self._attention.items())
            ]
        if self._router_max:
            readings["router_logit_max"] = float(f"{float(torch.stack(self._router_max).max()):.4g}")
            readings["router_logit_mean_square"] = float(f"{float(torch.stack(self._router_square).max()):.4g}")
        return readings

    def _enter_layer(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        self._layer = module.layer

    def _watch(self, call: registry.Call) -> Any:
        name = call.operation.name
        if name in ("mla_expanded", "mla_sparse", "mla_dense"):
            with torch.no_grad(), torch.autocast(call.args[0].device.type, enabled=False):
                largest = _attention_logit(name, *call.args)
            seen = self._attention.get(self._layer)
            self._attention[self._layer] = largest if seen is None else torch.maximum(seen, largest)
        return call.run()

    def _read_router(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, MixtureOfExperts)
        hidden: Tensor = arguments[0]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            logits = functional.linear(hidden.float(), module.gate.weight.float())
        self._router_max.append(logits.abs().max())
        self._router_square.append(logits.square().mean())


def _attention_logit(name: str, query: Tensor, latents: Tensor, third: Any, *rest: Any) -> Tensor:
    """Arguments as the operation of that name has them. The queries are absorbed into the latent space first."""
    num_heads = query.shape[1]
    norms = torch.linalg.vector_norm(query.detach(), dim=-1, dtype=torch.float32).flatten()
    chosen = norms.topk(min(NUM_QUERIES, norms.numel())).indices.tolist()
    largest = []
    for token, head in (divmod(place, num_heads) for place in chosen):
        vector = query[token, head].float()
        if name == "mla_sparse":
            scale = rest[0]
            rows = third[token]
            keys = latents.index_select(0, rows[rows >= 0])
        else:
            layout, scale = (rest[0], rest[1]) if name == "mla_expanded" else (third, rest[0])
            masks = rest[2] if name == "mla_expanded" and len(rest) > 2 else None
            keys = _visible(latents, layout, masks, token)
        if name == "mla_expanded":
            latent_dim = third.shape[2]
            nope_dim = vector.shape[0] - (latents.shape[1] - latent_dim)
            vector = torch.cat((vector[:nope_dim] @ third[head, :nope_dim].float(), vector[nope_dim:]))
        largest.append((keys.float() @ vector).abs().max() * scale)
    return torch.stack(largest).max()


def _visible(latents: Tensor, layout: KeyLayout, masks: list[Tensor] | None, token: int) -> Tensor:
    """Keys that a new token attends to, [S, W]."""
    sequence = next(b for b in range(layout.num_sequences) if token < layout.sequence_starts[b + 1])
    place = token - layout.sequence_starts[sequence]
    keys = layout.keys(latents, sequence, 0, layout.num_past(sequence) + place + 1)
    return keys if masks is None else keys[masks[sequence][place, : keys.shape[0]]]


def _imbalance(expert_counts: Mapping[int, Tensor]) -> float:
    """Work of the busiest expert over the mean, in the worst layer; 1 is perfect balance."""
    return max((float(counts.max() * counts.numel() / counts.sum()) for counts in expert_counts.values()), default=1.0)


def _busiest_share(expert_counts: Mapping[int, Tensor]) -> float:
    """Of the choices of all tokens, the share that went to the busiest expert, in the worst layer."""
    return max((float(counts.max() / counts.sum()) for counts in expert_counts.values()), default=0.0)


def _norms(optimizers: Iterable[torch.optim.Optimizer], *, of_gradients: bool) -> dict[str, float]:
    """By kind of optimizer, over all ranks."""
    norms = {}
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tensors = [parameter.grad if of_gradients else parameter.detach() for parameter in parameters]
        parts = [torch.linalg.vector_norm(local(tensor)) for tensor in tensors if tensor is not None]
        nothing = torch.zeros((), dtype=torch.float64, device=parameters[0].device)  # on this rank
        total = float(global_sum(torch.stack(parts).double().square().sum() if parts else nothing).sqrt())
        if total > 0.0:
            norms[type(optimizer).__name__] = float(f"{total:.5g}")
    return norms
