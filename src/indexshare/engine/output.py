"""What a request gives back: pieces of text or events while it runs, the whole of it at the end.

A stream is the only way tokens are made; the collected answer is a stream read to its end, so the two cannot differ.
Closing a stream early (or leaving its `with` block) frees the request's cache pages.
"""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

from indexshare.chat.parser import EventParser
from indexshare.chat.tokenizer import Tokenizer
from indexshare.chat.types import Done, Event, FinishReason, Start, Text, ToolCall, Usage, reply_message
from indexshare.engine.reply import ReplyDecoder
from indexshare.engine.sampler import SampledToken, SamplingParams
from indexshare.engine.session import Progress, Session

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer of `LLM.generate`.

    token_ids: every drawn token, the stop token too; logprobs: one entry for each of them, if the request asked.
    finish_reason: "stop" (a stop id or stop text), "length" (max_new_tokens), "cancelled" (closed before its end).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[SampledToken, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer of `LLM.chat`; finish_reason is "tool_calls" when the model stopped to call tools."""

    content: str
    reasoning_content: str | None
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request on its session. `keeps_session`: the caller's session stays open when the request ends."""

    session: Session
    prompt_ids: Sequence[int]
    params: SamplingParams
    stop_ids: tuple[int, ...]
    tokenizer: Tokenizer
    keeps_session: bool = False
    progress: Progress | None = None


@dataclass(slots=True)
class _State:
    """What a request has made so far."""

    sampled: list[SampledToken] = field(default_factory=list)
    num_cached: int = 0
    reason: FinishReason = "cancelled"
    events: list[Event] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))


class _Stream(Generic[Item]):
    """Iterates over the items of one request. The generator does not know the stream: dropping it closes it at once."""

    def __init__(self, request: Request, state: _State, items: Generator[Item, None, None]) -> None:
        self._request = request
        self._state = state
        self._items = items

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        return next(self._items)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the request now and free its pages; harmless when it has ended."""
        self._items.close()
        _release(self._request)  # the generator does it too, but only when it has begun

    @property
    def usage(self) -> Usage:
        return _usage(self._request, self._state)

    @property
    def _token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self._state.sampled)

    @property
    def _logprobs(self) -> tuple[SampledToken, ...] | None:
        return tuple(self._state.sampled) if self._request.params.logprobs is not None else None


class TextStream(_Stream[str]):
    """Pieces of text; none of them is empty. `completion` is what has come so far, and after the end all of it."""

    def __init__(self, request: Request) -> None:
        state = _State()
        super().__init__(request, state, _text(request, state))

    @property
    def completion(self) -> Completion:
        return Completion(
            text=self._state.text,
            token_ids=self._token_ids,
            finish_reason=self._state.reason,
            usage=self.usage,
            logprobs=self._logprobs,
        )


class ChatStream(_Stream[Event]):
    """Events of one reply, from Start to Done. `reply` is what has come so far, and after the end all of it.

    Stop texts end the answer, not the reasoning: they are looked for in the content only.
    """

    def __init__(self, request: Request, *, parser: EventParser) -> None:
        state = _State()
        decoder = ReplyDecoder(request.tokenizer, parser, request.params.stop)
        super().__init__(request, state, _events(request, state, decoder))

    @property
    def reply(self) -> Reply:
        message = reply_message(self._state.events)
        return Reply(
            content=self._state.text,
            reasoning_content=message.reasoning_content,
            tool_calls=message.tool_calls,
            finish_reason=self._state.reason,
            usage=self.usage,
            token_ids=self._token_ids,
            logprobs=self._logprobs,
        )


def _release(request: Request) -> None:
    if not request.keeps_session:
        request.session.close()


def _usage(request: Request, state: _State) -> Usage:
    return Usage(
        num_prompt_tokens=len(request.prompt_ids),
        num_completion_tokens=len(state.sampled),
        num_cached_tokens=state.num_cached,
    )


def _events(request: Request, state: _State, decoder: ReplyDecoder) -> Generator[Event, None, None]:
    """All events of a request, from Start to Done."""
    try:
        yield Start(len(request.prompt_ids))
        for event in _drawn(request, state, decoder):
            state.events.append(event)
            if isinstance(event, Done):
                state.reason = event.reason  # the parser knows about tool calls
            yield event
    finally:
        _release(request)


def _drawn(request: Request, state: _State, decoder: ReplyDecoder) -> Iterator[Event]:
    unread = request.session.rewind(request.prompt_ids)
    state.num_cached = request.session.context_length
    reason: FinishReason = "length"
    for token in request.session.stream(unread, request.params, stop_ids=request.stop_ids, progress=request.progress):
        state.sampled.append(token)
        if token.token_id in request.stop_ids:
            reason = "stop"
            break
        yield from decoder.push(token.token_id)
        if decoder.stopped:
            break
    yield from decoder.finish(reason, _usage(request, state))


def _text(request: Request, state: _State) -> Generator[str, None, None]:
    events = _events(request, state, ReplyDecoder(request.tokenizer, None, request.params.stop))
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Text):
                yield event.text
