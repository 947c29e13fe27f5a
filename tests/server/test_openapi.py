"""The document is true: it validates, names what exists, and generated requests never cause an error of the server."""

import asyncio
from typing import Any

import httpx2
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from server.scripted import ScriptedService
from starlette.routing import Route

from indexshare.chat.types import Done, Start, Text, Usage
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.types import Piece

SCRIPT = [
    Piece(events=(Start(7), Text("hello"))),
    Piece(events=(Done("stop", Usage(num_prompt_tokens=7, num_completion_tokens=1)),)),
]
APP = create_app(ScriptedService(lambda request: SCRIPT), ServerSettings())
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)


def document(**options: Any) -> dict[str, Any]:
    app = create_app(ScriptedService(lambda request: SCRIPT), ServerSettings(**options))

    async def send() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
            return await client.get("/openapi.json", headers={"x-api-key": "k" * 20})

    return asyncio.run(send()).json()


def test_every_route_but_the_page_is_described() -> None:
    described = set(document()["paths"])
    existing = {route.path.replace(":path}", "}") for route in APP.routes if isinstance(route, Route)}
    assert {path for path in existing if not path.startswith("/page/")} - {"/"} == described


def test_schemas_are_json_schemas_and_references_resolve() -> None:
    found = document()
    schemas = found["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)

    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    assert references(found) <= {f"#/components/schemas/{name}" for name in schemas}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_errors_are_described_in_the_dialect(path: str) -> None:
    responses = document()["paths"][path]["post"]["responses"]
    assert {"200", "400", "401", "403", "404", "405", "413", "415", "429", "500", "503"} <= set(responses)
    dialect = "AnthropicError" if path == "/v1/messages" else "OpenAIError"
    assert responses["400"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{dialect}")


def test_keys_are_described_when_they_are_asked_for() -> None:
    assert "security" not in document()
    found = document(api_keys={"k" * 20: "alice"})
    assert found["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert found["paths"]["/health"]["get"]["security"] == []


@SCHEMA.parametrize()
@settings(max_examples=10, suppress_health_check=list(HealthCheck), deadline=None)
def test_generated_requests_never_cause_an_error_of_the_server(case: schemathesis.Case) -> None:
    response = case.call(headers={"host": "127.0.0.1"})
    assert response.status_code < 500, response.text
    documented = case.operation.definition.raw["responses"]
    assert str(response.status_code) in documented
