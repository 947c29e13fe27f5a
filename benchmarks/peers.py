"""indexshare beside llama.cpp and transformers: the same model, the same machine, one run.

    python benchmarks/peers.py --model mid --json peers.json --plot peers.png

Makes a seeded random checkpoint, builds llama.cpp where it is not built yet, converts, checks that the engines compute
the same model (agreement.py; no speed is shown otherwise) and measures prefill and decode at several depths of context,
all engines in turn and several times over, while the machine is quiet (quiet.py).
Needs Linux, a C++ compiler and `pip install -e .[oracle,bench]`. Build and checkpoints are kept in INDEXSHARE_PEERS
(default ~/.cache/indexshare/peers): 10 GB for `mid`.

Formats: bf16 (BF16), int8 (Q8_0), int4 (Q4_K_M), in brackets llama.cpp's of the same width. llama.cpp is measured with
and without flash attention, and each ratio is against the better of the two.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agreement
import checkpoints
import llama_build
import peer_report
from agreement import Candidate, Missing
from peer_report import Measurement, Run
from quiet import NOISY_SHARE, Patience
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from workers import CHUNK_SIZE, PROBE_TOKENS, Progress, Worker, WorkerError

HERE = Path(__file__).parent
ENGINES = ("ours", "llama.cpp", "transformers")
FORMATS = tuple(llama_build.GGUF_TYPES)
DEPTHS = (0, 4096, 16_384, 32_768, 65_536)
PREFILL_TOKENS = (512, 128, 64)  # the most that takes no longer than PREFILL_SECONDS
PREFILL_SECONDS, LIMIT_SECONDS = 20.0, 120.0  # above the limit nothing is measured
DECODE_TOKENS, DECODE_SECONDS = 32, 10.0
DECODES_WITHOUT_FLASH_BELOW = 16_384  # slower than with it from 4K on, and by more and more
TRANSFORMERS_DEPTH = {"mid": 4096, "tiny": 8192}  # beyond that it needs minutes for a figure, then the memory
GROWTH_DEPTH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An engine in one format. deepest, decodes_to: up to which depth it is measured."""

    candidate: Candidate
    deepest: int
    decodes_to: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Racer:
    """A contender and its process."""

    contender: Contender
    worker: Worker


Step = Callable[[str], AbstractContextManager[Progress]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(stderr=True, soft_wrap=True)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install -e .[bench]")
    work = options.work or llama_build.cache_directory() / "work"
    work.mkdir(parents=True, exist_ok=True)
    run = Run(model=options.model, machine=peer_report.describe_machine(options.threads))
    interrupted = False
    try:
        contenders = _prepare(options, work, console)
        if not options.skip_agreement:
            contenders = _check(options, contenders, work, run, console)
        _measure_all(options, contenders, work, run, console)
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted; what was measured so far follows")
    peer_report.print_tables(run, Console())
    if options.plot and run.measurements:
        peer_report.plot(run, options.plot)
    return 130 if interrupted else 0 if run.measurements else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(known: Sequence[str]) -> Any:
        def parse(text: str) -> tuple[str, ...]:
            if unknown := sorted(set(text.split(",")) - set(known)):
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
            return tuple(name for name in known if name in text.split(","))

        return parse

    def at_least(least: int) -> Any:
        def parse(text: str) -> int:
            if int(text) < least:
                raise argparse.ArgumentTypeError(f"{text} is less than {least}")
            return int(text)

        return parse

    def depths(text: str) -> tuple[int, ...]:
        return tuple(sorted({at_least(0)(depth) for depth in text.split(",")}))

    parser.add_argument("--model", choices=("mid", "tiny"), default="mid", help="1.5 G or 14 M parameters")
    parser.add_argument("--formats", type=words(FORMATS), default=FORMATS, help="default bf16,int8,int4")
    parser.add_argument("--engines", type=words(ENGINES), default=ENGINES, help="default ours,llama.cpp,transformers")
    parser.add_argument("--depths", type=depths, default=DEPTHS, help="tokens of context, default 0,4096,...,65536")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="of each figure, interleaved; the median counts")
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait, in all, for a quiet machine")
    parser.add_argument(
        "--threads", type=at_least(1), default=len(os.sched_getaffinity(0)), help="default all processors"
    )
    parser.add_argument("--work", type=Path, help="where checkpoints and logs go, default in the cache directory")
    parser.add_argument("--json", type=Path, help="write every repeat, the medians, machine and versions")
    parser.add_argument("--plot", type=Path, help="write a picture, e.g. peers.png")
    parser.add_argument("--skip-agreement", action="store_true", help="while working on the benchmark; it is recorded")
    parser.add_argument(
        "--check-growth", action="store_true", help=f"also measure llama.cpp on {GROWTH_DEPTH:,} tokens that were read"
    )
    return parser.parse_args(arguments)


def _prepare(options: argparse.Namespace, work: Path, console: Console) -> list[Contender]:
    """Checkpoint, build, conversions; then who takes part."""
    console.print(f"checkpoint {options.model} in {work}")
    checkpoint = checkpoints.make(options.model, work)
    contenders = []
    if "llama.cpp" in options.engines:
        llama_build.ensure_built()
    for number_format in options.formats:
        contenders += _contenders(options, number_format, checkpoint)
    return contenders


def _contenders(options: argparse.Namespace, number_format: str, checkpoint: Path) -> Iterator[Contender]:
    threads, depths = options.threads, options.depths
    own: dict[str, Any] = {"directory": str(checkpoint), "dtype": "bfloat16", "threads": threads}

    def contender(engine: str, script: str, arguments: dict[str, Any], deepest: int, decodes_to: int) -> Contender:
        candidate = Candidate(engine=engine, format=number_format, script=script, arguments=arguments)
        return Contender(candidate=candidate, deepest=deepest, decodes_to=decodes_to)

    if "ours" in options.engines:
        quant = None if number_format == "bf16" else number_format
        arguments = own | {"quant": quant, "max_tokens": depths[-1] + 4 * CHUNK_SIZE}
        yield contender("ours", "engine_ours.py", arguments, depths[-1], depths[-1])
    if "llama.cpp" in options.engines:
        path = str(llama_build.ensure_gguf(checkpoint, llama_build.GGUF_TYPES[number_format]))
        flash = {"path": path, "flash_attention": True, "threads": threads}
        yield contender(peer_report.LLAMA_FLASH, "engine_llama.py", flash, depths[-1], depths[-1])
        plain = flash | {"flash_attention": False}
        yield contender(peer_report.LLAMA_PLAIN, "engine_llama.py", plain, depths[-1], DECODES_WITHOUT_FLASH_BELOW - 1)
        if options.check_growth:
            read = flash | {"grows": False}
            yield contender("llama.cpp fa, context read", "engine_llama.py", read, GROWTH_DEPTH, GROWTH_DEPTH)
    if "transformers" in options.engines and number_format == "bf16":
        deepest = TRANSFORMERS_DEPTH[options.model]
        yield contender("transformers", "engine_transformers.py", own, deepest, deepest)


def _check(
    options: argparse.Namespace, contenders: list[Contender], work: Path, run: Run, console: Console
) -> list[Contender]:
    """Those that can be measured. Exits when one does not compute the same model."""
    missing: list[Missing] = []
    checkpoint = checkpoints.make(options.model, work)
    engines = [engine for engine in options.engines if engine != "transformers"]
    candidates = [contender.candidate for contender in contenders if "read" not in contender.candidate.engine]
    with console.status("comparing log-probabilities"):
        for found in agreement.check_exact(work, engines, options.threads):
            if isinstance(found, Missing):
                raise SystemExit(f"{found.engine}: {found.reason}")
            run.agreements.append(found)
            peer_report.print_agreement(found, console)
        for found in agreement.check_near(options.model, checkpoint, candidates, work, options.threads):
            if isinstance(found, Missing):
                missing.append(found)
                console.print(f"{found.engine} has no {found.format}: {found.reason}")
            else:
                run.agreements.append(found)
                peer_report.print_agreement(found, console)
    if not all(found.holds for found in run.agreements):
        raise SystemExit("the engines do not agree: no speeds are measured")
    without = {(one.engine, one.format) for one in missing}
    run.missing.update({f"{one.engine} {one.format}": one.reason for one in missing})
    return [one for one in contenders if (one.candidate.engine, one.candidate.format) not in without]


def _measure_all(
    options: argparse.Namespace, contenders: list[Contender], work: Path, run: Run, console: Console
) -> None:
    """One format after the other; within one, depth by depth, all engines in turn."""
    depths = [depth for one in contenders for depth in options.depths if depth <= one.deepest]
    patience = Patience(options.patience)
    with _progress(console, len(depths) * (1 + options.repeats)) as step:  # the context, then the repeats
        for number_format in options.formats:
            with ExitStack() as stack:
                racers = _start([one for one in contenders if one.candidate.format == number_format], work, run, stack)
                for depth in options.depths:
                    for racer in racers:
                        if racer.contender.deepest < depth:
                            racer.worker.close()  # and give its memory to the others
                    racers = [racer for racer in racers if racer.contender.deepest >= depth]
                    racers = _measure_depth(depth, racers, options.repeats, patience, run, step)
                    for racer in racers:
                        console.print(peer_report.line(run.measurements_of(racer.worker.name)[-1]))
                    if options.json:
                        peer_report.write_json(run, options.json)


def _start(contenders: list[Contender], work: Path, run: Run, stack: ExitStack) -> list[Racer]:
    """A worker for each, until the stack is left; those that cannot load are noted."""
    racers = []
    for one in contenders:
        candidate = one.candidate
        name = f"{candidate.engine} {candidate.format}"
        log = work / "logs" / f"{run.model}-{name.replace(' ', '-')}.log"
        try:
            worker = stack.enter_context(Worker(name, HERE / candidate.script, candidate.arguments, log))
        except WorkerError as error:
            run.missing[name] = str(error)
            continue
        run.versions |= worker.versions
        racers.append(Racer(contender=one, worker=worker))
    return racers


def _measure_depth(
    depth: int, racers: list[Racer], repeats: int, patience: Patience, run: Run, step: Step
) -> list[Racer]:
    """Measure at one depth; those that are still there afterwards."""
    found: dict[str, Measurement] = {}

    def attempt(racer: Racer, what: str, action: Callable[[Racer, Progress], None]) -> bool:
        with step(f"{racer.worker.name}, {depth:,} tokens: {what}") as progress:
            try:
                action(racer, progress)
            except WorkerError as error:
                run.missing[f"{racer.worker.name} at {depth:,}"] = str(error)
                racer.worker.close()
                return False
        return True

    def set_depth(racer: Racer, progress: Progress) -> None:
        answer = racer.worker.call("depth", num_tokens=depth, progress=progress)
        found[racer.worker.name] = Measurement(
            engine=racer.contender.candidate.engine,
            format=racer.contender.candidate.format,
            depth=depth,
            prefill_tokens=_prefill_tokens(depth, answer["probe_seconds"]),
            context_seconds=answer["seconds"],
        )

    def repeat(racer: Racer, progress: Progress) -> None:
        one = found[racer.worker.name]
        if one.prefill_tokens:
            answer = _undisturbed(racer.worker, patience, "prefill", num_tokens=one.prefill_tokens)
            one.prefill.append(one.prefill_tokens / answer["seconds"])
            one.prefill_others.append(answer["others"])
        if depth <= racer.contender.decodes_to:
            limits = {"num_tokens": DECODE_TOKENS, "most_seconds": DECODE_SECONDS}
            answer = _undisturbed(racer.worker, patience, "decode", **limits)
            one.decode.append(answer["num_tokens"] / answer["seconds"])
            one.decode_others.append(answer["others"])
        one.peak_bytes = racer.worker.call("peak")["bytes"]

    racers = [racer for racer in racers if attempt(racer, "reading", set_depth)]
    for _ in range(repeats):
        racers = [racer for racer in racers if attempt(racer, "measuring", repeat)]
    run.measurements += [found[racer.worker.name] for racer in racers]
    return racers


def _undisturbed(worker: Worker, patience: Patience, action: str, **arguments: Any) -> dict[str, Any]:
    """The answer of a call during which the machine was quiet, or of any when there is no patience left."""
    while True:
        patience.wait()
        answer = worker.call(action, **arguments)
        if answer["others"] <= NOISY_SHARE or patience.seconds <= 0:
            return answer
        patience.seconds -= answer["seconds"]


def _prefill_tokens(depth: int, probe_seconds: float) -> int:
    """How many tokens a prefill is timed with: the same for all engines that are fast enough. 0: too slow for any.

    Always the most at depth 0, where a short prefill reads as many weights for fewer tokens.
    """
    for num_tokens in PREFILL_TOKENS:
        if depth == 0 or probe_seconds * num_tokens / PROBE_TOKENS <= PREFILL_SECONDS:
            return num_tokens
    return PREFILL_TOKENS[-1] if probe_seconds * PREFILL_TOKENS[-1] / PROBE_TOKENS <= LIMIT_SECONDS else 0


@contextmanager
def _progress(console: Console, num_steps: int) -> Generator[Step]:
    """A bar with the time left, on a terminal. `step(what)` is a context that gives long reads a bar of their own."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bars:
        whole = bars.add_task("all", total=num_steps)

        @contextmanager
        def step(what: str) -> Generator[Progress]:
            task = bars.add_task(what, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
            bars.remove_task(task)
            bars.advance(whole)

        yield step


if __name__ == "__main__":
    sys.exit(main())
