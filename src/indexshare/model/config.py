"""The configuration of GLM-5, 5.1, 5.2 and 5.3: read strictly from `config.json`, written as transformers reads it.

Field names are the keys of `config.json`. Which layers own an indexer is resolved here, once, into `indexer_types`; it
is empty for the families of checkpoints that have none (`families`), whose attention is dense.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from indexshare.errors import ConfigError
from indexshare.model.families import FAMILIES, FIXED_VALUES, INDEX_KEYS, UNUSED_KEYS, WITH_INDEXERS, family_of
from indexshare.model.rope_scaling import RopeScaling, read_rope, write_rope
from indexshare.quant import quantization_config

DTYPES = ("bfloat16", "float16", "float32")
MAX_LAYERS = 10_000  # a wrong number must not become a list of that length

# Written for transformers and other readers, with the values of the released files.
WRITTEN_FOR_OTHERS: dict[str, object] = {"use_cache": True, "pretraining_tp": 1, "ep_size": 1}

# Keys that name code to run or a private switch of transformers.
REFUSED_KEYS = ("auto_map", "_attn_implementation_internal", "_attn_implementation", "_experts_implementation_internal")

# Second names or redundant copies: key -> the field it must agree with.
REDUNDANT_KEYS = {
    "num_key_value_heads": "num_attention_heads",
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
}

DERIVED_KEYS = frozenset({"architectures", "rope_parameters", "quantization_config", "torch_dtype", "qk_head_dim"})

POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "index_topk_freq",
    "max_position_embeddings",
    "rms_norm_eps",
    "latent_norm_eps",
    "rope_theta",
    "initializer_range",
)
INDEX_SIZES = ("index_n_heads", "index_head_dim", "index_topk")


@dataclass(frozen=True, slots=True, kw_only=True)
class GlmConfig:
    """A GLM-5 family model. Build it with `from_json` or a recipe; `dataclasses.replace` makes checked variants."""

    model_type: str = WITH_INDEXERS  # a name in `families.FAMILIES`
    # sizes
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    latent_norm_eps: float  # ours: epsilon of q_a_layernorm and kv_a_layernorm; transformers has 1e-6 there
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    # multi-head latent attention
    num_attention_heads: int
    q_lora_rank: int | None  # None: queries are projected from hidden states directly
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool = True
    attention_bias: bool = False  # of q_a_proj, kv_a_proj_with_mqa and o_proj
    # indexer; 0 and () in a model without
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    indexer_types: tuple[str, ...] = ()  # "full" or "shared" for each layer; the MTP layer is always full
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2
    index_topk_pattern: str | tuple[str, ...] | None = None
    index_share_for_mtp_iteration: bool = False
    indexer_rope_interleave: bool = True
    # feed-forward
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    topk_method: str = "noaux_tc"  # sigmoid scores and a bias; "greedy", "group_limited_greedy": softmax scores
    n_group: int = 1  # experts are chosen from the topk_group best of n_group groups
    topk_group: int = 1
    first_k_dense_replace: int
    mlp_layer_types: tuple[str, ...]  # "dense" or "sparse" for each layer; the MTP layer is always sparse
    # the rest
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "bfloat16"
    quantization: str | None = None  # how the files hold weights: "fp8" (GLM-5.2-FP8) or "compressed-tensors"

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached for one token and layer: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_layers_with_mtp(self) -> int:
        """Decoder layers in the checkpoint; the MTP layer, if any, is the last."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def has_indexers(self) -> bool:
        """Whether attention is sparse; without indexers every layer attends to all visible keys."""
        return bool(self.indexer_types)

    @property
    def attention_scale(self) -> float:
        """What scores of queries and keys are multiplied with before the softmax."""
        return self.qk_head_dim**-0.5 * (1.0 if self.rope_scaling is None else self.rope_scaling.softmax_scale)

    def num_attended(self, context: int) -> int:
        """Keys that one query attends to with `context` tokens visible."""
        return min(context, self.index_topk) if self.has_indexers else context

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Layers of the main model that own an indexer."""
        return tuple(index for index, kind in enumerate(self.indexer_types) if kind == "full")

    def is_full(self, layer: int) -> bool:
        """Whether a layer owns an indexer; the MTP layer (index = num_hidden_layers) does if any does."""
        return self.has_indexers and (layer == self.num_hidden_layers or self.indexer_types[layer] == "full")

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is a mixture of experts; the MTP layer's is."""
        return layer == self.num_hidden_layers or self.mlp_layer_types[layer] == "sparse"

    def __post_init__(self) -> None:
        for name in POSITIVE_FIELDS:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than 0, not {getattr(self, name)}")
        for name in ("first_k_dense_replace", "index_skip_topk_offset"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise ConfigError(f"q_lora_rank must be absent or greater than 0, not {self.q_lora_rank}")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim must be even, not {self.qk_rope_head_dim}: RoPE turns pairs")
        if self.rope_scaling is not None and self.rope_theta <= 1:
            raise ConfigError(f"rope_theta must be greater than 1 for scaled RoPE, not {self.rope_theta}")
        self._check_indexers()
        _check_layer_list("mlp_layer_types", self.mlp_layer_types, ("dense", "sparse"), self.num_hidden_layers)
        self._check_routing()
        if self.num_nextn_predict_layers not in (0, 1):
            raise ConfigError(f"num_nextn_predict_layers must be 0 or 1, not {self.num_nextn_predict_layers}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.quantization not in (None, "fp8", quantization_config.METHOD):
            raise ConfigError(f"quantization must be absent, fp8 or compressed-tensors, not {self.quantization!r}")
        for token in (*self.eos_token_id, *(() if self.pad_token_id is None else (self.pad_token_id,))):
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"eos_token_id or pad_token_id {token} is outside vocab_size {self.vocab_size}")

    def _check_indexers(self) -> None:
        if self.model_type not in FAMILIES:
            raise ConfigError(f"model_type is {self.model_type!r}; supported are {', '.join(FAMILIES)}")
        if self.model_type != WITH_INDEXERS:
            if self.has_indexers:
                raise ConfigError(f"{self.model_type} has no indexers; with some it is {WITH_INDEXERS}")
            return
        for name in INDEX_SIZES:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than 0, not {getattr(self, name)}")
        _check_layer_list("indexer_types", self.indexer_types, ("full", "shared"), self.num_hidden_layers)
        if self.indexer_types[0] != "full":
            raise ConfigError("the first layer must be full: a shared layer reuses the selection of a layer before it")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ConfigError(f"index_head_dim {self.index_head_dim} is smaller than qk_rope_head_dim")
        if self.q_lora_rank is None:
            raise ConfigError("q_lora_rank is null: an indexer reads the query latent, which this model does not have")

    def _check_routing(self) -> None:
        methods = FAMILIES[self.model_type].topk_methods
        if self.topk_method not in methods:
            allowed = " and ".join(map(repr, methods))
            raise ConfigError(f"topk_method is {self.topk_method!r}; only {allowed} is supported in {self.model_type}")
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if chosen > experts:
            raise ConfigError(f"num_experts_per_tok {chosen} exceeds n_routed_experts {experts}")
        if self.topk_method == "greedy" or self.n_group == 1:
            return
        size = experts // self.n_group
        if experts % self.n_group or (self.topk_method == "noaux_tc" and size < 2):
            raise ConfigError(f"n_group is {self.n_group}: {experts} experts cannot be cut into so many equal groups")
        if self.topk_group > self.n_group or chosen > self.topk_group * size:
            raise ConfigError(f"topk_group is {self.topk_group}: {self.n_group} groups of {size} for {chosen} experts")

    @classmethod
    def from_json(
        cls,
        source: str | os.PathLike[str] | Mapping[str, object],
        *,
        index_pattern: str | None = None,
        latent_norm_eps: float | None = None,
        strict: bool = True,
    ) -> Self:
        """Read a `config.json`, a directory that holds one, or its parsed content.

        `index_pattern` ("FFSF...", one letter for each layer) replaces the file's choice of full and shared layers.
        `latent_norm_eps` replaces the epsilon of the two latent norms (default: rms_norm_eps; 1e-6 is transformers').
        Unknown keys raise ConfigError; with `strict=False` they are a warning. Unsupported values always raise.
        """
        given = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        _refuse(given)
        values = {key: value for key, value in given.items() if value is not None}
        family = family_of(values)
        has_indexers = values.get("model_type", WITH_INDEXERS) == WITH_INDEXERS
        fields_of_family = {field.name for field in dataclasses.fields(cls)} - (set() if has_indexers else INDEX_KEYS)
        _check_known(values, fields_of_family | set(family.fixed), strict)
        values = {**family.defaults, **family.fixed, **values}
        if index_pattern is not None:
            if not has_indexers:
                raise ConfigError(f"there is no index pattern to choose: {values['model_type']} has no indexers")
            values["index_topk_pattern"] = index_pattern
            values.pop("indexer_types", None)
        if latent_norm_eps is not None:
            values["latent_norm_eps"] = latent_norm_eps
        resolved = _resolve(values)
        fields = {field.name: resolved[field.name] for field in dataclasses.fields(cls) if field.name in resolved}
        try:
            return msgspec.convert(fields, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"config.json: {error}") from error

    def to_json_dict(self) -> dict[str, object]:
        """The content of a `config.json` that `from_json` reads back and that transformers' AutoConfig loads."""
        family = FAMILIES[self.model_type]
        content: dict[str, object] = {"architectures": [family.architecture]}
        content |= {**FIXED_VALUES, **WRITTEN_FOR_OTHERS, **family.fixed}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if self.has_indexers or field.name not in INDEX_KEYS:
                content[field.name] = list(value) if isinstance(value, tuple) else value
        del content["rope_scaling"], content["rope_theta"]
        content["rope_parameters"] = write_rope(self.rope_theta, self.rope_scaling)
        content["num_key_value_heads"] = self.num_attention_heads
        content["qk_head_dim"] = self.qk_head_dim
        content["head_dim"] = self.qk_rope_head_dim
        if self.latent_norm_eps == self.rms_norm_eps:
            del content["latent_norm_eps"]
        if content.pop("quantization") == "fp8":
            content["quantization_config"] = dict(quantization_config.FP8_CONFIG)
        return content


def derive_indexer_types(
    num_layers: int, *, pattern: str | Sequence[str] | None = None, freq: int = 1, offset: int = 2
) -> tuple[str, ...]:
    """Full and shared layers from a pattern ("FFSF..." or a list), else from frequency and offset.

    Layer i (from 0) is full when max(i - offset + 1, 0) is a multiple of freq; GLM-5.2 has 4 and 3: 0, 1, 2, 6, 10, ...
    """
    if pattern is None:
        return tuple("full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(num_layers))
    names = {"F": "full", "S": "shared", "full": "full", "shared": "shared"}
    if unknown := sorted({str(item) for item in pattern if not isinstance(item, str) or item not in names}):
        raise ConfigError(f"the index pattern may hold F (full) and S (shared) only, not {', '.join(unknown)}")
    if len(pattern) != num_layers:
        raise ConfigError(f"the index pattern has {len(pattern)} entries for {num_layers} layers")
    return tuple(names[item] for item in pattern)


def _read_json(path: Path) -> dict[str, object]:
    file = path / "config.json" if os.path.isdir(path) else path
    try:
        content = msgspec.json.decode(file.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration at {file}; a model directory holds config.json") from error
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def _refuse(given: Mapping[str, object]) -> None:
    for key in REFUSED_KEYS:
        if key in given:
            raise ConfigError(f"config.json has {key}, which names code or private switches; remove it to load this")


def _check_known(values: Mapping[str, object], fields: set[str], strict: bool) -> None:
    known = (fields - {"quantization"}) | set(FIXED_VALUES) | UNUSED_KEYS | set(REDUNDANT_KEYS) | DERIVED_KEYS
    if unknown := sorted(set(values) - known):
        message = f"unknown keys in config.json: {', '.join(unknown)}"
        if strict:
            raise ConfigError(f"{message}; the model may rely on them. strict=False makes this a warning")
        warnings.warn(message, stacklevel=3)


def _resolve(values: dict[str, object]) -> dict[str, object]:
    """Turn the keys of the file into the fields of GlmConfig; types are checked afterwards by msgspec."""
    resolved = dict(values)
    for key, field in REDUNDANT_KEYS.items():
        if key in values and values[key] != values.get(field):
            raise ConfigError(f"{key} is {values[key]!r} but {field} is {values.get(field)!r}; they must be equal")
    resolved["rope_theta"], resolved["rope_scaling"] = read_rope(values)
    resolved.setdefault("q_lora_rank", None)
    resolved["dtype"] = values.get("dtype", values.get("torch_dtype", "bfloat16"))
    quantization = values.get("quantization_config")
    resolved["quantization"] = None if quantization is None else quantization_config.check(quantization)
    if "rms_norm_eps" in values:  # without it the error must name that key, not ours
        resolved.setdefault("latent_norm_eps", values["rms_norm_eps"])
    eos = values.get("eos_token_id", ())
    resolved["eos_token_id"] = (eos,) if isinstance(eos, int) else eos
    num_layers = _integer(values, "num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers is {num_layers:,}; more than {MAX_LAYERS:,} is no model")
    if values.get("model_type", WITH_INDEXERS) == WITH_INDEXERS and "indexer_types" not in values:
        pattern = values.get("index_topk_pattern")
        if pattern is not None and not isinstance(pattern, (str, list, tuple)):
            raise ConfigError(f"index_topk_pattern must be a string or a list, not {pattern!r}")
        freq = max(_integer(values, "index_topk_freq", 1), 1)
        offset = _integer(values, "index_skip_topk_offset", 2)
        resolved["index_topk_freq"] = freq
        resolved["indexer_types"] = derive_indexer_types(num_layers, pattern=pattern, freq=freq, offset=offset)
    if "mlp_layer_types" not in values:
        num_dense = min(_integer(values, "first_k_dense_replace"), num_layers)
        resolved["mlp_layer_types"] = ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense)
    head_dims = (_integer(values, "qk_nope_head_dim"), _integer(values, "qk_rope_head_dim"))
    if values.get("qk_head_dim", sum(head_dims)) != sum(head_dims):
        raise ConfigError(f"qk_head_dim is {values['qk_head_dim']!r}; nope and rope parts sum to {sum(head_dims)}")
    return resolved


def _integer(values: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if value is None:
        raise ConfigError(f"config.json lacks {key}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key} must be a whole number, not {value!r}")
    return value


def _check_layer_list(name: str, kinds: Sequence[str], allowed: tuple[str, str], num_layers: int) -> None:
    if len(kinds) != num_layers:
        raise ConfigError(f"{name} has {len(kinds)} entries for {num_layers} layers")
    if unknown := sorted(set(kinds) - set(allowed)):
        raise ConfigError(f"{name} may hold {' and '.join(allowed)} only, not {', '.join(unknown)}")
