"""The small loss that balances experts inside each sequence (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, eq. 17-20).

The router's bias balances experts over a batch; this keeps single sequences from leaning on a few of them. GLM-4.5
(arXiv 2508.06471) trains with a weight of 1e-4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from indexshare.model.glm import MixtureOfExperts


def sequence_balance(scores: Tensor, sequence_starts: tuple[int, ...], num_chosen: int) -> Tensor:
    """sum_i f_i P_i of each sequence, averaged with their lengths as weights; 1 when all experts are used alike.

    scores [T, E]: the router's, before its bias; sequence_starts: offsets of the sequences, T last;
    num_chosen: experts for each token. f_i is E / (num_chosen T) times the tokens whose best scores i is among, P_i the
    mean of expert i's share of a token's scores. The gradient goes through P alone.
    """
    num_tokens, num_experts = scores.shape
    lengths = torch.tensor(sequence_starts, device=scores.device).diff()
    owner = torch.repeat_interleave(lengths)
    shares = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores).scatter_(1, scores.detach().topk(num_chosen, dim=-1).indices, 1.0)
    empty = scores.new_zeros(len(lengths), num_experts)
    frequency = empty.index_add(0, owner, chosen) * (num_experts / num_chosen) / lengths[:, None]
    mean_share = empty.index_add(0, owner, shares) / lengths[:, None]
    return (lengths * (frequency * mean_share).sum(-1)).sum() / num_tokens


class Balance:
    """`Trace.watch_router` of a packed batch: collects `sequence_balance` of every router."""

    def __init__(self, sequence_starts: tuple[int, ...]) -> None:
        self._starts = sequence_starts
        self._losses: dict[int, Tensor] = {}

    def __call__(self, module: MixtureOfExperts, hidden: Tensor) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = functional.linear(hidden.to(wide), module.gate.weight.to(wide))
        scores = logits.sigmoid() if module.config.topk_method == "noaux_tc" else logits.softmax(-1)
        # computed each time, too: a layer that runs again for its gradient has to repeat all of it
        self._losses.setdefault(module.layer, sequence_balance(scores, self._starts, module.config.num_experts_per_tok))

    def loss(self) -> Tensor:
        """The sum over layers."""
        return torch.stack(list(self._losses.values())).sum() if self._losses else torch.zeros(())

    @property
    def num_tokens(self) -> int:
        """Of the batch."""
        return self._starts[-1]
