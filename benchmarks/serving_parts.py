"""The parts of serving.py that are about our server alone; each gives its steps."""

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from serving_bench import Bench, Step, body
from serving_client import Answer
from serving_engine import Job, run_jobs
from serving_report import MILLISECONDS, latencies, percentile

from indexshare.chat.template import ChatTemplate, encode_chat
from indexshare.chat.tokenizer import Tokenizer
from indexshare.eval.documents import Library
from indexshare.train import corpus

PREFILL_SPEED, DECODE_SPEED = 600, 150  # tokens per second of `mid`, for the estimate of what is left
PROMPT_TRIALS = 20
TAIL = 64
LONG_REPLY = 8
BESIDE_REPLY = 2048
BESIDE_ARRIVALS = 64
OVERHEAD_PROMPT, OVERHEAD_REPLY, OVERHEAD_CLIENTS = 16, 128, (1, 16)
DRAFTS, SERVER_DRAFTS = (0, 1, 3, 5), (0, 3)
DRAFT_CLIENTS, DRAFT_PROMPTS, DRAFT_DOCUMENTS, CODE_PROMPT = (1, 16), 32, 4, 512


def weight(num_read: int, num_drawn: int) -> float:
    return 2 + num_read / PREFILL_SPEED + num_drawn / DECODE_SPEED


def load(bench: Bench) -> list[Step]:
    """Throughput and latency by number of clients: prompts that differ, and one that all share."""
    sizes = bench.sizes

    def measure(num_clients: int, is_warm: bool) -> None:
        server = bench.server()
        shared = _shared_prompt(bench) if is_warm else []

        def one() -> dict[str, Any]:
            return body(shared if is_warm else bench.prompt(sizes.short_prompt), sizes.short_reply)

        clients = [[one() for _ in range(_per_client(num_clients))] for _ in range(num_clients)]
        found, about = bench.drive(server, clients)
        figures = {"tokens/s": found.num_tokens / found.seconds} | latencies(found.first_seconds, found.gaps)
        bench.run.add("load", "the same prompt" if is_warm else "different prompts", num_clients, figures | about)

    return [
        Step(
            name=f"{num_clients} clients, {'the same prompt' if is_warm else 'different prompts'}",
            weight=weight(
                0 if is_warm else num_clients * _per_client(num_clients) * sizes.short_prompt,
                num_clients * _per_client(num_clients) * sizes.short_reply,
            ),
            run=partial(measure, num_clients, is_warm),
        )
        for num_clients in sizes.clients
        for is_warm in (False, True)
    ]


def _shared_prompt(bench: Bench) -> list[int]:
    """A prompt that is in the cache, and whose reply does not stop early: everybody would get that reply."""
    for _ in range(PROMPT_TRIALS):
        prompt = bench.prompt(bench.sizes.short_prompt)
        found, _ = bench.drive(bench.server(), [[body(prompt, bench.sizes.short_reply)]])
        if found.num_tokens == bench.sizes.short_reply:
            break
    return prompt


def _per_client(num_clients: int) -> int:
    return max(2, 8 // num_clients)


def long(bench: Bench) -> list[Step]:
    """Time to first token of a long prompt, then of the same with another end."""
    num_tokens = bench.sizes.long_prompt

    def measure() -> None:
        prompt = bench.prompt(num_tokens - TAIL)
        for kind in ("cold", "warm"):
            found, about = bench.drive(bench.server(), [[body(prompt + bench.prompt(TAIL), LONG_REPLY)]])
            first = found.first_seconds[0]
            figures = {
                "TTFT p50 ms": MILLISECONDS * first,
                "prompt tokens/s": num_tokens / first,
                "cached tokens": found.answers[0].num_cached_tokens,
            }
            bench.run.add("long", f"{num_tokens:,} tokens, {kind}", 1, figures | about)

    return [Step(name=f"{num_tokens:,} tokens twice", weight=weight(num_tokens, 16), run=measure)]


def beside(bench: Bench) -> list[Step]:
    """Clients that decode, before and while somebody's long prompt is read."""
    sizes = bench.sizes

    def measure() -> None:
        own = [body(bench.prompt(sizes.short_prompt), BESIDE_REPLY) for _ in range(8 * sizes.num_beside)]
        clients = [own[client :: sizes.num_beside] for client in range(sizes.num_beside)]
        intruder = body(bench.prompt(sizes.long_prompt), 1)
        found, about = bench.drive(bench.server(), clients, intruder=intruder, num_before=BESIDE_ARRIVALS)
        assert found.intruder is not None
        sent, answered = found.intruder.begun, found.intruder.begun + found.intruder.first_seconds
        for name, start, end in (("before", 0.0, sent), ("during", sent, answered)):
            gaps = gaps_between(found.answers, start, end)
            figures = {f"ITL p{percent} ms": MILLISECONDS * percentile(gaps, percent) for percent in (50, 95)}
            figures["ITL max ms"] = MILLISECONDS * max(gaps, default=float("nan"))
            bench.run.add("beside", name, sizes.num_beside, figures | (about if name == "during" else {}))
        figures = {"TTFT p50 ms": MILLISECONDS * found.intruder.first_seconds}
        bench.run.add("beside", f"the prompt of {sizes.long_prompt:,} tokens", 1, figures)

    return [
        Step(
            name=f"{sizes.num_beside} clients beside a long prompt",
            weight=weight(2 * sizes.long_prompt, 400),
            run=measure,
        )
    ]


def gaps_between(answers: Sequence[Answer], start: float, end: float) -> list[float]:
    """Seconds between arrivals of which the later one came after `start` and until `end`."""
    return [
        later - earlier
        for answer in answers
        for earlier, later in zip(answer.arrivals, answer.arrivals[1:], strict=False)
        if start < later <= end
    ]


def overhead(bench: Bench) -> list[Step]:
    """One request, and one token while decoding: over HTTP, and in an engine without it.

    Two views: HTTP beside an engine in a process of its own, which differ by what else the machine does in between too;
    and, of the server alone, the time that is not spent in the engine's steps, for each step.
    """
    sizes = bench.sizes
    limits = {"cache_tokens": sizes.cache_tokens}

    def drive(clients: list[list[dict[str, Any]]]) -> tuple[Any, dict[str, float]]:
        server = bench.server()
        before = server.metrics()
        found, about = bench.drive(server, clients)
        after = server.metrics()
        steps, spent = (
            after[f"indexshare_engine_{name}_total"] - before[f"indexshare_engine_{name}_total"]
            for name in ("steps", "step_seconds")
        )
        outside = (found.seconds - spent) / steps
        shares = {"outside ms": MILLISECONDS * outside, "outside %": 100 * outside * steps / spent}
        return found, shares | about

    def measure() -> None:
        prompts = [bench.prompt(1) for _ in range(sizes.num_latencies)]
        jobs = [Job(prompts=prompts, max_tokens=1, num_at_once=1, **limits)]
        found, about = drive([[body(prompt, 1) for prompt in prompts]])
        seconds, notes = [median(answer.ended - answer.begun for answer in found.answers)], [about]
        for num_clients in OVERHEAD_CLIENTS:
            prompts = [bench.prompt(OVERHEAD_PROMPT) for _ in range(num_clients)]
            jobs.append(Job(prompts=prompts, max_tokens=OVERHEAD_REPLY, num_at_once=num_clients, **limits))
            found, about = drive([[body(prompt, OVERHEAD_REPLY)] for prompt in prompts])
            seconds.append(median(map(token_seconds, found.answers)))
            notes.append(about)
        with bench.others_paused(None):
            request, *decodes = run_jobs(bench.served.name, jobs, bench.threads)
        own = [request.request_seconds, *(result.step_seconds for result in decodes)]
        cases = [("a request of one token", 1), *(("a token of each client", number) for number in OVERHEAD_CLIENTS)]
        for (name, num_clients), over_http, alone, about in zip(cases, seconds, own, notes, strict=True):
            figures = {
                "HTTP ms": MILLISECONDS * over_http,
                "engine ms": MILLISECONDS * alone,
                "difference ms": MILLISECONDS * (over_http - alone),
                "overhead %": 100 * (over_http - alone) / alone,
            }
            bench.run.add("overhead", name, num_clients, figures | about)

    num_drawn = sum(OVERHEAD_REPLY * number for number in OVERHEAD_CLIENTS)
    return [Step(name="overhead of HTTP", weight=10 + 2 * weight(0, num_drawn), run=measure)]


def token_seconds(answer: Answer) -> float:
    """Mean time for a token after the first one."""
    return (answer.arrivals[-1] - answer.arrivals[0]) / max(1, answer.num_tokens - 1)


def drafts(bench: Bench) -> list[Step]:
    """What the MTP layer's guesses are worth, on code and on questions about a document. Prompts are cached."""
    if not bench.served.can_draft:
        bench.run.note(f"drafts: not measured, {bench.run.model} has no MTP layer")
        return []
    sizes = bench.sizes
    prompts = {"code": code_prompts(bench), "retrieval": retrieval_prompts(bench)}
    cases = [(kind, num_clients) for kind in prompts for num_clients in DRAFT_CLIENTS]

    def chosen(kind: str, num_clients: int) -> list[list[int]]:
        return prompts[kind] if num_clients > 1 else prompts[kind][:: DRAFT_PROMPTS // 8]

    def alone() -> None:
        jobs = [
            Job(
                prompts=chosen(kind, num_clients),
                max_tokens=sizes.draft_reply,
                num_at_once=num_clients,
                num_drafts=num_drafts,
                cache_tokens=sizes.cache_tokens,
                reads_first=True,
            )
            for kind, num_clients in cases
            for num_drafts in DRAFTS
        ]
        with bench.others_paused(None):
            results = iter(run_jobs(bench.served.name, jobs, bench.threads))
        for kind, num_clients in cases:
            for num_drafts in DRAFTS:
                result = next(results)
                figures = {"tokens/s": result.num_tokens / result.seconds}
                for position, (drafted, accepted) in enumerate(zip(result.drafted, result.accepted, strict=True), 1):
                    figures[f"accepted {position} %"] = 100 * accepted / drafted if drafted else float("nan")
                bench.run.add("drafts", f"{kind}, {num_drafts} drafts", num_clients, figures)

    def over_http(kind: str, num_clients: int, num_drafts: int) -> None:
        server, own = bench.server(num_drafts), chosen(kind, num_clients)
        bench.drive(server, [[body(prompt, 1) for prompt in own]])
        clients = [
            [body(prompt, sizes.draft_reply) for prompt in own[start::num_clients]] for start in range(num_clients)
        ]
        found, about = bench.drive(server, clients)
        figures = {"tokens/s": found.num_tokens / found.seconds}
        bench.run.add("drafts", f"{kind}, {num_drafts} drafts, server", num_clients, figures | about)

    num_drawn = sizes.draft_reply * DRAFT_PROMPTS
    return [
        Step(name="drafts in the engine", weight=10 + 8 * weight(0, num_drawn), run=alone),
        *(
            Step(
                name=f"{kind}, {num_clients} clients, --draft {num_drafts}",
                weight=weight(0, num_drawn),
                run=partial(over_http, kind, num_clients, num_drafts),
            )
            for kind, num_clients in cases
            for num_drafts in SERVER_DRAFTS
        ),
    ]


def code_prompts(bench: Bench) -> list[list[int]]:
    """Beginnings of modules of the standard library, those that nano was not trained on first."""
    tokenizer, root = Tokenizer.from_directory(bench.served.directory), corpus.library_root()
    files = [path for path in corpus.HELD_OUT if (root / path).is_file()]
    found = []
    for path in dict.fromkeys([*files, *corpus.library_files(root)]):
        token_ids = tokenizer.encode(corpus.read_text(path))
        if len(token_ids) >= 2 * CODE_PROMPT:
            found.append(token_ids[:CODE_PROMPT])
            if len(found) == DRAFT_PROMPTS:
                break
    return found


def retrieval_prompts(bench: Bench) -> list[list[int]]:
    """Questions about facts in documents, as the chat template puts them."""
    library, generator = Library(bench.served.directory), np.random.default_rng(11)
    tokenizer, template = (
        Tokenizer.from_directory(bench.served.directory),
        ChatTemplate.from_directory(bench.served.directory),
    )
    return [
        encode_chat(tokenizer, template, document.messages(needle.fact), enable_thinking=False)
        for document in (
            library.document(generator, bench.sizes.draft_document, DRAFT_PROMPTS // DRAFT_DOCUMENTS)
            for _ in range(DRAFT_DOCUMENTS)
        )
        for needle in document.needles
    ]
