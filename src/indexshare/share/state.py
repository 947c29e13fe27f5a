"""The state of a pattern search as a file, so that a search survives being stopped."""

import json
from collections.abc import Mapping
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
    best_nats: the layer whose absence costs least so far. tried: patterns that moves led to.
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
        found = document["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:  # msgspec's ValidationError is a ValueError
        raise ConfigError(f"{path} is not the state of a search ({error}); remove it to begin anew") from error
    if found != identity:
        raise other_search(path)
    return state


def other_search(path: Path) -> ConfigError:
    """What to say of the state of a search that is not this one."""
    return ConfigError(
        f"{path} is the state of a search with another model, other data or other options: "
        "name another directory with --output, or remove the file"
    )


def write_json(path: Path, document: Any) -> None:
    """Write JSON, in which dataclasses may be, as `write_file` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
