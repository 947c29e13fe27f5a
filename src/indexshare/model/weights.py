"""Checkpoint to model and back, in safetensors, under the tensor names of the released GLM checkpoints.

Our parameter names are the checkpoint's, except that the experts of a layer are stacked: `experts.gate_up_proj`
[E, 2*I, D] and `experts.down_proj` [E, D, I] are `experts.<e>.{gate,up,down}_proj.weight` in a file (the stacked names
are read too; transformers can write them). Loading goes from headers to a complete plan to data: every name, shape and
dtype is checked before a tensor is read, then each tensor is read into its place (`placement`), so that memory holds
the model once plus one tensor.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from indexshare import runtime
from indexshare.errors import CheckpointError, MemoryLimitError
from indexshare.kernels.formats import QuantizedWeight
from indexshare.kernels.packed import PackedWeight
from indexshare.model.checkpoint_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM, assign_weights, weights_of
from indexshare.model.opening import EMBEDDING, LoadReport, Quant, open_checkpoint
from indexshare.model.stored_weight import PLAIN_DTYPES, stored_tensors, views
from indexshare.quant import quantization_config

DEFAULT_SHARD_BYTES = 5_000_000_000
WEIGHTS_NAME = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors")  # what `save_model` writes


def load_model(
    directory: str | os.PathLike[str],
    *,
    config: GlmConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    index_pattern: str | None = None,
    latent_norm_eps: float | None = None,
    quant: Quant | None = None,
    strict: bool = True,
) -> GlmForCausalLM:
    """The model of `load_checkpoint`, without the report."""
    model, _ = load_checkpoint(
        directory,
        config=config,
        dtype=dtype,
        device=device,
        index_pattern=index_pattern,
        latent_norm_eps=latent_norm_eps,
        quant=quant,
        strict=strict,
    )
    return model


def load_checkpoint(
    directory: str | os.PathLike[str],
    *,
    config: GlmConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    index_pattern: str | None = None,
    latent_norm_eps: float | None = None,
    quant: Quant | None = None,
    strict: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[GlmForCausalLM, LoadReport]:
    """Build a model from a directory with config.json and safetensors.

    Args:
        directory: the checkpoint, single or sharded.
        config: used in place of config.json, which is then read only to refuse what names code.
        dtype: bfloat16, float16 or float32; BF16, F16, F32 and FP8 tensors are converted to it. The router's
            `e_score_correction_bias` is float32 always.
        device: where the parameters are allocated.
        index_pattern, latent_norm_eps: see `GlmConfig.from_json`.
        quant: None holds weights as they are stored: FP8, int8 and int4 run from their own bytes. "int8" or "int4", or
            a `Policy` with more choices, quantises while reading; "none" widens everything to `dtype`.
        strict: unknown keys of config.json and unexpected tensors are errors; else a warning (keys) and an entry in
            the report (tensors). Missing tensors, wrong shapes and wrong dtypes are errors always.
        progress: is told (weights read, weights to read).

    Raises:
        CheckpointError: for everything wrong with the files. Nothing has been allocated then, except where a file
            shrinks while it is read.
        ConfigError: for a configuration that describes no model.
        MemoryLimitError: for weights that do not fit the device; nothing has been allocated then.
    """
    if dtype not in PLAIN_DTYPES:
        raise CheckpointError(f"weights are loaded as bfloat16, float16 or float32, not {dtype}")
    opened = open_checkpoint(
        directory,
        config=config,
        index_pattern=index_pattern,
        latent_norm_eps=latent_norm_eps,
        quant=quant,
        strict=strict,
    )
    model, placement = opened.model, opened.placement
    formats = sorted({weight_format for weight_format, _ in placement.formats.values()})
    held = " and ".join((*formats, str(dtype).removeprefix("torch.")))
    _check_memory(placement.allocate(dtype, "meta"), held, torch.device(device))
    weights = placement.allocate(dtype, device)
    widened = placement.fill(weights, progress)
    assign_weights(model, weights)
    return model, replace(opened.report, widened_fp8=widened)


def _check_memory(weights: Mapping[str, Tensor | QuantizedWeight], held: str, device: torch.device) -> None:
    """Refuse weights (on "meta") that do not fit, where the free memory is known; tied names count once."""
    if device.type not in ("cpu", "cuda"):
        return
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later counts as used
    needed = sum({id(weight): weight.nbytes for weight in weights.values()}.values())
    available = runtime.available_memory_bytes(str(device))
    if needed > available:
        raise MemoryLimitError(
            f"the weights need {needed:,} bytes as {held}, but only {available:,} bytes are available on {device}: "
            "see `indexshare plan` for what fits"
        )


def save_model(
    model: GlmForCausalLM, directory: str | os.PathLike[str], *, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write config.json and safetensors that `load_model` and transformers read.

    Tensors keep their dtypes and get the names of the released checkpoints, one tensor for each expert; quantised
    weights are written as they are held (see `stored_weight`). Above `max_shard_bytes` the tensors are split into
    shards with an index. Files are written beside their place, flushed to the disk and renamed; an interrupted save
    leaves the old checkpoint, the new one, or a directory that `load_model` refuses. Weights of an earlier save are
    removed; other files in the directory stay.

    Raises:
        CheckpointError: if the directory cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
        try:
            _write_files(model, staging, max_shard_bytes)
            _publish(staging, directory)
        finally:
            shutil.rmtree(staging)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write a checkpoint to {directory}: {error}") from error


def _write_files(model: GlmForCausalLM, staging: Path, max_shard_bytes: int) -> None:
    weights = {
        name: weight.plain() if isinstance(weight, PackedWeight) else weight
        for name, weight in weights_of(model).items()
    }
    held = dict(views(weights, {}))
    tensors: dict[str, Tensor] = {}
    for name, weight in held.items():
        tensors |= stored_tensors(name, weight)
    shards = _split(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # A copy only of what is not yet on the CPU, and of one shard at a time.
        save_file({name: tensor.cpu().contiguous() for name, tensor in shard.items()}, staging / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (staging / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    dtype = str(model.get_parameter(EMBEDDING).dtype).removeprefix("torch.")
    config = replace(model.config, dtype=dtype, quantization=None)
    content = config.to_json_dict()
    if (quantization := quantization_config.describe(_linear_modules(held))) is not None:
        content["quantization_config"] = quantization
    (staging / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _linear_modules(held: Mapping[str, Tensor | QuantizedWeight]) -> dict[str, tuple[str, int] | None]:
    """Format and group size of every matrix but the embedding, by the name of its module."""
    modules: dict[str, tuple[str, int] | None] = {}
    for name, weight in held.items():
        if len(weight.shape) == 2 and name != EMBEDDING:
            held_as = (weight.format, weight.group_size) if isinstance(weight, QuantizedWeight) else None
            modules[name.removesuffix(".weight")] = held_as
    return modules


def _split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Cut into runs of at most `max_bytes`; a larger tensor gets a run of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _publish(staging: Path, directory: Path) -> None:
    """Move complete files into place. config.json leaves first and returns last, so that whatever lies between, be it
    old weights, new ones or shards of both, is not loaded."""
    new = sorted(path.name for path in staging.iterdir())
    for name in new:
        # safetensors writes files that only their owner can read; all get the usual mode of a new file.
        (staging / name).chmod((staging / CONFIG_FILE).stat().st_mode)
        _flush(staging / name)
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    (directory / INDEX_FILE).unlink(missing_ok=True)
    for name in new:
        if name != CONFIG_FILE:
            os.replace(staging / name, directory / name)
    for path in directory.iterdir():
        if WEIGHTS_NAME.fullmatch(path.name) and path.name not in new:
            path.unlink()
    os.replace(staging / CONFIG_FILE, directory / CONFIG_FILE)
    _flush(directory)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
