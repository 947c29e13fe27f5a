"""Calibration: rows of text, and the loss of a model under any pattern of full and shared layers.

A pattern is a string, one letter a layer: F runs its indexer, S uses the choice of the last F before it (IndexCache,
arXiv 2603.12201). Only layers that have an indexer can be F. Layers before the first difference of two patterns compute
the same under both, so their hidden states and choices are kept and used again, as far as MEMORY_BYTES allows.
"""

import hashlib
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from indexshare import runtime
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import IGNORED, Batch, open_rows
from indexshare.errors import ConfigError, TrainingError
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import CacheView, ForwardBatch, Selection, Trace
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM, RopeTable, weights_of
from indexshare.model.inspect import token_work

MEMORY_BYTES = 2 << 30  # all hidden states and choices that are kept at once
KEPT_RUNS = 3  # of the current pattern, the best candidate and the candidate that is being measured


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationRow:
    """Tokens measured in one forward pass. token_ids, targets (-100: not measured), positions: int64 [T]."""

    token_ids: Tensor
    targets: Tensor
    positions: Tensor
    layout: KeyLayout

    @property
    def num_supervised(self) -> int:
        """Tokens whose loss counts."""
        return int((self.targets != IGNORED).sum())

    @classmethod
    def from_batch(cls, batch: Batch, device: torch.device) -> "CalibrationRow":
        """One packed batch, documents apart."""
        token_ids, targets, positions, _ = batch_tensors(batch, device)
        layout = KeyLayout.packed(batch.segment_starts)
        return cls(token_ids=token_ids, targets=targets, positions=positions, layout=layout)


def batch_tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_ids, targets, positions (int64) and loss weights (fp32) of a batch, all its rows as one: [B*T] each."""
    arrays = (batch.token_ids, batch.targets, batch.positions, batch.loss_weights)
    token_ids, targets, positions, weights = (torch.from_numpy(array).flatten().to(device) for array in arrays)
    return token_ids, targets, positions, weights


def read_rows(
    sources: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    *,
    num_rows: int,
    length: int,
    seed: int = 0,
    device: torch.device,
) -> tuple[CalibrationRow, ...]:
    """Rows of `length` tokens of files, folders or the output of `indexshare data build`, drawn by `seed`.

    Fewer than `num_rows` where the data holds fewer. Raises TrainingError when it does not fill one, ConfigError for
    numbers that cannot be.
    """
    if num_rows < 1 or length < 2 or seed < 0:
        raise ConfigError(
            f"take one row at least, of two tokens at least, with a seed from 0 on, not {num_rows:,} of {length:,} "
            f"with {seed}"
        )
    packed = open_rows(sources, tokenizer, length=length, seed=seed)
    taken = range(min(num_rows, packed.num_rows))
    return tuple(CalibrationRow.from_batch(packed.batch(index, 1), device) for index in taken)


def check_rows(rows: Sequence[CalibrationRow], config: GlmConfig) -> None:
    """Raises TrainingError when no query of the rows has more visible keys than an indexer selects."""
    if max(row.layout.max_context for row in rows) <= config.index_topk:
        raise TrainingError(
            f"no document of the calibration rows is longer than index_topk, {config.index_topk:,} tokens: "
            "all keys are selected, whatever layers share. Give longer documents, and longer rows with --length"
        )


def fingerprint(rows: Sequence[CalibrationRow]) -> str:
    """Of the tokens, targets and documents of calibration rows: the same for the same data, in hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row.layout.sequence_starts).encode())
        for tensor in (row.token_ids, row.targets, row.positions):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: GlmForCausalLM) -> str:
    """Of the configuration and all weights as they are held here, in hexadecimal: another dtype is another model."""
    digest = hashlib.sha256(repr(model.config).encode())
    weights = {id(weight): (name, weight) for name, weight in weights_of(model).items()}
    for name, weight in sorted(weights.values(), key=lambda named: named[0]):
        for part in (weight,) if isinstance(weight, Tensor) else (weight.data, weight.scales):
            if part is not None:
                digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
                digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def own_pattern(model: GlmForCausalLM) -> str:
    """F where a layer of the model has an indexer."""
    return "".join("S" if layer.self_attn.indexer is None else "F" for layer in model.stack.layers)


def check_pattern(model: GlmForCausalLM, pattern: str) -> None:
    """Raises ConfigError for a pattern that the model cannot run: wrong length, letters, or no indexer for an F."""
    own = own_pattern(model)
    if len(pattern) != len(own) or set(pattern) - {"F", "S"} or not pattern.startswith("F"):
        raise ConfigError(f"the pattern {pattern!r} must be {len(own)} letters F and S, the first of them F")
    missing = [index for index in range(len(own)) if pattern[index] == "F" and own[index] == "S"]
    if missing:
        raise ConfigError(f"layers {missing} have no indexer, so they cannot be F; the model is {own}")


@contextmanager
def sharing(model: GlmForCausalLM, pattern: str) -> Generator[None]:
    """Runs a block with the indexers of S layers left out; layer by layer only, packed weights keep their own."""
    check_pattern(model, pattern)
    attentions = [layer.self_attn for layer in model.stack.layers]
    indexers = [attention.indexer for attention in attentions]
    for attention, letter in zip(attentions, pattern, strict=True):
        if letter == "S":
            attention.indexer = None
    try:
        yield
    finally:
        for attention, indexer in zip(attentions, indexers, strict=True):
            attention.indexer = indexer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Boundary:
    """What enters a layer: hidden [T, D] and the choice in force, None before the first layer."""

    hidden: Tensor
    selected: Selection | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """A pattern measured: nats by row, summed over tokens; of a run that was stopped early only the first rows.

    boundaries: by row, what entered the layers that are kept.
    """

    pattern: str
    nats: tuple[float, ...]
    boundaries: tuple[dict[int, Boundary], ...]


@dataclass(slots=True)
class Work:
    """Forward work: layers run x tokens, tokens whose logits were computed, and patterns measured."""

    layer_tokens: int = 0
    head_tokens: int = 0
    num_runs: int = 0


@dataclass(slots=True, eq=False)
class PatternRunner:
    """Measures patterns over calibration rows. Weights may be quantised or packed; nothing is differentiated."""

    model: GlmForCausalLM
    rows: tuple[CalibrationRow, ...]
    memory_bytes: int = MEMORY_BYTES
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        check_rows(self.rows, self.model.config)

    @property
    def num_supervised(self) -> int:
        """Tokens whose loss counts, in all rows."""
        return sum(row.num_supervised for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def head_layers(self) -> float:
        """FLOP of the output matrix, as a share of those of a mean layer in the middle of the longest document."""
        config = self.model.config
        head = 2 * config.vocab_size * config.hidden_size
        context = max(1, max(row.layout.max_context for row in self.rows) // 2)
        return head * config.num_hidden_layers / (token_work(config, context).total - head)

    def total_work(self, work: Work) -> float:
        """Layers x tokens, in which the output matrix counts as `head_layers`."""
        return work.layer_tokens + self.head_layers * work.head_tokens

    def pass_work(self, first: int = 0) -> float:
        """`total_work` of one pass over all rows that runs the layers from `first` on, or from the last one before it
        whose input is kept."""
        first -= first % self.boundary_stride
        num_layers = self.model.config.num_hidden_layers
        return self.total_work(
            Work(layer_tokens=(num_layers - first) * self.num_tokens, head_tokens=self.num_supervised)
        )

    @property
    def boundary_stride(self) -> int:
        """What enters every so many layers is kept; more than the number of layers when nothing fits."""
        config, weight = self.model.config, self.model.model.embed_tokens.weight
        per_layer = self.num_tokens * (config.hidden_size * weight.element_size() + config.index_topk * 4)
        return max(1, -(-KEPT_RUNS * config.num_hidden_layers * per_layer // self.memory_bytes))

    def iterate(self, pattern: str, base: Run | None = None, num_rows: int | None = None) -> Iterator[Run]:
        """Measure row after row; each value is the run so far, and who has seen enough stops.

        base: a complete run of another pattern, whose boundaries before the first difference are used again.
        """
        nats: list[float] = []
        boundaries: list[dict[int, Boundary]] = []
        self.work.num_runs += 1
        for index, row in enumerate(self.rows[:num_rows]):
            kept = {} if base is None else _shared_part(base, pattern, index)
            with sharing(self.model, pattern), torch.inference_mode():
                hidden, kept = self._forward(row, kept)
                nats.append(lm_nats(self.model, hidden, row.targets))
            self.work.head_tokens += row.num_supervised
            boundaries.append(kept)
            yield Run(pattern=pattern, nats=tuple(nats), boundaries=tuple(boundaries))

    def run(self, pattern: str, base: Run | None = None) -> Run:
        """Measure a pattern over all rows."""
        *_, last = self.iterate(pattern, base)
        return last

    def loss(self, run: Run) -> float:
        """Mean over supervised tokens of the rows that were measured, in nats."""
        return sum(run.nats) / max(sum(row.num_supervised for row in self.rows[: len(run.nats)]), 1)

    def _forward(self, row: CalibrationRow, kept: dict[int, Boundary]) -> tuple[Tensor, dict[int, Boundary]]:
        """Run the layers from the last boundary that is kept -> hidden after the last layer, and all boundaries."""
        first, stride = max(kept, default=0), self.boundary_stride
        hidden = kept[first].hidden if kept else self.model.model.embed_tokens(row.token_ids)
        selected = kept[first].selected if kept else None
        batch = forward_batch(self.model, row)
        rope = RopeTable(row.positions, self.model.config, hidden.dtype)
        kept = dict(kept)
        for index, layer in enumerate(self.model.stack.layers[first:], start=first):
            if index % stride == 0 and index > 0:
                kept[index] = Boundary(hidden=hidden, selected=selected)
            hidden, selected = layer(hidden, selected, batch, rope)
        self.work.layer_tokens += (len(self.model.stack.layers) - first) * len(row.token_ids)
        return hidden, kept


def _shared_part(base: Run, pattern: str, row: int) -> dict[int, Boundary]:
    """The boundaries of a run that another pattern has as well: up to the input of the first layer that differs."""
    pairs = zip(base.pattern, pattern, strict=True)
    first = next((index for index, (old, new) in enumerate(pairs) if old != new), len(pattern))
    return {index: kept for index, kept in base.boundaries[row].items() if index <= first}


def forward_batch(model: GlmForCausalLM, row: CalibrationRow, trace: Trace | None = None) -> ForwardBatch:
    """A row with a cache of its own size, so that attention takes the path of inference, over gathered rows.

    All layers write to the same two pools: layers run one after the other, and each reads only what it wrote.
    """
    config, weight = model.config, model.model.embed_tokens.weight
    num_tokens, num_layers = len(row.token_ids), config.num_layers_with_mtp
    latents = weight.new_empty(num_tokens, config.latent_dim)
    index_keys = weight.new_empty(num_tokens, config.index_head_dim)
    cache = CacheView(latents=(latents,) * num_layers, index_keys=(index_keys,) * num_layers)
    return ForwardBatch(
        token_ids=row.token_ids, positions=row.positions, layout=_paged(row.layout), cache=cache, trace=trace
    )


def _paged(layout: KeyLayout) -> KeyLayout:
    """The same places as pages of one row: key s of a document is row start + s."""
    starts = torch.tensor(layout.sequence_starts[:-1])[:, None]
    table = (starts + torch.arange(layout.max_context)).clamp_(max=layout.num_tokens - 1)
    return replace(layout, page_table=table)


def lm_nats(model: GlmForCausalLM, hidden: Tensor, targets: Tensor) -> float:
    """Sum of -log p(target) over supervised tokens; hidden [T, D] before the final norm. Logits in tiles of tokens."""
    supervised = (targets != IGNORED).nonzero().flatten()
    hidden, targets = model.model.norm(hidden[supervised]), targets[supervised]
    tile = max(1, runtime.settings().workspace_bytes // (3 * 4 * model.config.vocab_size))
    total = 0.0
    for begin in range(0, len(targets), tile):
        logits = model.logits(hidden[begin : begin + tile])
        losses = functional.cross_entropy(logits, targets[begin : begin + tile], reduction="none")
        total += float(losses.double().sum())
    return total
