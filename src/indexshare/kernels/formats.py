"""Quantised weights as they lie in memory, and the arithmetic that multiplies with them.

| format | data | scales, float32 | value | activations |
|---|---|---|---|---|
| int8 | int8 [.., out, in], -127..127 | [.., out, 1] | data * scale | int8, by 128 |
| int4 | uint8 [.., out, ceil(in/2)], two 4-bit numbers | [.., out, ceil(in/G)] | (bits - 8) * scale | int8, by G |
| fp8 | float8_e4m3fn [.., out, in] | [.., ceil(out/128), ceil(in/128)] | data * scale | as they are |

int4: the low four bits hold the input with the even number; G is the weight's group size. The last group or block may
be shorter. The scales of int8 and int4 are numbers that bfloat16 has. [..] is nothing, or the experts of a layer.
These weights are for inference: no gradient passes the rounding of activations.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from indexshare.errors import KernelError

Format = Literal["int8", "int4", "fp8"]
FP8_BLOCK = 128
ACTIVATION_GROUP = 128  # inputs that share one activation scale when the weight is int8
BAND_NUMBERS = 2**20  # widened at once: they stay in a processor's cache
DATA_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
LEVELS = 127  # activations are rounded to -127..127


def storage_shapes(
    weight_format: Format, shape: tuple[int, ...], group_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of data and scales of a weight [..., out, in]. group_size: 0 for int8, 128 for fp8."""
    *leading, num_rows, num_columns = shape
    match weight_format:
        case "int8":
            return shape, (*leading, num_rows, 1)
        case "int4":
            return (*leading, num_rows, -(-num_columns // 2)), (*leading, num_rows, -(-num_columns // group_size))
        case "fp8":
            return shape, (*leading, -(-num_rows // FP8_BLOCK), -(-num_columns // FP8_BLOCK))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A weight [out, in], or [E, out, in] for experts, in one of the formats of this module.

    shape: the logical one. group_size: inputs that share a scale; 0 (the whole row) for int8, 128 for fp8.
    Raises KernelError when dtypes or shapes of data and scales do not fit.
    """

    format: Format
    data: Tensor
    scales: Tensor
    group_size: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        allowed = {"int8": self.group_size == 0, "int4": self.group_size > 0, "fp8": self.group_size == FP8_BLOCK}
        if not allowed[self.format] or len(self.shape) not in (2, 3) or 0 in self.shape:
            raise KernelError(f"no {self.format} weight has shape {list(self.shape)} and groups of {self.group_size}")
        found = ((self.data.dtype, tuple(self.data.shape)), (self.scales.dtype, tuple(self.scales.shape)))
        shapes = storage_shapes(self.format, self.shape, self.group_size)
        if found != ((DATA_DTYPES[self.format], shapes[0]), (torch.float32, shapes[1])):
            raise KernelError(
                f"{self.format} weight {list(self.shape)}, groups of {self.group_size}: data must be "
                f"{DATA_DTYPES[self.format]} {list(shapes[0])} and scales float32 {list(shapes[1])}, not {found}"
            )

    @classmethod
    def empty(
        cls, weight_format: Format, shape: tuple[int, ...], group_size: int, device: torch.device | str = "cpu"
    ) -> Self:
        """Uninitialised storage, to be filled in place."""
        data_shape, scale_shape = storage_shapes(weight_format, shape, group_size)
        return cls(
            format=weight_format,
            data=torch.empty(data_shape, dtype=DATA_DTYPES[weight_format], device=device),
            scales=torch.empty(scale_shape, dtype=torch.float32, device=device),
            group_size=group_size,
            shape=shape,
        )

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same weight on a device."""
        return replace(self, data=self.data.to(device), scales=self.scales.to(device))

    def copy_(self, source: "QuantizedWeight") -> None:
        """Overwrite this storage with a weight of the same format and shape."""
        assert (self.format, self.shape, self.group_size) == (source.format, source.shape, source.group_size)
        self.data.copy_(source.data)
        self.scales.copy_(source.scales)

    def expert(self, index: int) -> "QuantizedWeight":
        """The [out, in] weight of one expert; shares memory."""
        assert len(self.shape) == 3
        return replace(self, data=self.data[index], scales=self.scales[index], shape=self.shape[1:])

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Outputs start..stop of a [out, in] weight; shares memory. fp8: `start` must begin a block."""
        assert len(self.shape) == 2 and 0 <= start < stop <= self.shape[0]
        scale_rows = slice(start, stop)
        if self.format == "fp8":
            assert start % FP8_BLOCK == 0
            scale_rows = slice(start // FP8_BLOCK, -(-stop // FP8_BLOCK))
        shape = (stop - start, self.shape[1])
        return replace(self, data=self.data[start:stop], scales=self.scales[scale_rows], shape=shape)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in a floating dtype: products in float32 (for float64: in float64), rounded once."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        if len(self.shape) == 3:
            for index in range(self.shape[0]):
                out[index] = self.expert(index).dequantize(dtype)
            return out
        # The wide copy is a band of rows, so that it stays small however large the weight is.
        band = max(1, BAND_NUMBERS // (self.shape[1] * FP8_BLOCK)) * FP8_BLOCK
        for start in range(0, self.shape[0], band):
            stop = min(start + band, self.shape[0])
            out[start:stop] = self.rows(start, stop)._widen(torch.float64 if dtype == torch.float64 else torch.float32)
        return out

    def _widen(self, wide: torch.dtype) -> Tensor:
        num_rows, num_columns = self.shape
        scales = self.scales.to(wide)
        match self.format:
            case "int8":
                return self.data.to(wide) * scales
            case "int4":
                nibbles = torch.stack((self.data & 15, self.data >> 4), dim=-1).flatten(1)[:, :num_columns]
                return (nibbles.to(wide) - 8) * scales.repeat_interleave(self.group_size, 1)[:, :num_columns]
            case "fp8":
                by_row = scales.repeat_interleave(FP8_BLOCK, 0)[:num_rows]
                return self.data.to(wide) * by_row.repeat_interleave(FP8_BLOCK, 1)[:, :num_columns]


def quantize_activations(x: Tensor, group_size: int) -> Tensor:
    """Round each group of inputs to 255 levels: x [..., in] -> the rounded values, float32 (float64 for float64).

    For each row and group of `group_size` inputs (the last may be shorter), all in float32: scale = max|x| / 127,
    level = x / scale rounded half to even and kept in -127..127, 0 where scale is 0. The value is level * scale.
    Scale and level are float32 for float64 inputs as well: they are part of what is computed, and the reference of the
    doctor must round alike. NaN and infinity make the group NaN.
    """
    levels, scales = round_groups(x, group_size)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (levels.to(wide) * scales.to(wide)).flatten(-2)[..., : x.shape[-1]]


def round_groups(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The levels [.., groups, group_size] and scales [.., groups, 1] of `quantize_activations`, float32.

    The last group is padded with zeros. Where a scale is NaN or 0, levels are 0.
    """
    groups = F.pad(x.to(torch.float32), (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True) / LEVELS
    scale = scale.masked_fill(scale.isinf(), float("nan"))
    return torch.where(scale > 0, groups / scale, 0.0).round().clamp(-LEVELS, LEVELS), scale


def multiply(x: Tensor, weight: QuantizedWeight, workspace_bytes: int) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out] in x's dtype; the specification of `ops.linear` for these weights.

    int8, int4: activations are rounded (`quantize_activations`, in groups of 128 or of the weight), so that a kernel
    can sum integer products: y = sum over groups of activation scale * weight scale * integer dot product, in float32
    (float64 for float64 x). fp8: the weight is widened to x's dtype. A quarter of the workspace holds the wide rows.
    """
    dtype = x.dtype
    if weight.format != "fp8":
        x = quantize_activations(x, weight.group_size or ACTIVATION_GROUP)
    num_rows, num_columns = weight.shape
    band = max(1, workspace_bytes // 4 // (x.element_size() * num_columns * FP8_BLOCK)) * FP8_BLOCK
    pieces = []
    for start in range(0, num_rows, band):
        wide = weight.rows(start, min(start + band, num_rows)).dequantize(x.dtype)
        pieces.append(F.linear(x, wide).to(dtype))
    return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]
