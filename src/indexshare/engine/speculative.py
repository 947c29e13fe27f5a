"""Speculative decoding with the MTP layer: a cheap layer guesses a few tokens, the model reads them all at once.

What is accepted follows exactly the distribution of plain decoding (rejection sampling, arXiv 2211.17192); greedily
drawn tokens are those of plain decoding, one by one (where rounding to bfloat16 makes a near tie, it may break it
another way). Drafting as GLM-5.2 was trained for it:

    position i of the MTP layer reads (hidden state of token i after the final norm, embedding of token i + 1)
    verified tokens write its keys and run its own indexer; the last of them, the anchor, gives the first draft
    later drafts only query, with the anchor's keys and selection: they see neither themselves nor other drafts
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from indexshare.engine.cache import PagedCache
from indexshare.engine.sampler import SampledToken, Sampler, SamplingParams, check_integer, draw
from indexshare.engine.session import Progress, Session
from indexshare.errors import RequestError
from indexshare.model.batch import Selection, Trace
from indexshare.model.glm import GlmForCausalLM

DEFAULT_NUM_DRAFT_TOKENS = 3
MAX_DRAFT_TOKENS = 64


def accept_draft(
    target_probabilities: Tensor, draft_probabilities: Tensor, draft_ids: Sequence[int], generator: torch.Generator
) -> tuple[int, int]:
    """How many drafted tokens stay, and the token after them.

    target_probabilities: [n + 1, vocab]; row j is p after the first j drafted tokens. draft_probabilities: [n, vocab];
    token j was drawn from row j, q. It stays with probability min(1, p / q); the first that does not is replaced by a
    draw from max(p - q, 0), normalised; when all stay, the last row of p gives one more token. So every token follows
    p, and token j stays with probability 1 - TV(p, q). Greedy decoding is the case of one-hot rows.
    """
    for j, token_id in enumerate(draft_ids):
        p, q = target_probabilities[j].double(), draft_probabilities[j].double()
        uniform = torch.rand((), dtype=torch.float64, generator=generator)
        if float(uniform * q[token_id]) >= float(p[token_id]):
            missing = (p - q).clamp_(min=0.0)
            # A rejection means that p is above q elsewhere, unless they differ by rounding only.
            return j, draw(missing if float(missing.sum()) > 0.0 else p, generator)
    return len(draft_ids), draw(target_probabilities[-1].double(), generator)


@dataclass(slots=True)
class DraftStatistics:
    """drafted[j], accepted[j]: how many tokens were guessed j + 1 steps ahead, and how many of them stayed."""

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Count one verification."""
        more = [0] * (num_drafted - len(self.drafted))
        self.drafted += more
        self.accepted += more
        for j in range(num_drafted):
            self.drafted[j] += 1
            self.accepted[j] += j < num_accepted


class SpeculativeSession(Session):
    """A session that drafts `num_draft_tokens` tokens, 1 to 64, for each forward pass of the model.

    The cache holds the MTP layer too (`with_mtp=True`); its rows are written while tokens are read.
    statistics: over everything this session has drafted. Raises RequestError when the model has no MTP layer.
    """

    def __init__(
        self,
        model: GlmForCausalLM,
        cache: PagedCache,
        *,
        attention: Literal["sparse", "dense"] = "sparse",
        num_draft_tokens: int = DEFAULT_NUM_DRAFT_TOKENS,
    ) -> None:
        super().__init__(model, cache, attention=attention)
        check_integer("num_draft_tokens", num_draft_tokens, 1, MAX_DRAFT_TOKENS)
        if model.config.num_nextn_predict_layers == 0:
            raise RequestError("this model has no MTP layer to draft with: decode without drafts (num_draft_tokens 0)")
        assert len(cache.view().latents) == model.config.num_layers_with_mtp, "the cache needs the MTP layer's pools"
        self.num_draft_tokens = num_draft_tokens
        self.statistics = DraftStatistics()
        # The MTP layer's rows lag behind: row i needs token i + 1. Rows below _waiting_from are written; _waiting
        # [m, hidden_size] holds the hidden states of the m tokens from there on.
        self._nothing = model.model.embed_tokens.weight.new_empty(0, model.config.hidden_size)
        self._waiting = self._nothing
        self._waiting_from = 0

    def stream(
        self,
        token_ids: Sequence[int] | Tensor,
        params: SamplingParams,
        *,
        stop_ids: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> Iterator[SampledToken]:
        """As `Session.stream`: greedy tokens are the same, drawn ones have the same distribution (not the same draws).

        Between two tokens the session is as plain decoding would leave it, although more may have been verified.
        """
        tokens = self._checked(token_ids, num_more=params.max_new_tokens - 1)
        self._reserve(self.context_length + len(tokens) + params.max_new_tokens - 1)
        logits = self.prefill(tokens, progress=progress)
        sampler = Sampler(params, prompt_ids=self._token_ids)
        token = sampler.next(logits)
        verified: list[tuple[SampledToken, Tensor]] = []  # tokens to come, each with the logits it was drawn from
        for num_left in range(params.max_new_tokens - 1, -1, -1):
            yield token
            if token.token_id in stop_ids or num_left == 0:
                return
            if not verified:
                verified = self._decode_ahead(token.token_id, sampler, min(self.num_draft_tokens, num_left - 1))
            self._token_ids.append(token.token_id)
            token, self._last_logits = verified.pop(0)

    def _decode_ahead(
        self, token_id: int, sampler: Sampler, num_draft_tokens: int
    ) -> list[tuple[SampledToken, Tensor]]:
        """Read the drawn token and drafts after it in one pass: the accepted tokens and one more.

        `token_ids` does not change: the caller appends what it has handed out. Rows of rejected tokens are overwritten.
        """
        draft_ids, draft_probabilities = self._draft(token_id, sampler, num_draft_tokens)
        hidden, _ = super()._forward((token_id, *draft_ids))
        logits = self._logits(hidden)
        target = torch.stack([sampler.probabilities(row, ahead=draft_ids[:j]) for j, row in enumerate(logits)])
        num_accepted, next_id = accept_draft(target, draft_probabilities, draft_ids, sampler.generator)
        self.statistics.add(len(draft_ids), num_accepted)
        self._waiting = torch.cat((self._waiting, hidden[: num_accepted + 1]))
        emitted = (*draft_ids[:num_accepted], next_id)
        return [(sampler.record(drawn, row), row) for drawn, row in zip(emitted, logits, strict=False)]

    @torch.inference_mode()
    def _draft(self, token_id: int, sampler: Sampler, num_draft_tokens: int) -> tuple[list[int], Tensor]:
        """Guess the tokens after `token_id`, itself the token after those in the cache: ids, and rows q [n, vocab]."""
        hidden, selected = self._write(self._waiting_hidden(), (token_id,))
        self._waiting, self._waiting_from = self._nothing, self.context_length
        anchor = self.context_length - 1
        batch = replace(self._batch((token_id,), anchor), query_only=True)
        draft_ids: list[int] = []
        rows = [torch.empty(0, self._model.config.vocab_size, dtype=torch.float64, device=hidden.device)]
        while len(draft_ids) < num_draft_tokens:
            if draft_ids:
                position = torch.tensor([anchor + len(draft_ids)], device=hidden.device)
                drafted = torch.tensor(draft_ids[-1:], device=hidden.device)
                hidden, _ = self._model.mtp(hidden, drafted, replace(batch, positions=position), selected)
            probabilities = sampler.probabilities(self._logits(hidden)[0], ahead=draft_ids)
            draft_ids.append(draw(probabilities, sampler.generator))
            rows.append(probabilities[None])
        return draft_ids, torch.cat(rows)

    @torch.inference_mode()
    def _forward(
        self, token_ids: Sequence[int], trace: Trace | None = None, *, wants_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        waiting = self._waiting_hidden()
        hidden, logits = super()._forward(token_ids, trace, wants_logits=wants_logits)
        rows = torch.cat((waiting, hidden))
        if len(rows) > 1:
            self._write(rows[:-1], token_ids)
        self._waiting, self._waiting_from = rows[-1:], self.context_length + len(token_ids) - 1
        return hidden, logits

    def _write(self, hidden: Tensor, following: Sequence[int]) -> tuple[Tensor, Selection]:
        """The MTP layer's rows from _waiting_from on; `following` are the tokens after those in the cache.

        hidden [m, hidden_size] -> what the last row predicts its draft from, [1, hidden_size], and its selection.
        """
        next_ids = [*self._token_ids[self._waiting_from :], *following][1:]
        batch = self._batch(next_ids, self._waiting_from)
        output, selected = self._model.mtp(hidden, batch.token_ids, batch)
        return output[-1:], Selection(None if selected.rows is None else selected.rows[-1:])

    def _waiting_hidden(self) -> Tensor:
        """Hidden states [m, hidden_size] from _waiting_from to the last token; that is read again if they are lost."""
        length = self.context_length
        if length > self._waiting_from:
            return self._waiting[: length - self._waiting_from]
        if length == 0:
            self._waiting, self._waiting_from = self._nothing, 0
            return self._nothing
        last = self._token_ids.pop()
        try:
            hidden, _ = super()._forward((last,))
        finally:
            self._token_ids.append(last)
        self._waiting, self._waiting_from = hidden, length - 1
        return hidden
