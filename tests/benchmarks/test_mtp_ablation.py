"""The ways to draft that the ablation compares give the tokens of plain decoding, and its table counts what stayed."""

import mtp_ablation
import pytest
import torch
from mtp_ablation import NUM_DRAFTS, ROWS, GreedyDrafts, Measured, OwnKeysSession, Row, measure, recipe_of

from indexshare.engine.cache import PagedCache, num_pages_for
from indexshare.engine.llm import LLM
from indexshare.engine.sampler import SamplingParams
from indexshare.engine.speculative import SpeculativeSession
from indexshare.model import recipes
from indexshare.model.glm import GlmForCausalLM

VOCAB = 61
PROMPT = torch.randint(0, VOCAB, (25,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def llm() -> LLM:
    model = GlmForCausalLM(recipes.tiny(vocab_size=VOCAB, initializer_range=0.15))
    model.init_weights(3)
    return LLM(model.double())


@pytest.mark.parametrize("kind", [OwnKeysSession, GreedyDrafts, SpeculativeSession])
def test_drafts_of_every_kind_leave_greedy_tokens_as_they_are(llm: LLM, kind: type[SpeculativeSession]) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=0.0)
    with llm.open_session(64) as plain:
        expected = [token.token_id for token in plain.stream(PROMPT, params)]
    cache = PagedCache(llm.config, num_pages=num_pages_for(64, 4), page_size=4, dtype=llm.dtype)
    with kind(llm.model, cache, num_draft_tokens=NUM_DRAFTS) as session:
        assert [token.token_id for token in session.stream(PROMPT, params)] == expected
        assert session.statistics.drafted[0] > 1


def test_own_keys_change_what_is_drafted_after_the_first_token(llm: LLM) -> None:
    drafts = []
    for kind in (OwnKeysSession, GreedyDrafts):
        cache = PagedCache(llm.config, num_pages=16, page_size=4, dtype=llm.dtype)
        with kind(llm.model, cache, num_draft_tokens=NUM_DRAFTS) as session:
            states: list[torch.Tensor] = []
            session._logits = lambda hidden, states=states: states.append(hidden) or llm.model.logits(hidden)
            session.prefill(PROMPT)
            states.clear()
            session._reserve(len(PROMPT) + NUM_DRAFTS)
            session._draft(7, None if kind is GreedyDrafts else _Draws(), 3)
            drafts.append(states)
    (own_first, own_second, *_), (shared_first, shared_second, *_) = drafts
    torch.testing.assert_close(own_first, shared_first)
    assert not torch.allclose(own_second, shared_second)


class _Draws:
    generator = torch.Generator().manual_seed(0)


def test_the_table_counts_accepted_drafts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "stop_ids", property(lambda _: ()))
    monkeypatch.setattr(mtp_ablation, "CODE_TOKENS", 20)
    row = Row(name="row", run="shipped", session=SpeculativeSession)
    result = measure(row, llm, "code", [PROMPT, PROMPT[3:]], 1.0)
    assert result.num_rounds > 0 and len(result.accepted) == NUM_DRAFTS
    made = Measured(name="", kind="", temperature=1.0, num_rounds=4, accepted=(0.5, 0.25, 0.0), spread=0.0)
    assert [made.tokens(n) for n in (1, 2, 3)] == [1.5, 1.75, 1.75]


def test_runs_differ_in_nothing_but_the_objective() -> None:
    first, second, third = (recipe_of(run, 20, 1e-3) for run in ("single", "multi", "tv"))
    assert first.num_steps == second.num_steps == third.num_steps == 20
    assert {phase.trains for recipe in (first, second, third) for phase in recipe.phases} == {"mtp"}
    assert [phase.mtp_objective for phase in third.phases] == ["cross_entropy", "acceptance"]
    assert {row.run for row in ROWS} == {"shipped", "single", "multi", "tv"}
