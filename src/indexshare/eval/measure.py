"""Speed, memory and answers of one model under different ways of attending, on the same document.

Three variants share one set of weights:

    dense        every layer attends to every key
    every layer  sparse attention with an indexer in every layer. A checkpoint trained for IndexShare has no indexer
                 weights in its shared layers, so here each of them borrows those of the full layer before it: the cost
                 is that of DeepSeek-V3.2's sparse attention, the choice comes from an indexer trained for another layer
    IndexShare   the model as it is: shared layers reuse the selection of the full layer before them

Peak memory is the high-water mark of this process's resident memory since the variant began, so it includes torch and
the weights; what earlier work left in the allocator is trimmed first. On an accelerator it is torch's own peak there.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from indexshare import runtime
from indexshare.chat.template import ChatTemplate
from indexshare.engine.cache import required_bytes
from indexshare.engine.llm import LLM
from indexshare.engine.session import Progress, Session
from indexshare.eval.documents import Document, Library, Needle
from indexshare.eval.retrieval import TALK_TOKENS, Answer, ask
from indexshare.kernels import registry
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM, assign_weights, weights_of
from indexshare.model.native import pack_model

DECODE_TOKENS = 32

Ask = Callable[[LLM, Session, Library, Document, Needle], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way of attending: a name, the model and its attention."""

    name: str
    llm: LLM
    attention: Literal["sparse", "dense"] = "sparse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One variant on one document of `num_tokens` tokens.

    peak_bytes: see the module; None where the system cannot start the mark anew. cache_bytes: latents and index keys of
    the whole document. indexer_share: part of the reading time spent in `index_select` (scores and top-k); None on
    an accelerator, where launches return early. decode_tokens_per_second: reading one token at a time after the
    document. curve: (tokens read, seconds since the beginning), one point per chunk.
    """

    name: str
    num_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_bytes: int | None
    cache_bytes: int
    indexer_share: float | None
    curve: tuple[tuple[int, float], ...]
    answers: tuple[Answer, ...]
    ask_seconds: float

    @property
    def num_correct(self) -> int:
        return sum(answer.is_correct for answer in self.answers)


def indexer_in_every_layer(llm: LLM) -> LLM:
    """The same weights with an indexer in every layer; shared layers borrow the indexer before them. No copies."""
    config = llm.config
    every = config.to_json_dict() | {"indexer_types": None, "index_topk_pattern": "F" * config.num_hidden_layers}
    with torch.device("meta"):
        model = GlmForCausalLM(GlmConfig.from_json({key: value for key, value in every.items() if value is not None}))
    weights = weights_of(llm.model)
    owner = 0
    for layer in range(config.num_hidden_layers):
        owner = layer if config.is_full(layer) else owner
        source, target = f"model.layers.{owner}.self_attn.indexer.", f"model.layers.{layer}.self_attn.indexer."
        found = {name: weight for name, weight in weights.items() if name.startswith(source)}
        weights |= {target + name.removeprefix(source): weight for name, weight in found.items()}
    assign_weights(model, weights)
    if llm.model.stack.packed is not None:
        pack_model(model)
    template = ChatTemplate.from_directory(llm.directory)
    return LLM(model, tokenizer=llm.tokenizer, template=template, caches=llm.caches)


def variants(llm: LLM) -> tuple[Variant, Variant, Variant]:
    """Dense, sparse with an indexer in every layer, IndexShare."""
    return (
        Variant(name="dense attention", llm=llm, attention="dense"),
        Variant(name="sparse, indexer in every layer", llm=indexer_in_every_layer(llm)),
        Variant(name="IndexShare", llm=llm),
    )


def measure(
    variant: Variant,
    library: Library,
    document: Document,
    *,
    progress: Progress | None = None,
    ask: Ask = ask,
) -> Measurement:
    """Read the document, decode a few tokens, ask for its needles. Raises MemoryLimitError before anything is read."""
    llm = variant.llm
    num_tokens = len(document.token_ids)
    device = str(llm.device)
    _trim()
    can_reset = runtime.reset_peak_memory(device)
    curve = [(0, 0.0)]
    begun = time.perf_counter()

    def note(done: int, total: int) -> None:
        curve.append((done, time.perf_counter() - begun))
        if progress is not None:
            progress(done, total)

    with llm.open_session(num_tokens + TALK_TOKENS, attention=variant.attention) as session:
        with registry.timing() as seconds:
            logits = session.prefill(document.token_ids, progress=note)
        read_seconds = curve[-1][1]
        decode_begun = time.perf_counter()
        for _ in range(DECODE_TOKENS):
            logits = session.decode(int(logits.argmax()))
        decode_seconds = time.perf_counter() - decode_begun
        session.truncate(num_tokens)
        ask_begun = time.perf_counter()
        answers = tuple(ask(llm, session, library, document, needle) for needle in document.needles)
    return Measurement(
        name=variant.name,
        num_tokens=num_tokens,
        prefill_tokens_per_second=num_tokens / read_seconds,
        decode_tokens_per_second=DECODE_TOKENS / decode_seconds,
        peak_bytes=runtime.peak_memory_bytes(device) if can_reset else None,
        cache_bytes=required_bytes(llm.config, num_tokens, llm.dtype, with_mtp=False, formats=llm.caches),
        indexer_share=seconds.get("index_select", 0.0) / read_seconds if llm.device.type == "cpu" else None,
        curve=tuple(curve),
        answers=answers,
        ask_seconds=time.perf_counter() - ask_begun,
    )


def _trim() -> None:
    """Give freed memory back to the system, so that a variant does not start from what another one left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
