"""The model in the package does what its card says, as far as the suite has time; `indexshare eval nano` says more."""

import math
from pathlib import Path

import numpy as np
import pytest

import indexshare
from indexshare.chat.types import ToolCallEvent
from indexshare.engine.llm import LLM
from indexshare.engine.resolve import packaged_model
from indexshare.eval.documents import Library
from indexshare.eval.language import measure_language
from indexshare.eval.retrieval import evaluate_length
from indexshare.model import recipes
from indexshare.model.glm import weights_of
from indexshare.train import corpus
from indexshare.train.tool_episodes import TOOLS

MAX_BYTES = 24_000_000


@pytest.fixture(scope="module")
def nano() -> LLM:
    return indexshare.load("nano")


def test_it_is_the_recipe_and_fits_in_the_package(nano: LLM) -> None:
    assert nano.config.to_json_dict() == recipes.nano().to_json_dict() | {"dtype": "bfloat16"}
    assert 5e6 < sum(math.prod(weight.shape) for weight in weights_of(nano.model).values()) < 12e6
    directory = packaged_model()
    assert (directory / "model.safetensors").stat().st_size < MAX_BYTES
    assert {path.suffix for path in directory.iterdir()} <= {".safetensors", ".json", ".jinja", ".md", ".jsonl"}
    template = Path(indexshare.__file__).parent / "chat" / "glm52.jinja"
    assert (directory / "chat_template.jinja").read_bytes() == template.read_bytes()


def test_it_finds_facts_in_a_document_ten_times_longer_than_its_selection(nano: LLM) -> None:
    result = evaluate_length(nano, Library(nano.directory), 2560, num_questions=10, questions_per_document=10)
    assert result.num_correct >= 9, [answer.reply for answer in result.answers]
    assert result.num_selected == 10


@pytest.mark.parametrize("name", ["switch_light", "get_weather", "read_file"])
def test_it_calls_the_tool_at_hand_with_the_keys_and_types_of_its_schema(nano: LLM, name: str) -> None:
    """The form only: strings of the request are often copied wrongly, as the card says."""
    tool = next(tool for tool in TOOLS if tool.name == name)
    for seed in range(3):
        use = tool.make_use(np.random.default_rng(seed))
        events = nano.chat(
            [{"role": "user", "content": use.request}],
            tools=[tool.description],
            enable_thinking=False,
            stream=True,
            max_new_tokens=60,
        )
        (call,) = [event for event in events if isinstance(event, ToolCallEvent)]
        assert call.name == name
        assert {key: type(value) for key, value in call.arguments.items()} == {
            key: type(value) for key, value in use.arguments.items()
        }


def test_it_compresses_unseen_modules_better_than_xz(nano: LLM) -> None:
    paths = [path for path in corpus.held_out_files() if len(corpus.read_text(path)) < 8000][:5]
    result = measure_language(nano, paths=paths)
    assert result.bits_per_byte < result.xz_bits_per_byte
