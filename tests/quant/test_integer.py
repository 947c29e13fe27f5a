"""Rounding weights to int8 and int4: bounds, exact round trips, odd shapes, what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from indexshare.quant.integer import quantize
from indexshare.quant.policy import IntegerFormat, fitting_group

FORMATS: list[tuple[IntegerFormat, int, int]] = [("int8", 0, 127), ("int4", 32, 7), ("int4", 128, 7)]
EACH_FORMAT = pytest.mark.parametrize(("weight_format", "group", "levels"), FORMATS)
SHAPES = [(1, 1), (3, 33), (5, 160), (4100, 2)]  # the last is more than one band


def largest_by_group(weight: Tensor, group: int) -> Tensor:
    width = weight.shape[1]
    parts = [part.abs().amax(-1, keepdim=True).expand_as(part) for part in weight.split(group or width, dim=-1)]
    return torch.cat(parts, dim=-1)


@EACH_FORMAT
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_half_a_level(
    weight_format: IntegerFormat, group: int, levels: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = (torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None]).to(dtype)
    quantized = quantize(weight, weight_format, group)
    assert (quantized.format, quantized.group_size, quantized.shape) == (weight_format, group, shape)
    assert torch.equal(quantized.scales, quantized.scales.bfloat16().float())
    error = (quantized.dequantize(torch.float32) - weight.float()).abs()
    # A scale loses up to 2**-9 to bfloat16: the largest number then lacks up to a quarter of a level of 1 / 127.
    assert bool((error <= 0.51 * largest_by_group(weight.float(), group) / levels).all())


@EACH_FORMAT
def test_what_is_representable_survives_exactly(weight_format: IntegerFormat, group: int, levels: int) -> None:
    """Also a second rounding changes nothing."""
    weight = torch.randint(-levels, levels + 1, (6, 160)).float()
    weight[:, ::32] = levels  # every group has its largest level
    weight *= torch.tensor([1.0, 0.5, 3.0, 2.0**-20, 2.0**20, 0.0])[:, None]
    quantized = quantize(weight, weight_format, group)
    assert torch.equal(quantized.dequantize(torch.float32), weight)
    again = quantize(quantized.dequantize(torch.float32), weight_format, group)
    assert torch.equal(again.data, quantized.data)


@EACH_FORMAT
@given(exponent=st.integers(-149, 127), value=st.floats(1, 1.99), num_inputs=st.integers(1, 70))
def test_any_size_of_number_stays_finite(
    weight_format: IntegerFormat, group: int, levels: int, exponent: int, value: float, num_inputs: int
) -> None:
    weight = torch.full((2, num_inputs), math.ldexp(value, exponent))
    weight[1, num_inputs // 2] = 0
    widened = quantize(weight, weight_format, group).dequantize(torch.float32)
    assert bool(widened.isfinite().all())
    assert float(widened[1, num_inputs // 2]) == 0
    if exponent > -110:
        assert torch.allclose(widened[0], weight[0], rtol=2**-8)


@EACH_FORMAT
@pytest.mark.parametrize(
    "weight", [torch.full((2, 2), math.nan), torch.full((2, 2), math.inf), torch.ones(3), torch.ones(2, 2).int()]
)
def test_what_is_no_finite_matrix_is_refused(
    weight_format: IntegerFormat, group: int, levels: int, weight: Tensor
) -> None:
    with pytest.raises(ValueError, match="finite floating-point matrix"):
        quantize(weight, weight_format, group)


@pytest.mark.parametrize(
    ("num_inputs", "wanted", "expected"),
    [(6144, 128, 128), (2048, 64, 64), (192, 128, 64), (96, 128, 32), (96, 64, 32), (100, 128, 128), (100, 32, 32)],
)
def test_groups_divide_the_inputs_where_they_can(num_inputs: int, wanted: int, expected: int) -> None:
    assert fitting_group(num_inputs, wanted) == expected
