"""A model in C++ (kernels/cpp/model.h): packs its weights and runs a whole step in one call.

The packed weights take the place of the plain ones, so memory stays the same. What a packed model cannot do in one call
(dense attention, a trace of experts, what only other families than GLM-5 have) goes operation by operation, as on any
device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from indexshare import runtime
from indexshare.errors import KernelError
from indexshare.kernels import native, ops, registry
from indexshare.kernels.formats import QuantizedWeight
from indexshare.kernels.packed import INT4_GROUPS, LANES, Matrix, PackedWeight, as_tensor, fits_bfloat16, pack
from indexshare.model.batch import ForwardBatch, Selection
from indexshare.model.config import GlmConfig
from indexshare.model.glm import (
    INDEX_KEY_NORM_EPS,
    Attention,
    DecoderLayer,
    Experts,
    GlmForCausalLM,
    LayerStack,
    Linear,
    MixtureOfExperts,
    Mlp,
    StackOutput,
    run_layers,
    weights_of,
)
from indexshare.model.routing import is_glm_router

Packer = Callable[[Any], PackedWeight]
TIMED = ("linear", "index_select", "mla_sparse", "moe_experts")
MAX_ROPE = 1024  # numbers that the kernels turn at once
INTEGERS = ("hidden", "heads", "query_rank", "latent", "nope", "rope", "value", "index_heads", "index_dim")
MATRICES = ("q_a", "q_b", "kv_a", "absorb", "value", "output", "index_query", "index_key", "index_weights")
MLP_MATRICES = ("gate", "up", "down", "router", "expert_gate_up", "expert_down")


class Geometry(ctypes.Structure):
    """`struct Geometry`: what all layers share."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*INTEGERS, "interleaved", "index_interleaved")),
        *((name, ctypes.c_double) for name in ("norm_eps", "latent_norm_eps", "key_norm_eps", "scale")),
    )


class Norm(ctypes.Structure):
    """`struct Norm`: fp32 weight and bias."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class Layer(ctypes.Structure):
    """`struct Layer`: one decoder layer."""

    _fields_ = (
        *((name, Norm) for name in ("input_norm", "query_norm", "latent_norm", "key_norm", "mlp_norm")),
        *((name, Matrix) for name in (*MATRICES, *MLP_MATRICES)),
        ("router_bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_experts", "num_chosen", "normalise")),
        ("expert_scale", ctypes.c_double),
        ("expert_tokens", ctypes.c_void_p),
    )


class Model(ctypes.Structure):
    """`struct Model`: a stack of layers and what stands before and after them."""

    _fields_ = (
        ("geometry", Geometry),
        ("layers", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("embedding", ctypes.c_void_p),
        ("vocab", ctypes.c_int64),
        ("norm", Norm),
        ("head", Matrix),
        ("rope_theta", ctypes.c_double),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayers:
    """A stack as the kernels read it. model: `struct Model`. owned: everything that it points to.

    seconds: what the calls have spent on the operations TIMED. expert_tokens: int64 [experts] by layer, tokens that
    each expert has computed so far.
    """

    operators: Any
    model: Tensor
    numbers: tuple[int, ...]
    num_indexers: int
    dtype: torch.dtype
    owned: tuple[object, ...]
    seconds: Tensor
    expert_tokens: dict[int, Tensor]


def pack_model(model: GlmForCausalLM) -> str | None:
    """Replace the weights of a model on the CPU by packed ones, matrix by matrix, so that its layers run in C++.

    Returns None, or why the model stays as it is.
    """
    reason = enable() or _refusal(model)
    if reason is not None:
        return reason
    operators = native.load(native.instruction_set())
    packer = functools.partial(pack, operators, empty=runtime.Slab().empty)
    plain = {attention.kv_b_proj for attention in _attentions(model)}  # absorption reads it in two directions
    plain |= {attention.indexer.weights_proj for attention in _attentions(model) if attention.indexer is not None}
    for part in model.modules():
        if isinstance(part, Linear) and part not in plain:
            _replace(part, "weight", packer)
        elif isinstance(part, Experts):
            _replace(part, "gate_up_proj", functools.partial(packer, pieces=2))
            _replace(part, "down_proj", packer)
    for stack in _stacks(model):
        if _foreign(model.config) is None:
            stack.packed = _pack_stack(operators, stack, packer)
    return None


def _foreign(config: GlmConfig) -> str | None:
    """Why the layers of this model cannot run in one call, though its weights are packed; None when they can."""
    if not config.has_indexers:
        return "the model has no indexers: attention is dense"
    if config.rope_scaling is not None:
        return "rotary frequencies are scaled (YaRN)"
    if not is_glm_router(config):
        return "experts are chosen from groups"
    return "attention has biases" if config.attention_bias else None


def _stacks(model: GlmForCausalLM) -> list[LayerStack]:
    return [stack for stack in (model.stack, model.mtp_stack) if stack is not None]


def _attentions(model: GlmForCausalLM) -> list[Attention]:
    return [layer.self_attn for stack in _stacks(model) for layer in stack.layers]


def _refusal(model: GlmForCausalLM) -> str | None:
    config, weight = model.config, model.model.embed_tokens.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float32):
        return f"weights of {weight.dtype} on {weight.device}; the C++ kernels read bfloat16 and float32 on the CPU"
    if config.kv_lora_rank % LANES or config.moe_intermediate_size % LANES:
        return f"kv_lora_rank and moe_intermediate_size must be multiples of {LANES} for the C++ kernels"
    if config.qk_rope_head_dim > MAX_ROPE:
        return f"qk_rope_head_dim is more than {MAX_ROPE}"
    if model.model.norm.weight.dtype != weight.dtype:
        return f"norms are {model.model.norm.weight.dtype}, the embedding {weight.dtype}"
    if any(_kind(part.gate_proj) != _kind(part.up_proj) for part in model.modules() if isinstance(part, Mlp)):
        return "gate_proj and up_proj of a layer have different formats"
    quantized = [weight for weight in weights_of(model).values() if isinstance(weight, QuantizedWeight)]
    if any(weight.format != "fp8" and not fits_bfloat16(weight.scales) for weight in quantized):
        return "scales of integer weights are finer than bfloat16, or not numbers"
    if any(weight.format == "int4" and weight.group_size not in INT4_GROUPS for weight in quantized):
        return "groups of int4 weights have a size that the C++ kernels do not take"
    return None


def _kind(part: Linear) -> tuple[object, ...]:
    weight = part.weight
    return (weight.format, weight.group_size) if isinstance(weight, QuantizedWeight) else (weight.dtype,)


def _replace(module: nn.Module, name: str, packer: Packer) -> None:
    weight = getattr(module, name)
    if isinstance(weight, PackedWeight):
        return  # shared with a model that is packed already
    packed = packer(weight)
    delattr(module, name)  # a parameter, which nn.Module would not let another type replace
    setattr(module, name, packed)


def _pack_stack(operators: Any, stack: LayerStack, packer: Packer) -> PackedLayers:
    owned: list[object] = []
    config, layers, head = stack.config, stack.layers, stack.head.weight
    assert config.q_lora_rank is not None, "a model with indexers has a query latent"
    counts = {layer.self_attn.layer: torch.zeros(config.n_routed_experts, dtype=torch.int64) for layer in layers}
    parts = [_pack_layer(config, layer, counts[layer.self_attn.layer], packer, owned) for layer in layers]
    array = (Layer * len(layers))(*parts)
    owned.append(array)
    assert isinstance(head, PackedWeight), "projections are packed first"
    embedding = None if stack.embedding is None else stack.embedding.weight.detach().contiguous()
    model = Model(
        geometry=Geometry(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            query_rank=config.q_lora_rank,
            latent=config.kv_lora_rank,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            index_heads=config.index_n_heads,
            index_dim=config.index_head_dim,
            interleaved=config.rope_interleave,
            index_interleaved=config.indexer_rope_interleave,
            norm_eps=config.rms_norm_eps,
            latent_norm_eps=config.latent_norm_eps,
            key_norm_eps=INDEX_KEY_NORM_EPS,
            scale=config.attention_scale,
        ),
        layers=ctypes.addressof(array),
        num_layers=len(layers),
        embedding=None if embedding is None else embedding.data_ptr(),
        vocab=config.vocab_size,
        norm=_norm(stack.norm, owned),
        head=head.matrix,
        rope_theta=config.rope_theta,
    )
    owned.append((head, embedding))
    return PackedLayers(
        operators=operators,
        model=as_tensor(model),
        numbers=tuple(layer.self_attn.layer for layer in layers),
        num_indexers=sum(layer.self_attn.indexer is not None for layer in layers),
        dtype=layers[0].input_layernorm.weight.dtype,
        owned=tuple(owned),
        seconds=torch.zeros(len(TIMED), dtype=torch.float64),
        expert_tokens={
            layer.self_attn.layer: counts[layer.self_attn.layer]
            for layer in layers
            if isinstance(layer.mlp, MixtureOfExperts)
        },
    )


def _norm(module: nn.Module, owned: list[object]) -> Norm:
    tensors = [getattr(module, name, None) for name in ("weight", "bias")]
    wide = [None if tensor is None else tensor.detach().float().contiguous() for tensor in tensors]
    owned.append(wide)
    return Norm(*(None if tensor is None else tensor.data_ptr() for tensor in wide))


def _pack_layer(config: GlmConfig, layer: DecoderLayer, counts: Tensor, packer: Packer, owned: list[object]) -> Layer:
    def matrix(weight: Tensor | PackedWeight) -> Matrix:
        packed = weight if isinstance(weight, PackedWeight) else packer(weight.detach())
        owned.append(packed)
        return packed.matrix

    attention, mlp = layer.self_attn, layer.mlp
    kv_b = attention.kv_b().detach()
    packed = Layer(
        input_norm=_norm(layer.input_layernorm, owned),
        query_norm=_norm(attention.q_a_layernorm, owned),
        latent_norm=_norm(attention.kv_a_layernorm, owned),
        mlp_norm=_norm(layer.post_attention_layernorm, owned),
        q_a=matrix(attention.q_a_proj.weight),
        q_b=matrix(attention.q_b_proj.weight),
        kv_a=matrix(attention.kv_a_proj_with_mqa.weight),
        absorb=matrix(kv_b[:, : config.qk_nope_head_dim].transpose(1, 2)),
        value=matrix(kv_b[:, config.qk_nope_head_dim :]),
        output=matrix(attention.o_proj.weight),
    )
    if (indexer := attention.indexer) is not None:
        packed.key_norm = _norm(indexer.k_norm, owned)
        packed.index_query = matrix(indexer.wq_b.weight)
        packed.index_key = matrix(indexer.wk.weight)
        packed.index_weights = matrix(indexer.weights_proj.weight)
    dense = mlp.shared_experts if isinstance(mlp, MixtureOfExperts) else mlp
    packed.gate, packed.up, packed.down = (
        matrix(part.weight) for part in (dense.gate_proj, dense.up_proj, dense.down_proj)
    )
    if isinstance(mlp, MixtureOfExperts):
        assert mlp.gate.e_score_correction_bias is not None, "the router of GLM-5 has a bias"
        bias = mlp.gate.e_score_correction_bias.detach().float().contiguous()
        owned.append(bias)
        packed.router, packed.router_bias = matrix(mlp.gate.weight), bias.data_ptr()
        packed.expert_gate_up, packed.expert_down = matrix(mlp.experts.gate_up_proj), matrix(mlp.experts.down_proj)
        packed.num_experts, packed.num_chosen = config.n_routed_experts, config.num_experts_per_tok
        packed.normalise, packed.expert_scale = config.norm_topk_prob, config.routed_scaling_factor
        packed.expert_tokens = counts.data_ptr()
    return packed


def _supports(
    stack: LayerStack, inputs: Tensor, selected: Selection | None, batch: ForwardBatch, num_logits: int
) -> str | None:
    packed, cache = stack.packed, batch.cache
    if packed is None:
        return _foreign(stack.config) or "the weights are not packed (`indexshare.load` packs them on a CPU)"
    if cache is None or batch.layout.page_table is None:
        return "there is no cache: this is training"
    if batch.attention != "sparse":
        return "attention is dense"
    if not cache.dtypes <= {packed.dtype} or inputs.dtype != (packed.dtype if stack.embedding is None else torch.int64):
        caches = ", ".join(map(str, cache.dtypes))
        return f"caches are {caches}, inputs {inputs.dtype}, weights packed for {packed.dtype}"
    for tensor in (batch.positions, batch.layout.page_table):
        if tensor.dtype != torch.int64 or not tensor.is_contiguous():
            return "positions and page tables must be int64 and contiguous"
    return None if inputs.is_contiguous() else "the inputs are not contiguous"


def _run(
    stack: LayerStack, inputs: Tensor, selected: Selection | None, batch: ForwardBatch, num_logits: int
) -> StackOutput:
    packed, layout, cache, config = stack.packed, batch.layout, batch.cache, stack.config
    assert packed is not None and cache is not None and layout.page_table is not None
    num_tokens, max_context = len(inputs), layout.max_context
    if not batch.query_only:
        keeps_all = packed.num_indexers if batch.trace is not None else 1
        rows = torch.empty(keeps_all, num_tokens, min(config.index_topk, max_context), dtype=torch.int32)
    elif selected is not None and selected.rows is not None:
        rows = selected.rows[None].contiguous()
    else:
        assert num_tokens == layout.num_sequences, "one query for each sequence"
        every = [layout.rows(sequence) for sequence in range(num_tokens)]
        rows = torch.nn.utils.rnn.pad_sequence(every, batch_first=True, padding_value=-1)[None].to(torch.int32)
    hidden = torch.empty(num_tokens, config.hidden_size, dtype=packed.dtype)
    logits = torch.empty(num_logits, config.vocab_size)
    if registry.is_timing():
        packed.seconds.zero_()
    failed = packed.operators.run_model(
        packed.model,
        inputs,
        batch.positions,
        hidden,
        logits,
        layout.starts_and_contexts,
        layout.page_table,
        layout.page_size,
        cache.addresses(packed.numbers),
        *cache.group_sizes,
        batch.query_only,
        rows,
        packed.seconds,
    )
    if registry.is_timing():
        registry.add_seconds(dict(zip(TIMED, packed.seconds.tolist(), strict=True)))
    if failed < 0:
        raise IndexError(f"token ids must be from 0 to {config.vocab_size - 1}")
    if failed > 0:
        raise KernelError(f"layer {packed.numbers[failed - 1]}: {ops.NAN_SCORES}")
    sees_all = max_context <= config.index_topk
    if batch.trace is not None:
        full = [layer.self_attn.layer for layer in stack.layers if layer.self_attn.indexer is not None]
        batch.trace.selections.update((layer, None if sees_all else rows[i]) for i, layer in enumerate(full))
    return StackOutput(hidden, Selection(None if sees_all else rows[-1]), logits if num_logits > 0 else None)


@functools.cache
def enable() -> str | None:
    """`kernels.native.enable`, and the twin that runs all layers; once per process. Returns why not, or None."""
    reason = native.enable()
    if reason is None:
        twin = registry.Twin(
            name=native.NAME,
            devices=("cpu",),
            function=_run,
            supports=_supports,
            note=f"a step in one call ({native.instruction_set()}); else one by one",
        )
        registry.register(run_layers.name, twin)
    return reason
