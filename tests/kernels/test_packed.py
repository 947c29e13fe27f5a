"""Packed weights: they unpack to what they were, and the C++ products are those of the specification, bit for bit the
same whatever surrounds a row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_near
from torch import Tensor

from indexshare.errors import KernelError
from indexshare.kernels import native, ops, registry
from indexshare.kernels.formats import QuantizedWeight, storage_shapes
from indexshare.kernels.packed import PackedWeight, pack

BF16, FP32 = torch.bfloat16, torch.float32
INSTRUCTION_SETS = native.runnable()
FORMATS = ["bfloat16", "float32", "int8", "int4", "fp8"]


@pytest.fixture(params=INSTRUCTION_SETS)
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    for name in native.TWINS:
        monkeypatch.setattr(registry.get(name), "twins", [])
    native.register(request.param)
    return native.load(request.param)


def weight_of(name: str, shape: tuple[int, ...], group_size: int = 128) -> Tensor | QuantizedWeight:
    """A random weight whose values are around width^-1/2."""
    if name in ("bfloat16", "float32"):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(getattr(torch, name))
    group_size = {"int8": 0, "int4": group_size, "fp8": 128}[name]
    data_shape, scale_shape = storage_shapes(name, shape, group_size)
    scales = torch.rand(scale_shape) / shape[-1] ** 0.5 / (448 if name == "fp8" else 100)
    if name != "fp8":
        scales = scales.to(BF16).float()
    if name == "int4":
        data = torch.randint(0, 256, data_shape, dtype=torch.uint8)
        if shape[-1] % 2:
            data[..., -1] &= 15
    elif name == "int8":
        data = torch.randint(-127, 128, data_shape, dtype=torch.int8)
    else:
        bits = torch.randint(0, 256, data_shape, dtype=torch.uint8)
        data = torch.where(bits & 127 == 127, 0, bits).to(torch.uint8).view(torch.float8_e4m3fn)
    return QuantizedWeight(format=name, data=data, scales=scales, group_size=group_size, shape=shape)


def same(left: Tensor | QuantizedWeight, right: Tensor | QuantizedWeight) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return torch.equal(left, right)
    numbers = [each.data.view(torch.uint8) for each in (left, right)]
    return torch.equal(*numbers) and torch.equal(left.scales, right.scales) and left.group_size == right.group_size


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 8), (16, 16), (40, 24), (33, 130), (3, 32, 40), (2, 200, 257)])
def test_unpacking_gives_the_weight_back(operators: object, name: str, shape: tuple[int, ...]) -> None:
    weight = weight_of(name, shape, 32)
    packed = pack(operators, weight)
    assert packed.shape == shape
    assert same(packed.plain(), weight)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(32, 8), (3, 160, 40), (2, 2 * 128, 257)])
def test_unpacking_puts_pieces_together(operators: object, name: str, shape: tuple[int, ...]) -> None:
    weight = weight_of(name, shape, 32)
    assert same(pack(operators, weight, pieces=2).plain(), weight)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("num_rows", "width"), [(16, 8), (40, 24), (130, 257), (200, 512), (7, 1100)])
def test_products_are_those_of_the_specification(operators: object, name: str, num_rows: int, width: int) -> None:
    """Every number of tokens up to three tiles and a task, outputs and inputs that fill no block."""
    weight = weight_of(name, (num_rows, width), 64)
    packed = pack(operators, weight)
    for num_tokens in (1, 2, 5, 6, 7, 18, 49):
        x = torch.randn(num_tokens, width)
        for dtype in (FP32, BF16):
            if name == "bfloat16" and dtype == FP32:
                continue  # the inputs are rounded to BF16 then; see below
            found = ops.linear(x.to(dtype), packed)
            plain = weight.float() if isinstance(weight, Tensor) else weight
            expected = ops.linear.specification(x.to(dtype).float() if name != "fp8" else x.to(dtype), plain)
            # fp8 numbers are BF16 numbers, so that with fp32 inputs only these are rounded.
            assert_near(found, expected, BF16 if name == "fp8" else dtype)
    assert registry.hits["linear", registry.get("linear").twins[0].name] > 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(operators: object, name: str) -> None:
    packed = pack(operators, weight_of(name, (200, 700)))
    x = torch.randn(100, 700).to(BF16)
    together = ops.linear(x, packed)
    for start, stop in ((0, 1), (3, 5), (50, 100), (93, 100)):
        assert torch.equal(ops.linear(x[start:stop], packed), together[start:stop])
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(ops.linear(x, packed), together)


def test_all_fp8_numbers(operators: object) -> None:
    """Subnormals, zeros and NaN of both signs and the largest, one at a time."""
    bits = torch.arange(256, dtype=torch.uint8)
    data = bits.view(torch.float8_e4m3fn)[:, None].expand(256, 2).contiguous()
    weight = QuantizedWeight(format="fp8", data=data, scales=torch.ones(2, 1), group_size=128, shape=(256, 2))
    found = ops.linear(torch.tensor([[1.0, 0.0]]).to(BF16), pack(operators, weight))
    expected = bits.view(torch.float8_e4m3fn).to(BF16)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group_size", [48, 512])
def test_groups_across_parts_of_a_product_are_refused(operators: object, group_size: int) -> None:
    with pytest.raises(KernelError, match=f"int4 groups of {group_size}"):
        pack(operators, weight_of("int4", (16, 1024), group_size))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_so(operators: object, name: str, value: float) -> None:
    x = torch.ones(3, 300)
    x[1, 5] = value
    weight = weight_of(name, (20, 300))
    found = ops.linear(x.to(BF16), pack(operators, weight))
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()
    if name in ("int8", "int4"):  # a group of activations that cannot be rounded
        assert torch.equal(found.isnan(), ops.linear.specification(x.to(BF16), weight).isnan())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_experts_are_those_of_the_specification(operators: object, name: str, num_tokens: int) -> None:
    num_experts, hidden, width = 5, 40, 32
    gate_up, down = (
        weight_of(name, (num_experts, 2 * width, hidden), 32),
        weight_of(name, (num_experts, hidden, width), 32),
    )
    x = torch.randn(num_tokens, hidden).to(BF16 if name in ("bfloat16", "fp8") else FP32)
    experts = torch.stack([torch.randperm(num_experts - 1)[:2] for _ in range(num_tokens)])  # one is never chosen
    gates = torch.rand(num_tokens, 2)
    found = ops.moe_experts(x, experts, gates, pack(operators, gate_up, pieces=2), pack(operators, down))
    expected = ops.moe_experts.specification(x, experts, gates, gate_up, down)
    # Between the steps bfloat16 is rounded at other places, and a level may come out one higher or lower.
    assert_near(found.float(), expected.float(), FP32 if name == "float32" else BF16)
    alone = ops.moe_experts(x[-1:], experts[-1:], gates[-1:], pack(operators, gate_up, pieces=2), pack(operators, down))
    assert torch.equal(alone, found[-1:])


@given(
    st.sampled_from(FORMATS),
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(1, 20),
    st.integers(0, 2**31),
    st.data(),
)
def test_products_of_any_shape(
    name: str, num_rows: int, width: int, num_tokens: int, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    operators = native.load(data.draw(st.sampled_from(INSTRUCTION_SETS)))
    weight = weight_of(name, (num_rows, width), data.draw(st.sampled_from([8, 32, 64, 128])))
    packed = pack(operators, weight)
    assert same(packed.plain(), weight)
    x = torch.randn(num_tokens, width).to(BF16)
    found = torch.empty(num_tokens, num_rows, dtype=FP32)
    operators.linear(x.float(), packed.descriptor, found)
    expected = ops.linear.specification(x.float(), weight.float() if isinstance(weight, Tensor) else weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scales_beyond_bfloat16_are_refused(operators: object) -> None:
    weight = weight_of("int8", (4, 8))
    weight.scales.fill_(1 / 3)
    with pytest.raises(KernelError, match="bfloat16"):
        pack(operators, weight)


def test_other_dtypes_are_refused(operators: object) -> None:
    with pytest.raises(KernelError, match="float16"):
        pack(operators, torch.zeros(4, 4, dtype=torch.float16))


def test_a_packed_weight_takes_no_more_than_its_blocks(operators: object) -> None:
    for name, bits in (("bfloat16", 16), ("int8", 8), ("int4", 4), ("fp8", 8)):
        packed = pack(operators, weight_of(name, (256, 1024)))
        assert isinstance(packed, PackedWeight)
        assert packed.nbytes <= 256 * 1024 * bits / 8 * 1.04
