"""The policy, without a model: what is read when, who is admitted, who gives way."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexshare.engine.draft_length import DraftLength
from indexshare.engine.pages import PagePool
from indexshare.engine.sampler import SamplingParams
from indexshare.engine.scheduler import Limits, Plan, Scheduler
from indexshare.engine.sequence import Generation, Sequence

PAGE = 4


class Simulation:
    """Runs plans as an engine would, with made-up tokens."""

    def __init__(self, num_pages: int = 1000, **limits: int) -> None:
        self.pool = PagePool(num_pages, PAGE)
        self.copied: list[tuple[int, int, int]] = []
        self.scheduler = Scheduler(self.pool, Limits(**limits), copy_rows=lambda *copy: self.copied.append(copy))
        self.num_arrived = 0
        self.finished: list[Sequence] = []

    def add(self, prompt: list[int], new: int = 4, tenant: str = "") -> Sequence:
        generation = Generation(prompt_ids=tuple(prompt), params=SamplingParams(max_new_tokens=new), tenant=tenant)
        sequence = Sequence.of(generation, self.num_arrived)
        self.num_arrived += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self, num_drafts: int = 0) -> Plan:
        plan = self.scheduler.schedule(num_drafts)
        for item in plan.work:
            sequence = item.sequence
            assert len(sequence.pages) * PAGE >= sequence.num_computed + item.num_tokens + item.num_drafts
            draws = item.draws
            sequence.num_computed += item.num_tokens
            sequence.num_valid = sequence.num_computed
            if draws:
                sequence.token_ids.append(1000 + sequence.num_drawn)
            if sequence.num_left == 0:
                self.finished.append(sequence)
                self.scheduler.finish(sequence)
            else:
                self.scheduler.commit(sequence)
        self.pool.check_conservation()
        return plan

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.step().work:
                return
        pytest.fail("it never ends")


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(0, 99) for _ in range(length)]


def test_everybody_who_decodes_takes_part_in_every_step_beside_a_long_prompt() -> None:
    simulation = Simulation(max_step_tokens=32)
    short = [simulation.add(prompt(5, seed), new=30) for seed in range(3)]
    simulation.step()
    long = simulation.add(prompt(400, 9))
    while long.num_unread > 1:
        plan = simulation.step()
        assert {item.sequence for item in plan.work if item.num_tokens == 1 and item.draws} >= set(short[:3])
        assert plan.num_tokens <= 32
        if short[0].num_left == 0:
            break


def test_a_prompt_gets_only_the_mixed_budget_while_others_decode() -> None:
    simulation = Simulation(max_step_tokens=100)
    simulation.add(prompt(5), new=50)
    simulation.step()
    simulation.scheduler.mixed_tokens = 20
    simulation.add(prompt(300, 1))
    assert simulation.step().num_tokens == 1 + 20
    alone = Simulation(max_step_tokens=100)
    alone.scheduler.mixed_tokens = 10
    alone.add(prompt(300, 1))
    assert alone.step().num_tokens == 100


def test_short_prompts_pass_a_long_one_that_still_goes_on() -> None:
    simulation = Simulation(max_step_tokens=32)
    long = simulation.add(prompt(320))
    simulation.step()
    short = simulation.add(prompt(10, 1), new=1)
    plan = simulation.step()
    assert short in simulation.finished
    assert next(item.num_tokens for item in plan.work if item.sequence is long) >= 16


def test_the_least_served_tenant_is_next() -> None:
    simulation = Simulation(max_sequences=1)
    for seed in range(10):
        simulation.add(prompt(20, seed), tenant="greedy")
    simulation.step()
    late = simulation.add(prompt(20, 99), tenant="late")
    second = simulation.add(prompt(20, 98), tenant="late")
    simulation.run()
    order = [simulation.finished.index(sequence) for sequence in (late, second)]
    assert order[0] <= 2 and order[1] <= 4


def test_absence_earns_no_credit() -> None:
    simulation = Simulation(max_sequences=1)
    for seed in range(3):
        simulation.add(prompt(20, seed), tenant="a")
    simulation.step()
    simulation.step()
    first = simulation.add(prompt(20, 50), tenant="b")
    rest = [simulation.add(prompt(20, 60 + seed), tenant="b") for seed in range(5)]
    simulation.run()
    of_a = [index for index, done in enumerate(simulation.finished) if done.generation.tenant == "a"]
    assert max(of_a) < 8, "tenant a waited for all of b"
    assert simulation.finished.index(first) < simulation.finished.index(rest[-1])


def test_the_youngest_gives_way_and_reads_what_it_had_from_the_cache() -> None:
    simulation = Simulation(num_pages=12, max_step_tokens=64)
    old = simulation.add(prompt(16), new=26)
    young = simulation.add(prompt(14, 1), new=20)
    while young.num_preempted == 0:
        assert simulation.step().work
    assert old.num_preempted == 0 and young.pages == []
    drawn = young.num_drawn
    simulation.run()
    assert {old, young} == set(simulation.finished)
    assert drawn > 0 and young.num_drawn == 20
    assert simulation.pool.num_live == 0


def test_a_prefix_is_reused_pages_shared_and_the_rest_copied() -> None:
    simulation = Simulation()
    tokens = prompt(23)
    simulation.add(tokens, new=1)
    simulation.run()
    again = simulation.add([*tokens[:18], 500, 501], new=1)
    plan = simulation.step()
    assert again.num_cached == 17  # four pages of four, and one row of the fifth
    assert plan.work[0].num_tokens == 20 - 17
    ((source, target, count),) = simulation.copied
    assert source != target and count == 1


def test_what_is_being_read_for_one_is_waited_for_by_the_others() -> None:
    simulation = Simulation(max_step_tokens=16)
    tokens = prompt(81)
    same = [simulation.add([*tokens[:78], seed], new=2) for seed in range(200, 205)]
    other = simulation.add(prompt(9, 5), new=2)
    read = 0
    while len(simulation.finished) < 6:
        read += sum(item.num_tokens for item in simulation.step().work)
    assert other in simulation.finished[:2], "others go past those that wait for a prefix"
    assert all(sequence.num_cached >= 76 for sequence in same[1:])
    assert read < 79 + 4 * 5 + 9 + 2 * 6


def test_scoring_a_prompt_reuses_nothing() -> None:
    simulation = Simulation()
    simulation.add(prompt(20), new=1)
    simulation.run()
    sequence = simulation.add(prompt(20), new=1)
    simulation.scheduler._waiting[""][0].generation = replace(sequence.generation, scores_prompt=True)
    simulation.step()
    assert sequence.num_cached == 0


def test_prompts_are_read_however_many_decode() -> None:
    simulation = Simulation(num_pages=100_000, max_sequences=300, max_step_tokens=64)
    for seed in range(200):
        simulation.add(prompt(2, seed), new=400)
    while any(sequence.num_unread > 1 for sequence in simulation.scheduler.running) or simulation.scheduler.num_waiting:
        simulation.step()
    late = simulation.add(prompt(50, 999))
    for _ in range(8):
        plan = simulation.step(num_drafts=3)
        assert all(item.num_drafts == 0 for item in plan.work)
    assert late in simulation.finished


def test_a_shared_document_that_is_in_use_needs_no_room_of_its_own() -> None:
    simulation = Simulation(num_pages=100, max_step_tokens=512)
    document = prompt(300)
    simulation.add([*document, 500], new=60)
    simulation.step()
    second = simulation.add([*document, 501], new=20)
    simulation.step()
    assert second in simulation.scheduler.running and second.num_cached >= 299


def test_a_crowd_that_waits_for_one_prefix_lets_others_pass() -> None:
    simulation = Simulation(max_step_tokens=32)
    document = prompt(600)
    for seed in range(40):
        simulation.add([*document, 1000 + seed], new=2)
    small = simulation.add(prompt(20, 7), new=2)
    for _ in range(4):
        simulation.step()
    assert small in simulation.finished
    simulation.run()
    assert len(simulation.finished) == 41


def test_no_tenant_holds_all_places_while_another_waits() -> None:
    simulation = Simulation(max_sequences=8)
    greedy = [simulation.add(prompt(9, seed), new=300, tenant="greedy") for seed in range(20)]
    for _ in range(5):
        simulation.step()
    assert len(simulation.scheduler.running) == 8
    modest = [simulation.add(prompt(9, 100 + seed), new=5, tenant="modest") for seed in range(3)]
    for _ in range(8):
        simulation.step()
    assert all(sequence in simulation.finished for sequence in modest)
    simulation.run()
    assert set(simulation.finished) == {*greedy, *modest}


def test_a_tenant_at_its_share_does_not_hide_one_that_has_nothing() -> None:
    simulation = Simulation(max_sequences=6)
    for seed in range(4):
        simulation.add(prompt(40, seed), new=300, tenant="most")
    simulation.step()
    for seed in range(6):
        simulation.add(prompt(3, 50 + seed), new=300, tenant="least")
    for _ in range(3):
        simulation.step()
    late = simulation.add(prompt(9, 99), new=5, tenant="late")
    simulation.scheduler._served["least"] = -1  # whoever waits of these is looked at first
    for _ in range(10):
        simulation.step()
    assert late in simulation.finished


def test_drafts_fit_what_may_still_be_drawn() -> None:
    simulation = Simulation()
    sequence = simulation.add(prompt(5), new=4)
    simulation.step()
    sequence.num_valid -= 1  # a row of the MTP layer waits
    assert [item.num_drafts for item in simulation.scheduler.schedule(8).work] == [2]
    sequence.num_valid += 1
    assert [item.num_drafts for item in simulation.scheduler.schedule(8).work] == [0]


@given(st.integers(0, 10**6))
def test_everything_ends_on_a_small_pool(seed: int) -> None:
    rng = random.Random(seed)
    num_pages = rng.randint(6, 30)
    simulation = Simulation(num_pages=num_pages, max_sequences=rng.randint(1, 6), max_step_tokens=rng.randint(2, 40))
    added = []
    for _ in range(rng.randint(1, 12)):
        length = rng.randint(1, num_pages * PAGE - 8)
        new = rng.randint(1, min(20, num_pages * PAGE - length))
        shared = prompt(length, rng.randint(0, 2))
        added.append(simulation.add(shared, new=new, tenant=rng.choice("ab")))
        if rng.random() < 0.5:
            simulation.step(rng.randint(0, 3))
        if rng.random() < 0.2:
            victim = rng.choice(added)
            if victim not in simulation.finished:
                simulation.scheduler.finish(victim)
                simulation.finished.append(victim)
                simulation.pool.check_conservation()
    simulation.run()
    assert set(simulation.finished) == set(added)
    assert simulation.pool.num_live == 0


def test_the_draft_length_that_pays_is_found_and_left_when_it_no_longer_does() -> None:
    lengths = DraftLength(5)

    def speed(length: int, pays: bool) -> float:
        tokens = 1 + (0.8 * length if pays else 0.05 * length)
        return tokens / (1 + 0.2 * length)

    for pays, wanted in ((True, {4, 5}), (False, {0}), (True, {4, 5})):
        chosen = []
        for _ in range(1500):
            length = lengths.choose(4)
            chosen.append(length)
            lengths.observe(4, length, int(1000 * speed(length, pays)), 1000.0)
        late = chosen[-200:]
        assert sum(length in wanted for length in late) > 150, (pays, late)
    assert lengths.choose(64) == 5, "another load is measured on its own"


def test_a_fixed_draft_length_stays() -> None:
    lengths = DraftLength(3, is_fixed=True)
    for _ in range(100):
        assert lengths.choose(4) == 3
        lengths.observe(4, 3, 1, 1.0)
