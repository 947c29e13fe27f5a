"""What int8 caches change beside retrieval: bytes, the keys that are selected, and distributions on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indexshare.engine.cache import bytes_per_token
from indexshare.engine.llm import LLM
from indexshare.eval.documents import Library
from indexshare.eval.progress import bar
from indexshare.eval.quality import TextQuality, compare_text
from indexshare.kernels import registry
from indexshare.kernels.cache_formats import CacheFormat
from indexshare.kernels.pool import QuantizedPool

NUM_QUERIES = 256  # the last tokens of a document
TEXT_TOKENS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Share of the keys that index keys of the model's type select which rounded ones select too, for the same queries.

    Over the last NUM_QUERIES tokens of a document of num_tokens tokens, in each full layer.
    """

    num_tokens: int
    by_layer: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.by_layer) / len(self.by_layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheQuality:
    """Caches as they were asked for (None is the model's type) against caches of the model's type.

    recall: of rounded index keys alone. text: with all that is rounded, on about TEXT_TOKENS tokens.
    """

    latents: CacheFormat | None
    index_keys: CacheFormat | None
    bytes_per_token: int
    plain_bytes_per_token: int
    recall: tuple[Recall, ...]
    text: TextQuality


def measure_caches(llm: LLM, library: Library, lengths: Sequence[int], *, seed: int = 0) -> CacheQuality:
    """Measure a model that was loaded with rounded caches; bars go to standard error."""
    formats = llm.caches
    plain = LLM(llm.model, tokenizer=llm.tokenizer)
    return CacheQuality(
        latents=formats.latents,
        index_keys=formats.index_keys,
        bytes_per_token=bytes_per_token(llm.config, llm.dtype, with_mtp=False, formats=formats),
        plain_bytes_per_token=bytes_per_token(llm.config, llm.dtype, with_mtp=False),
        recall=tuple(measure_recall(plain, library, n, seed=seed) for n in lengths) if formats.index_keys else (),
        text=compare_text(plain, llm, max_tokens=TEXT_TOKENS),
    )


def measure_recall(llm: LLM, library: Library, num_tokens: int, *, seed: int = 0) -> Recall:
    """Let a model with plain caches read a document, and select once more from the same keys, rounded."""
    document = library.document(np.random.default_rng([seed, num_tokens]), num_tokens, 1)
    token_ids = document.token_ids
    shares: list[float] = []

    def select_twice(call: registry.Call) -> Any:
        result = call.run()
        if call.operation.name == "index_select":
            query, weights, keys, layout, topk = call.args
            num_rows, dim = keys.shape
            rounded = QuantizedPool.empty(num_rows, dim, 0, dim, keys.device)
            rounded.index_copy_(0, layout.rows(0).to(keys.device), layout.keys(keys, 0))
            shares.append(shared_rows(result, call.function(query, weights, rounded, layout, topk), num_rows))
        return result

    with llm.open_session(len(token_ids)) as session, bar(f"recall, {num_tokens:,} tokens", "tokens") as report:
        session.prefill(token_ids[:-NUM_QUERIES], progress=report)
        with registry.watch(select_twice):
            session.prefill(token_ids[-NUM_QUERIES:])
    return Recall(num_tokens=num_tokens, by_layer=tuple(shares))


def shared_rows(expected: Tensor, found: Tensor, num_rows: int) -> float:
    """Share of the rows of one selection that are in another, mean over queries; -1 is no row."""
    chosen = torch.zeros(len(found), num_rows + 1, dtype=torch.bool, device=found.device)
    chosen.scatter_(1, found.long() + 1, True)
    is_shared = chosen.gather(1, expected.long() + 1) & (expected >= 0)
    return float((is_shared.sum(-1) / (expected >= 0).sum(-1)).double().mean())


def lines(quality: CacheQuality) -> list[str]:
    """The figures as text."""
    text = quality.text
    held = {"latents": quality.latents, "index keys": quality.index_keys}
    return [
        f"int8 caches ({' and '.join(name for name, value in held.items() if value)}): "
        f"{quality.bytes_per_token:,} bytes a token instead of {quality.plain_bytes_per_token:,}",
        *(
            f"selected at {row.num_tokens:,} tokens: {row.mean:.2%} of what index keys that are not rounded select "
            f"(by layer {', '.join(f'{share:.1%}' for share in row.by_layer)})"
            for row in quality.recall
        ),
        f"against caches that are not rounded, on {text.num_tokens:,} tokens: KL {text.kl_mean:.5f} nats a token "
        f"(99 % below {text.kl_p99:.4f}), same first choice {text.top1_agreement:.2%}, "
        f"bits per byte {text.reference_bits_per_byte:.4f} before, {text.bits_per_byte:.4f} after",
    ]
