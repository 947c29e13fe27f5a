"""Weights in the order in which the C++ kernels read them (cpp/weights.h).

A packed weight takes the place of the plain one: it holds the same numbers in about as many bytes, and `plain` brings
the plain form back.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from indexshare import runtime
from indexshare.errors import KernelError
from indexshare.kernels.formats import FP8_BLOCK, Format, QuantizedWeight

LANES, STRIP = 16, 4  # outputs in a block, blocks in a strip
NUMBERS = {torch.float32: 0, torch.bfloat16: 1}
FORMATS = {"int8": 2, "int4": 3, "fp8": 4}
INT4_GROUPS = (8, 16, 32, 64, 128, 256)  # divisors of kInputsAtOnce in linear.h, of whole steps
INPUTS_PER_STEP = {0: 1, 1: 2, 2: 4, 3: 8, 4: 2}


class Matrix(ctypes.Structure):
    """`struct Matrix` of cpp/weights.h: one weight, or the first of a stack of equal ones."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("num_outputs", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


def as_tensor(structure: ctypes.Structure | ctypes.Array[Any]) -> Tensor:
    """The bytes of a structure as an operator takes them: uint8 [n], a copy."""
    return torch.frombuffer(bytearray(bytes(structure)), dtype=torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A weight [out, in], or a stack [E, out, in], packed: `data` uint8, `scales` as the format has them.

    dtype: that of the plain weight, or its format's name. matrix: one of the pieces of equal height, which are packed
    one after the other. descriptor: its bytes, for an operator.
    """

    data: Tensor
    scales: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype | Format
    matrix: Matrix
    descriptor: Tensor = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.data.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def plain(self) -> Tensor | QuantizedWeight:
        """The weight as it was before it was packed; a copy."""
        *leading, num_rows, width = self.shape
        piece_rows, inputs = self.matrix.num_outputs, INPUTS_PER_STEP[self.matrix.format]
        blocks, num_steps = -(-piece_rows // LANES), -(-width // inputs)
        pieces = self.data.view(math.prod(leading) * num_rows // piece_rows, blocks * num_steps, LANES, -1)
        whole = blocks // STRIP * STRIP
        strips = [pieces[:, : whole * num_steps].unflatten(1, (-1, num_steps, STRIP))]
        if whole < blocks:
            strips.append(pieces[:, whole * num_steps :].unflatten(1, (1, num_steps, blocks - whole)))
        steps = torch.cat([strip.transpose(2, 3).flatten(1, 2) for strip in strips], dim=1)
        if isinstance(self.dtype, torch.dtype):
            numbers = steps.view(self.dtype)
        elif self.dtype == "int4":
            numbers = torch.cat((steps & 15, steps >> 4), dim=-1)
        else:
            numbers = steps
        rows = numbers.transpose(-3, -2).flatten(-2).flatten(-3, -2)[:, :piece_rows, :width]
        rows = rows.reshape(*leading, num_rows, width)
        if isinstance(self.dtype, torch.dtype):
            return rows
        assert self.scales is not None
        if self.dtype == "int4":
            even, odd = rows[..., 0::2], rows[..., 1::2]
            rows = even | torch.nn.functional.pad(odd, (0, even.shape[-1] - odd.shape[-1])) << 4
        rows = (rows ^ 128).view(torch.int8) if self.dtype == "int8" else rows
        blocks = -(-num_rows // LANES)
        if self.dtype == "fp8":
            scales = self.scales.view(*leading, blocks, -1)[..., :: FP8_BLOCK // LANES, :]
        else:
            scales = self.scales.view(*leading, blocks, -1, LANES).transpose(-2, -1).flatten(-3, -2)[..., :num_rows, :]
        return QuantizedWeight(
            format=self.dtype,
            data=rows.view(torch.float8_e4m3fn) if self.dtype == "fp8" else rows,
            scales=scales.to(torch.float32).contiguous(),
            group_size=FP8_BLOCK if self.dtype == "fp8" else self.matrix.group,
            shape=self.shape,
        )


def pack(
    operators: Any,
    weight: Tensor | QuantizedWeight,
    *,
    pieces: int = 1,
    empty: Callable[[int], Tensor] = runtime.empty_bytes,
) -> PackedWeight:
    """Pack a weight [out, in] or [E, out, in] that lies on the CPU. Raises KernelError for a dtype without kernels.

    pieces: each matrix is cut into so many of equal height, a multiple of 16; 2 for gate and up in one. empty(count):
    where the bytes are put.
    """
    *_, num_rows, width = shape = tuple(weight.shape)
    assert pieces == 1 or num_rows % (pieces * LANES) == 0, "pieces begin with a block"
    matrix = Matrix(num_outputs=num_rows // pieces, width=width)
    scales = None
    if isinstance(weight, QuantizedWeight):
        dtype: torch.dtype | Format = weight.format
        matrix.format, matrix.group = FORMATS[weight.format], 0 if weight.format == "fp8" else weight.group_size
        if weight.format == "int4" and weight.group_size not in INT4_GROUPS:
            raise KernelError(f"int4 groups of {weight.group_size}: the C++ kernels take {INT4_GROUPS}")
        packed_scales = _pack_scales(weight)
        scales = empty(packed_scales.nbytes).view(packed_scales.dtype).view(packed_scales.shape).copy_(packed_scales)
        matrix.scales = scales.data_ptr()
        rows = weight.data
    elif weight.dtype in NUMBERS:
        dtype, matrix.format, rows = weight.dtype, NUMBERS[weight.dtype], weight
    else:
        raise KernelError(f"a weight of {weight.dtype} cannot be packed; the C++ kernels read bfloat16 and float32")
    size = operators.packed_bytes(as_tensor(matrix))
    stack = rows.reshape(-1, num_rows // pieces, rows.shape[-1])
    data = empty(len(stack) * size)
    for number, one in enumerate(stack):
        operators.pack(one.contiguous(), as_tensor(matrix), data[number * size : (number + 1) * size])
    matrix.data = data.data_ptr()
    return PackedWeight(data=data, scales=scales, shape=shape, dtype=dtype, matrix=matrix, descriptor=as_tensor(matrix))


def _pack_scales(weight: QuantizedWeight) -> Tensor:
    """fp8: fp32 [.., out/16, groups]; else BF16 [.., out/16, groups, 16]. Raises KernelError for finer scales."""
    blocks = -(-weight.shape[-2] // LANES)
    if weight.format == "fp8":
        return weight.scales.repeat_interleave(FP8_BLOCK // LANES, -2)[..., :blocks, :].contiguous()
    if not fits_bfloat16(weight.scales):
        raise KernelError("the scales of an integer weight must be numbers that bfloat16 has")
    padded = torch.nn.functional.pad(weight.scales, (0, 0, 0, blocks * LANES - weight.shape[-2]))
    return padded.unflatten(-2, (blocks, LANES)).transpose(-2, -1).to(torch.bfloat16).contiguous()


def fits_bfloat16(scales: Tensor) -> bool:
    """Whether bfloat16 holds all of these scales exactly."""
    return torch.equal(scales.bfloat16().float(), scales)
