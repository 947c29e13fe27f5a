"""Tensors of a checkpoint in safetensors files, written by any number of ranks and read by any other number.

Each rank writes the shards that it holds into a file of its own, with their places in the header (torch's distributed
checkpoint in its Hugging Face layout: no pickle). Whole tensors, as one process writes them, are read the same way.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from indexshare.train.distributed import communication_device, num_ranks, rank


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shards(tensors: Mapping[str, Tensor], directory: Path) -> dict[str, str]:
    """Write tensors, of which each rank holds shards or the same copy; all ranks together. -> SHA-256 of each file.

    Raises OSError on all ranks when one cannot write.
    """
    try:
        checkpoint.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))
    except CheckpointException as error:  # on all ranks, whichever it was
        reasons = {str(failure[0]) for failure in error.failures.values()}
        raise OSError("; ".join(sorted(reasons))) from error
    paths = sorted(directory.glob("*.safetensors"))
    # each rank reads some of the files; their digests meet in a sum
    digests = torch.zeros(len(paths), 32, dtype=torch.uint8)
    for place in range(rank(), len(paths), num_ranks()):
        digests[place] = torch.tensor(list(bytes.fromhex(file_digest(paths[place]))), dtype=torch.uint8)
    shared = digests.to(communication_device())
    distributed.all_reduce(shared)
    return {path.name: bytes(row.tolist()).hex() for path, row in zip(paths, shared.cpu(), strict=True)}


def stored_shapes(directory: Path) -> dict[str, torch.Size]:
    """Names and whole shapes of the tensors in the files of a directory."""
    metadata = HuggingFaceStorageReader(str(directory)).read_metadata()
    entries = metadata.state_dict_metadata.items()
    return {name: entry.size for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def read_shards(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Fill tensors, each rank its shards, from the files of a directory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        checkpoint.load(
            dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=num_ranks() == 1
        )
