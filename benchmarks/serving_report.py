"""What a run of serving.py found: tables, a file with every repeat, a picture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from quiet import QUIET_SHARE
from rich.console import Console
from rich.table import Table

TITLES = {
    "load": "throughput and latency, short prompts",
    "long": "a long prompt, read and found in the cache",
    "beside": "four clients while a long prompt is read",
    "overhead": "what HTTP adds to the engine",
    "drafts": "speculative decoding",
    "llama": "beside llama.cpp's server",
}
OTHERS = "others %"
OURS = "indexshare"
MILLISECONDS = 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Something that was measured: part of the benchmark, name, clients; figures: every repeat of each, by name."""

    part: str
    name: str
    num_clients: int
    figures: dict[str, list[float]] = field(default_factory=dict)

    def median(self, figure: str) -> float | None:
        """None where it was not measured. NaN is a repeat without the figure: a reply of one token has no gap."""
        values = [value for value in self.figures.get(figure, ()) if value == value]
        return median(values) if values else None

    @property
    def was_disturbed(self) -> bool:
        """Whether the medians come from a machine that was not quiet."""
        return (self.median(OTHERS) or 0.0) > 100 * QUIET_SHARE


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that was found. notes: sentences for the reader, such as what was not measured and why."""

    model: str
    machine: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    begun: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(self, part: str, name: str, num_clients: int, figures: Mapping[str, float]) -> None:
        """One repeat of a case. The name of a figure has its unit: "tokens/s", "TTFT p50 ms"."""
        case = self.find(part, name, num_clients)
        if case is None:
            self.cases.append(case := Case(part=part, name=name, num_clients=num_clients))
        for figure, value in figures.items():
            case.figures.setdefault(figure, []).append(value)

    def find(self, part: str, name: str, num_clients: int) -> Case | None:
        wanted = (part, name, num_clients)
        return next((case for case in self.cases if (case.part, case.name, case.num_clients) == wanted), None)

    def median(self, part: str, name: str, num_clients: int, figure: str) -> float | None:
        case = self.find(part, name, num_clients)
        return case.median(figure) if case else None

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(case.part for case in self.cases))

    def note(self, text: str) -> None:
        """Once, however often it is said."""
        if text not in self.notes:
            self.notes.append(text)


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated; NaN without values."""
    return float(np.percentile(values, percent)) if values else float("nan")


def latencies(first_seconds: Sequence[float], gaps: Sequence[float]) -> dict[str, float]:
    """Time to first token and between arrivals, in ms, as figures of `Run.add`."""
    return {
        f"{name} p{percent} ms": MILLISECONDS * percentile(values, percent)
        for name, values in (("TTFT", first_seconds), ("ITL", gaps))
        for percent in (50, 95)
    }


def ratios(run: Run) -> Iterator[tuple[str, float]]:
    """Quotients of medians that the tables do not show."""
    for case in run.cases:
        name, clients = case.name, f"{case.num_clients} client{'s' * (case.num_clients > 1)}"

        def quotient(other: str, figure: str, case: Case = case) -> float | None:
            own, theirs = case.median(figure), run.median(case.part, other, case.num_clients, figure)
            return own / theirs if own and theirs else None

        if case.part == "long" and name.endswith("cold"):
            found = {f"TTFT {name} / warm": quotient(name.replace("cold", "warm"), "TTFT p50 ms")}
        elif case.part == "drafts" and ", 0 " not in name:
            plain = name.partition(", ")[0] + (", 0 drafts, server" if name.endswith("server") else ", 0 drafts")
            found = {f"tokens/s {name} / no drafts": quotient(plain, "tokens/s")}
        elif case.part == "llama" and name != OURS:
            speed, first = quotient(OURS, "tokens/s"), quotient(OURS, "TTFT p50 ms")
            found = {f"tokens/s {OURS} / {name}": 1 / speed if speed else None, f"TTFT {name} / {OURS}": first}
        else:
            found = {}
        yield from ((f"{what}, {clients}", value) for what, value in found.items() if value)


def print_tables(run: Run, console: Console) -> None:
    """One table for each part, ratios, notes, then where this was."""
    for part in run.parts:
        cases = [case for case in run.cases if case.part == part]
        names = list(dict.fromkeys(figure for case in cases for figure in case.figures))
        table = Table(title=f"{run.model}: {TITLES.get(part, part)} (medians)", title_justify="left")
        table.add_column("")
        for name in ("clients", *names):
            table.add_column(name, justify="right")
        for case in cases:
            mark = "~" if case.was_disturbed else ""
            table.add_row(mark + case.name, str(case.num_clients), *(short(case.median(name)) for name in names))
        console.print(table)
    if any(case.was_disturbed for case in run.cases):
        console.print("~ other programs had more than 5 % of the processors while this was measured", soft_wrap=True)
    for name, value in ratios(run):
        console.print(f"{name}: {value:.2f}x", highlight=False, soft_wrap=True)
    for text in run.notes:
        console.print(text, highlight=False, soft_wrap=True)
    for name, text in (run.machine | run.versions).items():
        console.print(f"{name}: {text}", highlight=False, soft_wrap=True)


def short(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_json(run: Run, path: Path) -> None:
    """Every repeat and the medians, replaced as a whole. NaN, which JSON has not, becomes null."""
    content = {
        "benchmark": "serving",
        "begun": run.begun,
        "model": run.model,
        "settings": run.settings,
        "machine": run.machine,
        "versions": run.versions,
        "cases": [
            {
                "part": case.part,
                "name": case.name,
                "clients": case.num_clients,
                "medians": {figure: case.median(figure) for figure in case.figures},
                "repeats": {figure: list(map(_number, values)) for figure, values in case.figures.items()},
            }
            for case in run.cases
        ],
        "ratios": dict(ratios(run)),
        "notes": run.notes,
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.rename(path)


def _number(value: float) -> float | None:
    return None if value != value else value


def plot(run: Run, path: Path) -> None:
    """Tokens per second, and time to first token, against the number of clients."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes, name in zip(panels, ("tokens/s", "TTFT p50 ms"), strict=True):
        for part in ("load", "llama"):
            cases = [case for case in run.cases if case.part == part]
            for label in dict.fromkeys(case.name for case in cases):
                points = [(case.num_clients, case.median(name)) for case in cases if case.name == label]
                clients, values = zip(*sorted(points), strict=True)
                style = {"linestyle": "-" if part == "load" else "--", "marker": "o"}
                axes.plot(clients, values, label=label if part == "load" else f"{label}, long prompts", **style)
        ticks = sorted({case.num_clients for case in run.cases if case.part in ("load", "llama")})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(True, which="both", alpha=0.25)
        axes.set_title(name)
        axes.set_xlabel("clients")
    panels[0].legend(fontsize=8)
    figure.suptitle(
        f"{run.model} on {run.machine['processor']}, {run.machine['threads']}; {run.begun[:10]}", fontsize=9
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
