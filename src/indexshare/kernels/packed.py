"""Weights in the order in which the C++ kernels read them (cpp/linear.h).

A packed weight replaces the plain one: the bytes are the same in number, and `dequantize` brings the plain form back.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from indexshare.errors import KernelError

LANES = 16
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "fp8": 4}


class Matrix(ctypes.Structure):
    """`struct Matrix` of cpp/linear.h: one weight, or the first of a stack of equal ones."""

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


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight [out, in] or a stack of them [E, out, in], packed.

    data: uint8, the packed numbers; descriptor: the bytes of its Matrix. Both live as long as this object.
    """

    data: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    matrix: Matrix
    descriptor: Tensor = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The plain weight."""
        outputs, width = self.shape[-2:]
        pair = 1 if self.dtype == torch.float32 else 2
        blocks = self.data.view(self.dtype).view(-1, -(-outputs // LANES), -(-width // pair), LANES, pair)
        plain = blocks.transpose(2, 3).flatten(1, 2).flatten(2)[:, :outputs, :width]
        return plain.reshape(self.shape).to(dtype)


def pack(operators: Any, weight: Tensor) -> PackedWeight:
    """Pack a BF16 or fp32 weight [out, in] or [E, out, in] that lies on the CPU."""
    name = str(weight.dtype).removeprefix("torch.")
    if name not in FORMATS:
        raise KernelError(f"a weight of {name} cannot be packed; the C++ kernels read {', '.join(FORMATS)}")
    outputs, width = weight.shape[-2:]
    matrix = Matrix(num_outputs=outputs, width=width, format=FORMATS[name])
    size = operators.packed_bytes(as_tensor(matrix))
    stack = weight.reshape(-1, outputs, width)
    data = torch.empty(len(stack) * size, dtype=torch.uint8)
    for number, one in enumerate(stack):
        operators.pack(one.contiguous(), as_tensor(matrix), data[number * size : (number + 1) * size])
    matrix.data = data.data_ptr()
    return PackedWeight(data, tuple(weight.shape), weight.dtype, matrix, as_tensor(matrix))
