"""An OpenAPI 3.1 document made from the routes and what `documented` says about their handlers."""

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.routing import BaseRoute, Route

from indexshare import __version__
from indexshare.server.http import Documentation, documentation

_STATUS = {
    400: "The request is wrong; the message says what.",
    401: "No valid API key.",
    403: "A web page of another origin asks.",
    404: "No such model or path.",
    405: "The path does not know this method.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON in UTF-8.",
    429: "Too much work at the moment; retry-after says when to come again.",
    500: "An error of the server; the message holds the request id.",
    503: "Not now: the model is being loaded, or the server stops.",
}
_FOR_EVERYBODY = (400, 401, 403, 404, 405, 500)
_WITH_BODY = (408, 413, 415, 429, 503)


class OpenAIErrorBody(msgspec.Struct):
    """message: what was wrong and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(msgspec.Struct):
    """An error as OpenAI's clients read it."""

    error: OpenAIErrorBody


class AnthropicErrorBody(msgspec.Struct):
    """message: what was wrong and what to do."""

    type: str
    message: str


class AnthropicError(msgspec.Struct):
    """An error as Anthropic's clients read it."""

    error: AnthropicErrorBody
    request_id: str
    type: str = "error"


def openapi_document(routes: Iterable[BaseRoute], *, needs_key: bool) -> dict[str, Any]:
    """The document for those routes that `documented` describes. `needs_key`: the server asks for API keys."""
    described = [
        (route, note)
        for route in routes
        if isinstance(route, Route) and (note := documentation(route.endpoint)) is not None
    ]
    types = [kind for _, note in described for kind in (note.body, note.response) if kind is not None]
    schemas, components = msgspec.json.schema_components(
        [*types, OpenAIError, AnthropicError], ref_template="#/components/schemas/{name}"
    )
    by_type = dict(zip([*types, OpenAIError, AnthropicError], schemas, strict=True))
    paths: dict[str, Any] = {}
    for route, note in described:
        template = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        for method in sorted((route.methods or {"GET"}) - {"HEAD"}):
            paths.setdefault(template, {})[method.lower()] = _operation(template, method, note, by_type)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "indexshare", "version": __version__},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": components},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
        paths["/health"]["get"]["security"] = []
    return document


def _operation(path: str, method: str, note: Documentation, by_type: dict[Any, Any]) -> dict[str, Any]:
    error = by_type[AnthropicError if path.startswith("/v1/messages") else OpenAIError]
    statuses = (*_FOR_EVERYBODY, *(_WITH_BODY if note.body is not None else ()))
    responses: dict[str, Any] = {
        str(status): {"description": _STATUS[status], "content": {"application/json": {"schema": error}}}
        for status in statuses
    }
    success: dict[str, Any] = {"description": "The answer."}
    if note.response is not None:
        success["content"] = {"application/json": {"schema": by_type[note.response]}}
    if note.stream:
        success.setdefault("content", {})["text/event-stream"] = {"schema": {"type": "string"}}
    responses["200"] = success
    if path == "/ready":
        responses["503"] = {**success, "description": "Not yet; the reason says why."}
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', path)}",
        "summary": note.summary,
        "responses": responses,
    }
    if note.body is not None:
        content = {"application/json": {"schema": by_type[note.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    if names := re.findall(r"\{(\w+)\}", path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return operation
