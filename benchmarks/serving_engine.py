"""The engine without HTTP: what the server's overhead is measured against, and what drafts are worth by position.

`run_jobs(model, jobs, threads)` starts a process, which loads the model and serves each job with an engine of its own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """prompts: token ids; each gets max_tokens greedy tokens, num_at_once of them at a time. num_drafts: in every step,
    whether it pays or not. reads_first: the prompts are in the cache before the time begins."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    num_at_once: int
    num_drafts: int = 0
    cache_tokens: int = 0
    reads_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """request_seconds: median from submitting to the last token. step_seconds: median of the steps in which as many as
    possible decoded, and nothing else happened; 0 without any. drafted, accepted: by position."""

    seconds: float
    num_tokens: int
    request_seconds: float
    step_seconds: float
    drafted: Sequence[int]
    accepted: Sequence[int]


class EngineError(RuntimeError):
    """The engine's process failed."""


def run_jobs(model: str, jobs: Sequence[Job], threads: int) -> list[JobResult]:
    """Raises EngineError with the last line of what the process said."""
    # indexshare refuses variables that it does not know, and this one is the benchmark's.
    environment = {name: value for name, value in os.environ.items() if name != "INDEXSHARE_PEERS"}
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # an interrupt from the keyboard reaches only the parent, which then ends it
    )
    plan = {"model": model, "threads": threads, "jobs": [asdict(job) for job in jobs]}
    try:
        output, errors = process.communicate(json.dumps(plan).encode())
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise EngineError(errors.decode(errors="replace").strip().rpartition("\n")[2])
    return [JobResult(**result) for result in json.loads(output)]


class _Round:
    """Requests on an engine, in this thread."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.begun: dict[Any, float] = {}
        self.ended: dict[Any, float] = {}
        self.decode_steps: list[float] = []

    def deliver(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            assert output.error is None, output.error
            if output.ended is not None:
                self.ended[output.generation] = time.perf_counter()

    def serve(self, generations: Sequence[Any], num_at_once: int) -> None:
        left = list(reversed(generations))
        while left or len(self.ended) < len(self.begun):
            while left and len(self.begun) - len(self.ended) < num_at_once:
                generation = left.pop()
                self.begun[generation] = time.perf_counter()
                self.engine.submit(generation)
            num_ended, num_read = len(self.ended), self.engine.stats()["prompt_tokens"]
            clock = time.perf_counter()
            self.engine.step()
            seconds, stats = time.perf_counter() - clock, self.engine.stats()
            is_decode = stats["prompt_tokens"] == num_read and len(self.ended) == num_ended
            if is_decode and stats["running"] == num_at_once:
                self.decode_steps.append(seconds)


def serve_job(llm: Any, job: Job) -> JobResult:
    """One job on a loaded model."""
    from indexshare.engine.engine import Engine, EngineOptions
    from indexshare.engine.sampler import SamplingParams
    from indexshare.engine.sequence import Generation

    options = EngineOptions(num_drafts=job.num_drafts, adapts_drafts=False, cache_tokens=job.cache_tokens)
    rounds: list[_Round] = []
    engine = Engine(llm, options, deliver=lambda outputs: rounds[-1].deliver(outputs))

    def serve(max_tokens: int) -> None:
        params = SamplingParams(max_new_tokens=max_tokens)
        rounds.append(_Round(engine))
        generations = [Generation(prompt_ids=tuple(ids), params=params, stop_ids=llm.stop_ids) for ids in job.prompts]
        rounds[-1].serve(generations, job.num_at_once)

    if job.reads_first:
        serve(1)
    before, begun = engine.stats(), time.perf_counter()
    serve(job.max_tokens)
    seconds, stats, last = time.perf_counter() - begun, engine.stats(), rounds[-1]
    engine.close()
    return JobResult(
        seconds=seconds,
        num_tokens=int(stats["drawn_tokens"] - before["drawn_tokens"]),
        request_seconds=median(last.ended[generation] - at for generation, at in last.begun.items()),
        step_seconds=median(last.decode_steps) if last.decode_steps else 0.0,
        drafted=stats["drafted"],
        accepted=stats["accepted"],
    )


def main() -> None:
    import indexshare

    plan = json.loads(sys.stdin.buffer.read())
    llm = indexshare.load(plan["model"], threads=plan["threads"], device="cpu")
    serve_job(llm, Job(prompts=[list(range(300, 600))], max_tokens=8, num_at_once=1, cache_tokens=1024))  # wakes it
    json.dump([asdict(serve_job(llm, Job(**job))) for job in plan["jobs"]], sys.stdout)


if __name__ == "__main__":
    main()
