"""What quantisation changed: the distributions of two models of one tokenizer on held-out text, and retrieval by both.

The text, its windows and bits per byte are those of `eval.language`, the questions those of `eval.retrieval`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from indexshare.engine.llm import LLM
from indexshare.errors import RequestError
from indexshare.eval.documents import Library
from indexshare.eval.language import WINDOW, encode_file, scored_windows
from indexshare.eval.progress import bar
from indexshare.eval.retrieval import LengthResult, evaluate_length, facts_per_document
from indexshare.train import corpus

LENGTHS = (4096, 16_384)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextQuality:
    """Over `num_tokens` predictions, each counted once: mean and 99th percentile of KL(reference || quantised) in nats.

    top1_agreement: share of predictions with the same most probable token. Bits per byte as in `eval.language`.
    """

    num_files: int
    num_bytes: int
    num_tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    reference_bits_per_byte: float
    bits_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalQuality:
    """The same questions at one length to both models: how many each answered exactly."""

    num_tokens: int
    num_questions: int
    reference_correct: int
    num_correct: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What `compare` measured."""

    text: TextQuality
    retrieval: tuple[RetrievalQuality, ...]


def compare(
    reference: LLM,
    quantised: LLM,
    *,
    max_tokens: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    num_documents: int = 2,
    seed: int = 0,
) -> Quality:
    """Measure both models; bars with the time left go to standard error. Arguments as in the two functions below."""
    text = compare_text(reference, quantised, max_tokens=max_tokens)
    return Quality(
        text=text,
        retrieval=tuple(
            compare_retrieval(reference, quantised, length, num_documents=num_documents, seed=seed)
            for length in lengths
            if num_documents > 0 and length <= reference.config.max_position_embeddings
        ),
    )


def compare_text(
    reference: LLM, quantised: LLM, *, max_tokens: int | None = None, window: int = WINDOW, root: Path | None = None
) -> TextQuality:
    """Both models on the held-out files; max_tokens: whole files until there are that many tokens, by default all.

    Raises RequestError when a model has no tokenizer, or for fewer tokens than 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"the number of tokens to compare on must be 1 or more, not {max_tokens}")
    files: list[tuple[str, int, list[int]]] = []
    for path in corpus.held_out_files(root):
        if max_tokens is not None and sum(len(token_ids) for _, _, token_ids in files) >= max_tokens:
            break
        text = corpus.read_text(path, root)
        files.append((text, *encode_file(reference.tokenizer, path, text)))
    divergences, agreements, nats = [], [], torch.zeros(2, dtype=torch.float64)
    total, done = sum(len(token_ids) for _, _, token_ids in files), 0
    with bar("KL and bits per byte", "tokens") as report:
        for _, num_header, token_ids in files:
            for piece, first in scored_windows(token_ids, num_header, window):
                divergence, agreement, more = _compare_window(reference, quantised, piece, first)
                divergences.append(divergence)
                agreements.append(agreement)
                nats += more
            done += len(token_ids)
            report(done, total)
    num_bytes = sum(len(text.encode("utf-8")) for text, _, _ in files)
    kl = torch.cat(divergences).double()
    bits = (nats / math.log(2) / num_bytes).tolist()
    return TextQuality(
        num_files=len(files),
        num_bytes=num_bytes,
        num_tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]),
        top1_agreement=float(torch.cat(agreements).double().mean()),
        reference_bits_per_byte=bits[0],
        bits_per_byte=bits[1],
    )


def _compare_window(reference: LLM, quantised: LLM, token_ids: list[int], first: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the predictions of tokens first.. of a window: KL [n], agreement [n], and the nats of both models [2]."""
    divergences, agreements, nats = [], [], torch.zeros(2, dtype=torch.float64)
    start = 0
    with reference.open_session(len(token_ids)) as ours, quantised.open_session(len(token_ids)) as theirs:
        for logits in zip(ours.logits(token_ids), theirs.logits(token_ids), strict=True):
            expected, found = (each.log_softmax(-1).cpu() for each in logits)
            # row i predicts token start + i + 1; the last token of a window predicts nothing that is there
            rows = slice(max(first - 1 - start, 0), len(token_ids) - 1 - start)
            targets = torch.tensor(token_ids[start + 1 : start + 1 + len(expected)])[rows, None]
            expected, found = expected[rows], found[rows]
            divergences.append((expected.exp() * (expected - found)).sum(-1))
            agreements.append(expected.argmax(-1) == found.argmax(-1))
            nats -= torch.stack([each.gather(1, targets).double().sum() for each in (expected, found)])
            start += len(logits[0])
    return torch.cat(divergences), torch.cat(agreements), nats


def compare_retrieval(
    reference: LLM, quantised: LLM, num_tokens: int, *, num_documents: int, seed: int = 0
) -> RetrievalQuality:
    """Ask both models everything that is hidden in `num_documents` documents of `num_tokens` tokens."""
    library = Library(reference.directory)

    def evaluate(llm: LLM, name: str) -> LengthResult:
        with bar(f"retrieval, {num_tokens:,} tokens, {name}", "steps") as report:
            return evaluate_length(
                llm,
                library,
                num_tokens,
                num_questions=num_documents * facts_per_document(num_tokens),
                seed=seed,
                report=lambda _, done, total: report(done, total),
            )

    before, after = evaluate(reference, "reference"), evaluate(quantised, "quantised")
    return RetrievalQuality(
        num_tokens=num_tokens,
        num_questions=before.num_questions,
        reference_correct=before.num_correct,
        num_correct=after.num_correct,
    )
