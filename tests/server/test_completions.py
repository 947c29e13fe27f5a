"""The completions endpoint, driven by OpenAI's own client in process; the model is a script."""

from collections.abc import Sequence
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server.openai_client import complete, played, post
from server.scripted import ScriptedService

from indexshare.chat.types import Done, Error, Start, Text
from indexshare.engine.sampler import SampledToken, SamplingParams
from indexshare.errors import RequestError
from indexshare.server.types import CompletionRequest, OutputFormat, Piece


def drawn(character: str, logprob: float | None = -1.0, *top: tuple[str, float]) -> SampledToken:
    ranked = None if logprob is None else tuple((ord(other), value) for other, value in top)
    return SampledToken(token_id=ord(character), logprob=logprob, top_logprobs=ranked)


AB = (
    Piece(events=(Start(2),)),
    Piece(events=(Text("a"),), tokens=(drawn("a", -0.5, ("a", -0.5)),)),
    Piece(events=(Text("b"), Done("length")), tokens=(drawn("b", -1.5, ("x", -0.25)),)),
)
PROMPT_TOKENS = (drawn("h", None), drawn("i", -2.0, ("o", -1.0)))


def test_a_whole_answer() -> None:
    service = played(*AB)
    answer = complete(service, temperature=0.5, stop="x", top_p=0.5, presence_penalty=1.0, seed=4)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == "scripted"
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("ab", "length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 2)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert service.seen == [
        CompletionRequest(
            prompt="hi",
            sampling={
                "max_new_tokens": 16,
                "temperature": 0.5,
                "stop": "x",
                "top_p": 0.5,
                "presence_penalty": 1.0,
                "seed": 4,
            },
        )
    ]
    assert service.replies[0].closed


def test_a_streamed_answer() -> None:
    chunks = complete(played(*AB), stream=True, stream_options={"include_usage": True}, echo=True)
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["hi", "a", "b", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 9
    text = post(played(*AB), "/v1/completions", {"prompt": "hi", "stream": True}).text
    assert text.endswith("data: [DONE]\n\n") and "usage" not in text


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["hi", "ho"], ["hi", "ho"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts(prompt: Any, expected: list[Any]) -> None:
    service = played(*AB)
    answer = complete(service, prompt=prompt, n=2, best_of=2)
    assert [request.prompt for request in service.seen] == [one for one in expected for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(expected)))
    assert answer.usage.prompt_tokens == 7 * len(expected) and answer.usage.completion_tokens == 4 * len(expected)


def test_logprobs_as_evaluation_tools_read_them() -> None:
    """What lm-eval's `local-completions` sends to score a continuation, and every entry that it reads."""
    service = played(*AB[:2], Piece(events=(Done("length"),)), prompt_tokens=PROMPT_TOKENS)
    answer = complete(service, prompt=[[104, 105]], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    (request,) = service.seen
    assert isinstance(request, CompletionRequest) and request.echo
    assert request.sampling == {"temperature": 0, "max_new_tokens": 1, "logprobs": 1, "seed": 1234}
    (choice,) = answer.choices
    assert choice.text == "hia"
    assert choice.logprobs.tokens == ["h", "i", "a"]
    assert choice.logprobs.token_logprobs == [None, -2.0, -0.5]
    assert choice.logprobs.top_logprobs == [None, {"o": -1.0, "i": -2.0}, {"a": -0.5}]
    assert choice.logprobs.text_offset == [0, 1, 2]


def test_scoring_only() -> None:
    service = played(Piece(events=(Start(2), Done("length"))), prompt_tokens=PROMPT_TOKENS)
    choice = complete(service, max_tokens=0, logprobs=0, echo=True).choices[0]
    assert service.seen[0].sampling == {"max_new_tokens": 0, "logprobs": 0}
    assert (choice.text, choice.logprobs.token_logprobs) == ("hi", [None, -2.0])
    complete(service, max_tokens=0, echo=True)
    assert isinstance(service.seen[1], CompletionRequest) and service.seen[1].echo


def test_echo_without_logprobs_is_only_text() -> None:
    service = played(*AB)
    assert complete(service, echo=True, prompt=[104, 105]).choices[0].text == "hiab"
    assert isinstance(service.seen[0], CompletionRequest) and not service.seen[0].echo


def test_tokens_that_are_part_of_a_character() -> None:
    first, second = (SampledToken(token_id=byte, logprob=-1.0, top_logprobs=((byte, -1.0),)) for byte in "é".encode())
    service = played(
        Piece(events=(Start(2),), tokens=(first,)),
        Piece(events=(Text("éa"), Done("stop")), tokens=(second, drawn("a", float("-inf")))),
    )
    logprobs = complete(service, logprobs=1).choices[0].logprobs
    assert logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9", "a"]
    assert logprobs.top_logprobs[0] == {"bytes:\\xc3": -1.0}
    assert logprobs.text_offset == [0, 0, 1] and logprobs.token_logprobs == [-1.0, -1.0, -9999.0]


pieces = st.lists(
    st.builds(
        Piece,
        events=st.lists(st.builds(Text, st.text(max_size=3)), max_size=2).map(tuple),
        tokens=st.lists(st.builds(drawn, st.characters(max_codepoint=255), st.floats(-20, 0)), max_size=3).map(tuple),
    ),
    max_size=5,
)


@given(script=pieces, echo=st.booleans(), logprobs=st.none() | st.integers(0, 5))
def test_streaming_equals_not_streaming(script: list[Piece], echo: bool, logprobs: int | None) -> None:
    service = played(Piece(events=(Start(2),)), *script, Piece(events=(Done("stop"),)), prompt_tokens=PROMPT_TOKENS)
    (whole,) = complete(service, echo=echo, logprobs=logprobs).choices
    parts = [chunk.choices[0] for chunk in complete(service, echo=echo, logprobs=logprobs, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    assert [part.finish_reason for part in parts if part.finish_reason] == [whole.finish_reason]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [entry for part in parts if part.logprobs for entry in getattr(part.logprobs, name)]
        assert joined == (getattr(whole.logprobs, name) if whole.logprobs else [])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [[-1]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "64"),
        ({"logprobs": 21}, "20"),
        ({"max_tokens": 0}, "echo"),
        ({"structured_outputs": {}}, "exactly one"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    service = played(*AB)
    response = post(service, "/v1/completions", {"prompt": "hi"} | fields)
    assert response.status_code == 400 and words in response.json()["error"]["message"] and not service.seen


def test_fields_that_change_nothing_are_accepted_and_null_is_absent() -> None:
    service = played(*AB)
    post(
        service,
        "/v1/completions",
        {"prompt": "hi", "user": "u", "suffix": None, "best_of": 1, "max_tokens": None, "logprobs": None},
    )
    assert service.seen == [CompletionRequest(prompt="hi", sampling={"max_new_tokens": 16})]


def test_structured_outputs() -> None:
    service = played(*AB)
    complete(service, extra_body={"structured_outputs": {"regex": "a+"}, "top_k": 3})
    assert service.seen[0].output_format == OutputFormat(kind="regex", definition="a+")
    assert service.seen[0].sampling["top_k"] == 3


@pytest.mark.parametrize("field", ["max_tokens", "logprobs", "n", "best_of", "seed", "temperature", "top_p", "top_k"])
def test_odd_numbers_are_refused_or_understood_by_the_sampler(field: str) -> None:
    impossible = ["NaN", "1e400", "9223372036854775808", "true", '"1"', "[]"]
    for value in ["-1", "0", "1", "1.5", "2147483648", "null", *impossible]:
        service = played(*AB)
        response = post(service, "/v1/completions", f'{{"prompt": "hi", "{field}": {value}}}')
        assert response.status_code in ((400,) if value in impossible else (200, 400)), value
        for request in service.seen:
            SamplingParams(**request.sampling)
        if value == "null":
            assert response.status_code == 200


def test_failures() -> None:
    broken = (*AB[:2], Piece(events=(Error("the model broke"),)))
    with pytest.raises(openai.InternalServerError, match="the model broke"):
        complete(played(*broken))
    with pytest.raises(openai.APIError, match="the model broke"):
        complete(played(*broken), stream=True)
    with pytest.raises(openai.NotFoundError):
        complete(played(*AB), model="davinci")


def test_a_prompt_that_cannot_be_echoed_leaves_no_reply_behind() -> None:
    class Narrow(ScriptedService):
        def detokenize(self, token_ids: Sequence[int]) -> str:
            raise RequestError("token 9 is not in the vocabulary")

    service = Narrow(lambda request: AB)
    assert post(service, "/v1/completions", {"prompt": [9], "echo": True}).status_code == 400
    assert [reply.closed for reply in service.replies] == [True]
