"""Who may ask: API keys, the names this server answers to, and which web pages may use it.

Everything is decided on the raw ASGI scope, never on `request.url`: Starlette builds that from the Host header.
"""

import asyncio
import contextlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Collection, Mapping
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from indexshare.errors import ConfigError
from indexshare.server.http import ApiError, error_response

MIN_KEY_CHARACTERS = 16
MAX_DRAINED_BYTES, DRAIN_SECONDS = 64 * 1024, 2.0  # of a body that nobody reads

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_KEY = re.compile(r"[!-9;-~]+")  # visible ASCII without the colon
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")

_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def load_api_keys(path: Path) -> dict[str, str]:
    """Keys and the tenants they belong to, from a file that only its owner can read.

    One `key` or `tenant:key` a line; blank lines and lines that start with # are ignored. A key without a tenant is a
    tenant of its own, named after its hash. Raises ConfigError.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if os.name == "posix" and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigError(f"{path} can be read by others; run: chmod 600 {path}")
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error}") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        tenant, colon, key = line.rpartition(":")
        if len(key) < MIN_KEY_CHARACTERS or not _KEY.fullmatch(key):
            raise ConfigError(
                f"{path}, line {number}: an API key has at least {MIN_KEY_CHARACTERS} visible ASCII characters and no"
                f" colon; for a new one run: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        if colon and not _TENANT.fullmatch(tenant):
            raise ConfigError(
                f"{path}, line {number}: write tenant:key with a tenant of letters, digits, '.', '_', '-'"
            )
        if key in keys:
            raise ConfigError(f"{path}, line {number}: this key is there twice; remove one")
        keys[key] = tenant or f"key-{sha256(key.encode()).hexdigest()[:8]}"
    if not keys:
        raise ConfigError(f"{path} holds no API key; write one a line")
    return keys


def check_exposure(host: str, keys: Mapping[str, str]) -> None:
    """Raise ConfigError when other machines could reach a server that asks nobody for a key."""
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"refusing to listen on {host!r} without API keys: anybody who reaches this machine could use the model. "
            "Listen on 127.0.0.1, or give keys with --api-key-file FILE"
        )


def is_loopback(name: str) -> bool:
    """Whether a host name or address (IPv6 with or without brackets) always means this machine."""
    if name.lower() == "localhost":
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """All values that the request gives for a header (`name` in lower case)."""
    return [value for key, value in scope["headers"] if key == name]


class StampResponses:
    """ASGI middleware, the outermost: a request id, and headers that tell browsers to be careful, on every response.

    The client's own x-request-id is used if it is 1 to 64 of [A-Za-z0-9_-]: others could not be logged safely. Who is
    answered before its body was read, as without a key, may first send the rest of a small one: the connection would
    end otherwise, maybe just when the client sends its next request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # nothing below asks those for a key
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header_values(scope, b"x-request-id")
        request_id = given[0].decode("latin-1") if len(given) == 1 else ""
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id

        is_read = False

        async def watched() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                if not is_read and _declares_small_body(scope):
                    await _drain(watched)
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, watched, stamped)


def _declares_small_body(scope: Scope) -> bool:
    lengths = header_values(scope, b"content-length")
    return len(lengths) == 1 and lengths[0].isdigit() and 0 < int(lengths[0][:9]) <= MAX_DRAINED_BYTES


async def _drain(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass


class CheckHostAndOrigin:
    """ASGI middleware against DNS rebinding and strange web pages.

    Host (exactly one) must be a loopback name, the address that the connection came to, or one of `allowed_hosts`:
    400. A web page must come from this server or one of `allowed_origins`: 403. `public`: paths of the page itself,
    which a link on another site may open.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Collection[str] = (),
        allowed_origins: Collection[str] = (),
        public: Collection[str] = (),
    ) -> None:
        self.app = app
        self.hosts = frozenset(host.lower() for host in allowed_hosts)
        self.origins = frozenset(origin.encode() for origin in allowed_origins)
        self.public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif (error := self._host_error(scope) or self._origin_error(scope)) is not None:
            await error_response(scope["path"], error, scope["state"]["request_id"])(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _host_error(self, scope: Scope) -> ApiError | None:
        hosts = header_values(scope, b"host")
        match = _HOST.fullmatch(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
        if match is None:
            return ApiError(400, "a request needs one Host header, with a host name and perhaps a port")
        name = match.group(1).lower()
        arrived_at = (scope.get("server") or ("", None))[0]
        if is_loopback(name) or name.strip("[]") == arrived_at or name in self.hosts:
            return None
        return ApiError(400, "this server does not answer to that host name; the operator can add it (--allow-host)")

    def _origin_error(self, scope: Scope) -> ApiError | None:
        error = ApiError(403, "web pages of another origin may not use this server (--allow-origin)")
        origins = header_values(scope, b"origin")
        if origins:
            own = scope["scheme"].encode() + b"://" + header_values(scope, b"host")[0]
            return None if len(origins) == 1 and (origins[0] == own or origins[0] in self.origins) else error
        # Browsers leave Origin out of some GET requests, but newer ones say here that another site asks.
        foreign = any(site not in (b"same-origin", b"none") for site in header_values(scope, b"sec-fetch-site"))
        return error if foreign and not (scope["method"] == "GET" and scope["path"] in self.public) else None


class RequireKey:
    """ASGI middleware: 401 without one of the keys, whatever the path or method, known or not.

    `Authorization: Bearer KEY` or `x-api-key: KEY`. Only GET and HEAD of the `public` paths go without: a browser can
    not send a key when it loads a page. The key's tenant goes to `request.state.tenant`. No keys: everybody is "".
    """

    def __init__(self, app: ASGIApp, *, keys: Mapping[str, str], public: Collection[str] = ()) -> None:
        self.app = app
        self.tenants = [(sha256(key.encode()).digest(), tenant) for key, tenant in keys.items()]
        self.public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        tenant = self._tenant(scope) if self.tenants else ""
        if tenant is None and not (scope["method"] in ("GET", "HEAD") and scope["path"] in self.public):
            error = ApiError(
                401,
                "a valid API key is needed: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
            )
            await error_response(scope["path"], error, scope["state"]["request_id"])(scope, receive, send)
            return
        scope["state"]["tenant"] = tenant or ""
        await self.app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        """Of the key that was sent. All keys are compared, as hashes and in constant time, also after a match."""
        found: str | None = None
        for sent in _sent_keys(scope):
            digest = sha256(sent).digest()
            for known, tenant in self.tenants:
                if hmac.compare_digest(digest, known):
                    found = tenant
        return found


def _sent_keys(scope: Scope) -> list[bytes]:
    """At most one from each of the two headers; a header that is there twice counts for nothing."""
    keys = []
    bearers, plain = header_values(scope, b"authorization"), header_values(scope, b"x-api-key")
    if len(plain) == 1:
        keys.append(plain[0])
    if len(bearers) == 1:
        scheme, _, key = bearers[0].partition(b" ")
        if scheme.lower() == b"bearer":
            keys.append(key.strip())
    return keys
