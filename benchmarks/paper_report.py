"""The paper's table as Markdown: quality, speed, and which claims hold, from what has been measured."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paper_measures import Measured

from indexshare.errors import ConfigError

BEGIN, END = "<!-- paper table -->", "<!-- end of paper table -->"
NATS = 0.01  # a loss within this counts as the same
POINTS = 5.0  # and a mean of tasks in percent within this; one question is 2 to 8 points of its task
MORE = 0.001  # what counts as any difference
FASTER = 1.05
LONG = 16_384  # tasks at this length and beyond make the mean of long tasks
COMMON = 65_536  # dense attention is measured up to here
MISSING = "-"
TITLES = {
    "dense": "dense MLA",
    "all": "sparse, an indexer in every layer",
    "uniform-2": "1/2, equal spacing",
    "searched-2": "1/2, searched",
    "uniform-4": "1/4, equal spacing",
    "searched-4": "1/4, searched",
    "one": "1/8 (equal spacing and searched are the same)",
    "all-trained": "every layer, trained on",
    "uniform-4-cross": "1/4, equal spacing, distilled, cross-layer loss",
    "uniform-4-own": "1/4, equal spacing, distilled, own layer only",
    "searched-4-cross": "1/4, searched, distilled, cross-layer loss",
    "searched-4-own": "1/4, searched, distilled, own layer only",
}

Rows = Mapping[str, Measured]
Number = Callable[[Measured], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """By seed: rows by name, searched patterns by share of indexers, seconds by stage."""

    plan: str
    seeds: tuple[dict[str, Measured], ...]
    patterns: tuple[dict[str, str], ...]
    seconds: tuple[dict[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sentence of the paper as a number of one seed, and up to (or from) which it holds.

    number: difference or ratio of two rows, None while one of them is missing. is_least: the limit is the least.
    """

    text: str
    criterion: str
    number: Callable[[Rows], float | None]
    limit: float
    is_least: bool = False

    def holds(self, number: float) -> bool:
        return number >= self.limit if self.is_least else number <= self.limit


def mean_of_long(measured: Measured) -> float:
    """Mean of right answers, percent: retrieval at the long lengths that all rows have, groups at the shortest of them,
    walks."""
    lengths = [length for length in sorted(measured.retrieval) if LONG <= length <= COMMON] or sorted(
        measured.retrieval
    )
    shares = [measured.retrieval[length].share for length in lengths]
    return 100 * statistics.mean([*shares, measured.groups[lengths[0]].share, measured.walks.share])


def longest(measured: Measured) -> int:
    return max(measured.retrieval)


def more(one: str, other: str, number: Number) -> Callable[[Rows], float | None]:
    """The number of row `one` less that of row `other`."""

    def difference(rows: Rows) -> float | None:
        values = [number(rows[name]) if name in rows else None for name in (one, other)]
        return None if values[0] is None or values[1] is None else values[0] - values[1]

    return difference


def times(one: str, other: str, number: Number) -> Callable[[Rows], float | None]:
    """The number of row `one` over that of row `other`."""

    def ratio(rows: Rows) -> float | None:
        values = [number(rows[name]) if name in rows else None for name in (one, other)]
        return None if values[0] is None or not values[1] else values[0] / values[1]

    return ratio


def _nats(measured: Measured) -> float:
    return measured.nats


def _mass(measured: Measured) -> float | None:
    return measured.mass


def _prefill(measured: Measured) -> float:
    return measured.speed[longest(measured)].prefill


def _decode(measured: Measured) -> float:
    return measured.speed[longest(measured)].decode


def _growth(rows: Rows) -> float | None:
    """The indexer's share of the prefill at the longest length, less that at the shortest."""
    if "all" not in rows:
        return None
    speed = rows["all"].speed
    ends = [speed[length].indexer for length in (min(speed), max(speed))]
    return None if ends[0] is None or ends[1] is None else ends[1] - ends[0]


def _no_worse(text: str, one: str, other: str) -> tuple[Claim, Claim]:
    """In loss and in long tasks."""
    return (
        Claim(text=text, criterion=f"loss at most {NATS} nats more", number=more(one, other, _nats), limit=NATS),
        Claim(
            text=text,
            criterion=f"long tasks at most {POINTS:.0f} points lower",
            number=more(one, other, mean_of_long),
            limit=-POINTS,
            is_least=True,
        ),
    )


def _worse(text: str, one: str, other: str) -> tuple[Claim, Claim]:
    """By more than the limits of the same."""
    return (
        Claim(
            text=text,
            criterion=f"loss over {NATS} nats more",
            number=more(one, other, _nats),
            limit=NATS,
            is_least=True,
        ),
        Claim(
            text=text,
            criterion=f"long tasks over {POINTS:.0f} points lower",
            number=more(one, other, mean_of_long),
            limit=-POINTS,
        ),
    )


CLAIMS = (
    *_no_worse("sparse attention is as good as dense", "all", "dense"),
    *_worse("without training, equal spacing with 1/4 costs quality", "uniform-4", "all"),
    *_no_worse("1/2, searched, costs nothing", "searched-2", "all"),
    *_no_worse("1/4, searched, costs next to nothing", "searched-4", "all"),
    *_worse("at 1/4 equal spacing is worse than searched", "uniform-4", "searched-4"),
    *_worse("at 1/8 quality is lost", "one", "all"),
    *_no_worse("distilled, equal spacing with 1/4 is as good as all, trained on", "uniform-4-cross", "all-trained"),
    *_no_worse("distilled, equal spacing is as good as searched", "uniform-4-cross", "searched-4-cross"),
    Claim(
        text="the cross-layer loss is better than the own layer's",
        criterion="less loss, equal spacing",
        number=more("uniform-4-cross", "uniform-4-own", _nats),
        limit=-MORE,
    ),
    Claim(
        text="the cross-layer loss is better than the own layer's",
        criterion="more attention mass on chosen keys",
        number=more("uniform-4-cross", "uniform-4-own", _mass),
        limit=MORE,
        is_least=True,
    ),
    Claim(
        text="the indexers' share of the prefill grows with the length",
        criterion="longest less shortest above 0",
        number=_growth,
        limit=MORE,
        is_least=True,
    ),
    Claim(
        text="1/4 reads faster at the longest length",
        criterion=f"prefill at least {FASTER} times",
        number=times("uniform-4", "all", _prefill),
        limit=FASTER,
        is_least=True,
    ),
    Claim(
        text="1/4 decodes faster at the longest length",
        criterion=f"decode at least {FASTER} times",
        number=times("uniform-4", "all", _decode),
        limit=FASTER,
        is_least=True,
    ),
)


def render(results: Results) -> str:
    """All tables, with what is there."""
    done = sum(any(seed) for seed in results.seeds)
    hours = sum(sum(seconds.values()) for seconds in results.seconds) / 3600
    threads = sorted({row.threads for seed in results.seeds for row in seed.values()})
    head = [
        f"Mean ± sample standard deviation over {done} seed{'s' * (done != 1)} ({MISSING}: not measured);"
        f" {hours:.1f} hours, measured with {' or '.join(map(str, threads)) or 'no'} threads.",
        "",
        *_quality(results),
        "",
        *_speed(results),
        "",
        *_claims(results),
        "",
        *_patterns(results),
    ]
    if results.plan != "full":
        head.insert(0, f"**Of the plan {results.plan}: these figures say nothing but that the stages work.**\n")
    return "\n".join(head)


def _quality(results: Results) -> list[str]:
    lengths = _lengths(results)
    compared = next((length for length in lengths if length >= LONG), lengths[0] if lengths else 0)
    columns: list[tuple[str, Callable[[Measured], float | None], str]] = [
        ("loss, nats", _nats, ".3f"),
        ("bits per byte", lambda row: row.bits_per_byte, ".3f"),
        *((_short(length), _retrieved(length), "%") for length in lengths),
        (f"four facts, {_short(compared)}", lambda row: row.groups[compared].share, "%"),
        (f"walk, {_short(compared)}", lambda row: row.walks.share, "%"),
        ("long tasks", mean_of_long, ".0f"),
        (f"selected, {_short(compared)}", _chosen(compared), "%"),
        ("mass", _mass, "%"),
    ]
    return _table(results, columns)


def _retrieved(length: int) -> Callable[[Measured], float | None]:
    return lambda row: row.retrieval[length].share if length in row.retrieval else None


def _chosen(length: int) -> Callable[[Measured], float | None]:
    return lambda row: row.selected[length].share if length in row.selected else None


def _speed(results: Results) -> list[str]:
    columns: list[tuple[str, Callable[[Measured], float | None], str]] = []
    for length in [length for length in _lengths(results) if length >= LONG] or _lengths(results):
        columns += [
            (f"indexer, {_short(length)}", _speed_at(length, "indexer"), "%"),
            (f"prefill, {_short(length)}", _speed_at(length, "prefill"), ",.0f"),
            (f"decode, {_short(length)}", _speed_at(length, "decode"), ",.0f"),
        ]
    return _table(results, columns)


def _speed_at(length: int, what: str) -> Callable[[Measured], float | None]:
    return lambda row: getattr(row.speed[length], what) if length in row.speed else None


def _table(results: Results, columns: Sequence[tuple[str, Callable[[Measured], float | None], str]]) -> list[str]:
    lines = [f"| | {' | '.join(name for name, _, _ in columns)} |", f"|---|{'--:|' * len(columns)}"]
    for name, title in TITLES.items():
        rows = [seed[name] for seed in results.seeds if name in seed]
        cells = [spread([number(row) for row in rows], form) for _, number, form in columns]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float | None], form: str) -> str:
    """ "1.103 ± 0.004" of what is not None; a single value has no spread. form: a format, or % without a sign."""
    numbers = [value * (100 if form == "%" else 1) for value in values if value is not None]
    form = ".0f" if form == "%" else form
    if not numbers:
        return MISSING
    mean = format(statistics.mean(numbers), form)
    return mean if len(numbers) == 1 else f"{mean} ± {format(statistics.stdev(numbers), form)}"


def _claims(results: Results) -> list[str]:
    lines = ["| claim | holds when | measured | holds |", "|---|---|--:|---|"]
    for claim in CLAIMS:
        numbers = [number for seed in results.seeds if (number := claim.number(seed)) is not None]
        lines.append(f"| {claim.text} | {claim.criterion} | {spread(numbers, '.3f')} | {verdict(claim, numbers)} |")
    return lines


def verdict(claim: Claim, numbers: Sequence[float]) -> str:
    """ "yes" or "no" where all seeds agree, else in how many it holds."""
    if not numbers:
        return MISSING
    held = sum(claim.holds(number) for number in numbers)
    return {0: "no", len(numbers): "yes"}.get(held, f"{held} of {len(numbers)} seeds")


def _patterns(results: Results) -> list[str]:
    lines = ["| searched patterns | 1/2 | 1/4 | 1/8 |", "|---|---|---|---|"]
    for seed, found in enumerate(results.patterns):
        cells = [f"`{found[keep]}`" if keep in found else MISSING for keep in ("1/2", "1/4", "1/8")]
        lines.append(f"| seed {seed} | {' | '.join(cells)} |")
    return lines


def _lengths(results: Results) -> list[int]:
    return sorted({length for seed in results.seeds for row in seed.values() for length in row.retrieval})


def _short(length: int) -> str:
    return f"{length // 1024}K"


def write_page(path: Path, text: str) -> None:
    """Put the text between the markers of a page. Raises ConfigError when they are not there."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path} has no {BEGIN} and {END}: put them where the table belongs")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    os.replace(partial, path)
