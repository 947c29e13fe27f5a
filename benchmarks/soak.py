"""A server under mixed traffic for as long as you like: does it give right answers, and does it lose anything?

    python benchmarks/soak.py --minutes 30 --json soak.json

`indexshare serve nano` with a small cache and two API keys, and clients that chat and complete, stream or not, call
tools, ask for JSON, read slowly, send nonsense and go away in the middle (serving_traffic.py). Every finished greedy
answer must be the one that the model gives without a server. At the end nothing may run, wait or be held, memory must
be what it was after the first fifth of the time, and SIGTERM must let the last reply finish. Exit code 1 otherwise.
Linux only; needs `pip install -e .[server,dev]`.
"""

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import peer_report
from rich.console import Console
from rich.table import Table
from serving_servers import Server, ServerError, end_on_signal, our_server
from serving_traffic import Answer, Exchange, Tally, ask, check, make_exchanges, open_client, run_client

import indexshare

SAMPLE_SECONDS = 5.0
WARM_UP = (0.2, 0.3)  # shares of the time between which memory is what it should stay
MAX_GROWTH = 1.05
IDLE_SECONDS = 30.0
DRAIN_SECONDS = 20
LAST_REPLY_TOKENS = 400
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The server at a moment: seconds since the traffic began, and what /metrics says of the engine."""

    seconds: float
    rss_bytes: int
    engine: Mapping[str, float]


@dataclass(slots=True, kw_only=True)
class Soak:
    """What a run found."""

    minutes: float
    tally: Tally = field(default_factory=Tally)
    samples: list[Sample] = field(default_factory=list)
    last: Sample | None = None
    exit_seconds: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(stderr=True, soft_wrap=True)
    end_on_signal()
    soak = Soak(minutes=options.minutes)
    try:
        with tempfile.TemporaryDirectory() as directory:
            _run(options, Path(directory), soak, console)
    except (ServerError, OSError, httpx2.HTTPError) as error:
        soak.tally.violation(f"the server has gone: {type(error).__name__}: {error}; --log FILE keeps what it said")
    except KeyboardInterrupt:
        soak.tally.violation("interrupted")
    report(soak, Console(soft_wrap=True))
    if options.json:
        options.json.write_text(json.dumps(to_json(soak), indent=1) + "\n", encoding="utf-8")
    return 1 if soak.tally.violations else 0


def _run(options: argparse.Namespace, directory: Path, soak: Soak, console: Console) -> None:
    console.print("answers without a server")
    with console.status("generating"):
        exchanges = make_exchanges(indexshare.load("nano"))
    keys = {tenant: secrets.token_urlsafe(24) for tenant in ("first", "second")}
    key_file = directory / "keys"
    key_file.touch(mode=0o600)
    key_file.write_text("".join(f"{tenant}:{key}\n" for tenant, key in keys.items()))
    server = our_server(
        "nano",
        options.log or directory / "server.log",
        name="the server",
        key=keys["first"],
        api_key_file=key_file,
        cache_tokens=options.cache_tokens,
        max_sequences=options.clients,
        drain_seconds=DRAIN_SECONDS,
    )
    with server:
        server.wait()
        console.print(f"{options.clients} clients for {options.minutes:g} minutes, {len(exchanges)} different requests")
        asyncio.run(_traffic(server, list(keys.values()), exchanges, options, soak, console))


async def _traffic(
    server: Server,
    keys: Sequence[str],
    exchanges: Sequence[Exchange],
    options: argparse.Namespace,
    soak: Soak,
    console: Console,
) -> None:
    begun = time.monotonic()
    ends = asyncio.get_running_loop().time() + 60 * options.minutes
    watch = asyncio.create_task(_watch(server, soak, begun, console))
    async with asyncio.TaskGroup() as group:
        for index in range(options.clients):
            key = keys[index % len(keys)]
            group.create_task(run_client(server.port, key, exchanges, soak.tally, options.seed + index, ends))
    watch.cancel()
    await _check_idle(server, soak, begun)
    await _check_end(server, keys[0], exchanges, soak)


async def _watch(server: Server, soak: Soak, begun: float, console: Console) -> None:
    """Samples, and a line about them now and then."""
    while server.is_running:
        sample = await _sample(server, begun)
        soak.samples.append(sample)
        if len(soak.samples) % 12 == 1:
            left = max(0.0, soak.minutes - sample.seconds / 60)
            console.print(
                f"{sum(soak.tally.finished.values()):,} done, {soak.tally.num_violations} violations, "
                f"{sample.rss_bytes / MIB:.0f} MiB, {sample.engine['preempted_total']:.0f} preempted, "
                f"{sample.engine['evicted_pages_total']:.0f} pages evicted; {left:.1f} min left"
            )
        await asyncio.sleep(SAMPLE_SECONDS)


async def _sample(server: Server, begun: float) -> Sample:
    metrics = await asyncio.to_thread(server.metrics)
    prefix = "indexshare_engine_"
    engine = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    engine |= {"5xx": sum(value for name, value in metrics.items() if _is_failure(name))}
    return Sample(seconds=time.monotonic() - begun, rss_bytes=server.rss_bytes, engine=engine)


def _is_failure(name: str) -> bool:
    """Of a request; /ready says 503 while the model is loaded."""
    return name.startswith("indexshare_requests_total") and 'status="5' in name and 'route="/ready"' not in name


async def _check_idle(server: Server, soak: Soak, begun: float) -> None:
    """All clients are gone: nothing is left of them."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        soak.last = last = await _sample(server, begun)
        if not last.engine["running"] + last.engine["waiting"] + last.engine["live_pages"]:
            break
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.2)
    for violation in idle_violations(last.engine) + memory_violations(soak.samples, last, soak.minutes):
        soak.tally.violation(violation)


def idle_violations(engine: Mapping[str, float]) -> list[str]:
    """What is wrong with the engine's figures after all clients have gone; and whether the traffic was hard enough."""
    found = [f"{engine[name]:.0f} {name} at the end" for name in ("running", "waiting", "live_pages") if engine[name]]
    if engine["free_pages"] + engine["cached_pages"] != engine["pages"]:
        found.append(
            f"{engine['free_pages']:.0f} free and {engine['cached_pages']:.0f} cached of {engine['pages']:.0f} pages"
        )
    if engine["5xx"]:
        found.append(f"{engine['5xx']:.0f} requests were answered with 5xx")
    found += [
        f"{name} is 0: the cache was too large or the traffic too light to try that"
        for name in ("preempted_total", "evicted_pages_total")
        if not engine[name]
    ]
    return found


def memory_violations(samples: Sequence[Sample], last: Sample, minutes: float) -> list[str]:
    """Resident memory at the end beside that after the warm-up."""
    first, second = (60 * minutes * share for share in WARM_UP)
    before = [sample.rss_bytes for sample in samples if first <= sample.seconds <= second]
    if not before:
        return ["there is no sample of memory after the warm-up: run it for longer"]
    if last.rss_bytes <= MAX_GROWTH * median(before):
        return []
    return [f"memory grew from {median(before) / MIB:.0f} to {last.rss_bytes / MIB:.0f} MiB"]


async def _check_end(server: Server, key: str, exchanges: Sequence[Exchange], soak: Soak) -> None:
    """It still answers; and SIGTERM while a reply runs lets that finish."""
    tally = soak.tally
    async with open_client(server.port, key) as client:
        answer = await ask(client, exchanges[0], "stream", tally)
        if answer is not None:
            check(exchanges[0], answer, tally)
        body = exchanges[0].body | {"max_tokens": LAST_REPLY_TOKENS}
        long = Exchange(name="the last reply", path=exchanges[0].path, body=body)
        running = asyncio.create_task(ask(client, long, "stream", tally))
        while not (await _sample(server, 0.0)).engine["running"] and not running.done():
            await asyncio.sleep(0.01)
        begun = time.monotonic()
        code = await asyncio.to_thread(server.terminate, DRAIN_SECONDS + 5.0)
        soak.exit_seconds = time.monotonic() - begun
        last: Answer | None = await running
    if code is None:
        tally.violation(f"SIGTERM did not end the server within {DRAIN_SECONDS + 5} seconds")
    elif code not in (0, -15):
        tally.violation(f"SIGTERM ended the server with exit code {code}")
    if last is not None and last.reason not in ("stop", "length"):
        tally.violation(f"SIGTERM cut off a reply that could have finished: {last}")


def report(soak: Soak, console: Console) -> None:
    """What was done, memory and pages, then every violation."""
    tally, samples = soak.tally, [*soak.samples, *([soak.last] if soak.last else [])]
    table = Table(title=f"{soak.minutes:g} minutes", title_justify="left", show_header=False)
    for manner, number in sorted(tally.finished.items()):
        table.add_row(manner, f"{number:,}")
    table.add_row("statuses", ", ".join(f"{status}: {number:,}" for status, number in sorted(tally.statuses.items())))
    if samples:
        last = samples[-1].engine
        sizes = [sample.rss_bytes / MIB for sample in samples]
        table.add_row("memory, MiB", f"{sizes[0]:.0f} at first, {max(sizes):.0f} at most, {sizes[-1]:.0f} at the end")
        for name in ("requests_total", "steps_total", "cached_tokens_total", "evicted_pages_total", "preempted_total"):
            table.add_row(name, f"{last.get(name, 0):,.0f}")
    if soak.exit_seconds is not None:
        table.add_row("seconds from SIGTERM to the end", f"{soak.exit_seconds:.1f}")
    console.print(table)
    console.print(f"{tally.num_violations} violations", style="bold red" if tally.violations else "bold green")
    for text in tally.violations:
        console.print(f"- {text}", highlight=False, markup=False)


def to_json(soak: Soak) -> dict[str, Any]:
    """Everything, with a sample of memory for each moment."""
    return {
        "benchmark": "soak",
        "minutes": soak.minutes,
        "machine": peer_report.describe_machine(0),
        "version": indexshare.__version__,
        "finished": dict(soak.tally.finished),
        "statuses": {str(status): number for status, number in soak.tally.statuses.items()},
        "num_violations": soak.tally.num_violations,
        "violations": soak.tally.violations,
        "exit_seconds": soak.exit_seconds,
        "rss": [[round(sample.seconds, 1), sample.rss_bytes] for sample in soak.samples],
        "engine": dict(soak.last.engine) if soak.last else {},
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of traffic, default 30")
    parser.add_argument("--clients", type=int, default=16, help="at once, default 16")
    parser.add_argument("--cache-tokens", type=int, default=8192, help="of the server, default 8192: too few for all")
    parser.add_argument("--seed", type=int, default=1, help="of the traffic")
    parser.add_argument("--json", type=Path, help="write counts, violations and memory over time")
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
