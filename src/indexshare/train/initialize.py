"""A structured start for small models: positional heads, an induction circuit and indexers that see the neighbourhood.

A model that saw two million tokens had not found by gradient descent that a head may look some tokens back and that
another may search for what followed (docs/experiments.md). Initial weights that
already have such structure ("mimetic initialisation", Trockman and Kolter, arXiv 2305.09828; induction heads, Olsson
et al., arXiv 2209.11895) leave the rest to training: no parameter is frozen or special afterwards.

The residual stream [D] is divided as follows; e is a token's embedding, each share holds a random projection of it.

    1 constant | A: e of this token | B, C, D: e of the tokens 1, 2, 3 back, by layer 0 | O: what lm_head reads
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from indexshare.model.config import GlmConfig
from indexshare.model.glm import Attention, GlmForCausalLM, Indexer, MtpLayer

NUM_BACK = 3
BACK_DIM = 32  # share of the residual stream for each token back
SLOT_DIM = 16  # of it, in the keys of an induction head
OUTPUT_DIM = 64
EMBEDDING_SPREAD = 0.5
CONSTANT = 2.0
NUM_LOCAL_FREQUENCIES = 4
POSITION_GAIN = 8.0  # amplitude of each frequency in queries and in keys
INDUCTION_GAIN = 1.5
# Of each frequency in an index score, slowest last: with rope_theta 1e5 their sum is largest for the last 125 tokens of
# 131,072. The two fastest would only add noise.
NEAR_AMPLITUDES = (0.0, 0.0, 0.3, 1.0, 1.0, 1.0, 1.0, 1.0)
NEAR_KEY_GAIN = 4.0
NEAR_QUERY_GAIN = 2.0
NEAR_HEAD_WEIGHT = 0.5
INDUCTION_LAYERS = (2, 4, 6)
NUM_INDUCTION_HEADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shares:
    """Slices of the residual stream, and the projections between them."""

    token: slice
    back: tuple[slice, ...]
    output: slice
    to_back: Tensor  # [BACK_DIM, token]
    to_output: Tensor  # [OUTPUT_DIM, token]


@torch.no_grad()
def initialize_induction(model: GlmForCausalLM, seed: int) -> None:
    """Writes the structure into a model fresh from `init_weights`, in place. Needs hidden_size >= 224 and fp32."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    back_begin = config.hidden_size - OUTPUT_DIM - NUM_BACK * BACK_DIM
    shares = _Shares(
        token=slice(1, back_begin),
        back=tuple(slice(start, start + BACK_DIM) for start in range(back_begin, back_begin + 96, BACK_DIM)),
        output=slice(config.hidden_size - OUTPUT_DIM, config.hidden_size),
        to_back=_projection(BACK_DIM, back_begin - 1, generator),
        to_output=_projection(OUTPUT_DIM, back_begin - 1, generator),
    )
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, 0] = CONSTANT
    embedding[:, shares.token] = torch.randn(embedding[:, shares.token].shape, generator=generator) * EMBEDDING_SPREAD
    model.lm_head.weight[:, shares.output] = 0.5 * embedding[:, shares.token] @ shares.to_output.T
    for module in model.modules():
        if isinstance(module, MtpLayer):
            module.eh_proj.weight[0].zero_()
            module.eh_proj.weight[0, 0] = 1.0  # hands the constant on
    for attention in _attentions(model):
        if attention.indexer is not None:
            _see_near(attention, attention.indexer)
        if attention.layer == 0:
            _look_back(attention, config, shares)
        elif attention.layer in INDUCTION_LAYERS:
            _search(attention, config, shares, generator)


def _attentions(model: GlmForCausalLM) -> Iterator[Attention]:
    return (module for module in model.modules() if isinstance(module, Attention))


def _projection(num_rows: int, num_columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows in random directions."""
    return torch.linalg.qr(torch.randn(num_columns, num_rows, generator=generator))[0].T


def _query_rows(attention: Attention, config: GlmConfig, head: int) -> Tensor:
    """Rows of q_b_proj that belong to a head: a view [N + P, q_lora_rank]."""
    return attention.q_b_proj.weight.view(config.num_attention_heads, config.qk_head_dim, -1)[head]


def _look_back(attention: Attention, config: GlmConfig, shares: _Shares) -> None:
    """Heads 0, 1, 2 look at the token 1, 2, 3 back and write its embedding into B, C, D.

    With constant queries and keys a score is a sum of cosines of the distance; phases put its peak where it is wanted.
    """
    constant = CONSTANT / (EMBEDDING_SPREAD**2 * shares.to_back.shape[1] / config.hidden_size) ** 0.5
    attention.q_a_proj.weight[0].zero_()
    attention.q_a_proj.weight[0, 0] = 1.0
    keys, rotary = attention.kv_a_proj_with_mqa.weight.split((config.kv_lora_rank, config.qk_rope_head_dim))
    keys[:BACK_DIM].zero_()
    keys[:BACK_DIM, shares.token] = shares.to_back
    frequencies = config.rope_theta ** -(torch.arange(NUM_LOCAL_FREQUENCIES) * 2.0 / config.qk_rope_head_dim)
    rotary.zero_()
    rotary[: 2 * NUM_LOCAL_FREQUENCIES : 2, 0] = POSITION_GAIN / constant
    values = attention.kv_b()[:, config.qk_nope_head_dim :]
    output = attention.o_proj.weight.view(config.hidden_size, config.num_attention_heads, config.v_head_dim)
    for head, share in enumerate(shares.back):
        query = _query_rows(attention, config, head)[config.qk_nope_head_dim :]
        angles = frequencies * (head + 1)
        query.zero_()
        assert config.q_lora_rank is not None, "this start is for a model with query latents"
        # The normed query latent's first entry is about sqrt(q_lora_rank).
        amplitude = POSITION_GAIN / config.q_lora_rank**0.5
        query[: 2 * NUM_LOCAL_FREQUENCIES : 2, 0] = amplitude * angles.cos()
        query[1 : 2 * NUM_LOCAL_FREQUENCIES : 2, 0] = -amplitude * angles.sin()
        values[head].zero_()
        values[head, :BACK_DIM, :BACK_DIM] = torch.eye(BACK_DIM)
        output[:, head].zero_()
        output[share, head, :BACK_DIM] = 0.3 * torch.eye(BACK_DIM)


def _see_near(attention: Attention, indexer: Indexer) -> None:
    """The last index head scores a key by its distance alone, so that near tokens are selected however many there are.

    Key and query are constant in the rotary dims (through the bias of the key's norm, and the last entry of the query
    latent), so that the score is a sum of cosines of the distance that peaks at 0.
    """
    lanes = slice(0, 2 * len(NEAR_AMPLITUDES), 2)
    amplitudes = torch.tensor(NEAR_AMPLITUDES)
    amplitudes = (amplitudes / amplitudes.sum()).sqrt()
    rotary = indexer.config.qk_rope_head_dim
    indexer.k_norm.weight[:rotary] = 0.1
    indexer.k_norm.bias[lanes] = NEAR_KEY_GAIN * amplitudes
    attention.q_a_proj.weight[-1].zero_()
    attention.q_a_proj.weight[-1, 0] = 1.0
    query = indexer.wq_b.weight.view(indexer.config.index_n_heads, indexer.config.index_head_dim, -1)[-1]
    query.zero_()
    query[lanes, -1] = NEAR_QUERY_GAIN * amplitudes
    indexer.weights_proj.weight[-1].zero_()
    indexer.weights_proj.weight[-1, 0] = NEAR_HEAD_WEIGHT


def _search(attention: Attention, config: GlmConfig, shares: _Shares, generator: torch.Generator) -> None:
    """Heads that search for the place where the last three tokens stood before, and copy what followed.

    Keys hold the three tokens before a place, queries the last three; values hold the token of the place itself.
    """
    width = NUM_BACK * SLOT_DIM
    slots = [_projection(SLOT_DIM, BACK_DIM, generator) for _ in range(NUM_BACK)]
    sources = (shares.token, *shares.back[:-1])
    keys = attention.kv_a_proj_with_mqa.weight[: config.kv_lora_rank]
    keys.zero_()
    attention.q_a_proj.weight[:width].zero_()
    for index, (slot, source, back) in enumerate(zip(slots, sources, shares.back, strict=True)):
        rows = slice(index * SLOT_DIM, (index + 1) * SLOT_DIM)
        keys[rows, back] = slot
        attention.q_a_proj.weight[rows, source] = slot @ shares.to_back if index == 0 else slot
    to_value = _projection(config.kv_lora_rank - width, shares.to_back.shape[1], generator)
    keys[width:, shares.token] = to_value
    key_value = attention.kv_b()
    output = attention.o_proj.weight.view(config.hidden_size, config.num_attention_heads, config.v_head_dim)
    num_values = to_value.shape[0]
    for head in range(NUM_INDUCTION_HEADS):
        _query_rows(attention, config, head)[:width, :width] = INDUCTION_GAIN * torch.eye(width)
        key_value[head].zero_()
        key_value[head, :width, :width] = torch.eye(width)
        key_value[head, config.qk_nope_head_dim : config.qk_nope_head_dim + num_values, width:] = torch.eye(num_values)
        output[:, head].zero_()
        output[shares.output, head, :num_values] = 0.3 * shares.to_output @ to_value.T
