"""Bits per byte of modules that were never trained on, beside what `xz -9e` needs for the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.llm import LLM
from indexshare.engine.session import Progress
from indexshare.errors import RequestError
from indexshare.train import corpus
from indexshare.train.data import file_header

WINDOW = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageResult:
    """bits_per_byte of the model and xz_bits_per_byte of `xz -9e` over all the files at once, on the same bytes."""

    num_files: int
    num_bytes: int
    num_tokens: int
    window: int
    bits_per_byte: float
    xz_bits_per_byte: float


def measure_language(
    llm: LLM,
    *,
    paths: Sequence[str] | None = None,
    root: Path | None = None,
    window: int = WINDOW,
    attention: Literal["sparse", "dense"] = "sparse",
    progress: Progress | None = None,
) -> LanguageResult:
    """Score files (default: the held-out ones of this Python's library), each after its header line "# path".

    A file longer than `window` tokens is read in windows that overlap by half, so that every token after the first
    window has at least half a window before it. The header is context: its tokens are not counted.
    progress(tokens done, tokens in all).
    """
    if window < 2:
        raise RequestError(f"window must be 2 tokens or more, not {window}")
    paths = corpus.held_out_files(root) if paths is None else paths
    texts = [corpus.read_text(path, root) for path in paths]
    encoded = [encode_file(llm.tokenizer, path, text) for path, text in zip(paths, texts, strict=True)]
    total = sum(len(token_ids) for _, token_ids in encoded)
    done, nats = 0, 0.0
    for num_header, token_ids in encoded:
        for piece, first in scored_windows(token_ids, num_header, window):
            nats -= float(llm.logprobs(piece, attention=attention).double()[first - 1 :].sum())
        done += len(token_ids)
        if progress is not None:
            progress(done, total)
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return LanguageResult(
        num_files=len(paths),
        num_bytes=num_bytes,
        num_tokens=total,
        window=window,
        bits_per_byte=nats / math.log(2) / num_bytes,
        xz_bits_per_byte=corpus.xz_bits_per_byte(texts),
    )


def encode_file(tokenizer: Tokenizer, path: str, text: str) -> tuple[int, list[int]]:
    """How many tokens its header line has, and the tokens of header and text."""
    header = file_header(path)
    return len(tokenizer.encode(header)), tokenizer.encode(header + text)


def scored_windows(token_ids: list[int], num_header: int, window: int) -> Iterator[tuple[list[int], int]]:
    """Windows that overlap by half, each with the first of its tokens that counts: every token counts once."""
    scored = max(num_header, 1)  # nothing comes before the first token
    for begin in range(0, max(len(token_ids) - window // 2, 1), window // 2):
        piece = token_ids[begin : begin + window]
        if begin + len(piece) > scored and len(piece) > 1:
            yield piece, scored - begin
            scored = begin + len(piece)
