"""The page at `/`: a fixed table of files of this package. No path of a request is ever joined to a directory."""

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_NAMES = (
    "answer.js",
    "api.js",
    "chat.js",
    "composer.js",
    "i18n.js",
    "icon.svg",
    "minimap.js",
    "page.js",
    "reading.css",
    "reading.js",
    "selection.js",
    "settings.js",
    "style.css",
)
FILES = {"/": "index.html", **{f"/page/{name}": name for name in _NAMES}}
"""Path of the request to file. The page asks for an API key itself: of all paths only these need none."""

_HEADERS = {
    "cache-control": "no-cache",  # ask each time, by ETag: after an upgrade no browser mixes old and new modules
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def routes() -> list[Route]:
    """One route for each file; they are read now, once."""
    return [_route(path, name) for path, name in FILES.items()]


def _route(path: str, name: str) -> Route:
    content = (files("indexshare.server") / "page" / name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": etag}
    media_type = _TYPES[name.rpartition(".")[2]]

    async def handler(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return Route(path, handler, include_in_schema=False)
