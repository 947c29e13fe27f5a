"""A reply as blocks (reasoning, text, tool calls): what the Anthropic dialect and OpenAI's Responses have in common.

Both send and receive lists of objects that are told apart by "type", and both stream a reply as blocks that open, grow
and close. `decode_block` reads the one, `BlockFold` writes the other, and `respond` runs a reply through a fold.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from indexshare.chat.types import Done, Error, Event, FinishReason, Reasoning, Text, ToolCallEvent, Usage
from indexshare.server.http import ApiError, event_stream, json_response, run_while_connected
from indexshare.server.types import Piece, Reply

BlockKind = Literal["text", "reasoning"]
Chunk = dict[str, Any]
"""One server-sent event: its JSON object, whose "type" is also the event's name."""


class Extension(msgspec.Struct, forbid_unknown_fields=True):
    """The request field `indexshare`. selected: report which positions sparse attention read."""

    selected: bool = False


def decode_block(value: Mapping[str, Any], kinds: Mapping[str, type[msgspec.Struct]], where: str, hint: str) -> Any:
    """`value` as the struct that `kinds` has for its "type".

    Raises ApiError 400 that says `where` the object was, and for another type also `hint`.
    """
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ApiError(400, f"{where}: type {kind!r:.100} is not supported; {hint}", param=where)
    try:
        return msgspec.convert(value, kinds[kind])
    except msgspec.ValidationError as error:
        raise ApiError(400, f"{where}: {error}", param=where) from error


class BlockFold(ABC):
    """Puts a reply together, piece by piece. What `feed` returns is the streamed reply; `result` is the reply so far.

    Both come from the same steps, so a reply is the same streamed or not. A dialect says how blocks look.

    A block opens with its first characters and closes when another kind follows. Text that is only white space opens
    none, because clients refuse such a block when it is sent back to them: it waits for more, or goes.
    """

    def __init__(self, reply: Reply) -> None:
        self.failure: str | None = None
        self.selections: list[Any] = []
        self._reply = reply
        self._started = False
        self._open: BlockKind | None = None
        self._parts: list[str] = []
        self._blank = ""

    def feed(self, piece: Piece) -> Sequence[Chunk]:
        """The events to send for `piece`."""
        chunks: list[Chunk] = [] if self._started else self._start()
        self._started = True
        for event in piece.events:
            chunks += self._read(event)
        if piece.selection is not None:
            self.selections.append(piece.selection)
            if not chunks:
                chunks = [self._idle()]
            carrier = next((chunk for chunk in chunks if chunk["type"].endswith("delta")), chunks[0])
            carrier["indexshare"] = {"selected": piece.selection}
        return chunks

    def _read(self, event: Event) -> list[Chunk]:
        match event:
            case Reasoning(text) if text:
                return self._extend("reasoning", text)
            case Text(text) if text:
                if self._open != "text" and not text.strip():
                    self._blank += text
                    return []
                return self._extend("text", self._blank + text)
            case ToolCallEvent():
                return [*self._close_block(), *self._call(event)]
            case Done(reason="cancelled" | "error" as reason):
                return self._stop("the reply was cancelled" if reason == "cancelled" else "generation failed")
            case Done(reason, usage, stop_text):
                usage = usage or self._usage_so_far()
                return [*self._close_block(complete=reason != "length"), *self._finish(reason, usage, stop_text)]
            case Error(message):
                return self._stop(message)
            case _:
                return []

    def _extend(self, kind: BlockKind, text: str) -> list[Chunk]:
        chunks: list[Chunk] = []
        if self._open != kind:
            chunks = [*self._close_block(), *self._open_block(kind)]
            self._open = kind
        self._parts.append(text)
        return [*chunks, self._grow_block(kind, text)]

    def _close_block(self, *, complete: bool = True) -> list[Chunk]:
        kind, text = self._open, "".join(self._parts)
        self._open, self._blank = None, ""
        self._parts.clear()
        return [] if kind is None else self._end_block(kind, text, complete)

    def _stop(self, message: str) -> list[Chunk]:
        self.failure = message
        return self._fail(message)

    def _usage_so_far(self) -> Usage:
        reply = self._reply
        cached = reply.num_cached_tokens
        return Usage(num_prompt_tokens=reply.num_prompt_tokens, num_completion_tokens=0, num_cached_tokens=cached)

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """The reply as one JSON object."""

    @abstractmethod
    def _start(self) -> list[Chunk]: ...

    @abstractmethod
    def _idle(self) -> Chunk:
        """An event that says nothing, for a piece that has only extension data."""

    @abstractmethod
    def _open_block(self, kind: BlockKind) -> list[Chunk]: ...

    @abstractmethod
    def _grow_block(self, kind: BlockKind, text: str) -> Chunk: ...

    @abstractmethod
    def _end_block(self, kind: BlockKind, text: str, complete: bool) -> list[Chunk]: ...

    @abstractmethod
    def _call(self, call: ToolCallEvent) -> list[Chunk]: ...

    @abstractmethod
    def _finish(self, reason: FinishReason, usage: Usage, stop_text: str | None) -> list[Chunk]: ...

    @abstractmethod
    def _fail(self, message: str) -> list[Chunk]: ...


async def respond(request: Request, reply: Reply, fold: BlockFold, *, stream: bool) -> Response:
    """The HTTP response for `reply`. When the client goes, streaming or not, the reply is closed at once.

    Raises ApiError 500 when generation fails and nothing was sent yet.
    """
    if stream:
        return event_stream(_chunks(reply, fold))

    async def read() -> None:
        async with aclosing(reply.pieces()) as pieces:
            async for piece in pieces:
                fold.feed(piece)

    if not await run_while_connected(request.receive, read()):
        return Response(status_code=499)  # nobody reads it
    if fold.failure is not None:
        raise ApiError(500, fold.failure)
    result = fold.result()
    if fold.selections:
        result["indexshare"] = {"selected": fold.selections}
    return json_response(result)


async def _chunks(reply: Reply, fold: BlockFold) -> AsyncIterator[bytes]:
    async with aclosing(reply.pieces()) as pieces:
        async for piece in pieces:
            if chunks := fold.feed(piece):
                yield b"".join(
                    b"event: %b\ndata: %b\n\n" % (chunk["type"].encode(), msgspec.json.encode(chunk))
                    for chunk in chunks
                )
