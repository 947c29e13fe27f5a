"""The engine without HTTP: what the server's overhead is measured against, and what drafts are worth by position.

`run_jobs(model, jobs)` starts a process of its own, which loads the model and serves each job with an engine of its own.
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
    whether it pays or not."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    num_at_once: int
    num_drafts: int = 0
    cache_tokens: int = 0


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


def serve_job(llm: Any, job: Job) -> JobResult:
    """One job on a loaded model, in this thread."""
    from indexshare.engine.engine import Engine, EngineOptions
    from indexshare.engine.sampler import SamplingParams
    from indexshare.engine.sequence import Generation, Output

    begun: dict[Generation, float] = {}
    ended: dict[Generation, float] = {}

    def deliver(outputs: Sequence[Output]) -> None:
        for output in outputs:
            assert output.error is None, output.error
            if output.ended is not None:
                ended[output.generation] = time.perf_counter()

    options = EngineOptions(num_drafts=job.num_drafts, adapts_drafts=False, cache_tokens=job.cache_tokens)
    engine = Engine(llm, options, deliver=deliver)
    params = SamplingParams(max_new_tokens=job.max_tokens)
    stop_ids = llm.stop_ids
    left = [Generation(prompt_ids=tuple(ids), params=params, stop_ids=stop_ids) for ids in reversed(job.prompts)]
    steps: list[float] = []
    start = time.perf_counter()
    while left or len(ended) < len(begun):
        while left and len(begun) - len(ended) < job.num_at_once:
            generation = left.pop()
            begun[generation] = time.perf_counter()
            engine.submit(generation)
        num_ended, before, clock = len(ended), engine.stats(), time.perf_counter()
        engine.step()
        seconds, after = time.perf_counter() - clock, engine.stats()
        is_decode = after["prompt_tokens"] == before["prompt_tokens"] and len(ended) == num_ended
        if is_decode and after["running"] == job.num_at_once:
            steps.append(seconds)
    seconds, stats = time.perf_counter() - start, engine.stats()
    engine.close()
    return JobResult(
        seconds=seconds,
        num_tokens=int(stats["drawn_tokens"]),
        request_seconds=median(ended[generation] - at for generation, at in begun.items()),
        step_seconds=median(steps) if steps else 0.0,
        drafted=stats["drafted"],
        accepted=stats["accepted"],
    )


def main() -> None:
    import indexshare
    from indexshare.engine.engine import EngineOptions

    assert EngineOptions  # imported before anything is timed
    plan = json.loads(sys.stdin.buffer.read())
    llm = indexshare.load(plan["model"], threads=plan["threads"], device="cpu")
    serve_job(llm, Job(prompts=[list(range(300, 600))], max_tokens=8, num_at_once=1, cache_tokens=1024))  # wakes it
    json.dump([asdict(serve_job(llm, Job(**job))) for job in plan["jobs"]], sys.stdout)


if __name__ == "__main__":
    main()
