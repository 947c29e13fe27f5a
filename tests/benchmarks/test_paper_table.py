"""The stages of the paper's table go on where they were stopped, its tasks count what they say, its verdicts hold."""

import itertools
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import paper_measures
import paper_models
import paper_report
import paper_table
import pytest
from paper_measures import HOPS, SHARED_BY, Measured, Share, Speed, follow, grouped, make_chains
from paper_report import BEGIN, CLAIMS, END, Results, render, spread, verdict, write_page
from paper_table import ROWS, Seed, check_plan, results

from indexshare.errors import ConfigError
from indexshare.eval.measure import Measurement
from indexshare.eval.retrieval import Answer
from indexshare.train.episodes import Fact, answer

SCRIPT = Path(paper_table.__file__)


def measured(**changes: object) -> Measured:
    row = Measured(
        pattern=paper_models.EVERY,
        nats=1.0,
        bits_per_byte=0.5,
        retrieval={16_384: Share(right=9, asked=10)},
        groups={16_384: Share(right=2, asked=4)},
        selected={16_384: Share(right=10, asked=10)},
        speed={16_384: Speed(prefill=100.0, decode=10.0, indexer=0.25)},
        walks=Share(right=1, asked=4),
        mass=0.9,
        threads=1,
        seconds=1.0,
    )
    return replace(row, **changes)


# ---------------------------------------------------------------------------------------------------------------- tasks


def test_chains_lead_from_node_to_node_and_share_edges_by_pairs() -> None:
    chains = make_chains(np.random.default_rng(3), 6)
    nodes = [fact.subject.split("-")[0] for chain in chains for fact in chain] + [chain[-1].value for chain in chains]
    assert len(set(nodes)) == len(nodes) == 6 * (HOPS + 1)
    for chain in chains:
        for here, there in itertools.pairwise(chain):
            assert there.subject.startswith(f"{here.value}-")
    edges = [[fact.subject.split("-")[1] for fact in chain] for chain in chains]
    assert edges[0] == edges[1] != edges[2] == edges[3]
    assert len({edge for each in edges for edge in each}) == 6 // SHARED_BY * HOPS


def test_a_walk_goes_on_from_the_models_own_answer() -> None:
    chain, other = make_chains(np.random.default_rng(0), 2)
    facts = {fact.subject: fact for fact in (*chain, *other)}
    assert follow(chain, lambda subject: answer(facts[subject]))
    asked: list[str] = []

    def lost(subject: str) -> str:
        asked.append(subject)
        return answer(Fact(subject=subject, value=other[0].value) if len(asked) == 1 else facts[subject])

    assert not follow(chain, lost)  # it ends at the end of the other chain
    assert asked == [chain[0].subject, other[1].subject, other[2].subject]


def test_a_reply_about_something_else_ends_a_walk() -> None:
    chain = make_chains(np.random.default_rng(0), 1)[0]
    asked: list[str] = []
    assert not follow(chain, lambda subject: asked.append(subject) or "I do not know.")
    assert asked == [chain[0].subject]


def test_a_group_is_right_when_all_of_its_facts_are() -> None:
    right = [True] * 4 + [True, True, False, True] + [True] * 3  # three are left over
    answers = tuple(Answer(subject="", value="", reply="", is_correct=each, depth=0.0, selected={}) for each in right)
    one = Measurement(
        name="",
        num_tokens=1,
        prefill_tokens_per_second=1.0,
        decode_tokens_per_second=1.0,
        peak_bytes=None,
        cache_bytes=1,
        indexer_share=None,
        curve=(),
        answers=answers,
        ask_seconds=1.0,
    )
    assert grouped([one, one]) == [True, False, True, False]


# --------------------------------------------------------------------------------------------------------------- report


def claim(text: str, criterion: str) -> paper_report.Claim:
    return next(each for each in CLAIMS if text in each.text and criterion in each.criterion)


def test_verdicts_at_their_limits() -> None:
    half = claim("1/2, searched", "loss")
    rows = {"all": measured(), "searched-2": measured(nats=1.009)}
    assert half.number(rows) == pytest.approx(0.009)
    assert verdict(half, [0.009, 0.002]) == "yes"
    assert verdict(half, [0.011, 0.2]) == "no"
    assert verdict(half, [0.011, 0.002, -1.0]) == "2 of 3 seeds"
    assert verdict(half, []) == "-"
    assert half.number({"all": measured()}) is None


def test_a_drop_in_long_tasks_is_seen() -> None:
    rows = {"all": measured(), "uniform-4": measured(walks=Share(right=0, asked=4))}
    costs = claim("without training", "long tasks")
    assert costs.number(rows) == pytest.approx(-25 / 3)  # of retrieval, groups and walks
    assert costs.holds(-25 / 3)
    assert not costs.holds(-1.0)


def test_claims_about_speed_compare_the_longest_length() -> None:
    slow = {4096: Speed(prefill=900.0, decode=1.0, indexer=0.1), 16_384: Speed(prefill=100.0, decode=1.0, indexer=0.4)}
    fast = {4096: Speed(prefill=100.0, decode=1.0, indexer=0.1), 16_384: Speed(prefill=150.0, decode=2.0, indexer=0.2)}
    rows = {
        "all": measured(speed=slow, retrieval={4096: Share(right=1, asked=1), 16_384: Share(right=1, asked=1)}),
        "uniform-4": measured(speed=fast, retrieval={16_384: Share(right=1, asked=1)}),
    }
    assert claim("reads faster", "prefill").number(rows) == pytest.approx(1.5)
    assert claim("prefill grows", "").number(rows) == pytest.approx(0.3)


def test_means_and_spreads() -> None:
    assert spread([0.5, None, 1.0], "%") == "75 ± 35"  # sample standard deviation: 0.354
    assert spread([1.25], ".3f") == "1.250"
    assert spread([None], ".3f") == "-"


def test_the_table_shows_what_is_there_and_every_row_has_a_title() -> None:
    assert {row.name for row in ROWS} == set(paper_report.TITLES)
    empty = Results(plan="full", seeds=({},), patterns=({},), seconds=({},))
    assert "| dense MLA |" in render(empty)
    half = replace(empty, seeds=({"all": measured()}, {"all": measured(nats=1.2)}), patterns=({}, {"1/2": "FFSS"}))
    text = render(half)
    assert "over 2 seeds" in text
    row = next(line for line in text.splitlines() if line.startswith("| sparse, an indexer in every layer"))
    assert "1.100 ± 0.141" in row
    assert row.count("|") == text.splitlines()[2].count("|")


def test_a_page_keeps_what_is_around_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ConfigError, match="put them where"):
        write_page(page, "new")
    assert page.read_text() == "no markers"


def test_the_page_of_the_table_has_its_markers() -> None:
    page = Path(__file__).parents[2] / "docs" / "indexshare.md"
    assert re.search(rf"{BEGIN}.+{END}", page.read_text(), re.DOTALL)


# --------------------------------------------------------------------------------------------------------------- stages


def test_a_seed_goes_on_at_the_first_stage_that_is_not_done(tmp_path: Path) -> None:
    seed = Seed(paper_models.quick_plan(), 0, tmp_path)
    ran: list[str] = []

    def stopped() -> None:
        raise KeyboardInterrupt

    seed.stages = {"base": lambda: ran.append("base") or {"seconds": 500.0}, "search": stopped}
    with pytest.raises(KeyboardInterrupt):
        seed.run(None)
    seed.stages["search"] = lambda: ran.append("search") or {"1/2": "FS"}
    seed.run(None)
    seed.run(None)
    assert ran == ["base", "search"]
    assert seed.seconds()["base"] == 500.0  # of a training: over all calls
    assert results(paper_models.quick_plan(), 1, tmp_path).patterns == ({"1/2": "FS"},)


def test_a_stage_alone_needs_what_comes_before(tmp_path: Path) -> None:
    seed = Seed(paper_models.quick_plan(), 0, tmp_path)
    with pytest.raises(ConfigError, match="base of seed 0 first"):
        seed.run("measure-all")
    with pytest.raises(ConfigError, match="there are: base"):
        seed.run("bass")


def test_measurements_survive_the_file(tmp_path: Path) -> None:
    seed = Seed(paper_models.quick_plan(), 0, tmp_path)
    row = measured(mass=None, selected={})
    seed.stages = {"measure-dense": lambda: row}
    seed.run(None)
    assert seed.measured() == {"dense": row}


def test_a_directory_keeps_its_plan(tmp_path: Path) -> None:
    check_plan(paper_models.quick_plan(), tmp_path)
    check_plan(paper_models.quick_plan(), tmp_path)
    with pytest.raises(ConfigError, match="another plan"):
        check_plan(paper_models.full_plan(), tmp_path)


def test_the_full_plan_reads_more_than_its_indexers_choose() -> None:
    plan = paper_models.full_plan()
    assert all(plan.model.is_full(layer) for layer in range(paper_models.NUM_LAYERS))
    assert [paper_models.uniform(keep) for keep in ("1/2", "1/4", "1/8")] == ["FSFSFSFS", "FSSSFSSS", "FSSSSSSS"]
    recipe = paper_models.base_recipe(plan, 1)
    assert recipe.seed != paper_models.base_recipe(plan, 2).seed
    assert {phase.mtp_loss_weight for phase in recipe.phases} == {0.0}
    assert all(phase.sequence_length > plan.model.index_topk for phase in recipe.phases if phase.attention == "sparse")
    assert max(reading.num_tokens for reading in plan.readings) == 131_072


@pytest.mark.slow  # every stage of a seed on a tiny model: a minute of one core, more on a busy one
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_and_fills_the_table(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--seeds", "1", "--output", str(tmp_path / "run")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if "seed 0: searched-4-cross" in line:
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()
    written = tmp_path / "all.json"
    second = subprocess.run([*command, "--json", str(written)], capture_output=True, text=True, check=True)
    assert "seed 0: base" not in second.stdout
    assert "seed 0: searched-4-cross" in second.stdout
    found = json.loads(written.read_bytes())
    rows = found["seeds"][0]
    assert set(rows) == {row.name for row in ROWS}
    searched = found["patterns"][0]
    assert [searched[keep].count("F") for keep in ("1/2", "1/4", "1/8")] == [4, 2, 1]
    assert rows["searched-4-own"]["pattern"] == rows["searched-4"]["pattern"] == searched["1/4"]
    assert rows["dense"]["mass"] is None
    assert rows["uniform-4-cross"]["mass"] != rows["uniform-4-own"]["mass"] or (
        rows["uniform-4-cross"]["nats"] != rows["uniform-4-own"]["nats"]
    )
    assert "say nothing but that the stages work" in second.stdout
    assert paper_measures.GROUP == 4
