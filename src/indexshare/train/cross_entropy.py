"""-log p of tokens without logits of all of them at once: 154,880 fp32 numbers a token would be the largest tensor."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from indexshare import runtime
from indexshare.model.glm import GlmForCausalLM


def token_nats(model: GlmForCausalLM, states: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) [n] in fp32. states [n, D] after the final norm; targets int64 [n], all valid.

    Logits exist for one tile of tokens at a time, under the workspace budget: those of several tiles are made again on
    the way back.
    """

    def nats(states: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model.logits(states), targets, reduction="none")

    size = tile_rows(model)
    if len(states) <= size:
        return nats(states, targets)
    tiles = zip(states.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(nats, *tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles])


def tile_rows(model: GlmForCausalLM) -> int:
    """Rows of fp32 logits of which a few copies fit into the workspace."""
    return max(1, runtime.settings().workspace_bytes // (16 * model.config.vocab_size))
