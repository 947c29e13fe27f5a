"""Norms, rotary embedding, linear and cache writes against plain formulas in fp64."""

import math

import pytest
import torch
from tolerances import assert_near, relative_error

from indexshare.kernels import ops
from indexshare.kernels.formats import QuantizedWeight

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm(dtype: torch.dtype, scale: float) -> None:
    """The small scale makes the epsilon count, the large one would overflow a square in half precision."""
    x, weight = (scale * torch.randn(3, 2, 7)).to(dtype), torch.randn(7).to(dtype)
    rows = []
    for row in x.double().reshape(-1, 7).tolist():
        rms = math.sqrt(sum(value * value for value in row) / 7 + 1e-5)
        rows.append([value / rms * factor for value, factor in zip(row, weight.tolist(), strict=True)])
    result = ops.rms_norm(x, weight, 1e-5)
    assert result.dtype == dtype
    assert_near(result, torch.tensor(rows, dtype=torch.float64).view(3, 2, 7))


def test_rms_norm_multiplies_by_the_weight_after_rounding() -> None:
    """As the released model does: computed in fp32, rounded to x's dtype, then times the weight; C++ rounds once."""
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    wide = x.float()
    rounded = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    result = ops.rms_norm.specification(x, weight, 1e-5)
    assert relative_error(result, weight * rounded) < 1e-4
    assert relative_error(result, (weight.float() * rounded.float()).double()) > 1e-4


@DTYPES
def test_layer_norm(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(4, 9).to(dtype), torch.randn(9).to(dtype), torch.randn(9).to(dtype)
    rows = []
    for row in x.double().tolist():
        mean = sum(row) / 9
        deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / 9 + 1e-6)
        rows.append(
            [
                (value - mean) / deviation * factor + shift
                for value, factor, shift in zip(row, weight.tolist(), bias.tolist(), strict=True)
            ]
        )
    result = ops.layer_norm(x, weight, bias, 1e-6)
    assert result.dtype == dtype
    assert_near(result, torch.tensor(rows, dtype=torch.float64))


def rotated(vector: list[float], position: int, theta: float, interleaved: bool) -> list[float]:
    """Pairs turned by position * theta^(-2j/P), stored as two halves; Python floats."""
    half = len(vector) // 2
    first, second = [], []
    for j in range(half):
        x, y = (vector[2 * j], vector[2 * j + 1]) if interleaved else (vector[j], vector[j + half])
        angle = position * theta ** (-2 * j / len(vector))
        first.append(x * math.cos(angle) - y * math.sin(angle))
        second.append(y * math.cos(angle) + x * math.sin(angle))
    return first + second


@DTYPES
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("heads", [0, 3])
def test_rope_up_to_the_last_position(dtype: torch.dtype, interleaved: bool, heads: int) -> None:
    positions = torch.tensor([0, 1, 17, 1_048_575])
    x = torch.randn(4, *([heads] if heads else []), 8).to(dtype)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = ops.rope_table(positions, 8, 8e6, table_dtype)
    result = ops.rope(x, cos, sin, interleaved)
    assert result.dtype == dtype
    expected = [
        rotated(vector, position, 8e6, interleaved)
        for vectors, position in zip(x.double().view(4, -1, 8).tolist(), positions.tolist(), strict=True)
        for vector in vectors
    ]
    for token in range(4):  # each position for itself: the last one is as exact as the first
        assert_near(result[token], torch.tensor(expected, dtype=torch.float64).view(x.shape)[token])


def test_rope_keeps_relative_positions() -> None:
    """What attention needs: a dot product depends on the distance only."""
    query, key = torch.randn(1, 16, dtype=torch.float64), torch.randn(1, 16, dtype=torch.float64)
    products = []
    for shift in (0, 1000, 1_000_000):
        tables = [ops.rope_table(torch.tensor([p + shift]), 16, 8e6, torch.float64) for p in (40, 7)]
        turned = [ops.rope(x, *table, True) for x, table in zip((query, key), tables, strict=True)]
        products.append(float((turned[0] * turned[1]).sum()))
    assert products == pytest.approx([products[0]] * 3, rel=1e-9)


@DTYPES
def test_linear(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 8).to(dtype), torch.randn(5, 8).to(dtype)
    result = ops.linear(x, weight)
    assert result.dtype == dtype
    expected = [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in weight.tolist()]
        for row in x.view(-1, 8).tolist()
    ]
    assert_near(result, torch.tensor(expected, dtype=torch.float64).view(2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "num_columns"), [(576, 130), (128, 128), (5, 260)])
def test_linear_multiplies_fp8_blocks_by_their_scale(dtype: torch.dtype, num_rows: int, num_columns: int) -> None:
    """576 rows have 5 blocks: the last one is half a block."""
    weight = torch.randn(num_rows, num_columns).clamp(-3, 3).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(-(-num_rows // 128), -(-num_columns // 128)) + 0.5
    x = torch.randn(3, num_columns).to(dtype)
    wide = torch.empty(num_rows, num_columns, dtype=torch.float64)
    for row in range(num_rows):
        for column in range(0, num_columns, 128):
            block = weight[row, column : column + 128].double()
            wide[row, column : column + 128] = block * float(scale_inv[row // 128, column // 128])
    quantized = QuantizedWeight(format="fp8", data=weight, scales=scale_inv, group_size=128, shape=tuple(weight.shape))
    result = ops.linear(x, quantized)
    assert result.dtype == dtype
    assert_near(result, x.double() @ wide.T)


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_write_touches_its_rows_only(pool_dtype: torch.dtype) -> None:
    pool = torch.full((9, 3), 7.0, dtype=pool_dtype)
    values = torch.randn(3, 3)
    rows = torch.tensor([5, 0, 8])
    ops.cache_write(pool, rows, values)
    for row, value in zip(rows.tolist(), values, strict=True):
        assert torch.equal(pool[row], value.to(pool_dtype))
    assert (pool[[1, 2, 3, 4, 6, 7]] == 7.0).all()


def test_a_deliberately_wrong_operation_fails_the_comparison() -> None:
    """The tolerances have teeth: half a percent is noticed in fp32, five percent in bfloat16."""
    expected = torch.randn(50, 50, dtype=torch.float64)
    for dtype, factor in ((torch.float32, 1.005), (torch.bfloat16, 1.05)):
        assert_near(expected.to(dtype), expected)
        with pytest.raises(AssertionError, match="relative error"):
            assert_near((expected * factor).to(dtype), expected)
    for wrong in (expected[:1], expected + float("nan")):
        assert relative_error(wrong, expected) == math.inf
