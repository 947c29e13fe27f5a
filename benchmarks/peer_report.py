"""What a run of peers.py found: tables, a file with every repeat, a picture."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from agreement import Agreement
from quiet import QUIET_SHARE
from rich.console import Console
from rich.table import Table

from indexshare.eval.pictures import short_number

LLAMA_FLASH, LLAMA_PLAIN = "llama.cpp fa", "llama.cpp"
COLOURS = {"ours": "#2f7de1", "llama.cpp": "#e08a1e", "transformers": "#8a8f98"}
STYLES = {"bf16": "-", "int8": "--", "int4": ":"}
GIB = 2**30


@dataclass(slots=True, kw_only=True)
class Measurement:
    """One engine in one format at one depth. prefill, decode: tokens per second of every repeat.

    prefill_others, decode_others: the share of the processors that other programs had meanwhile.
    prefill_tokens: read in one repeat. context_seconds: until the depth was there, real or grown. peak_bytes: resident
    memory of the process at its highest after that, weights and cache included.
    """

    engine: str
    format: str
    depth: int
    prefill_tokens: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    prefill_others: list[float] = field(default_factory=list)
    decode_others: list[float] = field(default_factory=list)
    context_seconds: float = 0.0
    peak_bytes: int = 0

    def speed(self, kind: str) -> float | None:
        """The median of "prefill" or "decode"; None where it was not measured."""
        speeds = self.prefill if kind == "prefill" else self.decode
        return median(speeds) if speeds else None

    def was_disturbed(self, kind: str) -> bool:
        """Whether the median comes from a machine that was not quiet."""
        others = self.prefill_others if kind == "prefill" else self.decode_others
        return bool(others) and median(others) > QUIET_SHARE


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that was found. missing: what could not be measured, and why."""

    model: str
    machine: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    agreements: list[Agreement] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    begun: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def formats(self) -> list[str]:
        return list(dict.fromkeys(one.format for one in self.measurements))

    @property
    def depths(self) -> list[int]:
        return sorted({one.depth for one in self.measurements})

    def engines(self, number_format: str) -> list[str]:
        return list(dict.fromkeys(one.engine for one in self.measurements if one.format == number_format))

    def measurements_of(self, name: str) -> list[Measurement]:
        """Those of "engine format", in the order of their depths."""
        return [one for one in self.measurements if f"{one.engine} {one.format}" == name]

    def find(self, engine: str, number_format: str, depth: int) -> Measurement | None:
        for one in self.measurements:
            if (one.engine, one.format, one.depth) == (engine, number_format, depth):
                return one
        return None

    def speed(self, engine: str, number_format: str, depth: int, kind: str) -> float | None:
        one = self.find(engine, number_format, depth)
        return one.speed(kind) if one else None

    def best_llama(self, number_format: str, depth: int, kind: str) -> float | None:
        """llama.cpp's better setting for this figure."""
        speeds = [self.speed(engine, number_format, depth, kind) for engine in (LLAMA_FLASH, LLAMA_PLAIN)]
        return max((speed for speed in speeds if speed is not None), default=None)

    def ratio(self, number_format: str, depth: int, kind: str) -> float | None:
        """Ours over the better llama.cpp."""
        own, other = self.speed("ours", number_format, depth, kind), self.best_llama(number_format, depth, kind)
        return own / other if own is not None and other is not None else None


def describe_machine(threads: int) -> dict[str, str]:
    """Processor, threads, memory, system."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": names[0] if names else platform.machine(),
        "threads": f"{threads} of {os.cpu_count()} processors",
        "memory": f"{memory / GIB:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def line(one: Measurement) -> str:
    """A measurement as it is told while the run goes on."""
    return (
        f"{one.format} {short_number(one.depth):>4} {one.engine:14} prefill {_figure(one, 'prefill'):>6}, "
        f"decode {_figure(one, 'decode'):>6} tokens/s, peak {one.peak_bytes / GIB:.2f} GiB"
    )


def print_agreement(found: Agreement, console: Console) -> None:
    attention = "sparse" if found.sparse else "dense"
    console.print(
        f"{found.model} {found.format} {found.engine:14} {found.num_tokens:>5} tokens ({attention}): "
        f"KL {found.kl:.1e}, same first token {found.same_first:.0%}{'' if found.holds else ' - NOT THE SAME MODEL'}"
    )


def print_tables(run: Run, console: Console) -> None:
    """One table for each format, ratios in it, then where this was."""
    for number_format in run.formats:
        table = Table(title=f"{run.model} {number_format}, tokens/s (medians)", title_justify="left")
        table.add_column("")
        for depth in run.depths:
            table.add_column(f"depth {short_number(depth)}", justify="right")
        for kind in ("prefill", "decode"):
            for engine in run.engines(number_format):
                found = [run.find(engine, number_format, depth) for depth in run.depths]
                table.add_row(f"{kind}, {engine}", *(_figure(one, kind) for one in found))
            ratios = [run.ratio(number_format, depth, kind) for depth in run.depths]
            texts = ["-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
            table.add_row(f"{kind}, ours / best llama.cpp", *texts, style="bold", end_section=True)
        for engine in run.engines(number_format):
            found = [run.find(engine, number_format, depth) for depth in run.depths]
            table.add_row(f"peak GiB, {engine}", *(f"{one.peak_bytes / GIB:.2f}" if one else "-" for one in found))
        console.print(table)
    if any(one.was_disturbed(kind) for one in run.measurements for kind in ("prefill", "decode")):
        console.print("~ other programs had more than 5 % of the processors while this was measured", soft_wrap=True)
    for name, text in (run.machine | run.versions).items():
        console.print(f"{name}: {text}", highlight=False, soft_wrap=True)
    for name, reason in run.missing.items():
        console.print(f"not measured: {name}: {reason}", highlight=False, soft_wrap=True)
    if not run.agreements:
        console.print("the engines were NOT compared: these speeds may be those of different models", soft_wrap=True)


def write_json(run: Run, path: Path) -> None:
    """Every repeat and the medians, replaced as a whole."""
    content = {
        "benchmark": "peers",
        "begun": run.begun,
        "model": run.model,
        "machine": run.machine,
        "versions": run.versions,
        "agreements": [found.to_json() for found in run.agreements],
        "measurements": [
            asdict(one) | {f"{kind}_median": one.speed(kind) for kind in ("prefill", "decode")}
            for one in run.measurements
        ],
        "ratios": [
            {"format": number_format, "depth": depth, "kind": kind, "ours_over_best_llama": ratio}
            for number_format in run.formats
            for depth in run.depths
            for kind in ("prefill", "decode")
            if (ratio := run.ratio(number_format, depth, kind)) is not None
        ],
        "missing": run.missing,
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)


def plot(run: Run, path: Path) -> None:
    """Tokens per second against depth, prefill and decode side by side; logarithmic, with depth 0 at the left."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    positive = [depth for depth in run.depths if depth]
    for axes, kind in zip(panels, ("prefill", "decode"), strict=True):
        for name, number_format, points in _curves(run, kind):
            label = f"{name} {number_format}"
            depths, speeds = zip(*points, strict=True)
            axes.plot(depths, speeds, STYLES[number_format], color=COLOURS[name], marker="o", markersize=4, label=label)
        if positive:
            axes.set_xscale("symlog", base=2, linthresh=positive[0], linscale=0.7)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xticks(run.depths, [short_number(depth) for depth in run.depths])
        axes.minorticks_off()
        axes.grid(True, which="both", alpha=0.25)
        axes.set_title(kind)
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("tokens/s")
    panels[0].legend(fontsize=8)
    names = [f"{name} {run.versions[name]}" for name in ("indexshare", "transformers") if name in run.versions]
    names.append(run.versions.get("llama.cpp", "").partition(",")[0])
    figure.suptitle(
        f"{run.model} on {run.machine['processor']}, {run.machine['threads']}; {'; '.join(names)}; {run.begun[:10]}\n"
        "llama.cpp: the better of flash attention on and off",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curves(run: Run, kind: str) -> Iterator[tuple[str, str, list[tuple[int, float]]]]:
    """(name, format, points) of each line; llama.cpp is one line, at its better setting."""
    speeds: dict[str, Callable[[str, int], float | None]] = {
        "ours": lambda number_format, depth: run.speed("ours", number_format, depth, kind),
        "llama.cpp": lambda number_format, depth: run.best_llama(number_format, depth, kind),
        "transformers": lambda number_format, depth: run.speed("transformers", number_format, depth, kind),
    }
    for name, speed in speeds.items():
        for number_format in run.formats:
            found = [(depth, speed(number_format, depth)) for depth in run.depths]
            points = [(depth, value) for depth, value in found if value is not None]
            if points:
                yield name, number_format, points


def _figure(one: Measurement | None, kind: str) -> str:
    """Three digits, with a mark where other programs ran."""
    speed = one.speed(kind) if one else None
    if one is None or speed is None:
        return "-"
    digits = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
    return f"~{digits}" if one.was_disturbed(kind) else digits
