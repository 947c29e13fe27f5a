"""What one forward pass needs, as plain values: the model keeps no state of its own."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from indexshare.kernels.index_loss import LossAndGradients
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.pool import Pool, QuantizedPool


class IndexerOutput(NamedTuple):
    """What an indexer scores with: queries [n, J, I] and head weights [n, J] of n new tokens, keys [T, I] of all."""

    query: Tensor
    weights: Tensor
    keys: Tensor


class Selection(NamedTuple):
    """What a full layer hands to the shared layers after it.

    rows: int32 [T, K] pool rows (see kernels/ops.py), or None when every visible key is attended to.
    masks: the same rows as bool [new, S] per sequence; only in training on short sequences.
    indexer: what the choice was made with, of the tokens in `index_queries`; only while indexers are trained.
    latents: keys [T, W] of the layer that selected; only in training, where later draft steps of MTP attend to them.
    """

    rows: Tensor | None
    masks: list[Tensor] | None = None
    indexer: IndexerOutput | None = None
    latents: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheView:
    """Pools of rows, one per layer, the MTP layer last. A shared layer has no index keys.

    latents: [R, kv_lora_rank + qk_rope_head_dim] each; index_keys: [R, index_head_dim] or None. All latents are held in
    one format, and all index keys.
    """

    latents: tuple[Pool, ...]
    index_keys: tuple[Pool | None, ...]
    _addresses: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the caches that are not rounded."""
        return {pool.dtype for pool in (*self.latents[:1], *self.index_keys[:1]) if isinstance(pool, Tensor)}

    @property
    def group_sizes(self) -> tuple[int, int]:
        """Numbers that share a scale in latents and in index keys; 0 where they are not rounded."""
        latents, keys = self.latents[0], self.index_keys[0]
        return (
            latents.group_size if isinstance(latents, QuantizedPool) else 0,
            keys.group_size if isinstance(keys, QuantizedPool) else 0,
        )

    def addresses(self, layers: tuple[int, ...]) -> Tensor:
        """int64 [layers, 2]: where the latents and the index keys of these layers begin; 0 for no keys."""
        if layers not in self._addresses:
            pairs = [(self.latents[i], self.index_keys[i]) for i in layers]
            self._addresses[layers] = torch.tensor(
                [(latents.data_ptr(), 0 if keys is None else keys.data_ptr()) for latents, keys in pairs]
            )
        return self._addresses[layers]


class Trace:
    """What a caller wants to see of a forward pass; filled by the layers when given.

    selections: rows chosen by each full layer. In training also expert_counts: int64 [E], tokens sent to each expert,
    by layer, and index_losses: by layer, how far its attention is from the scores of the indexer whose choice it uses
    (`kernels/index_loss.py`, nats for each query), if the batch trains indexers.
    watch_router: called with each router's module and input [T, D], when the layer runs again as well.
    kept_choices: with `recompute`, layers keep only their inputs and run again on the way back, with the rows that they
    chose the first time and put here, by layer. kept_losses: what they found of their index losses then.
    Not a dataclass: FSDP2 looks into those for tensors, and hands layers a copy.
    """

    def __init__(self, *, recompute: bool = False, watch_router: Callable[[Any, Tensor], None] | None = None) -> None:
        self.watch_router = watch_router
        self.kept_choices: dict[int, Tensor] | None = {} if recompute else None
        self.kept_losses: defaultdict[int, list[LossAndGradients]] = defaultdict(list)
        self.selections: dict[int, Tensor | None] = {}
        self.expert_counts: dict[int, Tensor] = {}
        self.index_losses: dict[int, Tensor] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Everything a forward pass needs.

    token_ids, positions: int64 [T], all sequences flat. layout: where keys lie. cache None means training: the keys
    are the batch's own tokens. attention "dense" ignores the indexer's choice. query_only writes no keys and runs no
    indexer (later draft steps of MTP). index_queries: int64 [n] per sequence, the new tokens over which the
    indexer's loss is taken and added to `trace`; None does not train it. index_target: which keys that loss is over.
    gather: in training on several ranks, makes the keys of all out of the rows of this one, where `layout` finds them.
    """

    token_ids: Tensor
    positions: Tensor
    layout: KeyLayout
    cache: CacheView | None = None
    attention: Literal["sparse", "dense"] = "sparse"
    query_only: bool = False
    index_queries: list[Tensor] | None = None
    index_target: Literal["selected", "visible"] = "selected"
    trace: Trace | None = None
    gather: Callable[[Tensor], Tensor] | None = None
