"""Rounding weights to int8 (one scale for each output) and int4 (one for each group of inputs).

Nothing is calibrated, and nothing is cut: the largest number of a row or group is the largest level. Scales that cut
the largest numbers have less squared error and were worse in every measure of the model (docs/experiments.md).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from indexshare.kernels.formats import QuantizedWeight
from indexshare.quant.policy import IntegerFormat

BAND_ROWS = 4096  # rows rounded at once, so that the wide copies stay small
INT8_MAX = 127
INT4_MIN, INT4_MAX = -8, 7


def quantize(weight: Tensor, weight_format: IntegerFormat, group_size: int) -> QuantizedWeight:
    """Round a weight [out, in] of any floating type; group_size: inputs that share a scale, 0 for int8.

    Raises ValueError when the weight is not a finite matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise ValueError(f"expected a finite floating-point matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    result = QuantizedWeight.empty(weight_format, tuple(weight.shape), group_size, weight.device)
    for start in range(0, weight.shape[0], BAND_ROWS):
        band = slice(start, start + BAND_ROWS)
        wide = weight[band].float()
        rounded = _round_int8(wide) if weight_format == "int8" else _round_int4(wide, group_size)
        result.data[band], result.scales[band] = rounded
    return result


def _round_int8(wide: Tensor) -> tuple[Tensor, Tensor]:
    scales = _as_scale(wide.abs().amax(-1, keepdim=True) / INT8_MAX)
    return (wide / scales).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales


def _round_int4(wide: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = wide.shape
    groups = F.pad(wide, (0, -num_columns % group_size)).view(num_rows, -1, group_size)
    scales = _as_scale(groups.abs().amax(-1, keepdim=True) / INT4_MAX)
    levels = (groups / scales).round().clamp(INT4_MIN, INT4_MAX)
    nibbles = (levels - INT4_MIN).to(torch.uint8).flatten(1)[:, :num_columns]
    nibbles = F.pad(nibbles, (0, num_columns % 2))
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scales.squeeze(-1)


def _as_scale(scale: Tensor) -> Tensor:
    """The nearest number that bfloat16 has; 1 for a row or group of zeros (or of numbers next to zero)."""
    scale = scale.bfloat16().float()
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
