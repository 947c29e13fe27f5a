"""From replies to answers, whole or streamed: what the OpenAI endpoints share.

A Fold turns the pieces of one reply into parts of one choice. A streamed answer sends the parts as they come, a whole
one joins the same parts, so that the two cannot differ. Reasoning tokens are counted by piece: all of a piece
count when it brings reasoning, or when it brings nothing while the reasoning goes on.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from indexshare import __version__
from indexshare.chat.types import Done, Error, Event, Start
from indexshare.engine.sampler import SampledToken
from indexshare.errors import IndexShareError
from indexshare.server.http import (
    ApiError,
    as_api_error,
    error_response,
    event_stream,
    json_response,
    run_while_connected,
)
from indexshare.server.openai_types import GenerationBody
from indexshare.server.types import Piece, Reply, Service

FinishReason = Literal["stop", "length", "tool_calls"]
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class PromptDetails(msgspec.Struct):
    """cached_tokens: the part of the prompt that was not computed again."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    """reasoning_tokens: the part of the answer before the reasoning ended."""

    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Token counts of an answer: each prompt once, all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Selected(msgspec.Struct):
    """Extension: what the service says about the positions that sparse attention read."""

    selected: Any


class Part(Protocol):
    """A part of a choice: index, finish_reason, and logprobs, which the fold sets."""

    logprobs: Any


PartT = TypeVar("PartT", bound=Part)
RequestT = TypeVar("RequestT")


class Answer(msgspec.Struct, Generic[PartT], kw_only=True):
    """What a client receives, once or in every chunk. usage is null in chunks before the one that has it."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: Sequence[PartT]
    usage: Usage | UnsetType | None = UNSET
    indexshare: Selected | UnsetType = UNSET


class Fold(Generic[PartT]):
    """One choice: `feed` it pieces. Subclasses say what an event and a token are in their endpoint."""

    def __init__(self, index: int, reply: Reply, *, wants_logprobs: bool) -> None:
        self.index, self.reply = index, reply
        self.num_tokens = self.num_reasoning_tokens = 0
        self.has_ended = False
        self.wants_logprobs = wants_logprobs

    def opening(self) -> PartT | None:
        """The part that an answer begins with."""
        return None

    def translate(self, event: Event) -> PartT | None:
        """The part that an event is; None for one that clients do not see."""
        raise NotImplementedError

    def empty(self) -> PartT:
        """A part that adds nothing but its log-probabilities."""
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[SampledToken]) -> object:
        """Log-probabilities on the wire."""
        raise NotImplementedError

    def whole(self, parts: Sequence[PartT]) -> Any:
        """The parts joined: the choice of an answer that is not streamed."""
        raise NotImplementedError

    def feed(self, piece: Piece) -> Iterator[tuple[PartT, Any]]:
        """(part, selection) of a piece: its first part has the log-probabilities and the selection, the others None.

        Raises ApiError when the reply failed.
        """
        if any(isinstance(event, Start) for event in piece.events) and (part := self.opening()) is not None:
            yield part, None
        self.num_tokens += len(piece.tokens)
        logprobs = self.logprobs(piece.tokens) if self.wants_logprobs and piece.tokens else None
        selection = piece.selection
        for event in piece.events:
            if isinstance(event, Error):
                raise ApiError(500, event.message)
            if (part := self.translate(event)) is not None:
                part.logprobs = logprobs
                yield part, selection
                logprobs = selection = None
        if logprobs is not None or selection is not None:
            part = self.empty()
            part.logprobs = logprobs
            yield part, selection

    def finish_reason(self, event: Done) -> FinishReason:
        """The reason as OpenAI calls it. Raises ApiError when the reply was cut off from our side."""
        self.has_ended = True
        if event.usage is not None:
            self.num_tokens = event.usage.num_completion_tokens
            self.num_reasoning_tokens = event.usage.num_reasoning_tokens
        if event.reason in ("stop", "length", "tool_calls"):
            return event.reason
        raise ApiError(503, f"the reply was {event.reason}; send the request again")


class Exchange(Generic[RequestT, PartT]):
    """One HTTP request: `num_choices` replies to each prompt, and the answer made of them.

    kind: what `object` says in a whole answer; chunk_kind: and in a chunk.
    """

    def __init__(self, request: Request, service: Service, body: GenerationBody, *, kind: str, chunk_kind: str) -> None:
        if body.model is not None and body.model not in service.model_names:
            raise model_not_found(body.model, service)
        self._request, self._body = request, body
        self._kind, self._chunk_kind = kind, chunk_kind
        self._id = f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{secrets.token_hex(12)}"
        self._created, self._model = int(time.time()), body.model or service.model_names[0]
        self._folds: list[Fold[PartT]] = []

    async def respond(
        self,
        requests: Sequence[RequestT],
        accept: Callable[[RequestT], Awaitable[Reply]],
        fold: Callable[[int, Reply], Fold[PartT]],
    ) -> Response:
        """Have every request accepted, then answer. Closes all replies whatever happens."""
        replies: list[Reply] = []
        try:
            for item in requests:
                replies.append(await accept(item))
            self._folds = [fold(index, reply) for index, reply in enumerate(replies)]
        except BaseException:
            await _discard(replies)
            raise
        if self._body.stream:
            return event_stream(self._stream())
        answers: list[Answer[Any]] = []
        if not await run_while_connected(self._request.receive, self._whole(answers)):
            raise ApiError(499, "the client closed the connection")  # for the log: nobody receives it
        return json_response(answers[0])

    async def _whole(self, answers: list[Answer[Any]]) -> None:
        parts: list[list[PartT]] = [[] for _ in self._folds]
        selections: list[Any] = []
        async with aclosing(self._parts()) as stream:
            async for index, part, selection in stream:
                parts[index].append(part)
                if selection is not None:
                    selections.append(selection)
        choices = [fold.whole(own) for fold, own in zip(self._folds, parts, strict=True)]
        selected = Selected(selections) if self._body.wants_selection else UNSET
        answers.append(self._answer(self._kind, choices, usage=self._usage(), indexshare=selected))

    async def _stream(self) -> AsyncIterator[bytes]:
        options = self._body.stream_options
        includes_usage = options is not None and bool(options.include_usage)
        no_usage = None if includes_usage else UNSET
        try:
            async with aclosing(self._parts()) as stream:
                async for _, part, selection in stream:
                    selected = UNSET if selection is None else Selected(selection)
                    yield _event(self._answer(self._chunk_kind, [part], usage=no_usage, indexshare=selected))
        except (ApiError, IndexShareError) as error:
            failure = error if isinstance(error, ApiError) else as_api_error(error)
            request_id = getattr(self._request.state, "request_id", "")
            failure = error_response(self._request.scope["path"], failure, request_id)
            yield b"data: " + bytes(failure.body) + b"\n\n"
        else:
            if includes_usage:
                yield _event(self._answer(self._chunk_kind, [], usage=self._usage()))
        yield b"data: [DONE]\n\n"

    async def _parts(self) -> AsyncGenerator[tuple[int, PartT, Any]]:
        """(index of the choice, part, selection or None) as they come."""
        async with aclosing(_merged([fold.reply for fold in self._folds])) as pieces:
            async for index, piece in pieces:
                for part, selection in self._folds[index].feed(piece):
                    yield index, part, selection
        if not all(fold.has_ended for fold in self._folds):
            raise ApiError(500, "the reply broke off; send the request again")

    def _answer(self, kind: str, choices: Sequence[Any], **extra: Any) -> Answer[Any]:
        return Answer(
            id=self._id,
            object=kind,
            created=self._created,
            model=self._model,
            system_fingerprint=f"indexshare-{__version__}",
            choices=choices,
            **extra,
        )

    def _usage(self) -> Usage:
        prompts = [fold.reply for fold in self._folds[:: self._body.num_choices]]
        num_prompt = sum(reply.num_prompt_tokens for reply in prompts)
        num_completion = sum(fold.num_tokens for fold in self._folds)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
            prompt_tokens_details=PromptDetails(sum(reply.num_cached_tokens for reply in prompts)),
            completion_tokens_details=CompletionDetails(sum(fold.num_reasoning_tokens for fold in self._folds)),
        )


def model_not_found(name: str, service: Service) -> ApiError:
    """The error for a model that is not served; it names those that are."""
    message = f"there is no model {name!r:.200}; use one of {', '.join(service.model_names)}"
    return ApiError(404, message, param="model", code="model_not_found")


def wire_logprob(value: float) -> float:
    """A log-probability as JSON can say it."""
    return max(value, _LOWEST_LOGPROB)


def token_text(data: bytes, prefix: str = "") -> str:
    """A token's text; bytes that are no UTF-8 by themselves are written after `prefix` as \\x and two digits each."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def _merged(replies: Sequence[Reply]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of all replies as they come, each with the index of its reply. Closing it closes all of them."""
    if len(replies) == 1:  # without the tasks that taking turns needs
        async with aclosing(replies[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    sources = [reply.pieces() for reply in replies]
    waiting = {asyncio.ensure_future(anext(source, None)): index for index, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(task)
                if (piece := task.result()) is not None:
                    yield index, piece
                    waiting[asyncio.ensure_future(anext(sources[index], None))] = index
    finally:
        await _close(waiting, sources)


async def _discard(replies: Sequence[Reply]) -> None:
    """Cancel accepted replies of which nothing was read."""
    sources = [reply.pieces() for reply in replies]
    tasks = [asyncio.ensure_future(anext(source, None)) for source in sources]
    await asyncio.sleep(0)  # they begin: a generator that has not begun does not notice that it is closed
    await _close(tasks, sources)


async def _close(tasks: Iterable[asyncio.Future[Any]], sources: Sequence[AsyncGenerator[Piece]]) -> None:
    """Cancel the tasks, which read from the sources, then close those."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for source in sources:
        await source.aclose()
