"""One weight [out, in] as the files of a checkpoint hold it, read and written.

| format | tensors of the weight `X.weight` |
|---|---|
| plain | `X.weight` BF16, F16 or F32 |
| fp8 | `X.weight` F8_E4M3, `X.weight_scale_inv` F32 [ceil(out/128), ceil(in/128)]: the released FP8 checkpoints |
| int8 | `X.weight` I8, `X.weight_scale` [out, 1]: compressed-tensors "int-quantized" |
| int4 | `X.weight_packed` I32 [out, ceil(in/8)], `X.weight_scale` [out, ceil(in/group)], `X.weight_shape` I64 [2]: \
compressed-tensors "pack-quantized" |

An I32 holds eight numbers of 4 bits, the first in its lowest bits: in a file the bytes of `QuantizedWeight.data`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from indexshare.errors import CheckpointError
from indexshare.kernels.formats import FP8_BLOCK, Format, QuantizedWeight, storage_shapes
from indexshare.model.safetensors_header import StoredTensor
from indexshare.quant.policy import GROUP_SIZES

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_SCALE, SCALE, PACKED, SHAPE = "_scale_inv", "_scale", "_packed", "_shape"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a weight comes from: its tensors in the files, the one with the numbers first; format None is plain."""

    name: str
    shape: tuple[int, ...]
    format: Format | None
    group_size: int
    tensors: tuple[StoredTensor, ...]

    def read(self) -> Tensor | QuantizedWeight:
        """The weight as stored, on the CPU. Raises CheckpointError for a file that changed or contradicts itself."""
        data = self.tensors[0].read()
        if self.format is None:
            return data
        if self.format == "int4":
            num_rows, num_columns = self.shape
            if (stored := self.tensors[2].read().tolist()) != [num_rows, num_columns]:
                raise CheckpointError(
                    f"{self.name + SHAPE!r} says {stored}; the model's weight is {list(self.shape)}: "
                    "config.json is not its"
                )
            data = data.view(torch.uint8)[:, : -(-num_columns // 2)].contiguous()
        return QuantizedWeight(
            format=self.format,
            data=data,
            scales=self.tensors[1].read().float(),
            group_size=self.group_size,
            shape=self.shape,
        )


def find_source(name: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]) -> Source | None:
    """The source of a weight, from checked headers; None when the checkpoint lacks it.

    Raises CheckpointError for a wrong shape or dtype and for scales that are missing or do not fit.
    """
    packed = stored.get(name + PACKED)
    if packed is not None and name not in stored:
        return _find_packed(name, shape, packed, stored)
    if name not in stored:
        return None
    source = stored[name]
    if source.shape != shape:
        raise CheckpointError(f"tensor {name!r} has shape {list(source.shape)}; config.json asks for {list(shape)}")
    if source.dtype in PLAIN_DTYPES:
        return Source(name=name, shape=shape, format=None, group_size=0, tensors=(source,))
    known: dict[torch.dtype, Format] = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
    if source.dtype not in known or len(shape) != 2:
        raise CheckpointError(
            f"tensor {name!r} is {source.dtype}; weights must be BF16, F16, F32, or matrices in F8_E4M3, or in I8 or "
            "4 bits as compressed-tensors has them"
        )
    weight_format = known[source.dtype]
    is_fp8 = weight_format == "fp8"
    scale = _find_scale(name, weight_format, shape, 0, stored)
    return Source(
        name=name,
        shape=shape,
        format=weight_format,
        group_size=FP8_BLOCK if is_fp8 else 0,
        tensors=(source, scale),
    )


def _find_packed(name: str, shape: tuple[int, ...], packed: StoredTensor, stored: Mapping[str, StoredTensor]) -> Source:
    words = (shape[0], -(-shape[-1] // 8))
    if len(shape) != 2 or (packed.dtype, packed.shape) != (torch.int32, words):
        raise CheckpointError(
            f"tensor {packed.name!r} is {packed.dtype} {list(packed.shape)}; a weight {list(shape)} in 4 bits needs "
            f"int32 {list(words)}"
        )
    stated = stored.get(name + SHAPE)
    if stated is None or (stated.dtype, stated.shape) != (torch.int64, (2,)):
        raise CheckpointError(f"tensor {packed.name!r} needs a {SHAPE} sibling, int64 [2]")
    scale = stored.get(name + SCALE)
    num_groups = scale.shape[-1] if scale is not None and len(scale.shape) == 2 else 0
    fitting = [size for size in GROUP_SIZES if -(-shape[1] // size) == num_groups]
    group_size = fitting[0] if fitting else GROUP_SIZES[0]
    scale = _find_scale(name, "int4", shape, group_size, stored)
    return Source(name=name, shape=shape, format="int4", group_size=group_size, tensors=(packed, scale, stated))


def _find_scale(
    name: str, weight_format: Format, shape: tuple[int, ...], group_size: int, stored: Mapping[str, StoredTensor]
) -> StoredTensor:
    suffix, allowed = (FP8_SCALE, (torch.float32,)) if weight_format == "fp8" else (SCALE, PLAIN_DTYPES)
    expected = storage_shapes(weight_format, shape, group_size)[1]
    scale = stored.get(name + suffix)
    if scale is None or scale.dtype not in allowed or scale.shape != expected:
        found = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        kinds = "float32" if weight_format == "fp8" else "BF16, F16 or F32"
        group = {"fp8": "128x128 blocks", "int8": "one for each output", "int4": "groups of 32, 64 or 128"}
        raise CheckpointError(
            f"{weight_format.upper()} tensor {name!r} needs a {suffix} sibling, {kinds} {list(expected)} "
            f"({group[weight_format]}); found {found}"
        )
    return scale


def stored_tensors(name: str, weight: Tensor | QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that hold a weight in a file, by name; what `find_source` and `Source.read` read back."""
    if isinstance(weight, Tensor):
        return {name: weight}
    if weight.format == "fp8":
        return {name: weight.data, name + FP8_SCALE: weight.scales}
    narrow = weight.scales.bfloat16()
    scale = narrow if torch.equal(narrow.float(), weight.scales) else weight.scales  # others may write wider ones
    if weight.format == "int8":
        return {name: weight.data, name + SCALE: scale}
    packed = F.pad(weight.data, (0, -weight.data.shape[1] % 4)).view(torch.int32)
    return {name + PACKED: packed, name + SCALE: scale, name + SHAPE: torch.tensor(weight.shape)}


def views(
    weights: Mapping[str, Tensor | QuantizedWeight], stored: Mapping[str, object]
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Checkpoint names and the part of our weights that each one fills; stacked experts fall apart unless `stored`
    has them stacked. A tied tensor appears once, under its first name."""
    seen: set[int] = set()
    for name, weight in weights.items():
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        if isinstance(weight, Tensor):
            weight = weight.detach()
        experts, _, kind = name.rpartition(".experts.")
        if not experts or name in stored:
            yield name, weight
            continue
        for number in range(weight.shape[0]):
            part = weight[number] if isinstance(weight, Tensor) else weight.expert(number)
            if kind == "down_proj":
                yield f"{experts}.experts.{number}.down_proj.weight", part
            else:
                gate, up = part.chunk(2) if isinstance(part, Tensor) else _halves(part)
                yield f"{experts}.experts.{number}.gate_proj.weight", gate
                yield f"{experts}.experts.{number}.up_proj.weight", up


def _halves(weight: QuantizedWeight) -> tuple[QuantizedWeight, QuantizedWeight]:
    width = weight.shape[0] // 2
    return weight.rows(0, width), weight.rows(width, 2 * width)
