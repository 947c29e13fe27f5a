"""The function behind `indexshare train`: where it writes, and how a changed recipe goes on."""

import dataclasses
from pathlib import Path

import pytest

import indexshare
from indexshare.chat.tokenizer import Tokenizer
from indexshare.errors import ConfigError, TrainingError
from indexshare.model.config import GlmConfig
from indexshare.train import corpus, recipes
from indexshare.train.data import prepare
from indexshare.train.loop import TrainRecipe, TrainResult
from indexshare.train.tokenizer import save_tokenizer, train_tokenizer

SHIPPED = Path(indexshare.__path__[0], "models", "nano")


def short() -> TrainRecipe:
    """Two steps of the tiny model on short rows."""
    recipe = recipes.tiny()
    phase = dataclasses.replace(recipe.phases[0], num_steps=2, batch_size=1)
    return dataclasses.replace(recipe, phases=(phase,), warmup_steps=1)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory with the shards of a small library."""
    root = tmp_path_factory.mktemp("library")
    for name in ("argparse.py", "functools.py", "textwrap.py"):
        (root / name).write_bytes((corpus.library_root() / name).read_bytes())
    directory = tmp_path_factory.mktemp("run")
    prepare(directory / "data", tokenizer_directory=SHIPPED, root=root)
    return directory


def run(output: Path, recipe: TrainRecipe, **options: bool) -> TrainResult:
    return recipes.run(recipe, output, tokenizer_directory=SHIPPED, progress=False, **options)[1]


def test_a_changed_recipe_goes_on_only_when_accepted(output: Path) -> None:
    assert run(output, short()).stopped == "finished"
    assert {path.name for path in (output / "model").iterdir()} >= {"config.json", "model.safetensors"}
    stops = Tokenizer.from_directory(SHIPPED).stop_ids  # not those of the tiny preset, whose 0 is "!" here
    assert GlmConfig.from_json(output / "model").eos_token_id == stops
    phase = dataclasses.replace(short().phases[0], num_steps=3)
    longer = dataclasses.replace(short(), phases=(phase,))
    with pytest.raises(ConfigError, match="changed: phases"):
        run(output, longer)
    assert run(output, longer, accept_recipe_change=True).step == 3


def test_a_directory_that_cannot_be_written_to_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "prepare", lambda *_, **__: pytest.fail("work was done"))
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below", Path("/proc/nope")):
        with pytest.raises(TrainingError, match=rf"cannot write to {place}: \w+"):
            recipes.run(short(), place)


@pytest.mark.parametrize(("name", "before"), [("nano-long", "nano"), ("nano-longest", "nano-long")])
def test_a_stage_names_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: str
) -> None:
    monkeypatch.setattr(recipes, "prepare", lambda *_, **__: pytest.fail("work was done"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"from runs/{before}/model, .* first run `indexshare train {before}`, from"):
        recipes.run(recipes.recipe_named(name), tmp_path / "run")


def test_a_tokenizer_that_cannot_be_saved_is_one_clear_error(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words and some other words"] * 3, vocab_size=36 + 256 + 4)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    saved = (tmp_path / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer.save(str(tmp_path / "reference.json"))
    assert saved == (tmp_path / "reference.json").read_text(encoding="utf-8")
    (tmp_path / "taken" / "tokenizer.json").mkdir(parents=True)
    for place in (tmp_path / "reference.json", tmp_path / "taken"):
        with pytest.raises(TrainingError, match=rf"cannot write to {place}: \w+"):
            save_tokenizer(tokenizer, place)
