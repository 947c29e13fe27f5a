"""Recipes as TOML files: what they become, what is refused, and runs from them."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

import indexshare
from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.resolve import packaged_model
from indexshare.errors import ConfigError, TrainingError
from indexshare.model.recipes import nano
from indexshare.options import TrainOptions
from indexshare.train.recipes import recipe_named, run
from indexshare.train.recipes_file import PretrainOptions, options_of, read_recipe
from indexshare.train.recipes_run import read_texts, row_batches
from indexshare.train.rl import RlOptions
from indexshare.train.sft import SftOptions

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
SCRATCH = """
kind = "pretrain"
model = "tiny"
tokenizer = "nano"
config = { vocab_size = 4096 }
learning_rate_muon = 1e-3
learning_rate_adamw = 1e-3
checkpoint_every = 1
[data]
sources = ["texts"]
[[phases]]
name = "short"
num_steps = 2
sequence_length = 32
batch_size = 2
[[phases]]
name = "long"
num_steps = 1
sequence_length = 96
batch_size = 1
learning_rate_scale = 0.5
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("The lazy fox sleeps while the quick dog reads. " * 60)
    (tmp_path / "texts" / "two.md").write_text("# Words\n\nMany more words than one would read. " * 60)
    file = tmp_path / "own.toml"
    file.write_text(SCRATCH)
    return file


def test_a_file_becomes_a_recipe(recipe_file: Path) -> None:
    recipe = read_recipe(recipe_file)
    assert recipe_named(str(recipe_file)) == recipe
    assert (recipe.name, recipe.num_steps, recipe.seed, recipe.warmup_steps) == ("own", 3, 0, 0)
    tokenizer = Tokenizer.from_directory(packaged_model())
    assert (recipe.model.vocab_size, recipe.model.eos_token_id) == (4096, tokenizer.stop_ids)
    assert [phase.sequence_length for phase in recipe.phases] == [32, 96]
    assert options_of(recipe, recipe.phases[0]) == PretrainOptions(sources=str(recipe_file.parent / "texts"))
    assert recipe.data["start"] == "", "random weights"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('kind = "pretrain"', 'kind = "play"', "kind must be one of pretrain, sft, rl, not 'play'"),
        ('kind = "pretrain"', "", "kind must be one of"),
        ("checkpoint_every", "chekpoint_every", "unknown key 'chekpoint_every'; did you mean 'checkpoint_every'"),
        ("batch_size = 1", "batch = 1", r"\[\[phases\]\] 2: unknown key 'batch'; did you mean 'batch_size'"),
        ("batch_size = 1", "", r"\[\[phases\]\] 2: missing batch_size"),
        ("num_steps = 2", 'num_steps = "two"', r"\[\[phases\]\] 1: num_steps: Expected `int`, got `str`"),
        ("num_steps = 2", 'num_steps = 2\nattention = "thick"', "attention: Invalid enum value 'thick'"),
        ("learning_rate_muon = 1e-3", "", "missing learning_rate_muon"),
        ('sources = ["texts"]', 'sources = ["gone"]', r"\['gone'\] do not exist"),
        ('sources = ["texts"]', "sources = []", "sources must name files or folders"),
        ('sources = ["texts"]', 'sources = ["texts"]\ngroup_size = 3', "unknown key 'group_size'"),
        ('[data]\nsources = ["texts"]', "", "data is missing"),
        ('tokenizer = "nano"', "", 'a model from scratch needs tokenizer = "nano"'),
        ("vocab_size = 4096", "vocab = 4096", "vocab"),
        ('model = "tiny"\ntokenizer', 'model = "nano"\ntokenizer', "config changes a model that starts from scratch"),
        ("kind =", "kind ==", "cannot read the recipe"),
    ],
)
def test_what_a_file_may_not_say(recipe_file: Path, old: str, new: str, says: str) -> None:
    assert old in SCRATCH
    recipe_file.write_text(SCRATCH.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        read_recipe(recipe_file)


def test_a_file_or_a_name_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*none\.toml"):
        recipe_named(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match=r"there are: nano, .*tiny, and files that end in \.toml"):
        recipe_named("none")


def test_a_tokenizer_with_more_ids_than_the_model(recipe_file: Path) -> None:
    recipe_file.write_text(SCRATCH.replace("4096", "512"))
    with pytest.raises(ConfigError, match=r"4,096 ids, the model 512: set config = \{ vocab_size = 4096 \}"):
        read_recipe(recipe_file)


def test_reinforcement_learning_does_not_train_indexers(recipe_file: Path) -> None:
    assert read_recipe(EXAMPLES / "rl.toml").phases[0].trains == "model"
    text = (EXAMPLES / "rl.toml").read_text().replace("tasks.jsonl", str(EXAMPLES / "tasks.jsonl"))
    recipe_file.write_text(text + 'trains = "all"\n')
    with pytest.raises(ConfigError, match='reinforcement learning trains = "model"'):
        read_recipe(recipe_file)


def test_a_run_from_a_file_stops_goes_on_and_exports(recipe_file: Path, tmp_path: Path) -> None:
    def log(name: str) -> list[float]:
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    recipe_file.write_text(SCRATCH.replace("checkpoint_every", "log_every = 1\ncheckpoint_every"))
    recipe = read_recipe(recipe_file)
    run(recipe, tmp_path / "whole", progress=False)
    assert run(recipe, tmp_path / "parts", progress=False, max_minutes=0.0)[1].stopped == "max_minutes"
    _, result = run(recipe, tmp_path / "parts", progress=False)
    assert (result.stopped, result.step) == ("finished", 3)
    assert log("parts") == log("whole") and len(log("whole")) == 3
    llm = indexshare.load(tmp_path / "parts" / "model")
    assert llm.config.vocab_size == 4096 and llm.tokenizer.vocab_size == 4096
    assert set(llm.tokenizer.stop_ids) == set(llm.stop_ids)


def test_phases_have_rows_of_their_own_length_and_data(recipe_file: Path) -> None:
    (recipe_file.parent / "other.txt").write_text("zebra " * 300)
    recipe_file.write_text(SCRATCH + 'data = { sources = ["other.txt"] }\n')
    recipe = read_recipe(recipe_file)
    texts = read_texts(recipe)
    batches = row_batches(recipe, texts)
    assert [batches(step).token_ids.shape for step in range(3)] == [(2, 32), (2, 32), (1, 96)]
    assert "zebra" not in texts.tokenizer.decode(batches(1).token_ids.flatten().tolist())
    assert "zebra zebra" in texts.tokenizer.decode(batches(2).token_ids.flatten().tolist())


@pytest.mark.parametrize("name", ["pretrain", "sft", "rl"])
def test_the_examples_are_valid(name: str) -> None:
    recipe = read_recipe(EXAMPLES / f"{name}.toml")
    kinds = {"pretrain": PretrainOptions, "sft": SftOptions, "rl": RlOptions}
    assert isinstance(options_of(recipe, recipe.phases[0]), kinds[name])
    assert recipe.model.num_hidden_layers == nano().num_hidden_layers


def test_show_prints_what_is_left_open(recipe_file: Path) -> None:
    shown: dict[str, Any] = msgspec.json.decode(TrainOptions(show=True).train(str(recipe_file)))
    assert shown["learning_rate_muon"] == 1e-3 and shown["phases"][0]["mtp_num_steps"] == 1
    assert not (recipe_file.parent / "runs").exists()


def test_fine_tuning_without_a_fitting_conversation_says_so(recipe_file: Path) -> None:
    text = (EXAMPLES / "sft.toml").read_text().replace("sequence_length = 512", "sequence_length = 8")
    recipe_file.write_text(text.replace("chats.jsonl", str(EXAMPLES / "chats.jsonl")))
    with pytest.raises(TrainingError, match="raise sequence_length"):
        run(read_recipe(recipe_file), recipe_file.parent / "run", progress=False)
