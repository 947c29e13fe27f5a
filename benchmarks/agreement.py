"""Do the engines compute the same model? Asked before any speed is measured: a fast wrong answer is worth nothing.

Two questions, each at a length where attention is dense and at one where it is sparse, on logits of which the first
comes from a prefill and the others from decode steps:

exact: on `tiny16` in float32, every engine against transformers. Engines differ only in the order of their sums there.
    Measured: KL 3e-11 at both lengths. The limit above top-k leaves room for one score at the border of the top-k that
    goes the other way (KL 5e-4 in one row of 64 is what such a row costs).
near: on the checkpoint that is measured, in each format, against indexshare in float32, which the first question has
    compared. Rounding moves near ties of the router and of the top-k, and a random model is never confident, so the
    limits are wide. Measured on `mid` (below, above top-k): BF16 of indexshare 0.004, 0.03, of transformers 0.013,
    0.023, of llama.cpp 0.004, 0.005; Q8_0 0.025, 0.033; Q4_K_M 0.14, 0.15. Two unrelated rows would be at 4, the
    variance of the logits.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkpoints
import llama_build
import numpy as np
from numpy.typing import NDArray
from workers import Worker, WorkerError

HERE = Path(__file__).parent
NUM_ROWS = 64
EXACT_MODEL = "tiny16"
EXACT_BELOW, EXACT_ABOVE = 1e-6, 1e-3
NEAR = {"bf16": 0.1, "int8": 0.2, "int4": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """An engine against the reference. kl: mean KL(reference, engine), nats; same_first: share of equal best tokens."""

    model: str
    engine: str
    format: str
    num_tokens: int
    sparse: bool
    kl: float
    same_first: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.kl <= self.limit

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An engine as it is asked: its script and what it is started with."""

    engine: str
    format: str
    script: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """An engine that cannot take this model in this format, in its own words."""

    engine: str
    format: str
    reason: str


def check_exact(work: Path, engines: Collection[str], threads: int) -> Iterator[Agreement | Missing]:
    """The first question, for `engines` ("ours", "llama.cpp")."""
    checkpoint = checkpoints.make(EXACT_MODEL, work)
    topk = checkpoints.RECIPES[EXACT_MODEL]().index_topk
    options: dict[str, Any] = {"directory": str(checkpoint), "dtype": "float32", "threads": threads}
    reference = Candidate(engine="transformers", format="fp32", script="engine_transformers.py", arguments=options)
    candidates = []
    if "ours" in engines:
        arguments = options | {"quant": None, "max_tokens": 4 * topk}
        candidates.append(Candidate(engine="ours", format="fp32", script="engine_ours.py", arguments=arguments))
    if "llama.cpp" in engines:
        path = str(llama_build.ensure_gguf(checkpoint, "F32"))
        arguments = {"path": path, "flash_attention": False, "f32_cache": True, "threads": threads}
        candidates.append(Candidate(engine="llama.cpp", format="fp32", script="engine_llama.py", arguments=arguments))
    limits = {topk // 2: EXACT_BELOW, 2 * topk: EXACT_ABOVE}
    yield from _compare(EXACT_MODEL, reference, candidates, lambda candidate: limits, topk, work)


def check_near(
    model: str, checkpoint: Path, candidates: Collection[Candidate], work: Path, threads: int
) -> Iterator[Agreement | Missing]:
    """The second question, with the limit of each candidate's format."""
    topk = checkpoints.RECIPES[model]().index_topk
    arguments = {"directory": str(checkpoint), "dtype": "float32", "threads": threads, "quant": None}
    arguments["max_tokens"] = 2 * topk
    reference = Candidate(engine="ours", format="fp32", script="engine_ours.py", arguments=arguments)
    lengths = (topk // 2, topk + topk // 2)
    limits = {name: dict.fromkeys(lengths, limit) for name, limit in NEAR.items()}
    yield from _compare(model, reference, candidates, lambda candidate: limits[candidate.format], topk, work)


def _compare(
    model: str,
    reference: Candidate,
    candidates: Collection[Candidate],
    limits_for: Callable[[Candidate], Mapping[int, float]],
    topk: int,
    work: Path,
) -> Iterator[Agreement | Missing]:
    """limits_for(candidate): length -> the largest KL; the lengths are the same for all."""
    wanted: list[NDArray[np.float64]] | None = None
    for candidate in candidates:
        limits = limits_for(candidate)
        if wanted is None:
            wanted = _log_probabilities(model, reference, tuple(limits), work)
        try:
            found = _log_probabilities(model, candidate, tuple(limits), work)
        except WorkerError as error:
            yield Missing(engine=candidate.engine, format=candidate.format, reason=str(error))
            continue
        for (num_tokens, limit), p, q in zip(limits.items(), wanted, found, strict=True):
            yield Agreement(
                model=model,
                engine=candidate.engine,
                format=candidate.format,
                num_tokens=num_tokens,
                sparse=num_tokens > topk,
                kl=float((np.exp(p) * (p - q)).sum(axis=-1).mean()),
                same_first=float((p.argmax(axis=-1) == q.argmax(axis=-1)).mean()),
                limit=limit,
            )


def _log_probabilities(
    model: str, candidate: Candidate, lengths: Collection[int], work: Path
) -> list[NDArray[np.float64]]:
    """[NUM_ROWS, vocab] for the last tokens of each length."""
    name = f"{model}-{candidate.engine}-{candidate.format}".replace(" ", "-")
    log = work / "logs" / f"agreement-{name}.log"
    path = log.with_suffix(".npy")
    rows = []
    with Worker(name, HERE / candidate.script, candidate.arguments, log) as worker:
        for num_tokens in lengths:
            worker.call("logits", num_tokens=num_tokens, num_rows=NUM_ROWS, path=str(path))
            rows.append(_log_softmax(np.load(path, allow_pickle=False)))
            path.unlink()
    return rows


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
