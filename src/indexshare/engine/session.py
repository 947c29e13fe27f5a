"""One sequence on one model: read tokens, ask for the next one, drop the tail and ask again.

A session owns the pages of its sequence. Reading is everything: a prefill reads many tokens in chunks, a decode step
reads one, and `truncate` makes it possible to read a document once and ask many questions about it.
"""

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from indexshare.engine.cache import PagedCache
from indexshare.engine.sampler import SampledToken, Sampler, SamplingParams, check_integer
from indexshare.errors import RequestError
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import ForwardBatch, Trace
from indexshare.model.glm import GlmForCausalLM

DEFAULT_CHUNK_SIZE = 512
LOGPROB_BYTES = 32 * 2**20  # logits of one tile of rows while scoring
LOGITS_CHUNK = 256  # tokens whose logits exist at once in `Session.logits`

Progress = Callable[[int, int], None]
"""progress(tokens read so far, tokens to read in this call)"""


class Session:
    """A sequence and its cache pages; close it, or use it as a context manager, to give the pages back.

    attention: "sparse" as the model was trained, or "dense" to attend to every key (the comparison).
    """

    def __init__(
        self,
        model: GlmForCausalLM,
        cache: PagedCache,
        *,
        attention: Literal["sparse", "dense"] = "sparse",
    ) -> None:
        if attention not in ("sparse", "dense"):
            raise RequestError(f'attention must be "sparse" or "dense", not {attention!r}')
        self._model = model
        self._cache = cache
        self.attention: Literal["sparse", "dense"] = attention
        self._pages: list[int] = []
        self._page_table = torch.empty(1, 0, dtype=torch.int64, device=cache.device)
        self._token_ids: list[int] = []
        self._last_logits: Tensor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def context_length(self) -> int:
        """Tokens in the cache."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens in the cache, in order."""
        return tuple(self._token_ids)

    def prefill(
        self,
        token_ids: Sequence[int] | Tensor,
        *,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        progress: Progress | None = None,
    ) -> Tensor:
        """Read tokens after those already there. Returns the logits [vocab] fp32 after the last one.

        chunk_size: tokens per forward pass; any value gives the same tokens.
        Raises RequestError for no tokens, an id outside the vocabulary or a sequence longer than the model's positions,
        MemoryLimitError when the cache is too small; the session is then as it was before.
        """
        self._read(self._checked(token_ids), None, chunk_size=chunk_size, progress=progress)
        return self._logits_now()

    def decode(self, token_id: int) -> Tensor:
        """Read one token. Returns the logits [vocab] fp32 after it."""
        return self.prefill((token_id,))

    def logprobs(
        self,
        token_ids: Sequence[int] | Tensor,
        *,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        progress: Progress | None = None,
    ) -> Tensor:
        """Read tokens and score them: log p(token | everything before it), fp32 on the CPU.

        Returns [T-1] for the first read of a session (nothing comes before its first token), else [T]. Logits exist for
        one tile of rows at a time. Arguments and errors as in `prefill`.
        """
        tokens = self._checked(token_ids)
        pieces = [torch.empty(0)]
        if self.context_length > 0:
            pieces.append(_log_probabilities(self._logits_now()[None], tokens[:1]).cpu())

        def score(hidden: Tensor, start: int) -> None:
            pieces.append(self._score(hidden, tokens[start + 1 : start + 1 + len(hidden)]).cpu())

        self._read(tokens, score, chunk_size=chunk_size, progress=progress)
        return torch.cat(pieces)

    def logits(self, token_ids: Sequence[int] | Tensor, *, chunk_size: int = LOGITS_CHUNK) -> Iterator[Tensor]:
        """Read tokens and give the logits [n, vocab] fp32 after each of them, `chunk_size` tokens at a time.

        Errors as in `prefill`, chunk by chunk.
        """
        check_integer("chunk_size", chunk_size, 1, 2**31 - 1)
        tokens = self._checked(token_ids)
        for start in range(0, len(tokens), chunk_size):
            hidden: list[Tensor] = []
            chunk = tokens[start : start + chunk_size]
            self._read(chunk, lambda read, _: hidden.append(read), chunk_size=chunk_size, progress=None)  # noqa: B023
            yield self._logits(hidden[0])

    def stream(
        self,
        token_ids: Sequence[int] | Tensor,
        params: SamplingParams,
        *,
        stop_ids: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Iterator[SampledToken]:
        """Read `token_ids`, then draw tokens one by one; a stop id is yielded and is the last one.

        Errors as in `prefill`, for prompt and output together and before anything is read. A drawn token is read when
        the next one is asked for, so the last one yielded is never in the cache.
        """
        tokens = self._checked(token_ids, num_more=params.max_new_tokens - 1)
        self._reserve(self.context_length + len(tokens) + params.max_new_tokens - 1)
        logits = self.prefill(tokens, progress=progress)
        sampler = Sampler(params, prompt_ids=self._token_ids)
        for index in range(params.max_new_tokens):
            token = sampler.next(logits)
            yield token
            if token.token_id in stop_ids or index + 1 == params.max_new_tokens:
                return
            logits = self.decode(token.token_id)

    def selected_positions(self, token_ids: Sequence[int] | Tensor) -> dict[int, Tensor | None]:
        """What each full layer's indexer selects for the last of these tokens: layer -> positions int64 [K].

        None stands for a layer that attends to everything. The tokens are read after those in the cache and forgotten
        again. Errors as in `prefill`.
        """
        tokens, length, trace = self._checked(token_ids), self.context_length, Trace()
        self._reserve(length + len(tokens))
        try:
            self._forward(tokens, trace)
        finally:
            page_table = self._page_table[0]
            self._keep_pages(length)
        order = torch.empty(self._cache.num_pages, dtype=torch.int64, device=self._cache.device)
        order[page_table] = torch.arange(len(page_table), device=self._cache.device)
        size = self._cache.page_size
        positions: dict[int, Tensor | None] = {}
        for layer, selection in trace.selections.items():
            rows = None if selection is None else selection[-1][selection[-1] >= 0].long()
            positions[layer] = None if rows is None else order[rows // size] * size + rows % size
        return positions

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens; their pages are free again."""
        check_integer("num_tokens", num_tokens, 0, self.context_length)
        if num_tokens < self.context_length:
            self._last_logits = None
        del self._token_ids[num_tokens:]
        self._keep_pages(num_tokens)

    def rewind(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Keep the common beginning of the cache and `token_ids`; returns what remains to be read, at least one token.

        A conversation that goes on, or another question about the same document, is read from where it differs.
        """
        limit = min(self.context_length, len(token_ids) - 1)
        pairs = zip(self._token_ids, token_ids[: max(limit, 0)], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.truncate(shared)
        return token_ids[shared:]

    def close(self) -> None:
        """Give all pages back. The session is empty afterwards and may be used again."""
        self.truncate(0)

    def _checked(self, token_ids: Sequence[int] | Tensor, *, num_more: int = 0) -> list[int]:
        """The tokens as plain integers, once they and `num_more` further ones can be read."""
        config = self._model.config
        try:
            tokens = [operator.index(token) for token in token_ids]
        except TypeError as error:
            raise RequestError(f"token ids must be integers: {error}") from None
        if not tokens:
            raise RequestError("there are no tokens to read: give at least one")
        if min(tokens) < 0 or max(tokens) >= config.vocab_size:
            raise RequestError(f"token ids must be from 0 to {config.vocab_size - 1} for this model")
        total = self.context_length + len(tokens) + num_more
        if total > config.max_position_embeddings:
            raise RequestError(
                f"{total:,} tokens are more than the {config.max_position_embeddings:,} positions of this model: "
                "shorten the text or ask for fewer new tokens"
            )
        return tokens

    def _keep_pages(self, num_tokens: int) -> None:
        """Free the pages that `num_tokens` tokens do not need."""
        num_kept = -(-num_tokens // self._cache.page_size)
        self._cache.free(self._pages[num_kept:])
        del self._pages[num_kept:]
        self._page_table = self._page_table[:, :num_kept]

    def _reserve(self, num_tokens: int) -> None:
        """Pages for `num_tokens` tokens in all; raises before anything has changed."""
        missing = num_tokens - len(self._pages) * self._cache.page_size
        if missing > 0:
            self._pages += self._cache.allocate(missing)
            self._page_table = torch.tensor([self._pages], dtype=torch.int64, device=self._cache.device)

    def _logits_now(self) -> Tensor:
        """Logits [vocab] after the last token in the cache, which is read again when a truncate has lost them."""
        if self._last_logits is None:
            last = self._token_ids.pop()
            try:
                _, self._last_logits = self._forward((last,), wants_logits=True)
            finally:
                self._token_ids.append(last)  # its row is written with the same numbers
        assert self._last_logits is not None
        return self._last_logits

    def _read(
        self,
        tokens: list[int],
        on_chunk: Callable[[Tensor, int], None] | None,
        *,
        chunk_size: int,
        progress: Progress | None,
    ) -> None:
        """Read tokens chunk by chunk; on_chunk(hidden [chunk, hidden_size], offset of the chunk in `tokens`).

        The logits after the last token are kept.
        """
        check_integer("chunk_size", chunk_size, 1, 2**31 - 1)
        length_before = self.context_length
        self._reserve(length_before + len(tokens))
        try:
            for start in range(0, len(tokens), chunk_size):
                chunk = tokens[start : start + chunk_size]
                hidden, self._last_logits = self._forward(chunk, wants_logits=start + chunk_size >= len(tokens))
                self._token_ids += chunk
                if on_chunk is not None:
                    on_chunk(hidden, start)
                if progress is not None:
                    progress(start + len(chunk), len(tokens))
        except BaseException:  # an interrupt in the middle of a read leaves the session as it was before it
            del self._token_ids[length_before:]
            self._keep_pages(length_before)
            self._last_logits = None
            raise

    @torch.inference_mode()
    def _forward(
        self, token_ids: Sequence[int], trace: Trace | None = None, *, wants_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [T, hidden_size] of new tokens, then in the cache, and the logits after the last one."""
        batch = self._batch(token_ids, self.context_length, trace)
        return self._model.next_logits(batch) if wants_logits else (self._model(batch), None)

    def _batch(self, token_ids: Sequence[int], position: int, trace: Trace | None = None) -> ForwardBatch:
        """Tokens at `position` and after it; the keys end with the last of them."""
        device = self._cache.device
        end = position + len(token_ids)
        layout = KeyLayout(
            sequence_starts=(0, len(token_ids)),
            context_lengths=(end,),
            page_table=self._page_table,
            page_size=self._cache.page_size,
        )
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
            positions=torch.arange(position, end, device=device),
            layout=layout,
            cache=self._cache.view(),
            attention=self.attention,
            trace=trace,
        )

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)

    def _score(self, hidden: Tensor, targets: list[int]) -> Tensor:
        """log p(targets) [n] fp32 from the first n of hidden [T, hidden_size], in tiles of rows."""
        num_rows = max(1, LOGPROB_BYTES // (4 * self._model.config.vocab_size))
        scores = [torch.empty(0, device=hidden.device)]
        for start in range(0, len(targets), num_rows):
            wanted = targets[start : start + num_rows]
            scores.append(_log_probabilities(self._logits(hidden[start : start + len(wanted)]), wanted))
        return torch.cat(scores)


def _log_probabilities(logits: Tensor, targets: list[int]) -> Tensor:
    """log p(targets) [n] fp32 from logits [n, vocab]."""
    wanted = torch.tensor(targets, device=logits.device)[:, None]
    return (logits.gather(-1, wanted) - logits.logsumexp(dim=-1, keepdim=True))[:, 0]
