"""`/v1/models`, and text to token ids and back: `/tokenize` and `/detokenize` in vLLM's form."""

from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.server.chat_completions import chat_requests
from indexshare.server.http import ApiError, documented, json_response, read_json
from indexshare.server.openai_replies import model_not_found
from indexshare.server.openai_types import MAX_MESSAGES, MAX_TOOLS, ChatBody, Strict, TemplateArguments, TokenId, Tool
from indexshare.server.types import Service


class Model(msgspec.Struct):
    """A model that requests may name. max_model_len: tokens of prompt and answer together.

    The last three are what Anthropic's clients read.
    """

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int
    type: str
    display_name: str
    created_at: str


class Models(msgspec.Struct):
    """Every name of the model, its own name first."""

    object: str
    data: list[Model]
    first_id: str
    last_id: str
    has_more: bool = False


class TokenizeBody(Strict):
    """Either a prompt or a conversation. add_special_tokens is ignored: this tokenizer adds none."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_special_tokens: bool | None = None


class TokenCount(msgspec.Struct):
    """Token ids and their number."""

    count: int
    tokens: list[int]
    max_model_len: int


class DetokenizeBody(Strict, kw_only=True):
    """Token ids to be written as text."""

    model: str | None = None
    tokens: list[TokenId]


class Prompt(msgspec.Struct):
    """The text of token ids."""

    prompt: str


def routes(service: Service) -> list[Route]:
    """The endpoints over `service`."""

    def describe(name: str) -> Model:
        created_at = datetime.fromtimestamp(service.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        length = service.context_length
        return Model(name, "model", service.created, "indexshare", length, "model", name, created_at)

    def check_model(name: str | None) -> None:
        if name is not None and name not in service.model_names:
            raise model_not_found(name, service)

    @documented(summary="The names of the model", response=Models)
    async def models(request: Request) -> Response:
        names = service.model_names
        return json_response(Models("list", [describe(name) for name in names], names[0], names[-1]))

    @documented(summary="One name of the model", response=Model)
    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        check_model(name)
        return json_response(describe(name))

    @documented(
        summary="Token ids of a text, or of a conversation as the model reads it",
        body=TokenizeBody,
        response=TokenCount,
    )
    async def tokenize(request: Request) -> Response:
        body = await read_json(request, TokenizeBody)
        check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if body.messages is None:
            token_ids = await service.tokenize(body.prompt or "")
        else:
            chat = ChatBody(messages=body.messages, tools=body.tools, chat_template_kwargs=body.chat_template_kwargs)
            token_ids = await service.encode_chat(chat_requests(chat)[0])
        return json_response(TokenCount(len(token_ids), token_ids, service.context_length))

    @documented(summary="The text of token ids", body=DetokenizeBody, response=Prompt)
    async def detokenize(request: Request) -> Response:
        body = await read_json(request, DetokenizeBody)
        check_model(body.model)
        if len(body.tokens) > service.context_length:
            raise ApiError(400, f"tokens must be at most {service.context_length:,}", param="tokens")
        return json_response(Prompt(service.detokenize(body.tokens)))

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]
