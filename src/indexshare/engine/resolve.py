"""From what a user calls a model to a directory or a configuration: a path, `nano`, or a hub id (`zai-org/GLM-5.2`)."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from indexshare.errors import ConfigError
from indexshare.model.config import GlmConfig
from indexshare.model.recipes import RECIPES

PACKAGED = "nano"
TEXT_FILES = ("*.json", "*.jinja")  # configuration, tokenizer, template
FETCHED = ("*.safetensors", *TEXT_FILES)  # never code or pickles
HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """The directory of a model, fetched first if it is a hub id (`owner/name` or `owner/name@revision`; resumable).

    Raises ConfigError when there is no such directory and the name is not a hub id, or when the fetch fails.
    """
    return _directory(model, FETCHED)


def resolve_tokenizer(model: str | os.PathLike[str]) -> Path:
    """As `resolve_model`, for the tokenizer and template alone: of a hub id no weights are fetched."""
    return _directory(model, TEXT_FILES)


def _directory(model: str | os.PathLike[str], files: tuple[str, ...]) -> Path:
    if model == PACKAGED:
        return packaged_model()
    path = Path(model)
    if path.is_dir() and model != "":  # Path("") would be the working directory
        return path
    if path.is_file():
        raise ConfigError(f"{path} is a file; give the directory that holds config.json and the safetensors")
    return _fetch(os.fspath(model), files)


def resolve_config(
    model: str | os.PathLike[str],
    *,
    index_pattern: str | None = None,
    latent_norm_eps: float | None = None,
    strict: bool = True,
) -> GlmConfig:
    """The configuration of a model or a recipe (tiny, nano, mid, glm-5.2); of a hub id only config.json is fetched.

    Keyword arguments as in `GlmConfig.from_json`. Raises ConfigError.
    """
    path = Path(model)
    if model == PACKAGED and (packaged_model() / "config.json").is_file():
        source = packaged_model()
    elif isinstance(model, str) and model in RECIPES:
        source = RECIPES[model]().to_json_dict()
    elif path.exists() and model != "":
        source = path
    else:
        source = _fetch(os.fspath(model), ("config.json",))
    return GlmConfig.from_json(source, index_pattern=index_pattern, latent_norm_eps=latent_norm_eps, strict=strict)


def packaged_model() -> Path:
    """The directory of the model shipped inside this package."""
    return Path(str(resources.files("indexshare"))) / "models" / PACKAGED


def storage_of(model: str) -> tuple[Path, bool]:
    """On whose file system the weights of a model or recipe lie or would lie, and whether they are there already."""
    path = packaged_model() if model == PACKAGED else Path(model)
    if model in RECIPES and model != PACKAGED:
        return Path(), False
    if path.exists():
        directory = path if path.is_dir() else path.parent
        return directory, any(directory.glob("*.safetensors"))
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE), False


def _fetch(name: str, patterns: tuple[str, ...]) -> Path:
    match = HUB_ID.fullmatch(name)
    if match is None and name in RECIPES:
        raise ConfigError(
            f"{name} is a recipe without weights: `indexshare inspect` and `plan` take it, other commands not"
        )
    if match is None:
        raise ConfigError(f"no model at {name!r}: give a directory, {PACKAGED!r}, or a hub id such as zai-org/GLM-5.2")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(match["repository"], revision=match["revision"], allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        # the hub client raises HTTP errors, OSError without a network or a disk, ValueError for a malformed name
        reason = str(error).strip().split("\n", 1)[0]
        raise ConfigError(f"there is no directory {name!r}, and fetching it from the hub failed: {reason}") from error
