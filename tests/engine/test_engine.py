"""The engine serves many requests at once and gives each one exactly the tokens it would get alone."""

import random
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from indexshare.engine.engine import Engine, EngineOptions
from indexshare.engine.grammar import GuideCompiler
from indexshare.engine.llm import LLM, load
from indexshare.engine.sampler import SampledToken, SamplingParams
from indexshare.engine.scheduler import Limits
from indexshare.engine.sequence import Generation, Output
from indexshare.engine.speculative import SpeculativeSession
from indexshare.errors import CheckpointError, KernelError, MemoryLimitError, OverloadedError, RequestError
from indexshare.kernels import native, registry
from indexshare.model import recipes
from indexshare.model.glm import GlmForCausalLM, run_layers
from indexshare.model.native import pack_model

VOCAB = 97


class Served:
    """Requests and what came back for each."""

    def __init__(self, llm: LLM, **options: object) -> None:
        limits = options.pop("limits", Limits(max_sequences=6, max_step_tokens=48))
        options = {"page_size": 4, "cache_tokens": 1024, **options}
        self.outputs: dict[Generation, list[Output]] = defaultdict(list)
        self.engine = Engine(llm, EngineOptions(limits=limits, **options), deliver=self.deliver)

    def deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            self.outputs[output.generation].append(output)

    def run(self, *generations: Generation) -> list[tuple[SampledToken, ...]]:
        for generation in generations:
            self.engine.submit(generation)
        while self.engine.step():
            pass
        return [self.tokens(generation) for generation in generations]

    def tokens(self, generation: Generation) -> tuple[SampledToken, ...]:
        return tuple(token for output in self.outputs[generation] for token in output.tokens)

    def last(self, generation: Generation) -> Output:
        return self.outputs[generation][-1]


@pytest.fixture(scope="module", params=["native", "torch"])
def llm(request: pytest.FixtureRequest) -> LLM:
    model = GlmForCausalLM(recipes.tiny(vocab_size=VOCAB, initializer_range=0.15))
    model.init_weights(seed=3)
    model = model.to(torch.float32).requires_grad_(False)
    if request.param == "native" and (reason := pack_model(model)) is not None:
        pytest.skip(f"no C++ kernels here: {reason}")
    return LLM(model)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(VOCAB) for _ in range(length))


def wish(length: int, seed: int = 0, **options: object) -> Generation:
    fields = {name: options.pop(name) for name in list(options) if name in Generation.__dataclass_fields__}
    return Generation(prompt_ids=prompt(length, seed), params=SamplingParams(**options), **fields)


def alone(llm: LLM, generation: Generation) -> tuple[SampledToken, ...]:
    """What plain decoding gives: one sequence, one token at a time."""
    with llm.open_session(len(generation.prompt_ids) + generation.params.max_new_tokens, page_size=4) as session:
        return tuple(session.stream(generation.prompt_ids, generation.params, stop_ids=generation.stop_ids))


def mixed_requests(rng: random.Random, count: int = 10) -> list[Generation]:
    """Prompts that share beginnings, with all kinds of sampling that must not depend on company."""
    requests = []
    for _ in range(count):
        shared, own = prompt(rng.choice([0, 3, 12, 29]), 1), prompt(rng.randint(1, 20), rng.randint(0, 99))
        kind = rng.choice(["greedy", "greedy", "penalties", "logprobs", "seeded"])
        options: dict[str, object] = {"max_new_tokens": rng.randint(1, 18)}
        if kind == "penalties":
            options |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
        elif kind == "logprobs":
            options |= {"logprobs": 3}
        elif kind == "seeded":
            options |= {"temperature": 0.8, "top_p": 0.9, "seed": rng.randint(0, 9)}
        requests.append(
            Generation(
                prompt_ids=(*shared, *own),
                params=SamplingParams(**options),
                stop_ids=(5, 6),
                drafts=kind != "seeded",
                scope=rng.choice(["", "other"]),
            )
        )
    return requests


@pytest.mark.parametrize("num_drafts", [0, 1, 3, 6])
@pytest.mark.parametrize("cache_tokens", [1024, 100])
def test_company_changes_nothing(llm: LLM, num_drafts: int, cache_tokens: int) -> None:
    """With drafts, prefix hits, preemption and penalties, each request gets what it gets alone."""
    served = Served(llm, num_drafts=num_drafts, adapts_drafts=False, cache_tokens=cache_tokens)
    for seed in range(3):
        requests = mixed_requests(random.Random(seed))
        for generation, tokens in zip(requests, served.run(*requests), strict=True):
            expected = alone(llm, generation)
            assert [token.token_id for token in tokens] == [token.token_id for token in expected]
            if generation.params.logprobs is not None:
                for ours, theirs in zip(tokens, expected, strict=True):
                    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                    assert [i for i, _ in ours.top_logprobs] == [i for i, _ in theirs.top_logprobs]
            wanted = "stop" if expected[-1].token_id in generation.stop_ids else "length"
            assert served.last(generation).ended == wanted
    stats = served.engine.stats()
    assert stats["cached_tokens"] > 50, "prefixes were reused"
    if cache_tokens == 100:
        assert stats["preempted"] > 0 and stats["evicted_pages"] > 0
    if num_drafts:
        assert sum(stats["drafted"]) > 100


def test_native_kernels_gave_the_same_bits(llm: LLM) -> None:
    """The reason for exact equality above: a token's logits do not depend on what else is in the batch."""
    if llm.model.stack.packed is None:
        pytest.skip("torch's sums depend on the shape of the batch")
    before = registry.hits.copy()
    served = Served(llm)
    requests = [wish(30, seed, max_new_tokens=8, logprobs=0) for seed in range(5)]
    for generation, tokens in zip(requests, served.run(*requests), strict=True):
        assert [token.logprob for token in tokens] == [token.logprob for token in alone(llm, generation)]
    assert registry.hits[run_layers.name, native.NAME] > before[run_layers.name, native.NAME]


def test_a_cached_prefix_drafts_as_well_as_a_fresh_one(llm: LLM) -> None:
    """The MTP layer's rows are part of the cache: a hit changes neither tokens nor how many guesses are right."""
    if llm.model.stack.packed is None:
        pytest.skip("guesses depend on rounding, which in torch depends on the shape of the batch")
    first, again = (wish(41, 7, max_new_tokens=40) for _ in range(2))
    served = Served(llm, num_drafts=3, adapts_drafts=False)
    tokens = served.run(first)
    cold = served.engine.stats()
    assert served.run(again) == tokens
    warm = served.engine.stats()
    assert served.last(again).num_cached_tokens == 40
    # The first step after a hit has nothing to draft from; all guesses after it are those of the first time.
    accepted = [w - 2 * c for w, c in zip(warm["accepted"], cold["accepted"], strict=True)]
    assert all(abs(difference) <= 3 for difference in accepted), (cold, warm)
    longer = Generation(prompt_ids=(*first.prompt_ids, *(t.token_id for t in tokens[0][:-1])), params=first.params)
    fresh = Served(llm, num_drafts=3, adapts_drafts=False)
    assert served.run(longer) == fresh.run(replace(longer))
    assert served.last(longer).num_cached_tokens > 70


def test_guesses_of_a_batch_are_those_of_single_sequences(llm: LLM) -> None:
    """The batched draft phase against the plain one of SpeculativeSession: the same guesses are made."""
    requests = [wish(20 + 9 * seed, seed, max_new_tokens=30) for seed in range(4)]
    served = Served(llm, num_drafts=3, adapts_drafts=False, limits=Limits(max_step_tokens=512))
    served.run(*requests)
    drafted, accepted = [0] * 3, [0] * 3
    for generation in requests:
        with llm.open_session(200, num_draft_tokens=3, page_size=4) as session:
            assert isinstance(session, SpeculativeSession)
            list(session.stream(generation.prompt_ids, generation.params))
            for position in range(3):
                drafted[position] += session.statistics.drafted[position]
                accepted[position] += session.statistics.accepted[position]
    stats = served.engine.stats()
    assert stats["drafted"] == tuple(drafted) and stats["accepted"] == tuple(accepted)


def test_drawn_tokens_follow_the_same_distribution_with_drafts(llm: LLM) -> None:
    params: dict[str, Any] = {"max_new_tokens": 2, "temperature": 0.7, "top_k": 4}
    counts: dict[int, dict[int, int]] = {}
    for drafts in (0, 2):
        served = Served(llm, num_drafts=drafts, adapts_drafts=False, limits=Limits(max_waiting=1000))
        requests = [
            Generation(prompt_ids=prompt(20, 11), params=SamplingParams(**params, seed=seed)) for seed in range(600)
        ]
        seconds = [tokens[1].token_id for tokens in served.run(*requests)]
        counts[drafts] = {token: seconds.count(token) for token in set(seconds)}
    for token in counts[0] | counts[2]:
        plain, drafted = counts[0].get(token, 0), counts[2].get(token, 0)
        assert abs(plain - drafted) < 5 * max(4.0, (plain + drafted) ** 0.5)


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("length", [1, 2, 64, 65, 70, 129])
def test_prompt_scores_are_those_of_a_session(llm: LLM, length: int, num_drafts: int) -> None:
    tokens = prompt(length, 4)
    generation = Generation(
        prompt_ids=tokens, params=SamplingParams(max_new_tokens=1, logprobs=2), scores_prompt=True, draws_nothing=True
    )
    served = Served(llm, num_drafts=num_drafts)
    served.run(wish(length, 4, max_new_tokens=1))  # a cached prefix must not hide scores
    assert served.run(generation) == [()]
    scores = [token for output in served.outputs[generation] for token in output.prompt_tokens]
    assert [token.token_id for token in scores] == list(tokens) and scores[0].logprob is None
    expected = llm.logprobs(tokens)
    torch.testing.assert_close(torch.tensor([t.logprob for t in scores[1:]]), expected, rtol=1e-4, atol=1e-4)
    assert served.last(generation).ended == "length"


def test_prompt_scores_come_once_although_requests_give_way(llm: LLM) -> None:
    requests = [
        Generation(
            prompt_ids=prompt(40, seed),
            params=SamplingParams(max_new_tokens=12, logprobs=0),
            scores_prompt=True,
        )
        for seed in range(3)
    ]
    served = Served(llm, cache_tokens=112, limits=Limits(max_step_tokens=8))
    served.run(*requests)
    assert served.engine.stats()["preempted"] > 0
    for generation in requests:
        scores = [token for output in served.outputs[generation] for token in output.prompt_tokens]
        assert [token.token_id for token in scores] == list(generation.prompt_ids)
        expected = llm.logprobs(generation.prompt_ids)
        torch.testing.assert_close(torch.tensor([t.logprob for t in scores[1:]]), expected, rtol=1e-4, atol=1e-4)


def test_a_short_context_reads_everything_whatever_else_is_in_the_batch(llm: LLM) -> None:
    served = Served(llm, limits=Limits(max_step_tokens=512))
    short = wish(3, 1, max_new_tokens=4, wants_selection=True)
    served.run(wish(300, 2, max_new_tokens=4), short)
    for output in served.outputs[short]:
        assert all(chosen is None for selection in output.selections for chosen in selection.values())


def test_selections_are_those_of_a_session(llm: LLM) -> None:
    generation = wish(37, 2, max_new_tokens=5, wants_selection=True)
    served = Served(llm, num_drafts=2, adapts_drafts=False)
    served.run(wish(37, 2, max_new_tokens=1), generation, wish(30, 3, max_new_tokens=9))
    selections = [chosen for output in served.outputs[generation] for chosen in output.selections]
    tokens = [token.token_id for token in served.tokens(generation)]
    assert len(selections) == len(tokens) == 5
    read = [*generation.prompt_ids, *tokens]
    for index, chosen in enumerate(selections):
        with llm.open_session(64, page_size=4) as session:
            expected = session.selected_positions(read[: 37 + index])
        assert {layer: set(rows.tolist()) for layer, rows in chosen.items()} == {
            layer: set(rows.tolist()) for layer, rows in expected.items() if rows is not None
        }


def test_a_cancelled_request_ends_and_leaves_nothing(llm: LLM) -> None:
    served = Served(llm)
    long, other = wish(60, 1, max_new_tokens=200), wish(10, 2, max_new_tokens=20)
    served.engine.submit(long)
    served.engine.submit(other)
    for _ in range(5):
        served.engine.step()
    served.engine.cancel(long)
    served.engine.cancel(wish(3))  # not known: harmless
    while served.engine.step():
        pass
    assert served.last(long).ended == "cancelled"
    assert [t.token_id for t in served.tokens(other)] == [t.token_id for t in alone(llm, other)]
    assert served.engine.pool.num_live == 0


def test_what_never_fits_and_what_does_not_fit_now(llm: LLM) -> None:
    served = Served(llm, cache_tokens=64, limits=Limits(max_waiting=2))
    with pytest.raises(MemoryLimitError, match=r"60 prompt tokens and 5 new ones are 65 tokens .* bytes"):
        served.engine.submit(wish(60, max_new_tokens=5))
    with pytest.raises(RequestError, match="empty"):
        served.engine.submit(wish(0))
    for seed in range(2):
        served.engine.submit(wish(5, seed, max_new_tokens=4))
    with pytest.raises(OverloadedError) as raised:
        served.engine.submit(wish(5, 9, max_new_tokens=4))
    assert raised.value.retry_after >= 1.0


def test_drafts_need_an_mtp_layer() -> None:
    model = GlmForCausalLM(recipes.tiny(num_nextn_predict_layers=0))
    model.init_weights(seed=0)
    with pytest.raises(RequestError, match="no MTP layer"):
        Served(LLM(model), num_drafts=2)


def test_a_step_that_fails_ends_its_requests_and_no_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(llm)
    broken = wish(10, 1, max_new_tokens=9)
    served.engine.submit(broken)
    served.engine.step()
    run = served.engine._runner.run

    def fail(plan: object) -> None:
        raise KernelError("layer 3: NaN")

    monkeypatch.setattr(served.engine._runner, "run", fail)
    served.engine.step()
    assert served.last(broken).ended == "error" and "NaN" in (served.last(broken).error or "")
    monkeypatch.setattr(served.engine._runner, "run", run)
    fine = wish(12, 2, max_new_tokens=5)
    assert [t.token_id for t in served.run(fine)[0]] == [t.token_id for t in alone(llm, fine)]


def test_one_request_with_bad_logits_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(llm)
    bad, good = wish(10, 1, max_new_tokens=6), wish(11, 2, max_new_tokens=6)
    choose = served.engine._runner._choose

    def choose_or_fail(item: object, draft: object, logits: torch.Tensor) -> object:
        if item.sequence.generation is bad and item.sequence.num_drawn == 2:
            raise CheckpointError("the model's logits are not finite numbers")
        return choose(item, draft, logits)

    monkeypatch.setattr(served.engine._runner, "_choose", choose_or_fail)
    served.run(bad, good)
    assert served.last(bad).ended == "error"
    assert [t.token_id for t in served.tokens(good)] == [t.token_id for t in alone(llm, good)]


def test_a_thread_serves_many_clients(llm: LLM) -> None:
    done = threading.Event()
    served = Served(llm, num_drafts=2)
    requests = [wish(8 + seed, seed, max_new_tokens=6) for seed in range(12)]
    deliver = served.deliver

    def deliver_and_count(outputs: Sequence[Output]) -> None:
        deliver(outputs)
        if sum(bool(outs and outs[-1].ended) for outs in list(served.outputs.values())) == len(requests):
            done.set()

    served.engine._deliver = deliver_and_count
    served.engine.start()
    clients = [threading.Thread(target=served.engine.submit, args=(generation,)) for generation in requests]
    for client in clients:
        client.start()
    assert done.wait(30)
    served.engine.close()
    for generation in requests:
        assert [t.token_id for t in served.tokens(generation)] == [t.token_id for t in alone(llm, generation)]
    with pytest.raises(OverloadedError, match="shutting down"):
        served.engine.submit(wish(3))


def test_closing_lets_running_requests_finish_for_a_while(llm: LLM) -> None:
    served = Served(llm, cache_tokens=4096)
    short, endless = wish(8, 1, max_new_tokens=3), wish(8, 2, max_new_tokens=4000)
    served.engine.start()
    served.engine.submit(short)
    served.engine.submit(endless)
    served.engine.close(drain_seconds=0.3)
    assert served.last(short).ended == "length"
    assert served.last(endless).ended in ("cancelled", "length")
    assert served.engine.pool.num_live == 0


def test_a_guide_that_fails_while_guessing_ends_at_most_its_own_request() -> None:
    """Its grammar asks for a token that is not permitted, but only behind what the model says without drafts, too."""
    nano = load("nano", device="cpu", threads=1)
    compiler = GuideCompiler(nano.tokenizer, nano.config.vocab_size)
    compiled = compiler.grammar('start: "Hello world and all the others" <|user|>')

    def guided() -> Generation:
        return Generation(
            prompt_ids=tuple(nano.tokenizer.encode("def hello():")),
            params=SamplingParams(max_new_tokens=30),
            stop_ids=nano.chat_stop_ids,
            guide=compiled.guide(nano.chat_stop_ids),
        )

    results = []
    for num_drafts in (0, 3, 8):
        served = Served(nano, num_drafts=num_drafts, adapts_drafts=False, page_size=64)
        innocent = wish(30, 1, max_new_tokens=25)
        bad = guided()
        served.run(innocent, bad)
        assert served.last(innocent).ended == "length" and len(served.tokens(innocent)) == 25
        assert served.last(bad).ended == "error"
        results.append([token.token_id for token in served.tokens(bad)])
    assert results[0] == results[1] == results[2] and len(results[0]) > 3


def test_an_engine_that_dies_tells_everybody(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(llm)
    first, second = wish(8, 1, max_new_tokens=50), wish(8, 2, max_new_tokens=5)

    def die(plan: object) -> None:
        served.engine.submit(second)  # while the step runs
        raise AssertionError("a bug")

    monkeypatch.setattr(served.engine._runner, "run", die)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    served.engine.submit(first)
    served.engine.start()
    assert served.engine._thread is not None
    served.engine._thread.join(30)
    assert served.last(first).ended == served.last(second).ended == "error"
    with pytest.raises(OverloadedError):
        served.engine.submit(wish(3))
    assert served.engine.failure is not None and "a bug" not in served.engine.failure


def test_rows_that_cannot_be_completed_cost_no_answer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(llm, num_drafts=2)
    generation, again = wish(20, 1, max_new_tokens=6), wish(20, 1, max_new_tokens=6)

    def fail(sequence: object) -> None:
        raise KernelError("no")

    monkeypatch.setattr(served.engine._runner, "complete", fail)
    first = served.run(generation)
    assert served.last(generation).ended == "length"
    monkeypatch.undo()
    assert served.run(again) == first


def test_closing_without_patience_ends_what_was_just_submitted(llm: LLM) -> None:
    for _ in range(5):
        served = Served(llm, cache_tokens=8192)
        endless = wish(8, 2, max_new_tokens=8000)
        served.engine.start()
        served.engine.submit(endless)
        served.engine.close(drain_seconds=0.0)
        assert served.last(endless).ended == "cancelled"


def test_ended_replies_do_not_count_as_waiting(llm: LLM) -> None:
    served = Served(llm, limits=Limits(max_waiting=2))
    for _ in range(10):
        served.engine.cancel(wish(3))
    served.engine.submit(wish(5, 1, max_new_tokens=2))
