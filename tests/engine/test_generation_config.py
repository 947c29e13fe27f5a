"""generation_config.json: what it means for sampling and stop tokens; every broken file is one clear error."""

import json
from pathlib import Path
from typing import Any

import pytest

from indexshare.engine.generation_config import GenerationConfig, read_generation_config
from indexshare.errors import ConfigError


def read(directory: Path, content: dict[str, Any]) -> GenerationConfig:
    (directory / "generation_config.json").write_text(json.dumps(content))
    return read_generation_config(directory)


def test_without_a_file_it_is_greedy(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationConfig(sampling={}, stop_ids=())


@pytest.mark.parametrize(
    ("content", "sampling"),
    [
        ({"temperature": 0.7, "top_k": 20, "top_p": None}, {"temperature": 0.7, "top_k": 20}),
        ({"min_p": 0.1}, {"min_p": 0.1, "temperature": 1.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"presence_penalty": 0.5, "frequency_penalty": 0.2}, {"presence_penalty": 0.5, "frequency_penalty": 0.2}),
        ({"transformers_version": "5.12.0", "pad_token_id": 3}, {}),
    ],
)
def test_sampling(tmp_path: Path, content: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert read(tmp_path, content).sampling == sampling


def test_stop_tokens_are_one_or_a_list(tmp_path: Path) -> None:
    assert read(tmp_path, {"eos_token_id": 7}).stop_ids == (7,)
    assert read(tmp_path, {"eos_token_id": [9, 7]}).stop_ids == (9, 7)
    assert read(tmp_path, {"eos_token_id": None}).stop_ids == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "not a JSON object"),
        (b'{"a": "\xff"}', "not a JSON object"),
        (b"\xff\xfe{\x00}\x00", "not a JSON object"),
        (b'{"a":' * 50_000, "not a JSON object"),
        (b'{"min_p": 3}', "min_p must be a number"),
        (b'{"eos_token_id": "x"}', "eos_token_id must be a token id"),
        (b'{"eos_token_id": [true]}', "eos_token_id must be a token id"),
        (b'{"eos_token_id": -1}', "eos_token_id must be a token id"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"generation_config.json.*{message}"):
        read_generation_config(tmp_path)
