"""Models and tokens, driven by OpenAI's own client and by plain HTTP in process."""

from typing import Any

import httpx2
import openai
import pytest
from server import openai_client
from server.openai_client import with_client
from server.scripted import ScriptedService

from indexshare.server.types import ChatRequest


def silent() -> ScriptedService:
    return ScriptedService(lambda request: (), model_names=("scripted", "team/alias"))


def post(path: str, body: dict[str, Any], service: ScriptedService | None = None) -> httpx2.Response:
    return openai_client.post(service or silent(), path, body)


def test_models() -> None:
    listed = with_client(silent(), lambda client: client.models.list())
    assert [model.id for model in listed.data] == ["scripted", "team/alias"]
    assert listed.data[0].created == 1_700_000_000 and listed.data[0].max_model_len == 1000
    assert with_client(silent(), lambda client: client.models.retrieve("scripted")).id == "scripted"
    assert (
        with_client(silent(), lambda client: client._client.get("/v1/models/team/alias")).json()["id"] == "team/alias"
    )
    with pytest.raises(openai.NotFoundError, match="use one of scripted, team/alias"):
        with_client(silent(), lambda client: client.models.retrieve("gpt-6"))


def test_tokenize_and_back() -> None:
    body = {"prompt": "hé", "add_special_tokens": False}  # as lm-eval sends it
    answer = post("/tokenize", body).json()
    assert answer == {"count": 3, "tokens": list("hé".encode()), "max_model_len": 1000}
    assert post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "hé"}
    assert post("/tokenize", {"prompt": ""}).json()["tokens"] == []


def test_tokens_of_a_conversation_are_counted() -> None:
    service = silent()
    body = {
        "model": "team/alias",
        "messages": [{"role": "developer", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert post("/tokenize", body, service).json() == {"count": 42, "tokens": [*range(42)], "max_model_len": 1000}
    (request,) = service.seen
    assert isinstance(request, ChatRequest) and request.enable_thinking is False
    assert request.messages == [{"role": "system", "content": "hi"}]
    assert request.tools == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt or messages"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0]"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**31]}, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * 1001}, "1,000"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_refusals(path: str, body: dict[str, Any], words: str) -> None:
    response = post(path, body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_is_not_found(path: str) -> None:
    response = post(path, {"model": "x", "prompt": "a"} if path == "/tokenize" else {"model": "x", "tokens": [1]})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_both_kinds_of_clients_find_their_fields_in_the_list_of_models() -> None:
    answer = with_client(silent(), lambda client: client._client.get("/v1/models")).json()
    model = answer["data"][0]
    assert model["object"] == model["type"] == "model" and model["display_name"] == model["id"] == "scripted"
    assert model["created_at"] == "2023-11-14T22:13:20Z"
    assert (answer["has_more"], answer["first_id"], answer["last_id"]) == (False, "scripted", "team/alias")
