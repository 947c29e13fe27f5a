"""How well indexers follow the attention of the layers they serve, and what the choice costs in loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from indexshare.data.rows import Batch
from indexshare.errors import TrainingError
from indexshare.kernels import registry
from indexshare.kernels.index_loss import selected_mass
from indexshare.model.glm import GlmForCausalLM
from indexshare.share.calibration import batch_tensors
from indexshare.train.losses import Losses, step_loss

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuality:
    """A layer under dense attention. indexer: the full layer whose choice it would use; kl: nats for each query.

    recall: attention on the top-k keys of that indexer, over attention on the k keys where it is largest; only queries
    that see more than k keys count.
    """

    layer: int
    indexer: int
    kl: float
    recall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexQuality:
    """dense_loss, sparse_loss: nats per token with all visible keys and with the chosen ones."""

    dense_loss: float
    sparse_loss: float
    layers: tuple[LayerQuality, ...]


LAYER_COLUMNS = ("layer", "indexer", "KL before", "after", "recall before", "after")


def layer_cells(before: IndexQuality, after: IndexQuality) -> list[tuple[str, ...]]:
    """A row of texts for each layer, under LAYER_COLUMNS."""
    return [
        (
            str(old.layer),
            "its own" if old.layer == old.indexer else f"of layer {old.indexer}",
            f"{old.kl:.4f}",
            f"{new.kl:.4f}",
            f"{old.recall:.1%}",
            f"{new.recall:.1%}",
        )
        for old, new in zip(before.layers, after.layers, strict=True)
    ]


@dataclass(slots=True)
class _Watcher:
    """Adds up what each layer's loss is over; the calls of one pass come in the order of the layers."""

    topk: int
    num_layers: int
    num_calls: int = 0
    queries: int = 0
    kl: dict[int, float] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)  # fp64 [2]: on the chosen keys, on the best

    def __call__(self, call: registry.Call) -> Any:
        result = call.run()
        if call.operation.name == "indexer_loss":
            layer, num_queries = self.num_calls % self.num_layers, len(call.args[0])
            *inputs, _, scale, _ = call.args  # without the selection: the choice is among all visible keys
            measured: tuple[Any, ...] = (*inputs, scale, self.topk)
            chosen, best = selected_mass(*measured)
            self.mass[layer] = self.mass.get(layer, 0) + torch.stack((chosen.sum(), best.sum())).cpu()
            self.kl[layer] = self.kl.get(layer, 0.0) + float(result) * num_queries
            self.queries += num_queries if layer == 0 else 0
            self.num_calls += 1
        return result


@torch.no_grad()
def measure_indexers(
    model: GlmForCausalLM, batches: Sequence[Batch], *, stride: int = 1, report: Report | None = None
) -> IndexQuality:
    """Measure a model on packed rows; the indexers over every stride-th token. report(done, total) counts batches.

    Raises TrainingError when no document is longer than index_topk: then every choice is all keys.
    """
    config = model.config
    lengths = (
        max(b - a for a, b in zip(batch.segment_starts, batch.segment_starts[1:], strict=False)) for batch in batches
    )
    if max(lengths) <= config.index_topk:
        raise TrainingError(
            f"no document of the held-out rows is longer than index_topk, {config.index_topk:,} tokens: every indexer"
            " would choose all keys. Give longer documents, and longer rows with --length"
        )
    watcher = _Watcher(topk=config.index_topk, num_layers=config.num_hidden_layers)
    nats, num_tokens = {"dense": 0.0, "sparse": 0.0}, 0
    for done, batch in enumerate(batches, start=1):
        with registry.watch(watcher):
            dense = _losses(model, batch, attention="dense", trains="all", index_target="visible", index_stride=stride)
        sparse = _losses(model, batch, attention="sparse", trains="model")
        nats["dense"] += float(dense.lm) * dense.num_tokens
        nats["sparse"] += float(sparse.lm) * dense.num_tokens
        num_tokens += dense.num_tokens
        if report is not None:
            report(done, len(batches))
    layers, indexer = [], 0
    for layer in range(config.num_hidden_layers):
        indexer = layer if config.is_full(layer) else indexer
        chosen, best = watcher.mass[layer].tolist()
        kl = watcher.kl[layer] / watcher.queries
        layers.append(LayerQuality(layer=layer, indexer=indexer, kl=kl, recall=chosen / best))
    return IndexQuality(
        dense_loss=nats["dense"] / num_tokens, sparse_loss=nats["sparse"] / num_tokens, layers=tuple(layers)
    )


def _losses(model: GlmForCausalLM, batch: Batch, **options: Any) -> Losses:
    inputs = batch_tensors(batch, model.lm_head.weight.device)
    return step_loss(model, *inputs, batch.segment_starts, **options)
