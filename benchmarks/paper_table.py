"""The claims of the IndexCache paper in small: models trained here, with an indexer in every layer and in fewer.

    python benchmarks/paper_table.py --output runs/paper --write docs/indexshare.md      `make paper`: 7 hours
    python benchmarks/paper_table.py --output runs/paper --only 0,base                    one stage of one seed
    python benchmarks/paper_table.py --output /tmp/quick --quick --seeds 1                the same path in minutes

Stages of a seed, each done when OUTPUT/seed-N/STAGE.json is there; what was stopped goes on, also inside of a training:

    base                      the model, trained with an indexer in every layer
    search                    greedy search on it: patterns with a half, a quarter, an eighth of the indexers
    all-trained, ...          the base model with a pattern, trained on by both stages of `share distill`
    measure-VARIANT           loss, retrieval, walks, selection, speed of a row of the table

The table is printed at the end with what is there, and put between the markers of the page of --write.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from paper_measures import Measured, measure_variant
from paper_models import EVERY, Plan, distill, full_plan, quick_plan, search_patterns, train_base, uniform
from paper_report import Results, render, write_page

from indexshare import runtime
from indexshare.errors import ConfigError, IndexShareError
from indexshare.model import native
from indexshare.share.state import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A variant of the table. keep: the share of indexers; pattern: how the layers were picked; training: "" for none,
    else the loss of the indexers in `share distill`'s stages."""

    name: str
    keep: Literal["1", "1/2", "1/4", "1/8"] = "1"
    picked: Literal["every", "uniform", "searched"] = "every"
    training: Literal["", "cross-layer", "own-layer"] = ""
    attention: Literal["sparse", "dense"] = "sparse"


ROWS = (
    Row(name="dense", attention="dense"),
    Row(name="all"),
    Row(name="uniform-2", keep="1/2", picked="uniform"),
    Row(name="searched-2", keep="1/2", picked="searched"),
    Row(name="uniform-4", keep="1/4", picked="uniform"),
    Row(name="searched-4", keep="1/4", picked="searched"),
    Row(name="one", keep="1/8", picked="uniform"),  # of eight layers one: the first, also when searched
    Row(name="all-trained", training="cross-layer"),
    Row(name="uniform-4-cross", keep="1/4", picked="uniform", training="cross-layer"),
    Row(name="uniform-4-own", keep="1/4", picked="uniform", training="own-layer"),
    Row(name="searched-4-cross", keep="1/4", picked="searched", training="cross-layer"),
    Row(name="searched-4-own", keep="1/4", picked="searched", training="own-layer"),
)


class Seed:
    """The stages of one seed, in order."""

    def __init__(self, plan: Plan, seed: int, output: Path) -> None:
        self.plan, self.seed, self.directory = plan, seed, output / f"seed-{seed}"
        self.stages: dict[str, Callable[[], Any]] = {
            "base": lambda: train_base(plan, seed, self.directory),
            "search": lambda: search_patterns(plan, seed, self.directory),
        }
        for row in ROWS:
            if row.training:
                self.stages[row.name] = lambda row=row: self._distill(row)
        for row in ROWS:
            self.stages[f"measure-{row.name}"] = lambda row=row: self._measure(row)

    def run(self, only: str | None) -> None:
        """Every stage that is not done, or `only` that one.

        Raises ConfigError for an unknown stage, and for one that waits for another.
        """
        if only is not None and only not in self.stages:
            raise ConfigError(f"no stage {only!r}; there are: {', '.join(self.stages)}")
        for name, stage in self.stages.items():
            path = self._path(name)
            if path.exists() or (only is not None and name != only):
                continue
            print(f"seed {self.seed}: {name}, {time.strftime('%H:%M:%S')}", flush=True)
            begun = time.monotonic()
            result = stage()
            write_json(path, {"seconds": time.monotonic() - begun, "result": result})

    def result(self, name: str) -> Any:
        """What a stage returned. Raises ConfigError when it is not done."""
        if (found := self.peek(name)) is None:
            raise ConfigError(f"this needs the stage {name} of seed {self.seed} first: --only {self.seed},{name}")
        return found["result"]

    def peek(self, name: str) -> dict[str, Any] | None:
        """A stage's file: seconds and result."""
        path = self._path(name)
        return msgspec.json.decode(path.read_bytes()) if path.exists() else None

    def measured(self) -> dict[str, Measured]:
        """The rows that have been measured, by name."""
        found = {row.name: self.peek(f"measure-{row.name}") for row in ROWS}
        return {
            name: msgspec.convert(entry["result"], Measured, str_keys=True)
            for name, entry in found.items()
            if entry is not None
        }

    def seconds(self) -> dict[str, float]:
        """By stage; of trainings over all calls."""
        found = {name: entry for name in self.stages if (entry := self.peek(name)) is not None}
        return {name: max(entry["seconds"], _trained_for(entry["result"])) for name, entry in found.items()}

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def _pattern(self, row: Row) -> str:
        if row.picked == "every":
            return EVERY
        return uniform(row.keep) if row.picked == "uniform" else self.result("search")[row.keep]

    def _distill(self, row: Row) -> dict[str, float]:
        self.result("base")
        is_cross = row.training == "cross-layer"
        return distill(self.plan, self.seed, self.directory, row.name, self._pattern(row), cross_layer=is_cross)

    def _measure(self, row: Row) -> Measured:
        self.result(row.name if row.training else "base")
        directory = self.directory / (row.name if row.training else "base")
        return measure_variant(self.plan, self.seed, directory, pattern=self._pattern(row), attention=row.attention)


def _trained_for(result: Any) -> float:
    return float(result.get("seconds", 0.0)) if isinstance(result, dict) else 0.0


def check_plan(plan: Plan, output: Path) -> None:
    """Write the plan of a new directory. Raises ConfigError for a directory of another plan."""
    path = output / "plan.json"
    if not path.exists():
        write_json(path, plan)
    elif msgspec.json.decode(path.read_bytes()) != msgspec.json.decode(msgspec.json.encode(plan)):
        raise ConfigError(f"{output} was begun with another plan: name another directory with --output")


def results(plan: Plan, seeds: int, output: Path) -> Results:
    """What is there."""
    every = [Seed(plan, seed, output) for seed in range(seeds)]
    return Results(
        plan=plan.name,
        seeds=tuple(seed.measured() for seed in every),
        patterns=tuple((seed.peek("search") or {"result": {}})["result"] for seed in every),
        seconds=tuple(seed.seconds() for seed in every),
    )


def main() -> None:
    """Run what is missing, show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/paper"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="SEED or SEED,STAGE: nothing else")
    parser.add_argument("--quick", action="store_true", help="models that learn nothing, in minutes")
    parser.add_argument("--json", type=Path, help="write every measurement")
    parser.add_argument("--write", type=Path, help="a page to put the table into")
    options = parser.parse_args()
    plan = quick_plan() if options.quick else full_plan()
    wanted, _, only = (options.only or "").partition(",")
    native.enable()
    runtime.set_threads()
    try:
        check_plan(plan, options.output)
        for seed in [int(wanted)] if wanted else range(options.seeds):
            Seed(plan, seed, options.output).run(only or None)
    except IndexShareError as error:
        raise SystemExit(f"paper_table: {error}") from None
    found = results(plan, options.seeds, options.output)
    text = render(found)
    print(text)
    if options.json:
        write_json(options.json, found)
    if options.write:
        write_page(options.write, text)


if __name__ == "__main__":
    main()
