"""The main job on real input: read a long document once, ask about it, and compare the ways of attending.

The document is made of this machine's Python library; facts are hidden in it at random depths.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from rich.console import Console

from indexshare import runtime
from indexshare.chat.types import Text
from indexshare.engine.cache import check_memory, required_bytes
from indexshare.engine.llm import LLM
from indexshare.engine.session import Session
from indexshare.errors import RequestError
from indexshare.eval.documents import Document, Library, Needle
from indexshare.eval.machine import describe_machine
from indexshare.eval.measure import Ask, Measurement, Variant, measure, variants
from indexshare.eval.progress import bar, clock
from indexshare.eval.report import DemoResult, write_page, write_pictures
from indexshare.eval.retrieval import (
    ANSWER_TOKENS,
    TALK_TOKENS,
    Answer,
    LengthResult,
    ask,
    evaluate_length,
    judge,
    summarise,
)
from indexshare.train.episodes import question

TABLE_TOKENS = 16_384
TABLE_QUESTIONS = 10
MAP_QUESTIONS = 20
MAP_LENGTHS = (2048, 4096, 8192)
DOCUMENT_SLACK = 128  # a document ends with a line, at most this far before the length that was asked for
MIN_TOKENS = 2048


def run_demo(
    llm: LLM,
    *,
    num_tokens: int = 131_072,
    num_questions: int = 5,
    table_tokens: int = TABLE_TOKENS,
    html: Path | None = None,
    pictures: Path | None = None,
    seed: int = 0,
    on_stderr: bool = False,
) -> DemoResult:
    """Read at least `num_tokens` tokens, ask, stream the answers, then measure the variants.

    html: also write a page with pictures, for which more questions are asked at shorter lengths. pictures: a directory
    that gets the same pictures as SVG files; it is made if need be. on_stderr: print there instead of on standard
    output; the bars are always there. Raises RequestError and MemoryLimitError before anything is read.
    """
    longest = _longest(llm, num_tokens, num_questions, html, pictures)
    console = Console(stderr=on_stderr)
    console.print(f"making a document of {num_tokens:,} tokens from this machine's Python library", highlight=False)
    library = Library(llm.directory)
    document = library.document(np.random.default_rng([seed, 1]), longest, num_questions)
    first_file = document.text.partition("\n")[0].removeprefix("# ")
    console.print(f"{len(document.token_ids):,} tokens; it begins with {first_file}", highlight=False)
    console.print(f"{num_questions} facts are hidden in it", highlight=False)
    long = _measured(Variant(name="IndexShare", llm=llm), library, document, console, _Teller(console).ask)
    compared = document
    if len(document.token_ids) > table_tokens:
        compared = library.document(np.random.default_rng([seed, 2]), table_tokens, TABLE_QUESTIONS)
    console.print(f"\nthe same model in three ways, on {len(compared.token_ids):,} tokens", highlight=False)
    table = tuple(_measured(variant, library, compared, console, ask) for variant in variants(llm))
    needles = [_retrieval(long)] if compared is document else [_retrieval(table[-1]), _retrieval(long)]
    if html is not None or pictures is not None:
        shorter = [length for length in MAP_LENGTHS if length < needles[0].num_tokens]
        needles = [_evaluated(llm, library, length, seed) for length in shorter] + needles
    result = DemoResult(
        model=llm.directory.name,
        seed=seed,
        machine=describe_machine(llm),
        long=long,
        table=table,
        needles=tuple(needles),
    )
    if html is not None:
        write_page(result, html)
        console.print(f"the page is in {html}", highlight=False, soft_wrap=True)
    if pictures is not None:
        try:
            paths = write_pictures(result, pictures)
        except OSError as error:
            raise RequestError(f"cannot write into {pictures}: {error}") from error
        console.print(f"the pictures are in {paths[0]} and {paths[1]}", highlight=False, soft_wrap=True)
    return result


def _longest(llm: LLM, num_tokens: int, num_questions: int, html: Path | None, pictures: Path | None) -> int:
    """Length of the document to ask for, once everything that can be refused has been."""
    limit = llm.config.max_position_embeddings
    if not MIN_TOKENS <= num_tokens <= limit:
        raise RequestError(f"the demo reads {MIN_TOKENS:,} to {limit:,} tokens with this model, not {num_tokens:,}")
    if num_questions < 1:
        raise RequestError(f"the demo asks at least one question, not {num_questions}")
    if html is not None and not html.absolute().parent.is_dir():
        raise RequestError(f"cannot write {html}: there is no directory {html.absolute().parent}")
    if pictures is not None and pictures.exists() and not pictures.is_dir():
        raise RequestError(f"cannot write into {pictures}: it is not a directory")
    longest = min(num_tokens + DOCUMENT_SLACK, limit - TALK_TOKENS)
    needed = required_bytes(llm.config, longest + TALK_TOKENS, llm.dtype, with_mtp=False, formats=llm.caches)
    available = runtime.available_memory_bytes(str(llm.device))
    check_memory(needed, available, num_tokens=num_tokens, workspace=runtime.settings().workspace_bytes)
    return longest


def _measured(variant: Variant, library: Library, document: Document, console: Console, ask: Ask) -> Measurement:
    """One measurement with a bar while it reads and a line when it is done."""
    begun = time.perf_counter()
    with bar(f"reading, {variant.name}", "tokens") as report:

        def progress(done: int, total: int) -> None:
            report(done, total)
            if done == total:
                seconds = time.perf_counter() - begun
                console.print(f"{variant.name}: read {total:,} tokens in {clock(seconds)}", highlight=False)

        return measure(variant, library, document, progress=progress, ask=ask)


def _evaluated(llm: LLM, library: Library, num_tokens: int, seed: int) -> LengthResult:
    with bar(f"retrieval at {num_tokens:,} tokens", "steps") as report:
        return evaluate_length(
            llm,
            library,
            num_tokens,
            num_questions=MAP_QUESTIONS,
            questions_per_document=MAP_QUESTIONS,
            seed=seed,
            report=lambda _, done, total: report(done, total),
        )


def _retrieval(measurement: Measurement) -> LengthResult:
    """The answers of a measurement as a row of the needle map."""
    return summarise(
        measurement.answers,
        num_tokens=measurement.num_tokens,
        attention="sparse",
        num_documents=1,
        read_seconds=measurement.curve[-1][1],
        ask_seconds=measurement.ask_seconds,
    )


class _Teller:
    """Asks like `retrieval.ask` and shows question and answer while they come."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def ask(self, llm: LLM, session: Session, library: Library, document: Document, needle: Needle) -> Answer:
        self._console.print(
            f"\n[bold]{question(needle.fact)}[/]  [dim]hidden at {needle.depth:.0%}[/]", highlight=False
        )
        with llm.chat(
            document.messages(needle.fact),
            enable_thinking=False,
            session=session,
            max_new_tokens=ANSWER_TOKENS,
            temperature=0.0,
            stream=True,
        ) as events:
            for event in events:
                if isinstance(event, Text):
                    self._console.print(_visible(event.text), end="", markup=False, highlight=False, soft_wrap=True)
            reply = events.reply
        answer = judge(session, library, document, needle, reply.content, reply.usage.num_prompt_tokens)
        verdict = "[green]✓[/]" if answer.is_correct else f"[red]✗[/] [dim]it is {needle.fact.value}[/]"
        self._console.print(f"  {verdict}", highlight=False)
        return answer


def _visible(text: str) -> str:
    """Text in which a model cannot command the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)
