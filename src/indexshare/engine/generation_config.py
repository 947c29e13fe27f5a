"""What a checkpoint's generation_config.json says: how to sample in a chat, and which tokens end a text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from indexshare.engine.sampler import SamplingParams
from indexshare.errors import ConfigError, RequestError

DRAWING_KEYS = ("temperature", "top_k", "top_p", "min_p")  # one of them given means: draw, not greedy
PENALTY_KEYS = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """sampling: arguments of `SamplingParams`, none for greedy. stop_ids: token ids, in the order of the file."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()


def read_generation_config(directory: Path) -> GenerationConfig:
    """The generation_config.json of a model directory; greedy and no stop ids without one.

    Raises ConfigError when it cannot be read, is no JSON object, or has a value that no request may have.
    """
    file = directory / "generation_config.json"
    if not file.is_file():
        return GenerationConfig()
    try:
        content = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not a JSON object: {error}") from error
    return GenerationConfig(sampling=_sampling(content, file), stop_ids=_stop_ids(content, file))


def _sampling(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    given = {key: content[key] for key in (*DRAWING_KEYS, *PENALTY_KEYS) if content.get(key) is not None}
    if content.get("do_sample") is False:
        given["temperature"] = 0.0
    elif content.get("do_sample") is True or any(key in given for key in DRAWING_KEYS):
        given.setdefault("temperature", 1.0)
    try:
        SamplingParams(**given)
    except RequestError as error:
        raise ConfigError(f"{file}: {error}") from error
    return given


def _stop_ids(content: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    given = content.get("eos_token_id")
    token_ids = [] if given is None else given if isinstance(given, list) else [given]
    if any(type(token_id) is not int or token_id < 0 for token_id in token_ids):  # True is an int too
        raise ConfigError(f"{file}: eos_token_id must be a token id or a list of them, not {given!r:.200}")
    return tuple(token_ids)
