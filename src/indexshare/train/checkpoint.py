"""Checkpoints of a training run: everything that the next step depends on, written so that a crash cannot harm it.

    <directory>/step-00001200/model.safetensors      parameters and buffers, fp32, by name
                              optimizer.safetensors  "<parameter>:<state key>", e.g. "lm_head.weight:exp_avg"
                              shard-*.safetensors    in place of both: what each of several ranks holds of them
                              state.json             step, random generators, what the loop hands over, SHA-256 of all

A checkpoint is written under a hidden name, flushed to the disk and renamed: a directory called `step-*` is complete.
What a disk does to it later is found by its checksums before anything of it is used. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from indexshare.data.shards import write_file
from indexshare.errors import CheckpointError, TrainingError
from indexshare.train.distributed import agree, num_ranks, rank, write_on_main
from indexshare.train.optim import named_state, named_tensors
from indexshare.train.pipeline import names_elsewhere
from indexshare.train.sharded_checkpoint import file_digest, read_shards, stored_shapes, write_shards

FORMAT_VERSION = 2
NUM_KEPT = 2
_INCOMPLETE = ".incomplete-"
DAMAGED = "damaged-"


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written; the one before it can be used."""


def save_checkpoint(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of `step`, then drop all but the newest two. `state` is anything JSON can hold.

    Returns the checkpoint's directory. One that exists is left as it is: a run is a function of its step. Raises
    TrainingError when it cannot be written (a full disk): what there is of it goes, earlier checkpoints stay.
    """
    target = directory / f"step-{step:08d}"
    if target.exists():
        return target
    work = directory / f"{_INCOMPLETE}{target.name}"
    model_tensors = {name: tensor.detach().contiguous() for name, tensor in named_tensors(model)}
    parts = {"model.safetensors": model_tensors, "optimizer.safetensors": _optimizer_tensors(optimizers)}
    document = {"version": FORMAT_VERSION, "step": step, "random": _random_state(), **state}
    try:
        write_on_main(_make_empty, work)
        digests = _write_parts(parts, work)
        write_on_main(_complete, work, target, {**document, "sha256": digests})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        size = sum(tensor.numel() * tensor.element_size() for tensors in parts.values() for tensor in tensors.values())
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {directory} ({error}). It needs {size:,} bytes"
            f" beside the {NUM_KEPT} that are kept. Earlier checkpoints are as they were: make room and run again."
        ) from error
    return target


def _make_empty(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)


def _complete(work: Path, target: Path, document: Mapping[str, Any]) -> None:
    """Give a checkpoint, whose tensors are written, its state and its name; then it counts, and the oldest goes."""
    for name in document["sha256"]:
        _flush(work / name)
    _write_state(work, document)
    work.rename(target)
    _flush(target.parent)
    for outdated in list_checkpoints(target.parent)[:-NUM_KEPT]:
        _remove(outdated)


def _write_parts(parts: Mapping[str, Mapping[str, Tensor]], work: Path) -> dict[str, str]:
    """One file for each part; on several ranks one for each rank, with its shards of all parts. -> their SHA-256."""
    if num_ranks() > 1:
        return write_shards({name: tensor for tensors in parts.values() for name, tensor in tensors.items()}, work)
    for name, tensors in parts.items():
        save_file(dict(tensors), work / name)
    return {name: file_digest(work / name) for name in parts}


def _remove(checkpoint: Path) -> None:
    """Renamed first, so that a crash halfway through the removal leaves no broken `step-*` behind."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{_INCOMPLETE}{checkpoint.name}")))


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in `directory`, oldest first."""
    return sorted(directory.glob("step-*"))


def remove_incomplete(directory: Path) -> None:
    """Remove what a crash during `save_checkpoint` left behind."""
    for leftover in directory.glob(f"{_INCOMPLETE}*"):
        shutil.rmtree(leftover)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer one. It is kept for who wants to know what happened."""
    target = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    return checkpoint.rename(target)


def drop_checkpoints_after(checkpoint: Path) -> None:
    """Remove those of later steps: a run that goes back will write them again."""
    for later in list_checkpoints(checkpoint.parent):
        if later.name > checkpoint.name:
            _remove(later)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint: `step`, `random` and whatever was given to `save_checkpoint` as `state`.

    Raises DamagedCheckpointError when it is not what was written, CheckpointError for another format.
    """
    path = checkpoint / "state.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        checksum = document.pop("checksum", None)
        version = document.get("version")
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error}).") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, this version reads {FORMAT_VERSION}. Train in another output directory."
        )
    if checksum != _checksum(document):
        raise DamagedCheckpointError(f"{path} is damaged: its checksum differs.")
    return document


def update_state(checkpoint: Path, changes: Mapping[str, Any]) -> None:
    """Replace entries of a checkpoint's state, in one step as seen from outside. Raises OSError."""
    _write_state(checkpoint, {**read_state(checkpoint), **changes})


def _write_state(directory: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps({**document, "checksum": _checksum(document)}, indent=1)
    write_file(directory / "state.json", f"{text}\n".encode())
    _flush(directory)


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _check_files(checkpoint: Path, expected: Mapping[str, str]) -> None:
    """Raises DamagedCheckpointError when a file is missing or not what was written."""
    damage = ""
    for name, digest in tuple(expected.items())[rank() :: num_ranks()]:  # each rank reads some of them
        path = checkpoint / name
        try:
            if file_digest(path) != digest:
                damage = f"{path} is damaged: its SHA-256 is not the one that was written."
        except OSError as error:
            damage = f"{path} cannot be read ({error})."
    if agree((False, True), bool(damage)):
        raise DamagedCheckpointError(damage or f"another rank found a damaged file in {checkpoint}.")


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Any]:
    """Restore `model`, `optimizers` and the random generators in place; returns `read_state(checkpoint)`.

    Raises DamagedCheckpointError when a file is not what was written, and CheckpointError when names or shapes differ
    from the model's, before anything is changed.
    """
    document = read_state(checkpoint)
    _check_files(checkpoint, document["sha256"])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a step that was given up may have left its layers whole
    parameters = dict(named_tensors(model))
    elsewhere = names_elsewhere(model)
    shapes = {key: shape for key, shape in stored_shapes(checkpoint).items() if key.partition(":")[0] not in elsewhere}
    _check_same_shapes(checkpoint, parameters, {name: shape for name, shape in shapes.items() if ":" not in name})
    owners = {name: (parameter, state) for name, parameter, state in named_state(optimizers)}
    saved_state = [key for key in shapes if ":" in key]
    strangers = {key.rpartition(":")[0] for key in saved_state} - set(owners)
    if strangers:
        raise CheckpointError(
            f"{checkpoint} has optimizer state for {sorted(strangers)[:3]}, which are not trained here."
        )
    for _, state in owners.values():
        state.clear()  # of later steps, when a run goes back
    wanted = {name: tensor.detach() for name, tensor in parameters.items()}
    for key in saved_state:
        name, _, state_key = key.rpartition(":")
        parameter, state = owners[name]
        has_its_shape = shapes[key] == parameter.shape
        empty = torch.zeros_like(parameter) if has_its_shape else torch.zeros(shapes[key], device=parameter.device)
        wanted[key] = state[state_key] = empty.detach()
    read_shards(wanted, checkpoint)
    _restore_random_state(document["random"])
    return document


def _optimizer_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"{name}:{key}": tensor.contiguous()
        for name, _, state in named_state(optimizers)
        for key, tensor in state.items()
    }


def _check_same_shapes(checkpoint: Path, parameters: Mapping[str, Tensor], saved: Mapping[str, torch.Size]) -> None:
    differing = sorted(
        name
        for name in parameters.keys() | saved.keys()
        if name not in parameters or name not in saved or parameters[name].shape != saved[name]
    )
    if agree((False, True), bool(differing)):  # a stage of a pipeline sees its own only
        what = (
            f"{len(differing)} tensors differ, the first is {differing[0]}" if differing else "another rank says which"
        )
        raise CheckpointError(f"{checkpoint} belongs to another model: {what}. Train in another output directory.")


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": _to_hex(torch.get_rng_state()), "cuda": [_to_hex(state) for state in cuda]}


def _restore_random_state(document: Mapping[str, Any]) -> None:
    torch.set_rng_state(_from_hex(document["cpu"]))
    # a run may move to a machine with other devices; then it is not bit-identical anyway
    if torch.cuda.is_available() and len(document["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_from_hex(state) for state in document["cuda"]])


def _to_hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
