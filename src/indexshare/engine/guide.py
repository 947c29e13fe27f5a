"""Which tokens may come next: one request's state between two forward passes.

A `Guide` joins three rules: a budget of reasoning tokens, a grammar for the answer, and tokens that must not come. Make
one with `indexshare.engine.grammar`. The event parser reads text, not tokens, so a guide also keeps plain tokens from
spelling a tag that would mislead it: "</think>" inside the reasoning, "</arg_value>" inside an argument, "<tool_call>"
in a constrained answer. What a grammar asks for in plain text can therefore hold none of these.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.sampler import check_integer
from indexshare.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Allowed = Tensor | int
"""The tokens that may come: bool [vocab] on the CPU with at least one True, or the id of the only one."""

MAX_THINKING_BUDGET = 2**31 - 1
_MAX_ERROR_CHARS = 300


def constrain(logits: Tensor, allowed: Allowed | None) -> Tensor:
    """logits [..., vocab] with -inf wherever a token may not come; the input itself when anything may (None)."""
    if allowed is None:
        return logits
    if isinstance(allowed, int):
        forced = torch.full_like(logits, -torch.inf)
        forced[..., allowed] = logits[..., allowed]
        return forced
    return logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def matcher_error(matcher: "LLMatcher") -> str:
    """What went wrong in a matcher, short enough for an error message; "" when nothing did."""
    text = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return re.split(r"\n\s*\d+ \| ", text)[0][:_MAX_ERROR_CHARS]  # without the excerpt of our own grammar


class Vocabulary:
    """What guides need to know about a model's tokens; shared by all of its guides.

    size: width of the logits [vocab], which may exceed the tokenizer's vocabulary; ids beyond that are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.size = size
        self.tokenizer = tokenizer
        self.control_ids = frozenset(tokenizer.control_ids.values())
        self.think_end = tokenizer.control_ids.get("</think>")
        self.tool_call_ids = frozenset(i for name, i in tokenizer.control_ids.items() if name == "<tool_call>")
        self.argument_value = tokenizer.control_ids.get("<arg_value>")
        # Tokens that open roles or end the text. The request's stop tokens, which are among them, come only at the end.
        self.hidden_ids = tokenizer.hidden_ids.union(tokenizer.stop_ids)
        # Every tag ends with ">"; few tokens of a vocabulary hold one.
        texts = ((token_id, tokenizer.token_bytes(token_id)) for token_id in range(min(size, tokenizer.vocab_size)))
        self._with_angle = [(i, text) for i, text in texts if b">" in text and i not in self.control_ids]
        self.finishing = cache(self._finishing)

    def mask(self, *, without: Collection[int] = ()) -> Tensor:
        """All of the tokenizer's tokens but some, as bool [vocab]."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[: self.tokenizer.vocab_size] = True
        mask[list(without)] = False
        return mask

    def only(self, ids: Collection[int]) -> Tensor:
        """bool [vocab] with these ids."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[list(ids)] = True
        return mask

    def _finishing(self, tag: str, num_written: int) -> Tensor:
        """Ids of the plain tokens that finish spelling `tag` when its first `num_written` bytes stand there already."""
        name = tag.encode()
        ids = [token_id for token_id, text in self._with_angle if text.startswith(name[num_written:]) or name in text]
        return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What an accepted token changed. control: the last control token up to here, -1 before the first."""

    token_id: int
    control: int
    in_matcher: bool


class Guide:
    """One request's rules and where it stands in them. Not thread-safe; belongs to the engine thread.

    matcher: a fresh matcher of the answer's grammar, or None for a free answer. may_call: whether a free answer may
    hold tool calls. stop_ids: what ends the reply: with a grammar they come when it is complete, and not before.
    thinking: the prompt ended with `<think>`; all rules for the answer start after the control token `</think>`.
    thinking_budget: tokens of reasoning after which only `</think>` may come; needs `thinking` to have an effect.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        matcher: "LLMatcher | None",
        *,
        stop_ids: Sequence[int],
        thinking: bool = False,
        thinking_budget: int | None = None,
        may_call: bool = True,
    ) -> None:
        if matcher is not None and not stop_ids:
            raise RequestError("a constrained reply needs at least one stop token: its grammar could never end")
        if any(not 0 <= token_id < vocabulary.size for token_id in stop_ids):
            raise RequestError(f"stop token ids must lie in [0, {vocabulary.size}), not {list(stop_ids)[:16]}")
        if thinking_budget is not None:
            check_integer("thinking_budget", thinking_budget, 0, MAX_THINKING_BUDGET)
        if thinking and vocabulary.think_end is None:
            raise RequestError("this tokenizer has no control token '</think>': turn thinking off")
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._unused_matcher = None if matcher is None else matcher.deep_copy()
        self._budget = thinking_budget
        self._stop_ids = frozenset(stop_ids)
        self._stops = vocabulary.only(stop_ids)
        self._steps: list[_Step] = []
        self._answer_start: int | None = None if thinking else 0  # in _steps
        self._constrained = matcher is not None or not may_call
        calls = vocabulary.tool_call_ids if self._constrained else frozenset()
        # An answer is still owed while a grammar waits: the reasoning must then neither end the reply nor hold calls.
        ends = frozenset((*vocabulary.hidden_ids, *stop_ids))
        owed = ends if matcher is not None else frozenset()
        self._in_reasoning = vocabulary.mask(without=owed | calls) if owed | calls else None
        self._in_free_answer = vocabulary.mask(without=calls) if calls else None
        # Whatever a client's own grammar names: no token that opens a role, no early stop.
        self._in_grammar = vocabulary.mask(without=ends)

    def allowed(self) -> Allowed | None:
        """What may come next; None for anything.

        Raises RequestError when the grammar has run into a limit, or into a place where it allows no token.
        """
        vocabulary = self._vocabulary
        if self._answer_start is None:
            assert vocabulary.think_end is not None
            if self._budget is not None and len(self._steps) >= self._budget:
                return vocabulary.think_end
            tags = ("</think>", "<tool_call>") if self._constrained else ("</think>",)
            return self._unspelled(self._in_reasoning, tags)
        if self._steps and self._steps[-1].token_id in self._stop_ids:
            return self._stops
        if not self._constrained:
            return None
        in_value = bool(self._steps) and self._steps[-1].control == vocabulary.argument_value
        tags = ("</arg_value>",) if in_value else ("<tool_call>",)
        if self._matcher is None:
            return self._unspelled(self._in_free_answer, ("<tool_call>",))
        mask = self._unspelled(self._grammar_mask(self._matcher), tags)
        assert mask is not None
        num_allowed = int(mask.count_nonzero())
        if num_allowed == 0:
            raise RequestError(
                "the grammar allows no token here: it asks for a control token that is not permitted, "
                f"or for the text {tags[0]!r}"
            )
        return mask if num_allowed > 1 else int(mask.nonzero()[0])

    def accept(self, token_id: int) -> None:
        """The token was drawn, or drafted. RequestError when the grammar cannot go on with it."""
        in_matcher = self._answer_start is not None and self._matcher is not None and token_id not in self._stop_ids
        if in_matcher and self._matcher is not None and not self._matcher.consume_token(token_id):
            raise RequestError(f"the grammar cannot go on: {matcher_error(self._matcher)}")
        last = self._steps[-1].control if self._steps else -1
        control = token_id if token_id in self._vocabulary.control_ids else last
        self._steps.append(_Step(token_id=token_id, control=control, in_matcher=in_matcher))
        if self._answer_start is None and token_id == self._vocabulary.think_end:
            self._answer_start = len(self._steps)

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens accepted; 0 is allowed."""
        keep = len(self._steps) - num_tokens
        assert 0 <= keep <= len(self._steps), "cannot forget more tokens than were accepted"
        num_in_matcher = sum(step.in_matcher for step in self._steps[keep:])
        del self._steps[keep:]
        if self._matcher is not None and self._matcher.is_error():
            self._replay()
        elif num_in_matcher and self._matcher is not None and not self._matcher.rollback(num_in_matcher):
            raise RequestError(f"the grammar cannot go back: {matcher_error(self._matcher)}")
        if self._answer_start is not None and self._answer_start > keep:
            self._answer_start = None

    def _replay(self) -> None:
        """A matcher that has failed stays so: begin again with what is left, since guesses may fail."""
        assert self._unused_matcher is not None
        self._matcher = self._unused_matcher.deep_copy()
        token_ids = [step.token_id for step in self._steps if step.in_matcher]
        if token_ids and not self._matcher.consume_tokens(token_ids):
            raise RequestError(f"the grammar cannot go back: {matcher_error(self._matcher)}")

    def _grammar_mask(self, matcher: "LLMatcher") -> Tensor:
        """bool [vocab]: how the grammar goes on, and the stop tokens where it is complete."""
        packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        complete = matcher.is_accepting()
        if matcher.is_error():  # the mask would allow the end
            raise RequestError(f"the grammar is too complex to go on: {matcher_error(matcher)}")
        bits = np.unpackbits(packed, count=min(8 * len(packed), self._vocabulary.size), bitorder="little")
        mask = self._in_grammar.clone()
        mask[: len(bits)] &= torch.from_numpy(bits.view(np.bool_))
        return mask.logical_or_(self._stops) if complete else mask

    def _unspelled(self, mask: Tensor | None, tags: Sequence[str]) -> Tensor | None:
        """The mask without the plain tokens that would finish spelling one of the tags."""
        for tag in tags:
            ids = self._vocabulary.finishing(tag, self._num_written(tag.encode()))
            if len(ids):
                mask = self._vocabulary.mask() if mask is None else mask.clone()
                mask[ids] = False
        return mask

    def _num_written(self, name: bytes) -> int:
        """How many bytes of `name` the plain text of the reply so far ends with, fewer than all."""
        tail = b""
        for step in reversed(self._steps):
            if len(tail) >= len(name) or step.token_id in self._vocabulary.control_ids:
                break
            tail = self._vocabulary.tokenizer.token_bytes(step.token_id) + tail
        return next(length for length in range(len(name) - 1, -1, -1) if tail.endswith(name[:length]))
