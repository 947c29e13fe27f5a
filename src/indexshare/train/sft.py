"""Supervised fine-tuning on conversations: which tokens are learned, and rows of whole conversations.

Learned is what the model would have to write: reasoning and the `</think>` after it, content, tool calls and the token
that ends the turn. Prompts, tool results, `<|assistant|>` and the opening `<think>` are not (facts of GLM's
fine-tuning). The whole conversation is rendered once; text cannot become a control token (`chat.template.encode_chat`),
so control tokens alone say where a turn begins and ends, and the tokens are those the engine would read and write.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexshare.chat.template import ChatTemplate, encode_chat
from indexshare.chat.tokenizer import STOP_TOKENS, Tokenizer
from indexshare.data.chats import Conversation, read_chats
from indexshare.data.rows import IGNORED, Batch
from indexshare.errors import TrainingError

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SftOptions:
    """sources: files and folders of chats, one a line. enable_thinking: as the template's variable; not for chats
    without reasoning.

    clear_thinking: leave out the reasoning of earlier turns, which then learn to answer without it; by default all is
    kept ("preserved thinking"), so that every turn is learned as it was written.
    """

    sources: str
    enable_thinking: bool = True
    clear_thinking: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A conversation as tokens [n]; is_learned [n]: whether a token is a target."""

    token_ids: NDArray[np.int32]
    is_learned: NDArray[np.bool_]


def encode_example(
    conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate, options: SftOptions
) -> Example:
    """Render a conversation and mark what is learned.

    A conversation that ends with the assistant is closed by the token that the engine stops at: `<|observation|>` after
    a tool call, else `<|endoftext|>`. Errors as for `encode_chat`.
    """
    token_ids = encode_chat(
        tokenizer,
        template,
        conversation.messages,
        tools=conversation.tools or None,
        enable_thinking=options.enable_thinking,
        clear_thinking=options.clear_thinking,
        add_generation_prompt=False,
    )
    if conversation.messages[-1].role == "assistant":
        calls = bool(conversation.messages[-1].tool_calls)
        token_ids.append(tokenizer.control_id("<|observation|>" if calls else "<|endoftext|>"))
    return Example(
        token_ids=np.asarray(token_ids, dtype=np.int32), is_learned=np.asarray(learned_tokens(token_ids, tokenizer))
    )


def learned_tokens(token_ids: Sequence[int], tokenizer: Tokenizer) -> list[bool]:
    """Which tokens of a rendered conversation are learned [n].

    A `</think>` directly after `<think>` is the template's, who leaves reasoning out: not learned. Nor is a
    `<|system|>` after a turn: no engine stops at it.
    """
    control = tokenizer.control_ids
    assistant, opening, closing = (control.get(name) for name in ("<|assistant|>", "<think>", "</think>"))
    roles = {control[name] for name in ROLE_TOKENS if name in control}
    stops = {control[name] for name in STOP_TOKENS if name in control}
    learned = [False] * len(token_ids)
    in_turn = False
    previous: list[int | None] = [None, None]
    for index, token in enumerate(token_ids):
        begins = previous[1] == assistant and token == opening
        is_empty = previous == [assistant, opening] and token == closing
        if token in stops or token in roles:
            learned[index] = in_turn and token in stops
            in_turn = token == assistant
        else:
            learned[index] = in_turn and not begins and not is_empty
        previous = [previous[1], token]
    return learned


class ChatRows:
    """Conversations packed into rows of at most `length` tokens, whole ones only; batches as `data.rows.TokenRows`.

    divisor: of the width of every batch, and of `length`: as many processes share the tokens of a row.
    num_left_out: conversations that are longer than a row. Everything is a pure function of the seed.
    """

    def __init__(
        self, examples: Iterable[Example], *, length: int, pad_id: int, seed: int = 0, divisor: int = 1
    ) -> None:
        every = list(examples)
        self._examples = [example for example in every if len(example.token_ids) <= length + 1]
        self.num_left_out = len(every) - len(self._examples)
        if not self._examples:
            raise TrainingError(
                f"none of {len(every):,} conversations fits a row of {length:,} tokens: raise sequence_length"
            )
        self.length, self.seed, self._pad_id, self._divisor = length, seed, pad_id, divisor
        # the last token of a conversation is a target only
        self._rows = pack([len(example.token_ids) - 1 for example in self._examples], length)
        self.num_rows = len(self._rows)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @classmethod
    def from_files(
        cls,
        options: SftOptions,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        length: int,
        seed: int = 0,
        divisor: int = 1,
    ) -> "ChatRows":
        """Rows of the conversations of `options.sources`, rendered here and held in memory.

        Raises TrainingError for sources that cannot be read, when no conversation fits, and when thinking is on and
        none of them has reasoning: a prompt would then end in `<think>`, and the model had not learned to close it.
        """
        examples = (
            encode_example(conversation, tokenizer, template, options)
            for conversation in read_chats(options.sources.split("\n"))
        )
        pad_id = tokenizer.control_id("<|endoftext|>")
        rows = cls(examples, length=length, pad_id=pad_id, seed=seed, divisor=divisor)
        closing = tokenizer.control_ids.get("</think>")
        if options.enable_thinking and not any(
            closing in example.token_ids[example.is_learned] for example in rows._examples
        ):
            raise TrainingError(
                "no conversation has reasoning that is learned, and the model would not learn to end it: set"
                " enable_thinking = false in [data], or give chats with reasoning_content"
            )
        return rows

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of step `step` (0, 1, ...), each row once an epoch.

        Rows are as long as the fullest of them, rounded up to a multiple of the divisor; what is left of each is
        padding, a segment of its own.
        """
        rows = [self._rows[self._row(step * batch_size + index)] for index in range(batch_size)]
        fullest = max(sum(len(self._examples[index].token_ids) - 1 for index in row) for row in rows)
        width = -(-fullest // self._divisor) * self._divisor
        token_ids = np.full((batch_size, width), self._pad_id, dtype=np.int64)
        targets = np.full((batch_size, width), IGNORED, dtype=np.int64)
        positions = np.zeros((batch_size, width), dtype=np.int64)
        starts: list[int] = []
        for place, row in enumerate(rows):
            begin = 0
            for index in row:
                example = self._examples[index]
                end = begin + len(example.token_ids) - 1
                token_ids[place, begin:end] = example.token_ids[:-1]
                targets[place, begin:end] = np.where(example.is_learned[1:], example.token_ids[1:], IGNORED)
                positions[place, begin:end] = np.arange(end - begin)
                starts.append(place * width + begin)
                begin = end
            if begin < width:
                positions[place, begin:] = np.arange(width - begin)
                starts.append(place * width + begin)
        return Batch(
            token_ids=token_ids,
            targets=targets,
            loss_weights=(targets != IGNORED).astype(np.float32),
            positions=positions,
            segment_starts=(*starts, batch_size * width),
        )

    def _row(self, index: int) -> int:
        epoch, place = divmod(index, self.num_rows)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return int(self._order[1][place])


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths`, none above `capacity`, in groups of at most `capacity` together."""
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, group), ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        left, group = room.pop(place) if place < len(room) else (capacity, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(index)
        bisect.insort(room, (left - lengths[index], group))
    return groups
