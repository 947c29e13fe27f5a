"""What benchmarks/kernels.py measures: each operation at the shapes of real models, and whether its results are right.

A case counts the bytes and operations that a call cannot do without. Calls go through sets of arguments in turn, so
many that weights, keys and latents come from memory, as they do between the layers of a model.

Legend: T tokens or queries, S keys, K selected, H heads, W numbers in a cached row, C of them values, E experts.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ceilings import far_bytes
from torch import Tensor

from indexshare.eval.comparison import COMPARISONS
from indexshare.kernels import native, ops, registry
from indexshare.kernels.cache_formats import LATENT_GROUP, rounded_row_bytes
from indexshare.kernels.formats import Format, QuantizedWeight, quantize_activations, storage_shapes
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.packed import PackedWeight, pack
from indexshare.kernels.pool import Pool, QuantizedPool
from indexshare.model import recipes
from indexshare.model.config import GlmConfig

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the one table of tolerances
from tolerances import RELATIVE, SCORE_RESOLUTION, relative_error

PAGE_SIZE = 64
WINDOW = 65_536  # rows among which the selected ones of a token lie
MODELS: dict[str, Callable[[], GlmConfig]] = {"nano": recipes.nano, "mid": recipes.mid, "GLM-5.2": recipes.glm_5_2}
CONTEXTS = (16_384, 65_536)
QUANTIZED: dict[str, tuple[Format, int]] = {  # with the group size
    "int8": ("int8", 0),
    "int4/128": ("int4", 128),
    "int4/32": ("int4", 32),
    "fp8": ("fp8", 128),
}
BF16, INT8 = "bfloat16", "int8"
FORMATS = (BF16, *QUANTIZED)
OPERATIONS = ("index_select", "mla_sparse", "mla_sparse_backward", "linear", "moe_experts")

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One figure. num_bytes, num_operations: of a call, at the least. products: the type of number multiplied.

    prepare: makes arguments, and one or two functions that each do one call: the operation, and index_select with a
    top-k of one. check: what is wrong with the results of a smaller call, or None. is_quick: part of a short run.
    """

    name: str
    operation: str
    products: str
    num_bytes: float
    num_operations: float
    prepare: Callable[[], Sequence[Run]]
    check: Callable[[], str | None]
    is_quick: bool

    def seconds_at(self, ceilings: dict[str, float]) -> float:
        """How long a call takes a machine that reaches the ceiling: of memory or of products, whichever is later."""
        return max(self.num_bytes / ceilings["memory"], self.num_operations / ceilings[self.products])

    def bound(self, ceilings: dict[str, float]) -> str:
        """The ceiling that decides."""
        by_memory = self.num_bytes / ceilings["memory"] > self.num_operations / ceilings[self.products]
        return "memory" if by_memory else self.products


def in_turn(operation: Callable[..., object], sets: Sequence[tuple[Any, ...]]) -> Run:
    """A function that calls the operation with the next set of arguments each time."""
    endless = itertools.cycle(sets)
    return lambda: operation(*next(endless))


def all_cases(operations: Sequence[str], quick: bool) -> list[Case]:
    """The cases of the operations, in the order in which they are shown."""
    makers = {
        "index_select": index_select_cases,
        "mla_sparse": mla_sparse_cases,
        "mla_sparse_backward": mla_sparse_backward_cases,
        "linear": linear_cases,
        "moe_experts": moe_experts_cases,
    }
    return [case for name in operations for case in makers[name]() if case.is_quick or not quick]


# ---------------------------------------------------------------------------------------------------------- attention


def index_select_cases() -> list[Case]:
    """The last queries of a context: one as in decode, 64 as in a prompt. The longer one also with int8 keys."""
    places = [*((BF16, context) for context in CONTEXTS), (INT8, CONTEXTS[-1])]
    return [
        _index_select_case(model, cache, num_queries, context)
        for model, num_queries, (cache, context) in itertools.product(MODELS, (64, 1), places)
    ]


def _index_select_case(model: str, cache: str, num_queries: int, context: int) -> Case:
    config = MODELS[model]()
    heads, dim = config.index_n_heads, config.index_head_dim
    key_bytes = 2 * dim if cache == BF16 else rounded_row_bytes(dim, 0, dim)

    def prepare() -> list[Run]:
        num_sets = math.ceil(far_bytes() / (key_bytes * context))
        sets = _index_arguments(config, cache, num_queries, context, num_sets)
        return [
            in_turn(ops.index_select, sets),
            in_turn(ops.index_select, [(*arguments[:-1], 1) for arguments in sets]),
        ]

    visible = num_queries * context - num_queries * (num_queries - 1) // 2
    return Case(
        name=f"index_select {model}, {cache}, {context // 1024}K keys, {_count(num_queries, 'query', 'queries')}",
        operation="index_select",
        products=cache,
        num_bytes=key_bytes * context + 2 * dim * num_queries * heads,
        num_operations=2 * heads * dim * visible,
        prepare=prepare,
        check=functools.partial(_check_index_select, config, cache, num_queries),
        is_quick=context == CONTEXTS[-1],
    )


def _index_arguments(
    config: GlmConfig, cache: str, num_queries: int, context: int, num_sets: int
) -> list[tuple[Tensor, Tensor, Pool, KeyLayout, int]]:
    """Sets of arguments whose keys are the same numbers at different places."""
    heads, dim = config.index_n_heads, config.index_head_dim
    query = torch.randn(num_queries, heads, dim).bfloat16()
    weights = torch.randn(num_queries, heads) / heads**0.5
    pages = math.ceil(context / PAGE_SIZE)
    pool = _pool(torch.randn(pages * PAGE_SIZE, dim), cache, dim, dim, num_sets)
    layouts = [
        KeyLayout(
            sequence_starts=(0, num_queries),
            context_lengths=(context,),
            page_table=torch.arange(number * pages, (number + 1) * pages)[None],
            page_size=PAGE_SIZE,
        )
        for number in range(num_sets)
    ]
    return [(query, weights, pool, layout, config.index_topk) for layout in layouts]


def _check_index_select(config: GlmConfig, cache: str, num_queries: int) -> str | None:
    (arguments,) = _index_arguments(config, cache, num_queries, 3 * config.index_topk + 37, 1)
    query, weights, pool, layout, topk = arguments
    if cache == INT8:
        query = quantize_activations(query, config.index_head_dim)  # as the specification does
    operation = registry.get("index_select")
    call = registry.Call(operation=operation, twin=native.NAME, function=operation, args=arguments, kwargs={})
    exact = [query.double(), weights.double(), _plain(pool).double(), layout, topk]
    error, note = COMPARISONS["index_select"](call, exact, call.run())
    return None if error <= SCORE_RESOLUTION else f"chosen scores fall {error:.1e} short, {note}"


def mla_sparse_cases() -> list[Case]:
    """Random rows of a long context, in BF16 and int8: of one token as in decode, of 64 as in a prompt."""
    return [_mla_sparse_case(*each) for each in itertools.product(MODELS, (BF16, INT8), (64, 1))]


def _mla_sparse_case(model: str, cache: str, num_tokens: int) -> Case:
    config = MODELS[model]()
    heads, latent, num_selected = config.num_attention_heads, config.kv_lora_rank, config.index_topk
    width = latent + config.qk_rope_head_dim
    row_bytes = 2 * width if cache == BF16 else rounded_row_bytes(latent, config.qk_rope_head_dim, LATENT_GROUP)
    # The rows that at least one of the tokens has selected, as many as can be expected.
    num_rows = WINDOW * (1 - (1 - num_selected / WINDOW) ** num_tokens)

    def prepare() -> list[Run]:
        num_windows = math.ceil(far_bytes() / (row_bytes * WINDOW))
        num_sets = math.ceil(far_bytes() / (row_bytes * num_rows))
        return [in_turn(ops.mla_sparse, _mla_arguments(config, cache, num_tokens, num_windows, num_sets))]

    return Case(
        name=f"mla_sparse {model}, {cache}, {num_selected} rows, {_count(num_tokens, 'token')}",
        operation="mla_sparse",
        products=BF16,  # int8 rows are widened
        num_bytes=row_bytes * num_rows + 2 * num_tokens * heads * (width + latent),
        num_operations=2 * num_tokens * heads * num_selected * (width + latent),
        prepare=prepare,
        check=functools.partial(_check_mla_sparse, config, cache, num_tokens),
        is_quick=True,
    )


def _mla_arguments(
    config: GlmConfig, cache: str, num_tokens: int, num_windows: int, num_sets: int
) -> list[tuple[Tensor, Pool, Tensor, float, int]]:
    width = config.kv_lora_rank + config.qk_rope_head_dim
    query = torch.randn(num_tokens, config.num_attention_heads, width).bfloat16()
    pool = _pool(torch.randn(WINDOW, width), cache, config.kv_lora_rank, LATENT_GROUP, num_windows)

    def selection(window: int) -> Tensor:
        rows = [torch.randperm(WINDOW, dtype=torch.int32)[: config.index_topk] for _ in range(num_tokens)]
        return torch.stack(rows).sort(-1).values + window * WINDOW

    selections = [selection(number % num_windows) for number in range(num_sets)]
    return [(query, pool, chosen, config.qk_head_dim**-0.5, config.kv_lora_rank) for chosen in selections]


def _check_mla_sparse(config: GlmConfig, cache: str, num_tokens: int) -> str | None:
    ((query, pool, selection, scale, latent),) = _mla_arguments(config, cache, min(num_tokens, 9), 1, 1)
    if num_tokens > 1:
        selection[1, selection.shape[1] // 2 :] = -1
    found = ops.mla_sparse(query, pool, selection, scale, latent)
    expected = ops.mla_sparse.specification(query.double(), _plain(pool).double(), selection, scale, latent)
    return _judge(found, expected, torch.bfloat16)


def mla_sparse_backward_cases() -> list[Case]:
    """Training, in fp32: 64 tokens of a long row."""
    return [_mla_sparse_backward_case(model) for model in MODELS]


def _mla_sparse_backward_case(model: str) -> Case:
    config, num_tokens = MODELS[model](), 64
    heads, latent, num_selected = config.num_attention_heads, config.kv_lora_rank, config.index_topk
    width = latent + config.qk_rope_head_dim

    def arguments(num_tokens: int) -> tuple[Any, ...]:
        ((query, latents, chosen, scale, _),) = _mla_arguments(config, BF16, num_tokens, 1, 1)
        return query.float(), _plain(latents).float(), chosen, torch.randn(num_tokens, heads, latent), scale

    def check() -> str | None:
        small = arguments(9)
        wide = [each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in small]
        pairs = zip(ops.mla_sparse_backward(*small), ops.mla_sparse_backward.specification(*wide), strict=True)
        return next((wrong for found, expected in pairs if (wrong := _judge(found, expected, torch.float32))), None)

    return Case(
        name=f"mla_sparse_backward {model}, {num_selected} rows, {num_tokens} tokens",
        operation="mla_sparse_backward",
        products="float32",
        num_bytes=4 * (num_tokens * num_selected * width * 3 + num_tokens * heads * (2 * width + latent)),
        num_operations=2 * num_tokens * heads * num_selected * (3 * width + 2 * latent),
        prepare=lambda: [in_turn(ops.mla_sparse_backward, [arguments(num_tokens)])],
        check=check,
        is_quick=False,
    )


def _pool(values: Tensor, cache: str, rounded_dim: int, group_size: int, copies: int) -> Pool:
    """A pool that holds the rows several times; of int8 rows the numbers after rounded_dim are BF16."""
    if cache == BF16:
        return values.bfloat16().repeat(copies, 1)
    pool = QuantizedPool.empty(len(values), rounded_dim, values.shape[1] - rounded_dim, group_size)
    ops.cache_write(pool, torch.arange(len(values)), values)
    return replace(pool, data=pool.data.repeat(copies, 1))


def _plain(pool: Pool) -> Tensor:
    return pool[:] if isinstance(pool, QuantizedPool) else pool


# ------------------------------------------------------------------------------------------------------------ weights


def linear_cases() -> list[Case]:
    """One projection of a middle and of a large model in every format: one token as in decode, 512 as in a prompt."""
    shapes = {"mid": (3072, 1024), "GLM-5.2": (2048, 6144)}
    return [
        _linear_case(model, shape, name, num_tokens)
        for (model, shape), num_tokens, name in itertools.product(shapes.items(), (1, 512), FORMATS)
    ]


def _linear_case(model: str, shape: tuple[int, int], name: str, num_tokens: int) -> Case:
    num_outputs, width = shape

    def prepare() -> list[Run]:
        weight = random_weight(name, shape)
        num_sets = math.ceil(far_bytes() / _weight_bytes(name, shape)) if num_tokens == 1 else 1
        x = torch.randn(num_tokens, width).bfloat16()
        return [in_turn(ops.linear, [(x, _packed(weight)) for _ in range(num_sets)])]

    return Case(
        name=f"linear {model} {width} to {num_outputs}, {name}, {_count(num_tokens, 'token')}",
        operation="linear",
        products=_products(name),
        num_bytes=_weight_bytes(name, shape) + 2 * num_tokens * (width + num_outputs),
        num_operations=2.0 * num_tokens * num_outputs * width,
        prepare=prepare,
        check=functools.partial(_check_linear, name, num_tokens),
        is_quick=model == "GLM-5.2",
    )


def _check_linear(name: str, num_tokens: int) -> str | None:
    """At a shape that fills no block. The specification sees what the kernel sees: fp8 weights take BF16 inputs."""
    weight = random_weight(name, (200, 1100))
    packed, plain = _packed(weight), _wide_weight(weight)
    for dtype in (torch.bfloat16, torch.float32):
        if dtype == torch.float32 and name in (BF16, "fp8"):
            continue  # the kernel rounds these inputs to BF16
        x = torch.randn(min(num_tokens, 100), 1100).to(dtype)
        expected = ops.linear.specification(x if name == "fp8" else x.float(), plain)
        if wrong := _judge(ops.linear(x, packed), expected, dtype):
            return wrong
    return None


def moe_experts_cases() -> list[Case]:
    """The experts of a middle model. One token reads a few of them, and the next token others."""
    return [
        _moe_experts_case(name, num_tokens)
        for num_tokens, name in itertools.product((1, 512), (BF16, INT8, "int4/128"))
    ]


def _moe_experts_case(name: str, num_tokens: int) -> Case:
    config = recipes.mid()
    size, width, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    shapes = ((2 * width, size), (size, width))
    expert_bytes = sum(_weight_bytes(name, shape) for shape in shapes)
    num_experts = config.n_routed_experts if num_tokens > 1 else chosen

    def prepare() -> list[Run]:
        num_stacks = math.ceil(far_bytes() / (expert_bytes * config.n_routed_experts)) if num_tokens == 1 else 1
        gate_up, down = (random_weight(name, (config.n_routed_experts, *shape)) for shape in shapes)
        stacks = [(_packed(gate_up, pieces=2), _packed(down)) for _ in range(num_stacks)]
        hidden = torch.randn(num_tokens, size).bfloat16()
        gates = torch.full((num_tokens, chosen), 1 / chosen)
        experts = _experts_in_turn(config.n_routed_experts, num_tokens, chosen)
        return [in_turn(ops.moe_experts, [(hidden, one, gates, *stack) for stack in stacks for one in experts])]

    return Case(
        name=f"moe_experts mid, {name}, {_count(num_tokens, 'token')}",
        operation="moe_experts",
        products=_products(name),
        num_bytes=num_experts * expert_bytes + 4 * num_tokens * size,
        num_operations=2.0 * num_tokens * chosen * 3 * size * width,
        prepare=prepare,
        check=functools.partial(_check_moe_experts, name, num_tokens),
        is_quick=True,
    )


def _experts_in_turn(num_experts: int, num_tokens: int, num_chosen: int) -> list[Tensor]:
    """Choices of different experts for each token; one token after the other uses all there are."""
    if num_tokens > 1:
        return [torch.stack([torch.randperm(num_experts)[:num_chosen] for _ in range(num_tokens)])]
    return list(torch.randperm(num_experts)[: num_experts // num_chosen * num_chosen].view(-1, 1, num_chosen))


def _check_moe_experts(name: str, num_tokens: int) -> str | None:
    gate_up, down = random_weight(name, (6, 2 * 80, 200)), random_weight(name, (6, 200, 80))
    num_tokens = min(num_tokens, 100)
    hidden, gates = torch.randn(num_tokens, 200).bfloat16(), torch.rand(num_tokens, 2)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(num_tokens)])
    found = ops.moe_experts(hidden, experts, gates, _packed(gate_up, pieces=2), _packed(down))
    plain = _wide_weight(gate_up), _wide_weight(down)
    return _judge(found, ops.moe_experts.specification(hidden.float(), experts, gates, *plain), torch.bfloat16)


def random_weight(name: str, shape: tuple[int, ...]) -> Tensor | QuantizedWeight:
    """A weight [.., out, in] of values around in^-1/2, in one of FORMATS."""
    if name == BF16:
        return (torch.randn(shape) / shape[-1] ** 0.5).bfloat16()
    number_format, group_size = QUANTIZED[name]
    data_shape, scale_shape = storage_shapes(number_format, shape, group_size)
    data = torch.randint(0, 256, data_shape, dtype=torch.uint8)
    if number_format == "fp8":
        data = data.masked_fill(data & 127 == 127, 0).view(torch.float8_e4m3fn)
    elif number_format == "int8":
        data = data.view(torch.int8).clamp_(min=-127)
    largest = {"int8": 128, "int4": 8, "fp8": 448}[number_format]
    scales = (0.5 + torch.rand(scale_shape)).div_(largest * shape[-1] ** 0.5).bfloat16().float()
    return QuantizedWeight(format=number_format, data=data, scales=scales, group_size=group_size, shape=shape)


def _packed(weight: Tensor | QuantizedWeight, *, pieces: int = 1) -> PackedWeight:
    return pack(native.load(native.instruction_set()), weight, pieces=pieces)


def _wide_weight(weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
    return weight.float() if isinstance(weight, Tensor) else weight


def _weight_bytes(name: str, shape: tuple[int, int]) -> float:
    """Of numbers and scales of a packed weight."""
    num_outputs, width = shape
    if name == BF16:
        return 2.0 * num_outputs * width
    number_format, group_size = QUANTIZED[name]
    if number_format == "fp8":
        return num_outputs * width + 4 * num_outputs / 16 * width / group_size
    bits = {"int8": 8, "int4": 4}[number_format]
    return num_outputs * width * bits / 8 + 2 * num_outputs * (width / group_size if group_size else 1)


def _products(name: str) -> str:
    return INT8 if name.startswith("int") else BF16


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _judge(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    error = relative_error(found, expected)
    return None if error <= RELATIVE[dtype] else f"relative error {error:.1e}, allowed {RELATIVE[dtype]:.0e}"
