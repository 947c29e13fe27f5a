"""The figures of the model card: retrieval at several lengths, dense attention beside it, and bits per byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from indexshare import runtime
from indexshare.engine.cache import check_memory, required_bytes
from indexshare.engine.llm import LLM
from indexshare.errors import RequestError
from indexshare.eval import tool_calls
from indexshare.eval.cache_quality import CacheQuality, lines, measure_caches
from indexshare.eval.documents import Library
from indexshare.eval.language import LanguageResult, measure_language
from indexshare.eval.machine import MachineReport, describe_machine
from indexshare.eval.progress import bar
from indexshare.eval.retrieval import Attention, LengthResult, evaluate_length
from indexshare.eval.tool_calls import ToolResult, measure_tool_calls
from indexshare.kernels.cache_formats import PLAIN

COLUMNS = ("tokens", "attention", "right", "share", "95 % interval", "needle selected", "by layer")
NOTE = (
    "needle selected: share of questions for which at least one full layer had the first token of the value among its "
    "selected keys, at the step that has to state it; by layer: the same for each full layer."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """sparse: retrieval as the model was trained, by ascending length; dense: the same questions with every key.

    caches: what rounding them changed; None for caches of the model's type.
    """

    model: str
    seed: int
    machine: MachineReport
    sparse: tuple[LengthResult, ...]
    dense: tuple[LengthResult, ...]
    language: LanguageResult
    tools: ToolResult
    caches: CacheQuality | None = None


def evaluate_model(
    llm: LLM,
    *,
    lengths: Sequence[int],
    num_questions: int = 100,
    dense_up_to: int = 16_384,
    seed: int = 0,
) -> Evaluation:
    """Measure a model; bars with the time left go to standard error. Dense attention beside it up to a length.

    Raises RequestError and MemoryLimitError before anything is read.
    """
    lengths = sorted(set(lengths))
    longest, limit = lengths[-1], llm.config.max_position_embeddings
    if longest > limit:
        raise RequestError(f"this model has {limit:,} positions; leave out the length {longest:,}")
    needed = required_bytes(llm.config, longest, llm.dtype, with_mtp=False, formats=llm.caches)
    available = runtime.available_memory_bytes(str(llm.device))
    check_memory(needed, available, num_tokens=longest, workspace=runtime.settings().workspace_bytes)
    library = Library(llm.directory)

    def retrieval(num_tokens: int, attention: Attention) -> LengthResult:
        with bar(f"retrieval, {num_tokens:,} tokens, {attention}", "steps") as report:
            return evaluate_length(
                llm,
                library,
                num_tokens,
                num_questions=num_questions,
                attention=attention,
                seed=seed,
                report=lambda _, done, total: report(done, total),
            )

    sparse = tuple(retrieval(length, "sparse") for length in lengths)
    dense = tuple(retrieval(length, "dense") for length in lengths if length <= dense_up_to)
    with bar("bits per byte", "tokens") as report:
        language = measure_language(llm, progress=report)
    with bar("tool calls", "requests") as report:
        tools = measure_tool_calls(llm, num_requests=num_questions, seed=seed, report=report)
    return Evaluation(
        model=llm.directory.name,
        seed=seed,
        machine=describe_machine(llm),
        sparse=sparse,
        dense=dense,
        language=language,
        tools=tools,
        caches=measure_caches(llm, library, lengths, seed=seed) if llm.caches != PLAIN else None,
    )


def render(evaluation: Evaluation) -> RenderableType:
    """The table of retrieval and the line about bits per byte."""
    picture = Table(title=f"{evaluation.model}: exact retrieval through the chat template", title_justify="left")
    for column in COLUMNS:
        picture.add_column(column, justify="left" if column == "attention" else "right")
    for result in (*evaluation.sparse, *evaluation.dense):
        num, selected = result.num_questions, result.num_selected
        picture.add_row(
            f"{result.num_tokens:,}",
            result.attention,
            f"{result.num_correct} of {num}",
            f"{result.num_correct / num:.0%}",
            f"{result.low:.1%} to {result.high:.1%}",
            "" if selected is None else f"{selected / num:.0%}",
            ", ".join(f"{layer}: {count / num:.0%}" for layer, count in result.selected_by_layer.items()),
        )
    language = evaluation.language
    line = (
        f"bits per byte of {language.num_files} held-out modules ({language.num_bytes:,} bytes): "
        f"{language.bits_per_byte:.3f}; xz -9e needs {language.xz_bits_per_byte:.3f}"
    )
    caches = lines(evaluation.caches) if evaluation.caches is not None else []
    return Group(
        picture, Text(line), Text(tool_calls.line(evaluation.tools)), *map(Text, caches), Text(NOTE, style="dim")
    )
