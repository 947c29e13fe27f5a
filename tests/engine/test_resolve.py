import json
from pathlib import Path
from typing import Any

import pytest

from indexshare.engine import resolve
from indexshare.engine.resolve import packaged_model, resolve_config, resolve_model, resolve_tokenizer
from indexshare.errors import ConfigError
from indexshare.model.recipes import RECIPES, glm_5_2, tiny


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """A hub that holds one tiny configuration; returns the calls made to it."""
    calls: list[tuple[str, dict[str, Any]]] = []
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_json_dict()))

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append((repository, options))
        if repository.startswith("offline/"):
            raise OSError("no network\nmore")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path


def test_nano_is_in_the_package() -> None:
    assert resolve_model("nano") == packaged_model()
    assert packaged_model().parts[-3:] == ("indexshare", "models", "nano")


def test_a_hub_id_is_fetched_without_code(hub: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    assert resolve_model("zai-org/GLM-5.2") == tmp_path
    assert resolve_model("zai-org/GLM-5.2@refs/pr/1") == tmp_path
    assert hub[0] == (
        "zai-org/GLM-5.2",
        {"revision": None, "allow_patterns": ["*.safetensors", "*.json", "*.jinja"]},
    )
    assert hub[1][1]["revision"] == "refs/pr/1"


def test_a_tokenizer_fetches_no_weights(hub: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    assert resolve_tokenizer("zai-org/GLM-5.2") == tmp_path
    assert hub[0][1]["allow_patterns"] == ["*.json", "*.jinja"]
    assert resolve_tokenizer("nano") == packaged_model()


def test_a_configuration_fetches_nothing_else(hub: list[tuple[str, dict[str, Any]]]) -> None:
    assert resolve_config("some/model") == tiny()
    assert hub[0][1]["allow_patterns"] == ["config.json"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_configurations(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resolve, "packaged_model", lambda: tmp_path / "absent")
    assert resolve_config(name) == RECIPES[name]()


def test_a_pattern_applies_to_recipes_too() -> None:
    assert resolve_config("glm-5.2", index_pattern="F" * 78).full_layers == tuple(range(78))
    assert resolve_config("glm-5.2", latent_norm_eps=1e-6).latent_norm_eps == 1e-6
    assert resolve_config("glm-5.2") == glm_5_2()


@pytest.mark.parametrize("name", ["missing", "a/b/c", "../x", "/no/where", "a/b@", "https://x/y", ""])
def test_what_is_neither_a_directory_nor_a_hub_id_is_an_error(name: str, hub: list[Any], monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="give a directory"):
        resolve_model(name)
    assert not hub


def test_a_failed_fetch_is_one_clear_error(hub: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"no directory 'offline/model', .* from the hub failed: no network$"):
        resolve_model("offline/model")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(file)
