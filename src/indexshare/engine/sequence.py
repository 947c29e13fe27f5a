"""A request to the serving engine, what comes back step by step, and where the engine is with it. No torch here."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from indexshare.engine.pages import PrefixMatch, page_key, root_key
from indexshare.engine.sampler import SampledToken, SamplingParams

if TYPE_CHECKING:
    from indexshare.engine.guide import Guide

Ended = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generation:
    """One request to the engine.

    stop_ids: tokens that end it; a stop token is the last one reported. tenant: tenants share the machine fairly.
    scope: cached prefixes are shared within one scope only. guide: decides which token may come next, if anything does.
    drafts: whether the MTP layer may guess ahead; a request that draws (temperature above 0) from a seed of its own
    must not, so that its draws are those of plain decoding. scores_prompt: report log-probabilities of the prompt's
    tokens (then nothing of it is reused); draws_nothing: and end there. wants_selection: report what was attended to.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    tenant: str = ""
    scope: str = ""
    guide: "Guide | None" = None
    drafts: bool = True
    scores_prompt: bool = False
    draws_nothing: bool = False
    wants_selection: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one step gave a request. The first one says how much of the prompt was cached; the last one has `ended`.

    tokens: drawn ones. prompt_tokens: log-probabilities of prompt tokens, in order, over all outputs. selections: for
    each token in `tokens`, positions [k] by layer that owns an indexer (None: all), if asked for. error: why it failed.
    """

    generation: Generation
    tokens: tuple[SampledToken, ...] = ()
    ended: Ended | None = None
    num_cached_tokens: int = 0
    prompt_tokens: tuple[SampledToken, ...] = ()
    selections: tuple[dict[int, Any], ...] = ()
    error: str | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request that runs or waits. num_valid <= num_computed < len(token_ids) whenever it may go on.

    token_ids: prompt and drawn tokens. num_computed: tokens in the cache. num_valid: of these, tokens whose rows are
    complete, the MTP layer's too. pages: in order. keys: of the known pages among them, after that of the scope.
    prompt_keys: of the pages of its tokens, as far as they were looked up. awaited_page: the one of them that it waits
    for, because it is being computed for another sequence.
    """

    generation: Generation
    token_ids: list[int]
    arrival: int = 0
    num_computed: int = 0
    num_valid: int = 0
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    prompt_keys: list[bytes] = field(default_factory=list)
    awaited_page: int | None = None
    num_preempted: int = 0
    state: Any = None  # the runner's

    @classmethod
    def of(cls, generation: Generation, arrival: int) -> "Sequence":
        return cls(
            generation=generation,
            token_ids=list(generation.prompt_ids),
            arrival=arrival,
            keys=[root_key(generation.scope)],
        )

    @property
    def num_unread(self) -> int:
        """Tokens that are not in the cache: 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_drawn(self) -> int:
        return len(self.token_ids) - len(self.generation.prompt_ids)

    @property
    def num_left(self) -> int:
        """Tokens that may still be drawn."""
        return self.generation.params.max_new_tokens - self.num_drawn

    def prompt_key(self, index: int, page_size: int) -> bytes | None:
        """The key of its page `index`, None when its tokens do not fill that one."""
        if (index + 1) * page_size >= len(self.token_ids):
            return None
        while len(self.prompt_keys) <= index:
            begin = len(self.prompt_keys) * page_size
            parent = self.prompt_keys[-1] if self.prompt_keys else root_key(self.generation.scope)
            self.prompt_keys.append(page_key(parent, self.token_ids[begin : begin + page_size + 1]))
        return self.prompt_keys[index]

    def begin(self, match: PrefixMatch, page_size: int) -> None:
        """Start from a cached prefix."""
        assert not self.pages and self.num_computed == 0, "it has begun already"
        self.pages = [cached.page for cached in match.pages]
        self.keys = [self.keys[0], *(cached.key for cached in match.pages)]
        self.num_computed = self.num_valid = len(match.pages) * page_size + match.num_partial

    def tokens_of_page(self, index: int, page_size: int) -> Tokens[int]:
        """The tokens of its page `index`, as far as it is valid, and the one after them."""
        return self.token_ids[index * page_size : min((index + 1) * page_size, self.num_valid) + 1]
