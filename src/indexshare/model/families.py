"""Families of checkpoints that are this model, with or without indexers, and what their config.json may say.

All have multi-head latent attention over one latent row per token and a mixture of experts with shared experts; only
glm_moe_dsa has indexers. Source of names and default values: the released files and transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from indexshare.errors import ConfigError

WITH_INDEXERS = "glm_moe_dsa"

# Keys with one value that this model implements; an absent key means that value.
FIXED_VALUES: dict[str, object] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "moe_router_dtype": "float32",
}

# Known, and without meaning here: what transformers 5.23 writes of its own, training losses, hints to other software.
# `head_dim` is among them because it is 192 in the released files and 64 (the rotary width) in transformers' own.
UNUSED_KEYS = frozenset(
    {
        "_name_or_path",
        "aux_loss_alpha",
        "bos_token_id",
        "chunk_size_feed_forward",
        "ep_size",
        "head_dim",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "layer_types",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "seq_aux",
        "transformers_version",
        "use_cache",
    }
)

# What only a model with indexers has.
INDEX_KEYS = frozenset(
    {
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "indexer_types",
        "index_topk_freq",
        "index_skip_topk_offset",
        "index_topk_pattern",
        "index_share_for_mtp_iteration",
        "indexer_rope_interleave",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `model_type`. defaults: values of absent keys. required: keys whose absence has no safe reading.

    topk_methods: how experts may be chosen. fixed: further keys with one value.
    """

    architecture: str
    topk_methods: tuple[str, ...] = ("noaux_tc",)
    defaults: Mapping[str, object] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=lambda: {"scoring_func": "sigmoid"})
    required: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    WITH_INDEXERS: Family(architecture="GlmMoeDsaForCausalLM"),
    "glm4_moe_lite": Family(
        architecture="Glm4MoeLiteForCausalLM",
        defaults={"first_k_dense_replace": 1},
        fixed={"scoring_func": "sigmoid", "partial_rotary_factor": 1.0},
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM", required=("n_group", "topk_group", "first_k_dense_replace")
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        topk_methods=("greedy", "group_limited_greedy"),
        defaults={"topk_method": "greedy", "first_k_dense_replace": 0},
        # normalised gates: the files' own code then leaves out routed_scaling_factor, transformers does not normalise
        fixed={"scoring_func": "softmax", "norm_topk_prob": False, "rope_interleave": True},
    ),
}


def family_of(values: Mapping[str, object]) -> Family:
    """The family of a parsed config.json. Raises ConfigError for others and for keys at odds with it."""
    name = values.get("model_type", WITH_INDEXERS)
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"model_type is {name!r}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    architectures = values.get("architectures", [family.architecture])
    if architectures != [family.architecture]:
        raise ConfigError(
            f"model_type is {name!r} but architectures is {architectures!r}; it must be {[family.architecture]!r}"
        )
    for key, expected in {**FIXED_VALUES, **family.fixed}.items():
        value = values.get(key, expected)
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            raise ConfigError(f"{key} is {value!r}; only {expected!r} is supported in {name}")
    if missing := [key for key in family.required if key not in values]:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    return family
