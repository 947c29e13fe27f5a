"""Drawn tokens to what the caller sees: text, or events, with stop texts held back; and the prompt they answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from indexshare.chat.parser import EventParser
from indexshare.chat.template import ChatTemplate, Conversation, encode_chat
from indexshare.chat.tokenizer import StreamDecoder, Tokenizer
from indexshare.chat.types import Done, Event, FinishReason, Text, Usage
from indexshare.engine.stops import StopFilter


class ReplyDecoder:
    """`push` tokens as they are drawn, without the stop token, then `finish` once.

    parser: makes events of a chat reply; None for a plain text, which is Text events only. stops: stop texts; they end
    the answer, not the reasoning, and then `stopped` is set. The events do not depend on how tokens are grouped.
    """

    def __init__(self, tokenizer: Tokenizer, parser: EventParser | None, stops: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._parser = parser
        self._stops = StopFilter(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come: nothing more is wanted."""
        return self._stops.stopped

    def push(self, *token_ids: int) -> list[Event]:
        """The events that become certain with these tokens."""
        return self._parse(self._decoder.push(*token_ids))

    def finish(self, reason: FinishReason, usage: Usage) -> list[Event]:
        """The remaining events, ending with Done. Reason "stop" becomes "tool_calls" after tool calls."""
        events = [] if self.stopped else self._parse(self._decoder.finish())
        if self.stopped:
            return [*events, Done("stop", usage, self._stops.found)]
        if self._parser is not None:
            events += self._until_stop(self._parser.finish(reason, usage))
        else:
            events += self._until_stop([Done(reason, usage)])
        return events if not self.stopped else [*events, Done("stop", usage, self._stops.found)]

    def _parse(self, text: str) -> list[Event]:
        if not text or self.stopped:
            return []
        return self._until_stop(self._parser.feed(text) if self._parser is not None else [Text(text)])

    def _until_stop(self, events: Sequence[Event]) -> list[Event]:
        """Text is held back while it may become a stop text; nothing is let through after one."""
        passed: list[Event] = []
        for event in events:
            if text := self._stops.push(event.text) if isinstance(event, Text) else self._stops.finish():
                passed.append(Text(text))
            if self.stopped:
                break
            if not isinstance(event, Text):
                passed.append(event)
        return passed


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation as the model reads it. is_thinking: the reply begins inside its reasoning."""

    token_ids: list[int]
    parser: EventParser
    is_thinking: bool


def chat_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Conversation,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_effort: str | None = None,
    enable_thinking: bool = True,
    clear_thinking: bool = True,
) -> ChatPrompt:
    """Render and encode a conversation, with the parser for its reply. Errors as for `encode_chat`."""
    token_ids = encode_chat(
        tokenizer,
        template,
        messages,
        tools=tools,
        reasoning_effort=reasoning_effort,
        enable_thinking=enable_thinking,
        clear_thinking=clear_thinking,
    )
    is_thinking = token_ids[-1:] == [tokenizer.control_ids.get("<think>")]
    # ids are unique in the conversation, and the same for the same request
    parser = EventParser(tools, thinking=is_thinking, id_prefix=f"call_{len(messages)}_")
    return ChatPrompt(token_ids=token_ids, parser=parser, is_thinking=is_thinking)
