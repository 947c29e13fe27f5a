"""Files that a search or a conversion leaves, so that it survives being stopped; and what to say when it cannot."""

import json
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from indexshare.data.shards import write_file
from indexshare.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A step of the search: the layer that became shared, and the pattern and loss (nats a token) after it."""

    layer: int
    pattern: str
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A later step: the layers that lost and got an indexer, and the pattern and loss after it."""

    gone: int
    new: int
    pattern: str
    loss: float


@dataclass(slots=True, kw_only=True)
class SearchState:
    """Everything the next measurement depends on; on disk after each one.

    nats, start_nats: of the current pattern and of the first, by row. increases: by layer, the last known cost of its
    absence, nats a token.
    measured: the layers measured in this round; floor: the lowest nats of any pattern in this round, by row; best,
    best_nats: the layer whose absence costs least so far. tried: patterns that moves led to. The last three are the
    work so far, as `Work` counts it.
    """

    pattern: str
    nats: list[float] = field(default_factory=list)
    start_nats: list[float] = field(default_factory=list)
    increases: dict[int, float] = field(default_factory=dict)
    measured: list[int] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    best: int | None = None
    best_nats: list[float] = field(default_factory=list)
    num_rounds: int = 0
    removals: list[Removal] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    num_runs: int = 0
    layer_tokens: int = 0
    head_tokens: int = 0


def save_state(path: Path, state: SearchState, identity: Mapping[str, object]) -> None:
    """Write the state of the search that `identity` describes."""
    write_json(path, {"identity": identity, "state": state})


def load_state(path: Path, identity: Mapping[str, object]) -> SearchState | None:
    """The state in a file, None without one. Raises ConfigError when it is damaged or of another search."""
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        state = msgspec.convert(document["state"], SearchState, str_keys=True)
        found = msgspec.convert(document["identity"], dict[str, object])
    except (OSError, ValueError, KeyError, TypeError) as error:  # msgspec's ValidationError is a ValueError
        raise ConfigError(f"{path} is not the state of a search ({error}); remove it to begin anew") from error
    if changed := [name for name in identity if found.get(name) != identity[name]]:
        raise ConfigError(
            f"{path} is the state of a search with another value of {', '.join(changed)}: "
            "name another directory with --output, or remove the file"
        )
    return state


def write_json(path: Path, document: Any) -> None:
    """Write JSON, in which dataclasses may be, as `write_file` does. Raises as `writing`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Runs a block that writes a file or a directory. Raises ConfigError, in a sentence, when that is not possible."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}. Make room, or name another output directory"
        ) from error


@contextmanager
def output_directory(directory: Path) -> Generator[None]:
    """Makes a directory, tries to write there, and runs a block; directories that this made and that are still empty
    after it go again. Raises ConfigError, as `writing`, before the block."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        yield
    finally:
        for path in made:
            with suppress(OSError):  # what holds files stays
                path.rmdir()
