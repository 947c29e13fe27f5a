"""Which experts compute a token, for routers that are not GLM-5's: groups of experts, and softmax scores.

`ops.moe_route` is the router of GLM-5 and has a place in the C++ kernels; what is here runs in torch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from indexshare.model.config import GlmConfig

EXPERTS_OF_A_GROUP = 2  # whose scores rank the groups of a router with a bias (DeepSeek-V3, arXiv 2412.19437)


def is_glm_router(config: GlmConfig) -> bool:
    """Whether `ops.moe_route` is this model's router: sigmoid scores, a bias, and no groups."""
    return config.topk_method == "noaux_tc" and config.n_group == 1


def route_in_groups(hidden: Tensor, weight: Tensor, bias: Tensor | None, config: GlmConfig) -> tuple[Tensor, Tensor]:
    """Experts and gates as from `ops.moe_route`, chosen by `config.topk_method`.

    "noaux_tc": sigmoid scores; with `bias` [E] added they rank experts, and groups by their best two (DeepSeek-V3).
    "greedy": softmax scores rank experts; "group_limited_greedy": and groups by their best one (DeepSeek-V2, arXiv
    2405.04434). Experts come from the `topk_group` best groups; gates are scores without the bias. hidden [T, D],
    weight [E, D] -> experts int64 [T, A] (best first, ties to the lower number), gates [T, A] in fp32 (fp64 stays).
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(wide), weight.to(wide))
    if config.topk_method == "noaux_tc":
        assert bias is not None, "a router with sigmoid scores has a bias"
        scores = logits.sigmoid()
        ranks = scores.detach() + bias.to(wide)
    else:
        scores = logits.softmax(-1)
        ranks = scores.detach()
    if config.topk_method != "greedy" and config.n_group > 1:
        grouped = ranks.unflatten(-1, (config.n_group, -1))
        num_best = EXPERTS_OF_A_GROUP if config.topk_method == "noaux_tc" else 1
        best = _best(grouped.topk(num_best, dim=-1).values.sum(-1), config.topk_group)
        allowed = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=hidden.device).scatter_(-1, best, True)
        ranks = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    experts = _best(ranks, config.num_experts_per_tok)
    gates = scores.gather(-1, experts)
    if config.norm_topk_prob:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return experts, gates * config.routed_scaling_factor


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()
