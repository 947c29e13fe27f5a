"""`indexshare serve` over HTTP: throughput, latency, what HTTP costs, drafts, and llama.cpp's server beside it.

    python benchmarks/serving.py --model mid --json serving.json --plot serving.png
    python benchmarks/serving.py --model nano --parts load,drafts --quick

Each server is a process on 127.0.0.1, the clients are another one (serving_client.py); all figures are medians of
repeats that take turns, while the machine is quiet (quiet.py). A server that is not measured stands still. Prompts are
random token ids except for drafts. ITL is the time between two arrivals of text at a client, so that tokens that come
together count once.

Parts: load     short prompts at 1 to 64 clients, all different and all the same
       long     time to first token of 32K tokens, read and found in the cache
       beside   clients that decode while somebody's 32K tokens are read
       overhead a request, and a token, over HTTP and in an engine without it
       drafts   speculative decoding on code and retrieval (nano)
       llama    8K prompts beside llama.cpp's server (mid, tiny), built when it is first needed: minutes

Linux only. Checkpoints and llama.cpp are kept in INDEXSHARE_PEERS (peers.py), 6 GB for `mid`; llama and --plot need
`pip install -e .[oracle,bench]`. Ctrl-C ends every process, prints what was found and writes it.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import llama_build
import peer_report
import serving_llama
import serving_model
import serving_parts
import serving_report
import torch
from rich.console import Console
from serving_bench import QUICK, Bench, Sizes, Step
from serving_client import LoadError
from serving_engine import EngineError
from serving_report import Run
from serving_servers import ServerError, end_on_signal

import indexshare

PARTS: dict[str, Callable[[Bench], list[Step]]] = {
    "load": serving_parts.load,
    "long": serving_parts.long,
    "beside": serving_parts.beside,
    "overhead": serving_parts.overhead,
    "drafts": serving_parts.drafts,
    "llama": serving_llama.llama,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(stderr=True, soft_wrap=True)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install -e .[bench]")
    end_on_signal()
    work = options.work or llama_build.cache_directory() / "work"
    work.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if options.quick else Sizes()
    run = Run(
        model=options.model,
        machine=peer_report.describe_machine(options.threads),
        settings={"repeats": options.repeats, "threads": options.threads, **asdict(sizes)},
        versions={"indexshare": indexshare.__version__, "torch": str(torch.__version__)},
    )
    code = 0
    try:
        console.print(f"model {options.model} in {work}")
        served = serving_model.prepare(options.model, work)
        bench = Bench(served, sizes, run, work=work, threads=options.threads, patience=options.patience)
        measure_all(bench, options.parts, options.repeats, console, options.json)
    except KeyboardInterrupt:
        code = 130
        console.print("interrupted; what was measured so far follows")
    except (ServerError, LoadError, EngineError) as error:
        code = 1
        run.note(f"ended early: {error}")
    serving_report.print_tables(run, Console(width=None if sys.stdout.isatty() else 160))
    if options.json:
        serving_report.write_json(run, options.json)
    if options.plot and {"load", "llama"} & set(run.parts):
        serving_report.plot(run, options.plot)
    return code if run.cases else code or 1


def measure_all(bench: Bench, parts: Sequence[str], repeats: int, console: Console, json_file: Path | None) -> None:
    """Part by part; within one, all steps in turn, as often as there are repeats. Ends the servers."""
    try:
        for part in parts:
            if part == "llama":  # one server after the other, each alone in memory
                bench.close_servers()
            steps = PARTS[part](bench)
            total, done, begun = repeats * sum(step.weight for step in steps), 0.0, time.monotonic()
            for repeat in range(repeats):
                for step in steps:
                    left = _left(begun, done, total)
                    with console.status(f"{part} {repeat + 1} of {repeats}: {step.name}; {left}"):
                        clock = time.monotonic()
                        step.run()
                    done += step.weight
                    seconds, left = time.monotonic() - clock, _left(begun, done, total)
                    console.print(
                        f"{part} {repeat + 1}/{repeats}: {step.name}: {seconds:.0f} s; {left}", highlight=False
                    )
                    if json_file:
                        serving_report.write_json(bench.run, json_file)
    finally:
        bench.close_servers()


def _left(begun: float, done: float, total: float) -> str:
    """An estimate for the part, from the weights of its steps and the time they took so far."""
    seconds = (time.monotonic() - begun) * (total - done) / done if done else total
    return f"about {seconds / 60:.1f} min of this part left"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parts(text: str) -> tuple[str, ...]:
        if unknown := sorted(set(text.split(",")) - set(PARTS)):
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
        return tuple(name for name in PARTS if name in text.split(","))

    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is less than 1")
        return int(text)

    all_threads = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--model", choices=("nano", "mid", "tiny"), default="nano", help="12 M, 1.5 G or 14 M parameters"
    )
    parser.add_argument("--parts", type=parts, default=tuple(PARTS), help=f"default {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="short prompts, few clients: to try the benchmark itself")
    parser.add_argument("--repeats", type=positive, default=3, help="of each figure; the median counts")
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait, in all, for a quiet machine")
    parser.add_argument("--threads", type=positive, default=all_threads, help="of each engine, default all processors")
    parser.add_argument("--work", type=Path, help="where checkpoints and logs go, default in the cache directory")
    parser.add_argument("--json", type=Path, help="write every repeat, the medians, ratios, machine and versions")
    parser.add_argument("--plot", type=Path, help="write a picture, e.g. serving.png")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
