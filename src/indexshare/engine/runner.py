"""Runs a plan: one forward pass over all its sequences, drafts before it, draws after it.

Logits exist only for tokens that something is drawn after. A sequence's MTP rows lag behind its other rows, because row
i reads token i + 1: the hidden states of tokens whose row is not written yet wait in the sequence's state.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from indexshare.engine.cache import PagedCache
from indexshare.engine.guide import Guide, constrain
from indexshare.engine.sampler import SampledToken, Sampler, draw
from indexshare.engine.scheduler import Plan, Work
from indexshare.engine.sequence import Sequence
from indexshare.engine.speculative import accept_draft
from indexshare.errors import IndexShareError
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import ForwardBatch, Selection, Trace
from indexshare.model.glm import GlmForCausalLM

LOGITS_BYTES = 64 * 2**20  # logits of one tile of rows
MAX_WAITING = 64  # hidden states that wait for the MTP layer while nothing is drafted


@dataclass(slots=True, eq=False)
class _State:
    """waiting: [m, hidden_size] hidden states after the final norm of the last m tokens read. num_scored: prompt tokens
    that were reported."""

    sampler: Sampler
    waiting: Tensor
    num_scored: int = 0


@dataclass(slots=True, eq=False)
class _Draft:
    """Guesses for one sequence. rows: what each was drawn from, fp64 [vocab], where that matters; allowed: what the
    guide let pass before each, and after the last."""

    token_ids: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    allowed: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a step did for one sequence. num_drafted, of which num_accepted were right. error: only this one failed."""

    work: Work
    tokens: tuple[SampledToken, ...] = ()
    num_drafted: int = 0
    num_accepted: int = 0
    prompt_tokens: tuple[SampledToken, ...] = ()
    selections: tuple[dict[int, Any], ...] = ()
    error: str | None = None


class Runner:
    """A model and its caches. with_mtp: the cache has the MTP layer's pools, and drafts can be asked for."""

    def __init__(self, model: GlmForCausalLM, cache: PagedCache, *, with_mtp: bool) -> None:
        assert not with_mtp or len(cache.view().latents) == model.config.num_layers_with_mtp
        self._model = model
        self._cache = cache
        self._with_mtp = with_mtp
        self._nothing = model.model.embed_tokens.weight.new_empty(0, model.config.hidden_size)

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Result]:
        """Read what the plan says, and draw. The sequences' tokens, counts and guides are brought up to date."""
        for item in plan.work:
            self._prepare(item.sequence)
        drafts = self._draft([item for item in plan.work if item.num_drafts > 0])
        trace = Trace() if any(item.sequence.generation.wants_selection for item in plan.work) else None
        token_ids = [_tokens(item) + drafts.get(item.sequence, _Draft()).token_ids for item in plan.work]
        batch = self._batch(
            [(item.sequence, item.sequence.num_computed, ids) for item, ids in zip(plan.work, token_ids, strict=True)],
            trace,
        )
        hidden = self._model(batch)
        spans = list(zip(batch.layout.sequence_starts, batch.layout.sequence_starts[1:], strict=False))
        # the token of the plan that something is drawn after, and the drafts behind it
        wanted = [
            range(start + item.num_tokens - 1, end) if item.draws and not item.sequence.generation.draws_nothing else ()
            for item, (start, end) in zip(plan.work, spans, strict=True)
        ]
        logits = self._logits(hidden, [row for rows in wanted for row in rows])
        results, used = [], 0
        for item, (start, _), rows in zip(plan.work, spans, wanted, strict=True):
            own, used = logits[used : used + len(rows)], used + len(rows)
            draft = drafts.get(item.sequence, _Draft())
            try:
                tokens = self._choose(item, draft, own)
                scores = self._score_prompt(item, hidden[start : start + item.num_tokens])
                results.append(
                    Result(
                        work=item,
                        tokens=tokens,
                        num_drafted=len(draft.token_ids),
                        num_accepted=max(0, len(tokens) - 1),
                        prompt_tokens=scores,
                        selections=self._selections(item, trace, rows[: len(tokens)]),
                    )
                )
            except IndexShareError as error:  # of this request alone: its grammar, its logits
                results.append(Result(work=item, error=str(error)))
                continue
            self._commit(item, tokens, hidden[start:])
        if self._with_mtp:
            waiting = [item.sequence for item in plan.work if len(item.sequence.state.waiting) > MAX_WAITING]
            self._write_mtp(waiting, keep=1)  # the last one gives the first guess
        return results

    def complete(self, sequence: Sequence) -> None:
        """Write the MTP rows that can be written, before a sequence ends."""
        end = min(sequence.num_computed, len(sequence.token_ids) - 1)  # a row needs the token after it
        if self._with_mtp and sequence.state is not None and sequence.num_valid < end:
            self._write_mtp([sequence])

    def expert_tokens(self) -> dict[int, list[int]]:
        """Tokens that each expert has computed, by layer; only the C++ kernels count."""
        stacks = [stack.packed for stack in (self._model.stack, self._model.mtp_stack) if stack is not None]
        return {
            layer: counts.tolist()
            for packed in stacks
            if packed is not None
            for layer, counts in packed.expert_tokens.items()
        }

    def _prepare(self, sequence: Sequence) -> None:
        if sequence.state is None:
            generation = sequence.generation
            sequence.state = _State(Sampler(generation.params, prompt_ids=generation.prompt_ids), self._nothing)
        if sequence.num_valid == sequence.num_computed:
            sequence.state.waiting = self._nothing  # also after it was preempted

    def _batch(self, reads: Items[tuple[Sequence, int, Items[int]]], trace: Trace | None = None) -> ForwardBatch:
        """Of each sequence: tokens to read and the position of the first; keys end with the last of them."""
        lengths = [start + len(ids) for _, start, ids in reads]
        width = max(-(-length // self._cache.page_size) for length in lengths)
        table = torch.zeros(len(reads), width, dtype=torch.int64)
        starts = [0]
        for row, (sequence, _, ids) in enumerate(reads):
            pages = sequence.pages[:width]
            table[row, : len(pages)] = torch.tensor(pages)
            starts.append(starts[-1] + len(ids))
        device = self._cache.device
        positions = [torch.arange(start, start + len(ids)) for _, start, ids in reads]
        return ForwardBatch(
            token_ids=torch.tensor([token for _, _, ids in reads for token in ids]).to(device),
            positions=torch.cat(positions).to(device),
            layout=KeyLayout(
                sequence_starts=tuple(starts),
                context_lengths=tuple(lengths),
                page_table=table.to(device),
                page_size=self._cache.page_size,
            ),
            cache=self._cache.view(),
            trace=trace,
        )

    def _logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """fp32 [rows, vocab], in the CPU's memory, where they are drawn from."""
        if not rows:
            return torch.empty(0, self._model.config.vocab_size)
        chosen = hidden[torch.tensor(rows, dtype=torch.int64, device=hidden.device)]
        tile = max(1, LOGITS_BYTES // (4 * self._model.config.vocab_size))
        return torch.cat([self._model.logits(part).cpu() for part in chosen.split(tile)])

    def _choose(self, item: Work, draft: _Draft, logits: Tensor) -> tuple[SampledToken, ...]:
        """The accepted drafts and one more token, up to a stop token, from logits [1 + drafts, vocab]."""
        if len(logits) == 0:
            return ()
        unlimited, sequence, sampler = logits, item.sequence, item.sequence.state.sampler
        guide = sequence.generation.guide
        if guide is not None:
            if not draft.allowed:
                draft.allowed.append(guide.allowed())
            guide.rollback(len(draft.token_ids))
            logits = torch.stack([constrain(row, allowed) for row, allowed in zip(logits, draft.allowed, strict=True)])
        if sampler.is_plainly_greedy:
            best = sampler.greedy(logits)
            count = next((j for j, token in enumerate(draft.token_ids) if best[j] != token), len(draft.token_ids))
            drawn = best[: count + 1]
        elif not draft.token_ids:
            drawn = [sampler.draw(logits[0])]
        else:
            target = torch.stack([sampler.probabilities(r, ahead=draft.token_ids[:j]) for j, r in enumerate(logits)])
            count, last = accept_draft(target, torch.stack(draft.rows), draft.token_ids, sampler.generator)
            drawn = [*draft.token_ids[:count], last]
        stops = sequence.generation.stop_ids
        end = next((j + 1 for j, token in enumerate(drawn) if token in stops), len(drawn))
        if guide is not None:
            for token in drawn[:end]:
                guide.accept(token)
        return tuple(sampler.record(token, row) for token, row in zip(drawn[:end], unlimited, strict=False))

    def _commit(self, item: Work, tokens: Items[SampledToken], hidden: Tensor) -> None:
        """The sequence has read its tokens and the drafts that stayed, all but the last of `tokens`."""
        sequence = item.sequence
        num_read = item.num_tokens + max(0, len(tokens) - 1)
        sequence.token_ids += [token.token_id for token in tokens]
        sequence.num_computed += num_read
        if self._with_mtp:
            sequence.state.waiting = torch.cat((sequence.state.waiting, hidden[:num_read]))
        else:
            sequence.num_valid = sequence.num_computed

    def _draft(self, items: Items[Work]) -> dict[Sequence, _Draft]:
        """Guess ahead for sequences that decode: the first from their own rows, the others by queries only."""
        drafts = {item.sequence: _Draft() for item in items}
        if not items:
            return drafts
        assert self._with_mtp, "drafts need the MTP layer's rows"
        hidden, selected = self._write_mtp([item.sequence for item in items])
        anchors = [item.sequence.num_computed - 1 for item in items]
        asking = list(range(len(items)))
        step = 0
        while asking:
            if step > 0:
                batch = self._batch(
                    [(items[i].sequence, anchors[i], [drafts[items[i].sequence].token_ids[-1]]) for i in asking]
                )
                batch = replace(batch, query_only=True, positions=batch.positions + step)
                hidden, _ = self._model.mtp(hidden, batch.token_ids, batch, selected)
            logits = self._logits(hidden, list(range(len(asking))))
            goes_on = [
                self._guess(items[i].sequence, drafts[items[i].sequence], logits[row]) for row, i in enumerate(asking)
            ]
            step += 1
            kept = [row for row, i in enumerate(asking) if goes_on[row] and items[i].num_drafts > step]
            if len(kept) < len(asking):
                chosen = torch.tensor(kept, dtype=torch.int64, device=hidden.device)
                hidden = hidden[chosen]
                selected = Selection(None if selected.rows is None else selected.rows[chosen.to(selected.rows.device)])
                asking = [asking[row] for row in kept]
        for sequence, draft in drafts.items():
            if sequence.generation.guide is not None:
                _look_ahead(sequence.generation.guide, draft)
        return drafts

    @staticmethod
    def _guess(sequence: Sequence, draft: _Draft, logits: Tensor) -> bool:
        """One more guess; False when the guide has come to an end of its own, where guessing must end too."""
        sampler, guide = sequence.state.sampler, sequence.generation.guide
        if guide is not None:
            if not _look_ahead(guide, draft):
                return False
            logits = constrain(logits, draft.allowed[-1])
        rows = []
        if sampler.is_plainly_greedy:
            token_id = sampler.greedy(logits[None])[0]
        else:
            rows = [sampler.probabilities(logits, ahead=draft.token_ids)]
            token_id = draw(rows[0], sampler.generator)
        if guide is not None:
            try:
                guide.accept(token_id)
            except IndexShareError:
                return False
        draft.rows += rows
        draft.token_ids.append(token_id)
        return True

    def _write_mtp(self, sequences: Iterable[Sequence], *, keep: int = 0) -> tuple[Tensor, Selection]:
        """Write the rows whose next token is known, all but the last `keep` of those that were read.

        Returns what the last row of each sequence predicts from, [n, hidden_size], and what it selected.
        """
        reads, rows = [], []
        for sequence in sequences:
            first = sequence.num_valid
            next_ids = sequence.token_ids[first + 1 : sequence.num_computed + 1 - keep]
            reads.append((sequence, first, next_ids))
            rows.append(sequence.state.waiting[: len(next_ids)])
            sequence.state.waiting = sequence.state.waiting[len(next_ids) :]
            sequence.num_valid = first + len(next_ids)
        if not reads:
            return self._nothing, Selection(None)
        batch = self._batch(reads)
        hidden, selected = self._model.mtp(torch.cat(rows), batch.token_ids, batch)
        last = torch.tensor(batch.layout.sequence_starts[1:]) - 1
        return hidden[last.to(hidden.device)], Selection(None if selected.rows is None else selected.rows[last])

    def _score_prompt(self, item: Work, hidden: Tensor) -> tuple[SampledToken, ...]:
        """Log-probabilities of the prompt's tokens after those just read."""
        generation, first = item.sequence.generation, item.sequence.num_computed
        if not generation.scores_prompt or first >= len(generation.prompt_ids):
            return ()
        state = item.sequence.state
        scores = [SampledToken(token_id=generation.prompt_ids[0])] if state.num_scored == 0 else []
        skipped = max(0, state.num_scored - first - 1)  # reported before it was preempted
        targets = generation.prompt_ids[first + 1 + skipped : first + 1 + item.num_tokens]
        hidden = hidden[skipped:]
        tile = max(1, LOGITS_BYTES // (4 * self._model.config.vocab_size))
        for start in range(0, len(targets), tile):
            wanted = targets[start : start + tile]
            logits = self._logits(hidden, list(range(start, start + len(wanted))))
            scores += [state.sampler.report(token, row) for token, row in zip(wanted, logits, strict=True)]
        state.num_scored += len(scores)
        return tuple(scores)

    def _selections(self, item: Work, trace: Trace | None, rows: Items[int]) -> tuple[dict[int, Any], ...]:
        """For each of these rows of the batch: ascending positions int64 [k] by full layer, None for all."""
        sequence = item.sequence
        if trace is None or not sequence.generation.wants_selection:
            return ()
        size, topk = self._cache.page_size, self._model.config.index_topk
        first_context = sequence.num_computed + item.num_tokens  # keys that the first of these rows sees
        order = torch.zeros(self._cache.num_pages, dtype=torch.int64)
        order[torch.tensor(sequence.pages)] = torch.arange(len(sequence.pages))

        def positions(chosen: Tensor | None, row: int, context: int) -> Tensor | None:
            if chosen is None or context <= topk:
                return None
            rows_of_pool = chosen[row][chosen[row] >= 0].long().cpu()
            return (order[rows_of_pool // size] * size + rows_of_pool % size).sort().values

        return tuple(
            {layer: positions(chosen, row, first_context + j) for layer, chosen in trace.selections.items()}
            for j, row in enumerate(rows)
        )


def _look_ahead(guide: Guide, draft: _Draft) -> bool:
    """What may come after the guesses so far, once. When the guide cannot say, the last guess is taken back.

    If that guess is right after all, the same error comes again when it is drawn, for this request alone.
    """
    if len(draft.allowed) > len(draft.token_ids):
        return True
    try:
        draft.allowed.append(guide.allowed())
    except IndexShareError:
        if draft.token_ids:
            guide.rollback(1)
            draft.token_ids.pop()
            del draft.rows[len(draft.token_ids) :]
        return False
    return True


def _tokens(item: Work) -> list[int]:
    first = item.sequence.num_computed
    return item.sequence.token_ids[first : first + item.num_tokens]
