"""Which tensors of a checkpoint fill which weights of a model, and in which format: a plan that is checked first.

`plan_weights` decides and checks, `Placement.allocate` makes room (on "meta" to count bytes), `Placement.fill` reads
tensor by tensor, so that memory holds the model once plus one tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from indexshare.errors import CheckpointError, ConfigError
from indexshare.kernels.formats import FP8_BLOCK, Format, QuantizedWeight
from indexshare.model.safetensors_header import StoredTensor
from indexshare.model.stored_weight import Source, find_source, views
from indexshare.quant.integer import quantize
from indexshare.quant.policy import Policy, is_quantizable

ROUTER_BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The plan: `shapes` are the model's tensors (on "meta"), `formats` holds those that will be quantised with their
    group size, `sources` the checkpoint's weights by name."""

    shapes: Mapping[str, Tensor]
    formats: Mapping[str, tuple[Format, int]]
    sources: Mapping[str, Source]

    @property
    def used(self) -> set[str]:
        """Names of the tensors in the files that will be read."""
        return {tensor.name for source in self.sources.values() for tensor in source.tensors}

    def allocate(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor | QuantizedWeight]:
        """Uninitialised weights under the model's names; tied names share one."""
        made: dict[int, Tensor | QuantizedWeight] = {}
        for name, tensor in self.shapes.items():
            if id(tensor) in made:
                continue
            if name in self.formats:
                made[id(tensor)] = QuantizedWeight.empty(*_storage(self.formats[name], tensor), device)
                continue
            data = torch.empty(tensor.shape, dtype=_target_dtype(name, dtype), device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(data, requires_grad=tensor.requires_grad) if is_parameter else data
        return {name: made[id(tensor)] for name, tensor in self.shapes.items()}

    def fill(
        self, weights: Mapping[str, Tensor | QuantizedWeight], progress: Callable[[int, int], None] | None = None
    ) -> tuple[str, ...]:
        """Read every weight into its place, in the order of the files; returns those converted from FP8.

        progress(weights read, weights to read).
        """
        places = dict(views(weights, self.sources))
        first = {name: self.sources[name].tensors[0] for name in places}
        order = sorted(places, key=lambda name: (first[name].path, first[name].offset))
        for number, name in enumerate(order, start=1):
            _read_into(places[name], self.sources[name])
            if progress is not None:
                progress(number, len(order))
        return tuple(name for name in order if self.sources[name].format == "fp8" and not _is_fp8(places[name]))


def plan_weights(
    shapes: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], num_layers: int, quant: Policy | str | None
) -> Placement:
    """Find and check the source of every weight and choose its format.

    quant: None holds weights as they are stored (where the model can: see `quant.policy`), "none" widens all, a Policy
    quantises. Raises CheckpointError for what is missing or malformed, ConfigError for an impossible policy.
    """
    sources: dict[str, Source] = {}
    parts: dict[str, list[str]] = {}
    missing: list[str] = []
    for name, tensor in _distinct(shapes).items():
        parts[name] = []
        for part, view in views({name: tensor}, stored):
            source = find_source(part, tuple(view.shape), stored)
            parts[name].append(part)
            if source is None:
                missing.append(part)
            else:
                sources[part] = source
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {enumerate_names(missing)}; it is incomplete or config.json is not its"
        )
    formats: dict[str, tuple[Format, int]] = {}
    could_be: list[str] = []
    for name, names in parts.items():
        tensor, members = shapes[name], [sources[part] for part in names]
        if isinstance(quant, Policy):
            chosen = quant.format_of(name, tensor.shape[-1], num_layers)
            if chosen is not None:
                _check_wide(members)
                could_be += names
                chosen = None if quant.keeps(names) else chosen
        else:
            chosen = None if quant == "none" else _stored_format(name, tensor, members)
        if chosen is not None:
            formats[name] = chosen
    if isinstance(quant, Policy):
        quant.check_used(could_be)
    return Placement(shapes=shapes, formats=formats, sources=sources)


def _distinct(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied names once, under the first."""
    first = {id(tensor): name for name, tensor in reversed(list(shapes.items()))}
    return {name: tensor for name, tensor in shapes.items() if first[id(tensor)] == name}


def _stored_format(name: str, tensor: Tensor, members: list[Source]) -> tuple[Format, int] | None:
    """The format that all parts have in the files; None where the model cannot hold it."""
    kinds = {(member.format, member.group_size) for member in members}
    weight_format, group_size = kinds.pop()
    if kinds or weight_format is None or not is_quantizable(name):
        return None
    if weight_format == "fp8" and name.endswith("gate_up_proj") and tensor.shape[1] // 2 % FP8_BLOCK:
        return None  # the blocks of up would begin inside of one of gate
    return weight_format, group_size


def _check_wide(members: list[Source]) -> None:
    for member in members:
        if member.format in ("int8", "int4"):
            raise ConfigError(
                f"{member.name} is {member.format} already: load this checkpoint as it is, or quantise the "
                "checkpoint that it was made from"
            )


def _storage(chosen: tuple[Format, int], tensor: Tensor) -> tuple[Format, tuple[int, ...], int]:
    return chosen[0], tuple(tensor.shape), chosen[1]


def _target_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(ROUTER_BIAS) else dtype


def _is_fp8(place: Tensor | QuantizedWeight) -> bool:
    return isinstance(place, QuantizedWeight) and place.format == "fp8"


def _read_into(place: Tensor | QuantizedWeight, source: Source) -> None:
    """Read one weight and convert it to what its place holds."""
    if isinstance(place, Tensor):
        if source.format is None and place.device.type == "cpu" and place.dtype == source.tensors[0].dtype:
            source.tensors[0].read_into(place)
            return
        value = source.read()
        place.copy_(value if isinstance(value, Tensor) else value.dequantize(place.dtype))
        return
    value = source.read().to(place.device)
    if isinstance(value, QuantizedWeight) and value.format == place.format:
        place.copy_(value)
        return
    wide = value if isinstance(value, Tensor) else value.dequantize(torch.float32)
    assert place.format != "fp8", "no weight becomes FP8 here"
    try:
        place.copy_(quantize(wide, place.format, place.group_size))
    except ValueError as error:
        raise CheckpointError(f"tensor {source.name!r} cannot be quantised: {error}") from error


def enumerate_names(names: list[str] | tuple[str, ...]) -> str:
    """'3 tensors (a, b, c)' with at most five names."""
    listed = ", ".join(name[:100] for name in names[:5])
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({listed}{', ...' * (len(names) > 5)})"
