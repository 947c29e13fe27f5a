"""Recipes as TOML files: what they become, what is refused, and runs from them."""

import json
import textwrap
from dataclasses import replace
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
from indexshare.train.distributed import Mesh
from indexshare.train.recipes import recipe_named, run
from indexshare.train.recipes_file import PretrainOptions, options_of, read_recipe
from indexshare.train.recipes_run import check_phases, read_texts, row_batches, with_contents
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
        ("vocab_size = 4096", "vocab = 4096", r"own\.toml config: unknown key 'vocab'; did you mean 'vocab_size'"),
        ("vocab_size = 4096", "index_topk = -1", r"own\.toml config: index_topk must be greater than 0, not -1"),
        ("learning_rate_adamw = 1e-3", "", "missing learning_rate_adamw"),
        ('model = "tiny"\ntokenizer', 'model = "nano"\ntokenizer', "config changes a model that starts from scratch"),
        ("kind =", "kind ==", "cannot read the recipe"),
    ],
)
def test_what_a_file_may_not_say(recipe_file: Path, old: str, new: str, says: str) -> None:
    assert old in SCRATCH
    recipe_file.write_text(SCRATCH.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        read_recipe(recipe_file)


# The line that is replaced, lines in its place, what is refused, and what would be right.
RANGES = [
    *(
        (f"{name} = 2" if name in ("num_steps", "batch_size") else "num_steps = 2", name, value, ">= 1")
        for name in ("num_steps", "batch_size", "index_stride", "mtp_num_steps")
        for value in (0, -1)
    ),
    ("sequence_length = 32", "sequence_length", 0, ">= 1"),
    ("num_steps = 2", "balance_loss_weight", -1, ">= 0.0"),
    ("num_steps = 2", "mtp_loss_weight", "nan", ">= 0.0"),
    ("num_steps = 2", "learning_rate_scale", -0.5, ">= 0.0"),
    ("checkpoint_every = 1", "checkpoint_every", 0, ">= 1"),
    ("checkpoint_every = 1", "log_every", 0, ">= 1"),
    ("checkpoint_every = 1", "warmup_steps", -1, ">= 0"),
    ("checkpoint_every = 1", "seed", -1, ">= 0"),
    ("checkpoint_every = 1", "min_lr_ratio", 1.5, "<= 1.0"),
    ("checkpoint_every = 1", "gradient_clip", 0, "> 0.0"),
    *(("learning_rate_muon = 1e-3", "learning_rate_muon", value, ">= 0.0") for value in (-1e-3, "nan")),
    ("learning_rate_adamw = 1e-3", "learning_rate_adamw", "inf", "<= 1.797"),
]


@pytest.mark.parametrize(("line", "name", "value", "allowed"), RANGES)
def test_numbers_out_of_range(recipe_file: Path, line: str, name: str, value: object, allowed: str) -> None:
    new = f"{name} = {value}" if line.startswith(f"{name} =") else f"{line}\n{name} = {value}"
    recipe_file.write_text(SCRATCH.replace(line, new, 1))
    with pytest.raises(ConfigError, match=rf"own\.toml.*: {name}: Expected `(int|float)` {allowed}"):
        read_recipe(recipe_file)


def rl_example(file: Path, *changes: tuple[str, str]) -> Path:
    """The example with other lines, in a directory of its own."""
    text = (EXAMPLES / "rl.toml").read_text().replace("tasks.jsonl", str(EXAMPLES / "tasks.jsonl"))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("line", "allowed"),
    [("group_size = 0", ">= 1"), ("max_new_tokens = 0", ">= 1"), ("clip_low = 2", "<= 1"), ("gae_lambda = -1", ">= 0")],
)
def test_numbers_out_of_range_for_reinforcement_learning(recipe_file: Path, line: str, allowed: str) -> None:
    text = rl_example(recipe_file).read_text()
    kept = [old for old in text.splitlines() if not old.startswith(line.split()[0])]
    recipe_file.write_text("\n".join(kept).replace("[data]", f"[data]\n{line}"))
    with pytest.raises(ConfigError, match=rf"\[data\]: {line.split()[0]}: Expected `(int|float)` {allowed}"):
        read_recipe(recipe_file)


@pytest.mark.parametrize(
    ("mesh", "change", "says"),
    [
        (Mesh(dp=2), {}, "phase 'long': batch_size is 1, which 2 processes .* multiple of 2, or start fewer"),
        (Mesh(ep=2, cp=2), {"balance_loss_weight": 0.0}, "phase 'long': batch_size is 1, which 2 processes"),
        (
            Mesh(cp=5),
            {"balance_loss_weight": 0.0},
            "phase 'short': sequence_length is 32, which 5 processes .*: set it",
        ),
        (Mesh(cp=2), {}, "phase 'short': balance_loss_weight is 0.0001 .* --cp 2 divides: set it to 0"),
        (Mesh(), {"trains": "mtp"}, "phase 'short': training the MTP layer needs .* mtp_loss_weight above 0"),
    ],
)
def test_phases_that_could_not_run_are_refused_before_anything_is_done(
    recipe_file: Path, mesh: Mesh, change: dict[str, Any], says: str
) -> None:
    recipe = read_recipe(recipe_file)
    recipe = replace(recipe, phases=tuple(replace(phase, **change) for phase in recipe.phases))
    with pytest.raises(ConfigError, match=says):
        run(recipe, recipe_file.parent / "run", mesh=mesh)
    assert not (recipe_file.parent / "run").exists()


def test_phases_that_divide_are_taken(recipe_file: Path) -> None:
    recipe = read_recipe(recipe_file)
    check_phases(recipe, Mesh())
    whole = tuple(replace(phase, balance_loss_weight=0.0, batch_size=4) for phase in recipe.phases)
    check_phases(replace(recipe, phases=whole), Mesh(pp=2, dp=2, cp=4, ep=2))
    check_phases(read_recipe(EXAMPLES / "rl.toml"), Mesh())
    with pytest.raises(ConfigError, match="reinforcement learning runs in one process"):
        check_phases(read_recipe(EXAMPLES / "rl.toml"), Mesh(dp=2))


def test_data_that_changed_are_refused_unless_accepted(recipe_file: Path) -> None:
    recipe, output = read_recipe(recipe_file), recipe_file.parent / "run"
    run(recipe, output, progress=False, max_minutes=0.0)
    text = recipe_file.parent / "texts" / "one.txt"
    same, other = text.read_text(), text.read_text().replace("fox", "cat")
    text.write_text(other)
    with pytest.raises(ConfigError, match=r"changed: data\.contents\. Name another output"):
        run(recipe, output, progress=False)
    text.write_text(same)
    run(recipe, output, progress=False, max_minutes=0.0)
    text.rename(text.with_name("three.txt"))  # files are read in the order of their names
    with pytest.raises(ConfigError, match=r"changed: data\.contents\."):
        run(recipe, output, progress=False)
    assert run(recipe, output, progress=False, accept_recipe_change=True)[1].stopped == "finished"


def test_chats_that_changed_are_known(tmp_path: Path) -> None:
    """Of a folder the files that are read."""
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "one.jsonl").write_bytes((EXAMPLES / "chats.jsonl").read_bytes())
    text = (EXAMPLES / "sft.toml").read_text().replace("chats.jsonl", "chats")
    (tmp_path / "sft.toml").write_text(text)
    recipe = read_recipe(tmp_path / "sft.toml")
    before = with_contents(recipe)
    (tmp_path / "chats" / "notes.txt").write_text("not read")
    assert with_contents(recipe) == before
    with (tmp_path / "chats" / "one.jsonl").open("a") as file:
        file.write("\n")
    changed = with_contents(recipe)
    assert changed != before and replace(changed, data=before.data) == before


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
    with pytest.raises(ConfigError, match='reinforcement learning trains = "model"'):
        read_recipe(rl_example(recipe_file, ("num_steps = 25", 'num_steps = 25\ntrains = "all"')))


@pytest.mark.parametrize(
    "line",
    [
        "recompute = true",
        "mtp_loss_weight = 0.1",
        "balance_loss_weight = 1e-4",
        "index_loss_weight = 1.0",
        "data = { max_new_tokens = 8 }",
    ],
)
def test_reinforcement_learning_refuses_what_it_does_not_use(recipe_file: Path, line: str) -> None:
    file = rl_example(recipe_file, ("num_steps = 25", f"num_steps = 25\n{line}"))
    with pytest.raises(ConfigError, match=rf"\[\[phases\]\] 1: reinforcement learning does not use {line.split()[0]} "):
        read_recipe(file)
    unused = rl_example(recipe_file, ("num_steps = 25", "num_steps = 25\nrecompute = false\nmtp_loss_weight = 0"))
    assert not read_recipe(unused).phases[0].recompute


def test_a_group_of_one_is_for_a_critic(recipe_file: Path) -> None:
    alone = ("group_size = 8", "group_size = 1")
    with pytest.raises(
        ConfigError, match=r"\[data\]: group_size is 1, .*: set it to 2 or more, or algorithm = \"ppo\""
    ):
        read_recipe(rl_example(recipe_file, alone))
    assert read_recipe(rl_example(recipe_file, alone, ('"grpo"', '"ppo"'))).data["group_size"] == 1


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
    options = msgspec.json.decode(TrainOptions(show=True).train(str(EXAMPLES / "rl.toml")))["data"]
    assert options["algorithm"] == "grpo" and options["clip_high"] == 0.28 and options["enable_thinking"] is False


def test_the_recipe_of_the_document_is_valid(recipe_file: Path) -> None:
    text = (EXAMPLES.parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    lines = text.split("A file says\n\n", 1)[1].split("\n\n", 1)[0]
    recipe_file.write_text(textwrap.dedent(lines))
    (recipe_file.parent / "chats.jsonl").write_bytes((EXAMPLES / "chats.jsonl").read_bytes())
    recipe = read_recipe(recipe_file)
    assert row_batches(recipe, read_texts(recipe))(0).token_ids.size


def test_fine_tuning_without_a_fitting_conversation_says_so(recipe_file: Path) -> None:
    text = (EXAMPLES / "sft.toml").read_text().replace("sequence_length = 512", "sequence_length = 8")
    recipe_file.write_text(text.replace("chats.jsonl", str(EXAMPLES / "chats.jsonl")))
    with pytest.raises(TrainingError, match="raise sequence_length"):
        run(read_recipe(recipe_file), recipe_file.parent / "run", progress=False)
