"""Has a kernel become slower? `make bench-check` runs this: the short run of kernels.py against benchmarks/ratios.json.

The file holds, for each kind of processor, the share of the machine's own ceilings that every kernel reached. Shares of
ceilings measured in the same run carry over between machines and busy hours better than speeds do. A kernel that falls
by more than 15 % is measured again, three times at most, and the best counts: other programs only ever take speed away.
`--update` writes what was measured; without stored shares for this processor there is nothing to compare.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import kernels
import torch
from kernel_cases import OPERATIONS, Case, all_cases
from quiet import Patience
from rich.console import Console

from indexshare.kernels import native

RATIOS = Path(__file__).with_name("ratios.json")
TOLERANCE = 0.15
RETRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Names of kernels. fallen, risen: by more than the tolerance. new: not stored; gone: stored, but not measured."""

    fallen: tuple[str, ...]
    risen: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]


def compare(stored: Mapping[str, float], found: Mapping[str, float], tolerance: float = TOLERANCE) -> Comparison:
    """What has changed between stored shares and those found now."""
    both = [name for name in found if name in stored]
    return Comparison(
        fallen=tuple(name for name in both if found[name] < stored[name] * (1 - tolerance)),
        risen=tuple(name for name in both if found[name] > stored[name] * (1 + tolerance)),
        new=tuple(name for name in found if name not in stored),
        gone=tuple(name for name in stored if name not in found),
    )


def better(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The larger share of each kernel; names in the order of `first`."""
    return {name: max(share, second.get(name, 0.0)) for name, share in first.items()}


def kind_of_processor() -> str:
    """What stored shares hold for: instruction set, maker, family and model, threads."""
    fields = [kernels.processor(name) for name in ("vendor_id", "cpu family", "model")]
    vendor, family, model = (field or "unknown" for field in fields)
    return f"{native.instruction_set()} {vendor} family {family} model {model}, {torch.get_num_threads()} threads"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 when a kernel has become slower or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="store what is measured for this kind of processor")
    parser.add_argument("--threads", type=int, help="default all processors")
    options = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False)
    if reason := kernels.start(options.threads):
        console.print(f"there is nothing to measure: {reason}")
        return 1
    kind, all_stored = kind_of_processor(), json.loads(RATIOS.read_text(encoding="utf-8"))
    stored = all_stored.get(kind, {})
    if not stored and not options.update:
        console.print(f"no shares are stored for this processor ({kind}): nothing to compare. On a quiet machine,")
        console.print("`make bench-check BENCH_ARGUMENTS=--update` stores them in benchmarks/ratios.json")
        return 0
    cases = all_cases(OPERATIONS, quick=True)
    if wrong := kernels.check(cases, console):
        console.print("\n".join(f"wrong: {name}: {what}" for name, what in wrong.items()))
        return 1
    found = _measure(cases, stored, console)
    if options.update:
        all_stored[kind] = {name: round(share, 3) for name, share in found.items()}
        RATIOS.write_text(json.dumps(dict(sorted(all_stored.items())), indent=1) + "\n", encoding="utf-8")
        console.print(f"stored {len(found)} shares for {kind}")
        return 0
    return report(stored, found, console)


def _measure(cases: Sequence[Case], stored: Mapping[str, float], console: Console) -> dict[str, float]:
    """Name -> share of the ceiling; what falls short of the stored one is measured again."""
    found = _shares(cases, console)
    for _ in range(RETRIES):
        again = [case for case in cases if case.name in compare(stored, found).fallen]
        if not again:
            break
        console.print(f"slower than stored, measured again: {', '.join(case.name for case in again)}")
        found = better(found, _shares(again, console))
    return found


def _shares(cases: Sequence[Case], console: Console) -> dict[str, float]:
    figures, _ = kernels.measure(cases, quick=True, progress=console, patience=Patience(kernels.PATIENCE))
    kernels.warn_of_others(figures, console)
    return {figure.name: figure.best_share for figure in figures}


def report(stored: Mapping[str, float], found: Mapping[str, float], console: Console) -> int:
    """Says what has changed; 1 when a kernel has fallen."""
    changes = compare(stored, found)
    for name in changes.risen:
        console.print(f"faster: {name}: {stored[name]:.0%} of the ceiling, now {found[name]:.0%}")
    for names, what in ((changes.new, "not stored yet"), (changes.gone, "stored, but no longer measured")):
        if names:
            console.print(f"{what}: {', '.join(names)}")
    if changes.risen or changes.new or changes.gone:
        console.print("`make bench-check BENCH_ARGUMENTS=--update` stores the shares of this run")
    for name in changes.fallen:
        console.print(f"[bold red]slower[/]: {name}: {stored[name]:.0%} of the ceiling, now {found[name]:.0%}")
    if not changes.fallen:
        console.print(f"{len(found)} kernels are as fast as stored, within {TOLERANCE:.0%}")
    return 1 if changes.fallen else 0


if __name__ == "__main__":
    sys.exit(main())
