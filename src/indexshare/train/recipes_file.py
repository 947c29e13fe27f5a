"""Recipes as TOML files: pre-training, fine-tuning and reinforcement learning on data of one's own.

    kind = "sft"                   # pretrain, sft or rl
    model = "nano"                 # a directory, nano or a hub id to start from; or tiny, mid, glm-5.2: from scratch
    learning_rate_muon = 1e-4      # and the other fields of TrainRecipe
    ...
    [data]
    sources = ["chats.jsonl"]      # relative to this file; and the options of the kind
    [[phases]]                     # the fields of Phase
    ...

The file becomes a `TrainRecipe`, whose `data` holds kind, start, tokenizer and all options of the kind.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.resolve import PACKAGED, resolve_config, resolve_model, resolve_tokenizer
from indexshare.errors import ConfigError
from indexshare.model import recipes as model_recipes
from indexshare.model.config import DERIVED_KEYS, GlmConfig
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.rl import RlOptions
from indexshare.train.sft import SftOptions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PretrainOptions:
    """sources: files and folders of text and code, or the output of `indexshare data build`."""

    sources: str


KINDS: dict[str, type] = {"pretrain": PretrainOptions, "sft": SftOptions, "rl": RlOptions}
# What a file may leave out. Muon Split as in GLM-5; docs/experiments.md has what it did for a small model.
_DEFAULTS = {"seed": 0, "warmup_steps": 0, "muon_split": True}
_OWN_KEYS = {"kind": str, "model": str, "tokenizer": str, "config": dict[str, Any]}
_PHASE_KINDS: dict[str, dict[str, Any]] = {
    "pretrain": {"index_loss_weight": 1.0, "balance_loss_weight": 1e-4},  # the latter of GLM-4.5 and DeepSeek-V3
    "sft": {"index_loss_weight": 1.0},
    "rl": {"trains": "model"},  # the indexer is frozen, so that the choice of keys does not run away from the sampler's
}
_NOT_FOR_RL = ("index_loss_weight", "mtp_loss_weight", "balance_loss_weight", "recompute", "data")
_CONFIG_KEYS = {field.name for field in dataclasses.fields(GlmConfig)} - {"quantization"} | DERIVED_KEYS


def read_recipe(path: Path) -> TrainRecipe:
    """The recipe in a file. Raises ConfigError, naming file, key and what is known, for anything it does not know."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    kind = content.get("kind")
    if kind not in KINDS:
        raise ConfigError(f'{path}: kind must be one of {", ".join(KINDS)}, not {kind!r}: write kind = "sft"')
    hints = get_type_hints(TrainRecipe, include_extras=True)
    known = {name: hints[name] for name in hints if name not in ("name", "model", "phases", "data")}
    tables = {"data": dict[str, Any], "phases": list[dict[str, Any]]}
    values = _convert(content, _OWN_KEYS | known | tables, str(path))
    for name in ("model", "phases", "data"):
        if not values.get(name):
            raise ConfigError(f"{path}: {name} is missing")
    start = _start(values, path)
    tokenizer = _tokenizer(values, start, path)
    model = resolve_config(start) if start else _fresh_config(values, tokenizer, path)
    sources = _sources(values["data"], kind, path, f"{path} [data]")
    phases = tuple(_phase(table, kind, path, number) for number, table in enumerate(values["phases"], start=1))
    options = _options(sources, kind, f"{path} [data]")
    if isinstance(options, RlOptions) and options.algorithm == "grpo" and options.group_size == 1:
        raise ConfigError(
            f"{path} [data]: group_size is 1, but GRPO compares the completions of a task with each other:"
            ' set it to 2 or more, or algorithm = "ppo"'
        )
    data = {"kind": kind, "start": start, "tokenizer": tokenizer, **dataclasses.asdict(options)}
    return _build(
        TrainRecipe,
        {**_DEFAULTS, **{name: values[name] for name in known if name in values}}
        | {"name": path.stem, "model": model, "phases": phases, "data": data},
        str(path),
    )


def options_of(recipe: TrainRecipe, phase: Phase) -> Any:
    """The options of a phase: SftOptions, RlOptions or PretrainOptions, as the recipe's kind says."""
    kind = str(recipe.data["kind"])
    return _options({**recipe.data, **phase.data}, kind, recipe.name)


def _options(data: Mapping[str, Any], kind: str, where: str) -> Any:
    names = {field.name for field in dataclasses.fields(KINDS[kind])}
    return _build(KINDS[kind], {name: value for name, value in data.items() if name in names}, where)


def _start(values: Mapping[str, Any], path: Path) -> str:
    """The directory or hub id whose weights are the start, "" for random ones."""
    name = values["model"]
    if name in model_recipes.RECIPES and name != PACKAGED:
        return ""
    if values.get("config"):
        raise ConfigError(f"{path}: config changes a model that starts from scratch; {name!r} has weights")
    return _place(name, path)


def _fresh_config(values: Mapping[str, Any], tokenizer: str, path: Path) -> GlmConfig:
    """A recipe of `model.recipes` with the file's changes."""
    changes, where = values.get("config", {}), f"{path} config"
    _check_keys(changes, _CONFIG_KEYS, where)
    try:
        config = model_recipes.RECIPES[values["model"]](**changes)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    texts = Tokenizer.from_directory(resolve_tokenizer(tokenizer))
    if texts.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer has {texts.vocab_size:,} ids, the model {config.vocab_size:,}: "
            f"set config = {{ vocab_size = {texts.vocab_size} }}, or take another tokenizer"
        )
    return with_ends(config, texts)


def with_ends(config: GlmConfig, texts: Tokenizer) -> GlmConfig:
    """The configuration of a model from scratch with what ends a text, which comes with the tokenizer."""
    return dataclasses.replace(config, eos_token_id=texts.stop_ids, pad_token_id=texts.control_id("<|endoftext|>"))


def _tokenizer(values: Mapping[str, Any], start: str, path: Path) -> str:
    if "tokenizer" in values:
        return _place(values["tokenizer"], path)
    if not start:
        raise ConfigError(f'{path}: a model from scratch needs tokenizer = "nano", or the directory of another model')
    return start


def _place(name: str, path: Path) -> str:
    """A path as seen from the recipe's directory, when there is such a thing; else the name as it is."""
    local = path.parent / name
    return str(local) if name and local.exists() else name


def _phase(table: Mapping[str, Any], kind: str, path: Path, number: int) -> Phase:
    where = f"{path} [[phases]] {number}"
    values = _convert(table, get_type_hints(Phase, include_extras=True) | {"data": dict[str, Any]}, where)
    if "data" in values:
        values["data"] = _sources(values["data"], kind, path, f"{where} data")
    if kind == "rl" and values.get("trains", "model") != "model":
        raise ConfigError(f'{where}: reinforcement learning trains = "model": indexer and MTP layer stay as they are')
    if kind == "rl" and (unused := [name for name in _NOT_FOR_RL if values.get(name)]):
        raise ConfigError(
            f"{where}: reinforcement learning does not use {', '.join(unused)} of a phase: leave it out"
            " ([data] holds for all phases)"
        )
    defaults = {"name": f"phase {number}", "attention": "sparse", **_PHASE_KINDS[kind]}
    return _build(Phase, defaults | values, where)


def _sources(data: Mapping[str, Any], kind: str, path: Path, where: str) -> dict[str, int | float | str]:
    """The table as a recipe holds it: plain values, sources one a line."""
    hints = get_type_hints(KINDS[kind], include_extras=True) | {"sources": list[str]}
    values = _convert(data, hints, where)
    if "sources" in values:
        missing = [name for name in values["sources"] if not (path.parent / name).exists()]
        if missing or not values["sources"]:
            raise ConfigError(f"{where}: sources must name files or folders; {missing[:3]} do not exist")
        values["sources"] = "\n".join(str(path.parent / name) for name in values["sources"])
    return values


def _convert(table: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a table, checked against their types and ranges; no key may be unknown."""
    _check_keys(table, hints, where)
    values = {}
    for key, value in table.items():
        try:
            values[key] = msgspec.convert(value, hints[key])
        except msgspec.ValidationError as error:
            choices = f"; there are {', '.join(get_args(hints[key]))}" if get_origin(hints[key]) is Literal else ""
            raise ConfigError(f"{where}: {key}: {error}{choices}") from error
    return values


def _check_keys(table: Collection[str], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    return kind(**values)


def start_directory(recipe: TrainRecipe) -> Path | None:
    """Where the first weights are, fetched if need be; None for random ones. Raises ConfigError."""
    start = str(recipe.data.get("start", ""))
    return resolve_model(start) if start else None
