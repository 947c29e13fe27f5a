"""What a checkpoint directory holds: its config.json and its tensors, from safetensors and JSON only.

A directory of unknown origin is assumed hostile. Nothing in it is executed, no pickle is opened, and while a model is
loaded no file outside of it is read: links that lead out are refused. (The hub's cache keeps a snapshot's files in
`blobs` beside it; links there are followed.)
"""

import os
import re
from pathlib import Path

from indexshare.errors import CheckpointError
from indexshare.model.config import REFUSED_KEYS
from indexshare.model.safetensors_header import StoredTensor, parse_json_object, read_header

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
MAX_JSON_BYTES = 100_000_000
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


def read_config(directory: Path) -> dict[str, object]:
    """The parsed config.json of a checkpoint.

    Raises:
        CheckpointError: if it is missing, not a JSON object, or asks for code to be run.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    config = _read_json(_resolve_inside(directory, CONFIG_FILE))
    # At any depth: transformers has been made to import code by such keys (CVE-2025-66448, CVE-2026-4372).
    if refused := sorted(_keys(config) & set(REFUSED_KEYS)):
        raise CheckpointError(
            f"{directory / CONFIG_FILE} has {refused[0]}, which names code to run; "
            "no such code is ever run. Remove the key if you trust the weights"
        )
    return config


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, from checked headers; no data is read.

    Raises:
        CheckpointError: if there are no safetensors (pickles are named, never opened), a header is malformed, a shard
            is missing or lies outside of the directory, or the index and the shards disagree.
    """
    has_single, has_index = (os.path.lexists(directory / name) for name in (SINGLE_FILE, INDEX_FILE))
    if has_single and has_index:
        raise CheckpointError(f"{directory} has both {SINGLE_FILE} and {INDEX_FILE}; remove the stale one")
    if has_single:
        return read_header(_resolve_inside(directory, SINGLE_FILE))
    if has_index:
        return _find_sharded(directory)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights as pickles ({', '.join(pickles[:3])}), which can run code and are never "
            "opened; convert them to safetensors"
        )
    raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def check_text_files(directory: Path) -> None:
    """Check what is read beside config and weights: tokenizer, chat template and generation_config.json, if present.

    Raises:
        CheckpointError: if one is a link out of the directory, a broken link, or not a regular file.
    """
    for name in TEXT_FILES:
        if os.path.lexists(directory / name):
            _resolve_inside(directory, name)


def _find_sharded(directory: Path) -> dict[str, StoredTensor]:
    index_path = _resolve_inside(directory, INDEX_FILE)
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_path} needs a weight_map from tensor names to file names")
    # Every name is checked before any shard is opened.
    shards = {shard: _resolve_inside(directory, shard) for shard in sorted(set(weight_map.values()))}
    tensors: dict[str, StoredTensor] = {}
    for shard, path in shards.items():
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{path} holds {name!r}, which {INDEX_FILE} places in {weight_map.get(name)!r}")
            tensors[name] = tensor
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{index_path} names {len(absent)} tensors that no shard holds, first {absent[0]!r}")
    return tensors


def _resolve_inside(directory: Path, name: str) -> Path:
    """The real path of a plain file of the checkpoint; a symlink may not lead out of it."""
    if name not in (CONFIG_FILE, INDEX_FILE, *TEXT_FILES) and not SHARD_NAME.fullmatch(name):
        raise CheckpointError(f"{name[:200]!r} is not the plain name of a .safetensors file inside of {directory}")
    root = Path(os.path.realpath(directory))
    roots = [root]
    if root.parent.name == "snapshots":
        # The cache of huggingface_hub: snapshots/<revision>/ holds links to blobs/ beside it.
        roots.append(root.parent.parent / "blobs")
    path = Path(os.path.realpath(root / name))
    if not any(path.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(f"{directory / name} is a link to a file outside of the checkpoint")
    if not os.path.isfile(path):
        raise CheckpointError(f"{directory / name} is missing or not a regular file")
    return path


def _read_json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return parse_json_object(text, str(path))


def _keys(value: object) -> set[str]:
    """The keys of all objects inside a JSON value; a loop, since the depth is the file's choice."""
    keys: set[str] = set()
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            keys.update(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return keys
