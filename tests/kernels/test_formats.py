"""The quantised formats element by element, and the operations that multiply with them, against plain loops."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_near
from torch import Tensor

from indexshare.errors import KernelError
from indexshare.kernels import formats, ops
from indexshare.kernels.formats import Format, QuantizedWeight, quantize_activations, storage_shapes

FORMATS: list[tuple[Format, int]] = [("int8", 0), ("int4", 32), ("int4", 128), ("fp8", 128)]
EACH_FORMAT = pytest.mark.parametrize(("weight_format", "group"), FORMATS)


@pytest.fixture(autouse=True)
def narrow_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 128 rows, so that even a small weight has a few."""
    monkeypatch.setattr(formats, "BAND_NUMBERS", 1)


def make_weight(weight_format: Format, shape: tuple[int, ...], group: int) -> QuantizedWeight:
    """Every bit pattern that the format allows, and random scales."""
    data_shape, scale_shape = storage_shapes(weight_format, shape, group)
    match weight_format:
        case "int8":
            data = torch.randint(-127, 128, data_shape, dtype=torch.int8)
        case "int4":
            data = torch.randint(0, 256, data_shape, dtype=torch.uint8)
        case "fp8":
            data = torch.randn(data_shape).to(torch.float8_e4m3fn)
    scales = (torch.rand(scale_shape) + 0.5).bfloat16().float()
    return QuantizedWeight(format=weight_format, data=data, scales=scales, group_size=group, shape=shape)


def element(weight: QuantizedWeight, row: int, column: int) -> float:
    """One element of a [out, in] weight as the table of the module defines it."""
    match weight.format:
        case "int8":
            return int(weight.data[row, column]) * float(weight.scales[row, 0])
        case "int4":
            byte = int(weight.data[row, column // 2])
            level = (byte >> 4 if column % 2 else byte & 15) - 8
            return level * float(weight.scales[row, column // weight.group_size])
        case "fp8":
            return float(weight.data[row, column].float()) * float(weight.scales[row // 128, column // 128])


def widened(weight: QuantizedWeight) -> Tensor:
    rows, columns = weight.shape
    return torch.tensor([[element(weight, i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64)


@EACH_FORMAT
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (130, 5), (2, 160)])
def test_elements(weight_format: Format, group: int, shape: tuple[int, int]) -> None:
    weight = make_weight(weight_format, shape, group)
    expected = widened(weight)
    assert torch.equal(weight.dequantize(torch.float64), expected)
    for dtype in (torch.float32, torch.bfloat16):
        result = weight.dequantize(dtype)
        assert result.dtype == dtype
        # fp8 times a scale needs more digits than float32 has; the others are exact there
        assert torch.equal(result, expected.float().to(dtype))


@EACH_FORMAT
def test_experts_and_rows_share_memory(weight_format: Format, group: int) -> None:
    weight = make_weight(weight_format, (3, 260, 7), group)
    whole = weight.dequantize(torch.float32)
    assert weight.nbytes == weight.data.nbytes + weight.scales.nbytes
    one = weight.expert(1)
    assert torch.equal(one.dequantize(torch.float32), whole[1])
    assert torch.equal(one.rows(128, 259).dequantize(torch.float32), whole[1, 128:259])
    one.scales.fill_(0)
    assert not weight.dequantize(torch.float32)[1].any()
    copy = QuantizedWeight.empty(weight_format, weight.shape, group)
    copy.copy_(weight)
    assert torch.equal(copy.to("cpu").dequantize(torch.float32), weight.dequantize(torch.float32))


@EACH_FORMAT
@pytest.mark.parametrize("wrong", ["scales", "data", "scale dtype", "data dtype", "group", "shape"])
def test_parts_that_do_not_fit_are_refused(weight_format: Format, group: int, wrong: str) -> None:
    weight = make_weight(weight_format, (129, 160), group)
    changes = {
        "scales": {"scales": weight.scales[:-1]},
        "data": {"data": weight.data[:, :-1]},
        "scale dtype": {"scales": weight.scales.bfloat16()},
        "data dtype": {"data": weight.data.view(torch.uint8 if weight_format != "int4" else torch.int8)},
        "group": {"group_size": 0 if group else 128},
        "shape": {"shape": (160,)},
    }
    with pytest.raises(KernelError, match=f"{weight_format} weight"):
        replace(weight, **changes[wrong])


# ---------------------------------------------------------------------------------------------------------------------
# activations


def rounded(row: list[float], group: int) -> list[float]:
    """The definition with one number at a time; Python's round is half to even."""
    result = []
    for begin in range(0, len(row), group):
        part = row[begin : begin + group]
        scale = torch.tensor(max(map(abs, part))) / 127
        for value in part:
            level = 0 if float(scale) == 0 else round(float(torch.tensor(value) / scale))
            result.append(float(level * scale))
    return result


@pytest.mark.parametrize("group", [3, 32, 128])
@pytest.mark.parametrize("num_inputs", [1, 31, 32, 129])
def test_activations_are_rounded_by_group(group: int, num_inputs: int) -> None:
    x = torch.randn(2, num_inputs)
    x[0, : min(group, num_inputs)] = 0
    expected = torch.tensor([rounded(row, group) for row in x.tolist()])
    assert torch.equal(quantize_activations(x, group), expected)
    assert torch.equal(quantize_activations(x[:, None], group), expected[:, None])
    wide = quantize_activations(x.double(), group)  # the same levels and scales, multiplied exactly
    assert wide.dtype == torch.float64
    assert torch.equal(wide.float(), expected)


def test_half_goes_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5])
    assert quantize_activations(x, 8).tolist() == [127, 0, 2, 2, 0, -2, -126]


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=20))
def test_rounding_is_within_half_a_level_and_keeps_the_largest(values: list[float]) -> None:
    x = torch.tensor(values)
    result = quantize_activations(x, 7)
    for part, near in zip(x.split(7), result.split(7), strict=True):
        largest = float(part.abs().max())
        assert bool(near.isfinite().all())
        if largest > 1e-30:  # below, scales are subnormal numbers
            assert float((near - part).abs().max()) <= largest / 127 * 0.5001
            assert math.isclose(float(near.abs().max()), largest, rel_tol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x = torch.ones(2, 64)
    x[0, 40] = bad
    result = quantize_activations(x, 32)
    assert bool(result[0, 32:].isnan().any())
    assert torch.equal(result[1], x[1])
    assert torch.equal(result[0, :32], x[0, :32])


# ---------------------------------------------------------------------------------------------------------------------
# operations


def expected_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Sum over groups of activation scale * weight scale * integer dot product."""
    inputs = x.double()
    if weight.format != "fp8":
        group = weight.group_size or 128
        rows = [rounded(row, group) for row in x.float().view(-1, x.shape[-1]).tolist()]
        inputs = torch.tensor(rows, dtype=torch.float64).view(x.shape)
    return inputs @ widened(weight).T


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_linear(weight_format: Format, group: int, dtype: torch.dtype, small_tiles: None) -> None:
    """150 outputs are two bands; 130 inputs have a last group of 2."""
    weight = make_weight(weight_format, (150, 130), group)
    x = torch.randn(2, 3, 130).to(dtype)
    result = ops.linear(x, weight)
    assert result.dtype == dtype
    # rounded() multiplies level and scale in float32
    assert_near(result, expected_linear(x, weight), torch.float32 if dtype == torch.float64 else None)


@EACH_FORMAT
def test_experts(weight_format: Format, group: int) -> None:
    """A quantised expert layer is the composition of quantised linears."""
    gate_up, down = make_weight(weight_format, (5, 36, 40), group), make_weight(weight_format, (5, 40, 18), group)
    hidden, gates = torch.randn(7, 40), torch.rand(7, 2)
    experts = torch.rand(7, 5).argsort(-1)[:, :2]
    expected = torch.zeros(7, 40)
    for token in range(7):
        for expert, gate in zip(experts[token].tolist(), gates[token].tolist(), strict=True):
            inner = ops.swiglu(ops.linear(hidden[token], gate_up.expert(expert)))
            expected[token] += gate * ops.linear(inner, down.expert(expert))
    assert_near(ops.moe_experts(hidden, experts, gates, gate_up, down), expected)
