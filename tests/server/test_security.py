"""Who may ask: keys on every route, host names, origins, and what every response carries."""

import asyncio
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from server.scripted import ScriptedService
from server.sockets import head, live_server
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from indexshare.errors import ConfigError
from indexshare.server import page
from indexshare.server.app import ServerSettings, create_app
from indexshare.server.http import json_response
from indexshare.server.security import load_api_keys

ALICE, BOB = "alice-" + "a" * 32, "bob-" + "b" * 32


async def whoami(request: Request) -> Response:
    return json_response({"tenant": request.state.tenant, "request_id": request.state.request_id})


def ask(
    path: str = "/whoami",
    method: str = "GET",
    headers: Mapping[str, str] | list[Any] | None = None,
    base_url: str = "http://127.0.0.1",
    **settings: Any,
) -> httpx2.Response:
    app = create_app(
        ScriptedService(lambda request: []), ServerSettings(**settings), extra_routes=[Route("/whoami", whoami)]
    )

    async def send() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url=base_url) as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


KEYS = {ALICE: "alice", BOB: "bob"}


def all_paths() -> list[str]:
    app = create_app(ScriptedService(lambda request: []), ServerSettings())
    return sorted({re.sub(r"\{.*?\}", "x", route.path) for route in app.routes if isinstance(route, Route)})


@pytest.mark.parametrize("path", [*all_paths(), "/nowhere", "/v1", "/v1/messages/x", "/health/", "/page/", "/docs"])
def test_every_path_and_method_needs_a_key_except_health_and_the_page(path: str) -> None:
    """Also /metrics, /ready and /openapi.json, and what does not exist."""
    open_paths = {"/health", "/"} | {f"/page/{file}" for file in page.FILES.values()}
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = ask(path, method, api_keys=KEYS)
        is_open = path in open_paths and method == "GET"
        assert (answer.status_code == 401) == (not is_open), f"{method} {path}: {answer.status_code}"
        if not is_open:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert (answer.json().get("type") == "error") == path.startswith("/v1/messages")
    assert ask(path, "HEAD", api_keys=KEYS).status_code == (200 if path in open_paths else 401)


def test_open_paths_are_a_fixed_list() -> None:
    """A path with a parameter would open more than can be listed."""
    assert not [path for path in page.FILES if "{" in path or path.startswith(("/v1", "/metrics"))]


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {ALICE}"},
        {"authorization": f"bearer  {ALICE}"},
        {"x-api-key": ALICE},
        {"x-api-key": "another-product's-key", "authorization": f"Bearer {ALICE}"},
        {"x-api-key": ALICE, "authorization": "Basic Zm9v"},
    ],
)
def test_a_key_names_its_tenant(headers: dict[str, str]) -> None:
    assert ask(headers=headers, api_keys=KEYS).json()["tenant"] == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ALICE},
        {"authorization": f"Basic {ALICE}"},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {ALICE[:-1]}"},
        {"authorization": f"Bearer {ALICE}x"},
        {"x-api-key": ""},
        {"x-api-key": ALICE.upper()},
        [("x-api-key", ALICE), ("x-api-key", ALICE)],
        [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}")],
        {"cookie": f"authorization=Bearer {ALICE}"},
    ],
)
def test_no_key_no_answer(headers: Any) -> None:
    answer = ask(headers=headers, api_keys=KEYS)
    assert answer.status_code == 401
    assert ALICE not in answer.text


def test_a_key_in_the_query_does_not_count() -> None:
    assert ask(f"/whoami?api_key={ALICE}", api_keys=KEYS).status_code == 401


def test_without_keys_everybody_is_the_same_tenant() -> None:
    assert ask(headers={"x-api-key": "anything"}).json()["tenant"] == ""


@pytest.mark.parametrize(
    ("host", "path"),
    list(itertools.product(["127.0.0.1/v1/health?", "127.0.0.1/health#", "x/health"], ["/metrics", "/v1/models"])),
)
def test_the_host_header_cannot_make_up_a_path(host: str, path: str) -> None:
    """CVE-2026-48746 and CVE-2026-48710: the check and the router saw different paths."""
    assert ask(path, headers={"host": host}, api_keys=KEYS).status_code == 400


def test_spellings_of_an_open_path_open_nothing_else() -> None:
    """Over sockets: clients normalise paths before they send them."""
    spellings = (
        "/%68ealth/../metrics /health%2f..%2fmetrics /health/.. // /health;x /HEALTH /health%00 /page/../metrics"
    )
    with live_server(api_keys=KEYS) as live:
        for target in spellings.split():
            assert live.ask(head(target)).startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), target
        assert live.ask(head("/%68ealth")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.2:1", "[::1]", "[::1]:8000", "my.server", "My.Server:443"],
)
def test_own_names_are_answered(host: str) -> None:
    assert ask(headers={"host": host}, allowed_hosts=["my.server"]).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",  # DNS rebinding: the browser believes that it talks to the attacker's site
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "my.server.evil.example",
        "localhost.",
        "10.0.0.1",
        "0.0.0.0",
        "2130706433",
        "0x7f.1",
        "[::ffff:8.8.8.8]",
        "::1",
        "[::1",
        "localhost:port",
        "localhost:8000:9",
        "user@localhost",
        "localhost localhost",
        "localhost,evil.example",
        "",
    ],
)
def test_other_names_are_not(host: str) -> None:
    answer = ask(headers={"host": host}, allowed_hosts=["my.server"])
    assert answer.status_code == 400
    assert "Host" in answer.json()["error"]["message"] or "host" in answer.json()["error"]["message"]


def test_the_address_of_the_connection_is_an_own_name() -> None:
    """A probe, or a client on the network, names the address it connects to. A browser page cannot choose that."""
    assert ask(
        base_url="http://192.168.7.9:8000", host="0.0.0.0", api_keys=KEYS, headers={"x-api-key": ALICE}
    ).is_success


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://127.0.0.1"}, 200),
        ({"origin": "https://app.example"}, 200),
        ({"origin": "https://app.example", "sec-fetch-site": "cross-site"}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "https://127.0.0.1"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "https://app.example.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ([("origin", "http://127.0.0.1"), ("origin", "http://evil.example")], 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_web_pages_of_other_origins_are_refused(headers: Any, status: int) -> None:
    assert ask(headers=headers, allowed_origins=["https://app.example"]).status_code == status


def test_behind_tls_the_own_origin_is_https() -> None:
    assert ask(headers={"origin": "https://127.0.0.1"}, base_url="https://127.0.0.1").status_code == 200
    assert ask(headers={"origin": "http://127.0.0.1"}, base_url="https://127.0.0.1").status_code == 403


def test_a_link_may_open_the_page_but_not_the_api() -> None:
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert ask("/", headers=followed).status_code == 200
    assert ask("/v1/models", headers=followed).status_code == 403


def test_preflights_are_answered_for_allowed_origins_only() -> None:
    headers = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    settings = {"allowed_origins": ["https://app.example"], "api_keys": KEYS}
    good = ask("/v1/models", "OPTIONS", headers | {"origin": "https://app.example"}, **settings)
    assert good.status_code == 200
    assert good.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in good.headers
    bad = ask("/v1/models", "OPTIONS", headers | {"origin": "https://evil.example"}, **settings)
    assert bad.status_code == 403
    assert not [name for name in bad.headers if name.startswith("access-control")]


def test_there_are_no_cors_headers_by_default() -> None:
    answer = ask(headers={"origin": "http://127.0.0.1"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_of_an_allowed_origin_can_read_its_401() -> None:
    answer = ask(headers={"origin": "https://app.example"}, allowed_origins=["https://app.example"], api_keys=KEYS)
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize("path", ["/", "/health", "/nowhere", "/v1/models", "/whoami"])
@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"])
def test_every_response_is_stamped(path: str, host: str) -> None:
    headers = ask(path, headers={"host": host}).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert "server" not in headers


@pytest.mark.parametrize("given", ["trace-1_A", "x" * 64])
def test_the_clients_request_id_is_kept(given: str) -> None:
    answer = ask(headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "é", "a;b", '"'])
def test_a_strange_request_id_is_replaced(given: str) -> None:
    answer = ask(headers=[(b"x-request-id", given.encode("latin-1"))])
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    keys = load_api_keys(key_file(tmp_path, f"# people\n\nalice:{ALICE}\n  {BOB}  \nalice:{ALICE}2\n"))
    assert keys[ALICE] == keys[ALICE + "2"] == "alice"
    assert re.fullmatch("key-[0-9a-f]{8}", keys[BOB])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("short\n", "at least 16"),
        ("k" * 15 + "\n", "at least 16"),
        ("k k k k k k k k k k\n", "visible ASCII"),
        ("schlüssel-schlüssel\n", "visible ASCII"),
        (f"a b:{ALICE}\n", "tenant"),
        (f":{ALICE}\n", "tenant"),
        (f"{ALICE}\n{ALICE}\n", "twice"),
        ("# nothing\n", "no API key"),
    ],
)
def test_bad_key_files_are_errors_without_the_key(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        load_api_keys(key_file(tmp_path, text))
    assert ALICE not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_key_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        load_api_keys(key_file(tmp_path, ALICE, mode))


def test_a_missing_key_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_api_keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_machines_are_let_in_only_with_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, api_keys=KEYS).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert ServerSettings(host=host).host == host


def test_settings_do_not_show_their_keys() -> None:
    assert ALICE not in repr(ServerSettings(api_keys=KEYS))
