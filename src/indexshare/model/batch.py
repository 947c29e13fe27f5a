"""What one forward pass needs, as plain values: the model keeps no state of its own."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.pool import Pool, QuantizedPool


class Selection(NamedTuple):
    """What a full layer hands to the shared layers after it.

    rows: int32 [T, K] pool rows (see kernels/ops.py), or None when every visible key is attended to.
    masks: the same rows as bool [new, S] per sequence; only in training on short sequences.
    scores: the indexer's differentiable scores [n, S] per sequence for `index_queries`; only while it is trained.
    """

    rows: Tensor | None
    masks: list[Tensor] | None = None
    scores: list[Tensor] | None = None


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


@dataclass(slots=True)
class Trace:
    """What a caller wants to see of a forward pass; filled by the layers when given.

    selections: rows chosen by each full layer. In training also expert_counts: int64 [E], tokens sent to each expert,
    by layer, and index_losses: one term of the indexer's loss per layer, if the batch trains the indexer.
    """

    selections: dict[int, Tensor | None] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    index_losses: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Everything a forward pass needs.

    token_ids, positions: int64 [T], all sequences flat. layout: where keys lie. cache None means training: the keys
    are the batch's own tokens. attention "dense" ignores the indexer's choice. query_only writes no keys and runs no
    indexer (later draft steps of MTP). index_queries: int64 [n] per sequence, the new tokens over which the
    indexer's loss is taken and added to `trace`; None does not train it. index_target: which keys that loss is over.
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
