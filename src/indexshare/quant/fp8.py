"""Rounding weights to FP8 E4M3 with one scale for each 128x128 block, the format of the released GLM FP8 checkpoints.

The stored scale is called `weight_scale_inv`, yet a weight is recovered by *multiplying* with it:

    weight[r, c] = fp8[r, c] * scale_inv[r // 128, c // 128]

The last block of a row or column may be smaller: 576 rows have 5 rows of scales.
"""

import torch
from torch import Tensor
from torch.nn import functional

from indexshare.kernels.formats import FP8_BLOCK, QuantizedWeight, storage_shapes

E4M3_MAX = 448.0


def quantize_block(weight: Tensor) -> QuantizedWeight:
    """Round a weight [R, C] of any floating type with the scale `amax / 448` for each block; 1 for a block of zeros.

    Raises ValueError if `weight` is not a finite matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise ValueError(f"expected a finite floating-point matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    num_rows, num_columns = weight.shape
    row_blocks, column_blocks = storage_shapes("fp8", (num_rows, num_columns), FP8_BLOCK)[1]
    padding = (0, column_blocks * FP8_BLOCK - num_columns, 0, row_blocks * FP8_BLOCK - num_rows)
    blocks = functional.pad(weight.float(), padding).view(row_blocks, FP8_BLOCK, column_blocks, FP8_BLOCK)
    amax = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(amax > 0, amax / E4M3_MAX, 1.0)
    # A subnormal amax divides to zero; the smallest normal number keeps the quotient finite.
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    # The cast gives NaN above 448, which rounding of the quotient could reach by one unit.
    scaled = (blocks / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    flat = scaled.reshape(row_blocks * FP8_BLOCK, column_blocks * FP8_BLOCK)[:num_rows, :num_columns]
    return QuantizedWeight(
        format="fp8",
        data=flat.to(torch.float8_e4m3fn),
        scales=scales,
        group_size=FP8_BLOCK,
        shape=(num_rows, num_columns),
    )
