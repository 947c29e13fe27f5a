"""A pool of rows rounded to int8, in the place of a tensor [R, W]: the format is that of `cache_formats`.

It has the few members of a tensor that the operations use on a pool; rows are rounded when they are written, and come
back as float32. The C++ kernels read the bytes.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from indexshare import runtime
from indexshare.kernels.cache_formats import plain_at, rounded_row_bytes, scales_at
from indexshare.kernels.formats import round_groups


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedPool:
    """Rows of rounded_dim numbers in int8 with a scale for each group_size of them, then plain_dim in bfloat16.

    data: uint8 [R, row bytes].
    """

    data: Tensor
    rounded_dim: int
    plain_dim: int
    group_size: int

    @classmethod
    def empty(
        cls, num_rows: int, rounded_dim: int, plain_dim: int, group_size: int, device: torch.device | str = "cpu"
    ) -> Self:
        """Rows that are uninitialised until written."""
        row_bytes = rounded_row_bytes(rounded_dim, plain_dim, group_size)
        if torch.device(device).type == "cpu":
            data = runtime.empty_bytes(num_rows * row_bytes).view(num_rows, row_bytes)
        else:
            data = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device=device)
        return cls(
            data=data,
            rounded_dim=rounded_dim,
            plain_dim=plain_dim,
            group_size=group_size,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and numbers in a row."""
        return self.data.shape[0], self.rounded_dim + self.plain_dim

    @property
    def dtype(self) -> torch.dtype:
        """That of the rows it takes and gives."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def requires_grad(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return self.data.data_ptr()

    def __getitem__(self, rows: slice) -> Tensor:
        return self._widen(self.data[rows])

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """float32 [n, W]: the rows with these numbers."""
        assert dim == 0
        return self._widen(self.data.index_select(0, rows))

    def index_copy_(self, dim: int, rows: Tensor, values: Tensor) -> None:
        """Round values [n, W] into the rows with these numbers. A group that holds NaN or infinity becomes NaN."""
        assert dim == 0 and values.shape[1] == self.shape[1]
        rounded, plain = values.split((self.rounded_dim, self.plain_dim), dim=-1)
        levels, scales = round_groups(rounded, self.group_size)
        numbers = levels.to(torch.int8)
        sums = numbers.sum(-1, dtype=torch.int32)
        groups = torch.stack((scales[..., 0], sums.view(torch.float32)), dim=-1)
        numbers = numbers.flatten(1)[:, : self.rounded_dim]
        parts = [F.pad(numbers, (0, scales_at(self.rounded_dim) - self.rounded_dim)), groups.flatten(1)]
        parts.append(F.pad(plain.to(torch.bfloat16), (0, -self.plain_dim % 4)))
        self.data.index_copy_(0, rows, torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1))

    def _widen(self, rows: Tensor) -> Tensor:
        levels = rows[:, : self.rounded_dim].view(torch.int8).to(torch.float32)
        begin, end = scales_at(self.rounded_dim), plain_at(self.rounded_dim, self.group_size)
        scales = rows[:, begin:end].view(torch.float32)[:, ::2]
        levels *= scales.repeat_interleave(self.group_size, dim=1)[:, : self.rounded_dim]
        plain = rows[:, end : end + 2 * self.plain_dim].view(torch.bfloat16)
        return torch.cat((levels, plain.to(torch.float32)), dim=-1)


Pool = Tensor | QuantizedPool
