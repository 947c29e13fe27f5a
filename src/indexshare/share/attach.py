"""Another pattern of indexers for a model: new ones where it has none, none where the pattern shares.

A model of dense attention (MLA without indexers) becomes one of GLM-5.2's kind. Its new indexers know nothing yet:
`share distill` trains them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from indexshare.errors import ConfigError
from indexshare.kernels.ops import Weight
from indexshare.model.config import GlmConfig, derive_indexer_types
from indexshare.model.families import WITH_INDEXERS
from indexshare.model.glm import GlmForCausalLM, assign_weights, weights_of

RELEASED_TOPK = 2048
ROWS_PER_TOPK = 8  # a model for short texts selects this share of them at least, so that there is something to select


def with_indexers(
    config: GlmConfig,
    pattern: str,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    topk: int | None = None,
) -> GlmConfig:
    """The configuration with indexers exactly in the F layers of `pattern`.

    num_heads, head_dim, topk: index_n_heads, index_head_dim and index_topk, by default the model's, and those of
    `default_sizes` for a model without indexers. Raises ConfigError for a pattern or sizes that do not fit.
    """
    sizes = (config.index_n_heads, config.index_head_dim, config.index_topk)
    if not config.has_indexers:
        if not config.rope_interleave:
            raise ConfigError(
                "rope_interleave is false, but other software reads a model with indexers as if it were true:"
                " interleave the rotary rows of q_b_proj and kv_a_proj_with_mqa first"
            )
        sizes = default_sizes(config)
    elif num_heads not in (None, sizes[0]) or head_dim not in (None, sizes[1]):
        raise ConfigError(
            f"the model has indexers of {sizes[0]} heads of {sizes[1]}: new ones beside them must be of the same size"
        )
    return replace(
        config,
        model_type=WITH_INDEXERS,
        index_n_heads=sizes[0] if num_heads is None else num_heads,
        index_head_dim=sizes[1] if head_dim is None else head_dim,
        index_topk=sizes[2] if topk is None else topk,
        indexer_types=derive_indexer_types(config.num_hidden_layers, pattern=pattern),
        index_topk_pattern=pattern,
    )


def attach_indexers(
    model: GlmForCausalLM,
    pattern: str,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    topk: int | None = None,
    seed: int = 0,
) -> GlmForCausalLM:
    """A model with indexers exactly in the F layers of `pattern` (FFSF..., one letter a layer) and in the MTP layer.

    Indexers that are there stay; the others are new, drawn from `seed`. All weights are shared with `model`, which
    stays as it is. num_heads, head_dim, topk, and what is raised: as in `with_indexers`.
    """
    changed = with_indexers(model.config, pattern, num_heads=num_heads, head_dim=head_dim, topk=topk)
    with torch.device("meta"):
        attached = GlmForCausalLM(changed)
    places = dict(attached.named_parameters())
    weights: dict[str, Weight] = {name: weight for name, weight in weights_of(model).items() if name in places}
    like = model.model.layers[0].get_parameter("self_attn.o_proj.weight")
    for index, name in enumerate(places):
        if name not in weights:
            generator = torch.Generator().manual_seed(1_000_003 * seed + index)
            new = _initial(name, places[name].shape, generator)
            weights[name] = torch.nn.Parameter(new.to(device=like.device, dtype=like.dtype))
    assign_weights(attached, weights)
    return attached


def default_sizes(config: GlmConfig) -> tuple[int, int, int]:
    """Heads, head size and top-k of indexers for a model without: half as many heads as attention has, of twice the
    rotary width, and 2,048 keys or an eighth of the model's positions, as in GLM-5.2 and DeepSeek-V3.2."""
    heads = max(1, config.num_attention_heads // 2)
    topk = min(RELEASED_TOPK, max(1, config.max_position_embeddings // ROWS_PER_TOPK))
    return heads, 2 * config.qk_rope_head_dim, topk


def _initial(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Unit queries, keys and head weights for inputs of unit scale, so that scores spread by about one."""
    if name.endswith("k_norm.weight"):
        return torch.ones(shape)
    if name.endswith("k_norm.bias"):
        return torch.zeros(shape)
    assert ".indexer." in name, f"{name} is no part of an indexer"
    return torch.randn(shape, generator=generator) * shape[-1] ** -0.5


def pattern_of_frequency(config: GlmConfig, freq: int) -> str:
    """Three full layers, then one in `freq`: GLM-5.2's own pattern with 4 (FFFSSSF...). Raises ConfigError."""
    if freq < 1:
        raise ConfigError(f"the frequency must be at least 1, not {freq}: one layer in so many runs its indexer")
    types = derive_indexer_types(config.num_hidden_layers, freq=freq, offset=3)
    return "".join("F" if kind == "full" else "S" for kind in types)
