import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from indexshare.kernels.formats import FP8_BLOCK, storage_shapes
from indexshare.quant.fp8 import E4M3_MAX, quantize_block

SHAPES = [(1, 1), (127, 129), (128, 128), (576, 256), (300, 64)]


def reference(weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """The formula of the format, written with one index for each element."""
    rows = torch.arange(weight.shape[0]) // FP8_BLOCK
    columns = torch.arange(weight.shape[1]) // FP8_BLOCK
    return weight.float() * scale_inv[rows[:, None], columns[None, :]]


def test_scale_shape_rounds_up() -> None:
    assert storage_shapes("fp8", (576, 6144), 128)[1] == (5, 48)  # kv_a_proj_with_mqa of the released checkpoint
    assert storage_shapes("fp8", (128, 6144), 128)[1] == (1, 48)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_stays_within_half_a_step_of_e4m3(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    quantized = quantize_block(weight)
    widened = quantized.dequantize(torch.float32)
    assert torch.equal(widened, reference(quantized.data, quantized.scales))
    error = (widened - weight).abs()
    # 3 bits of mantissa: 2**-4 of the value; below 2**-6 the steps are 2**-9, so half of one is 2**-10.
    bound = weight.abs() * 2**-4 + reference(torch.full(shape, 2**-10), quantized.scales)
    assert bool((error <= bound * (1 + 1e-5)).all())


def test_the_largest_value_of_a_block_survives() -> None:
    weight = torch.randn(200, 200)
    quantized = quantize_block(weight)
    assert float(quantized.scales[0, 0]) * E4M3_MAX == pytest.approx(float(weight[:128, :128].abs().max()), rel=1e-6)
    assert float(quantized.data.float().abs().max()) == E4M3_MAX


@given(st.integers(-149, 127))
def test_constant_blocks_of_any_size_are_finite(exponent: int) -> None:
    value = 2.0**exponent
    widened = quantize_block(torch.full((3, 3), value)).dequantize(torch.float32)
    assert bool(widened.isfinite().all())
    if value > 1e-35:
        assert torch.allclose(widened, torch.full((3, 3), value), rtol=2**-4)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        quantize_block(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="matrix"):
        quantize_block(torch.ones(3))
