"""A checkpoint's headers against a model: names, shapes and formats are checked before a weight is read."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from indexshare.errors import CheckpointError, ConfigError
from indexshare.model.checkpoint_files import find_tensors, read_config
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.placement import Placement, enumerate_names, plan_weights
from indexshare.model.safetensors_header import StoredTensor
from indexshare.quant.policy import HEAD, IntegerFormat, Policy

Quant = IntegerFormat | Literal["none"] | Policy
COMPARED_BYTES = 2**24
EMBEDDING = "model.embed_tokens.weight"
INDEXER_NAME = re.compile(r"model\.layers\.(\d{1,6})\.self_attn\.indexer\..+")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What loading did beyond copying; tuples hold checkpoint names.

    `skipped_indexers`: indexer tensors of layers that the given pattern made shared. `skipped_unexpected`: tensors
    without a place in the model (only with strict=False). `widened_fp8`: weights converted from FP8. `mtp_absent`: the
    configuration has an MTP layer, the files have none, and the model was built without. `num_bytes`: bytes read.
    """

    num_tensors: int
    num_bytes: int
    widened_fp8: tuple[str, ...] = ()
    skipped_indexers: tuple[str, ...] = ()
    skipped_unexpected: tuple[str, ...] = ()
    mtp_absent: bool = False

    def remarks(self) -> list[str]:
        """One sentence for each thing that a user who did not look into the files should know."""
        found = []
        if self.skipped_indexers:
            names = enumerate_names(self.skipped_indexers)
            found.append(f"not used, because the index pattern makes their layers shared: {names}")
        if self.mtp_absent:
            found.append("the weights lack the MTP layer of config.json: the model is loaded without and cannot draft")
        if self.skipped_unexpected:
            found.append(f"not used, without a place in the model: {enumerate_names(self.skipped_unexpected)}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCheckpoint:
    """A checkpoint whose headers have been checked against a model, which is on "meta": no weight has been read."""

    model: GlmForCausalLM
    placement: Placement
    report: LoadReport

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name, one after the other, on the CPU; for `open_checkpoint` with quant "none"."""
        for name, shape in self.placement.shapes.items():
            one = replace(self.placement, shapes={name: shape})
            weights = one.allocate(dtype, "cpu")
            one.fill(weights)
            weight = weights[name]
            assert isinstance(weight, Tensor)
            yield name, weight.detach()


def open_checkpoint(
    directory: str | os.PathLike[str],
    *,
    config: GlmConfig | None = None,
    index_pattern: str | None = None,
    latent_norm_eps: float | None = None,
    quant: Quant | None = None,
    strict: bool = True,
) -> OpenCheckpoint:
    """What `load_checkpoint` does before it allocates anything; arguments and errors as there."""
    policy = Policy(format=quant) if quant in ("int8", "int4") else quant
    if not isinstance(policy, Policy) and policy not in (None, "none"):
        raise ConfigError(f"quant must be int8, int4 or none (or left out), not {quant!r}")
    if config is not None and (index_pattern is not None or latent_norm_eps is not None):
        raise ConfigError("give index_pattern and latent_norm_eps, or a whole config, not both")
    directory = Path(directory)
    content = read_config(directory)
    stored = find_tensors(directory)
    may_skip_indexers = index_pattern is not None or config is not None
    if config is None:
        num_layers = content.get("num_hidden_layers")
        if isinstance(num_layers, int) and num_layers > len(stored):
            raise CheckpointError(f"config.json has {num_layers} layers, the checkpoint only {len(stored)} tensors")
        config = GlmConfig.from_json(
            content, index_pattern=index_pattern, latent_norm_eps=latent_norm_eps, strict=strict
        )
    _check_plausible(config, stored)
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    mtp_absent = config.num_nextn_predict_layers > 0 and not any(name.startswith(mtp_prefix) for name in stored)
    # What the model holds is seen in its weights; `quantization` describes the files.
    config = replace(
        config, quantization=None, num_nextn_predict_layers=0 if mtp_absent else config.num_nextn_predict_layers
    )
    skipped_indexers = _unused_indexers(stored, config) if may_skip_indexers else ()

    with torch.device("meta"):
        model = GlmForCausalLM(config)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.get_parameter(EMBEDDING)
    placement = plan_weights(model.state_dict(keep_vars=True), stored, config.num_hidden_layers, policy)
    used = placement.used
    unexpected = tuple(sorted(stored.keys() - used - set(skipped_indexers) - _mtp_copies(stored, config)))
    if unexpected and strict:
        raise CheckpointError(
            f"{directory} has {enumerate_names(unexpected)} without a place in the model; "
            "config.json may not belong to these weights (strict=False skips them)"
        )
    report = LoadReport(
        num_tensors=len(used),
        num_bytes=sum(stored[name].num_bytes for name in used),
        skipped_indexers=skipped_indexers,
        skipped_unexpected=unexpected,
        mtp_absent=mtp_absent,
    )
    return OpenCheckpoint(model=model, placement=placement, report=report)


def _check_plausible(config: GlmConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse sizes far beyond the files before a model of them is built, even without memory: it could overflow."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries = config.q_lora_rank or 0
    least = config.vocab_size * hidden + hidden * (queries + config.latent_dim + heads * config.v_head_dim)
    least += (queries or hidden) * heads * config.qk_head_dim + queries * config.index_n_heads * config.index_head_dim
    least += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    if "dense" in config.mlp_layer_types:
        least += 3 * hidden * config.intermediate_size
    if "sparse" in config.mlp_layer_types:
        least += 3 * hidden * config.moe_intermediate_size * (config.n_routed_experts + config.n_shared_experts)
    # an I32 holds eight numbers of 4 bits
    found = sum(math.prod(tensor.shape) * (8 if tensor.dtype == torch.int32 else 1) for tensor in stored.values())
    if least > found:
        raise CheckpointError(
            f"config.json describes at least {least} parameters, the checkpoint has {found}; "
            "it is incomplete or config.json is not its"
        )


def _unused_indexers(stored: Mapping[str, StoredTensor], config: GlmConfig) -> tuple[str, ...]:
    """Indexer tensors (scales included) of layers that are shared."""
    matches = (INDEXER_NAME.fullmatch(name) for name in stored)
    return tuple(
        sorted(
            match[0]
            for match in matches
            if match and int(match[1]) < config.num_hidden_layers and not config.is_full(int(match[1]))
        )
    )


def _mtp_copies(stored: Mapping[str, StoredTensor], config: GlmConfig) -> set[str]:
    """Copies of embedding and head that an MTP layer brings along (DeepSeek-V3, GLM-4.7-Flash); ours borrows them.

    Raises CheckpointError for ones that differ from the main model's: a layer with its own is not supported.
    """
    layer = f"model.layers.{config.num_hidden_layers}."
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    originals = {layer + "embed_tokens.weight": EMBEDDING, layer + "shared_head.head.weight": head}
    copies = {name: original for name, original in originals.items() if name in stored and original in stored}
    for name, original in copies.items():
        if not _same_data(stored[name], stored[original]):
            raise CheckpointError(f"{name!r} is not a copy of {original!r}; an MTP layer with its own is not supported")
    return set(copies)


def _same_data(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors in files are equal, read a piece at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for begin in range(0, one.num_bytes, COMPARED_BYTES):
        size = min(COMPARED_BYTES, one.num_bytes - begin)
        pieces = [
            replace(each, dtype=torch.uint8, shape=(size,), offset=each.offset + begin, num_bytes=size).read()
            for each in (one, other)
        ]
        if not torch.equal(*pieces):
            return False
    return True
