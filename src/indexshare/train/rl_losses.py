"""What a step of reinforcement learning minimises: a clipped policy loss over tokens, and for PPO a critic's.

GRPO (arXiv 2402.03300, advantage of a completion over its group), PPO (arXiv 1707.06347, generalised advantage
estimation arXiv 1506.02438), the importance ratio against the sampler's own log-probabilities, clipped on both sides
(GLM-5, arXiv 2602.15763): a token whose ratio leaves [1 - low, 1 + high] takes no part, whatever its advantage.
There is no KL term. The mean is over tokens, not over completions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import ForwardBatch
from indexshare.model.glm import GlmForCausalLM
from indexshare.train.cross_entropy import token_nats
from indexshare.train.phases import Phase

EPSILON = 1e-6  # beside standard deviations


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Completions to learn from, each after its prompt, end to end in one flat batch without padding.

    token_ids, positions: int64 [T]; segment_starts: offsets of the sequences, T last. predictors: int64 [N], the places
    in the batch after which the N drawn tokens were drawn; targets: int64 [N], these tokens; sampled_logprobs: fp32
    [N], theirs when they were drawn. completion_starts: offsets of the completions in the N tokens, N last. rewards,
    groups: one for each completion; those of a group answer the same prompt.
    """

    step: int
    token_ids: Tensor
    positions: Tensor
    segment_starts: tuple[int, ...]
    predictors: Tensor
    targets: Tensor
    sampled_logprobs: Tensor
    completion_starts: tuple[int, ...]
    rewards: tuple[float, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RlLosses:
    """As the loop wants them. lm: mean negative log-probability of the drawn tokens, nats. metrics: more to log.

    The router's balance is left alone: a bias that moves would change the policy without a gradient.
    """

    total: Tensor
    lm: Tensor
    num_tokens: int
    metrics: Mapping[str, float]
    mtp: Tensor = field(default_factory=lambda: torch.zeros(()))
    index_kl: Tensor = field(default_factory=lambda: torch.zeros(()))
    mtp_acceptance: Tensor = field(default_factory=lambda: torch.zeros(0))
    expert_counts: Mapping[int, Tensor] = field(default_factory=dict)


class ValueHead(nn.Module):
    """The critic: the expected reward from here on, read off the final hidden state by one vector [D].

    Its loss never moves the policy: no gradient flows back into the hidden states. Fresh, it says 0 everywhere.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> values fp32 [N]."""
        return (hidden.detach().float() * self.weight).sum(-1) + self.bias


def group_advantages(rewards: Sequence[float], groups: Sequence[int]) -> Tensor:
    """GRPO: by how many standard deviations a completion is better than its group, fp32 [completions].

    0 in a group of equal rewards: it has nothing to say.
    """
    values, members = torch.tensor(rewards), torch.tensor(groups)
    advantages = torch.zeros_like(values)
    for group in members.unique():
        own = values[members == group]
        spread = own.std(correction=0)
        advantages[members == group] = (own - own.mean()) / (spread + EPSILON)
    return advantages


def token_advantages(values: Tensor, rewards: Sequence[float], starts: Sequence[int], gae_lambda: float) -> Tensor:
    """Generalised advantage estimation without discount, the reward at each completion's last token: fp32 [N].

    values: fp32 [N], what the critic expects before each token; starts: offsets of the completions, N last.
    """
    advantages = torch.zeros_like(values)
    known = values.tolist()
    for reward, (start, stop) in zip(rewards, pairwise(starts), strict=True):
        after, advantage = reward, 0.0
        for place in range(stop - 1, start - 1, -1):
            advantage = after - known[place] + gae_lambda * advantage
            advantages[place] = advantage
            after = known[place]
    return advantages


def policy_loss(
    logprobs: Tensor, sampled: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-> (loss, which tokens were left out [N]). All [N] fp32; gradient flows into `logprobs` only.

    Each token within the bounds weighs ratio * advantage, the others nothing; the mean is over all N tokens.
    """
    ratio = (logprobs - sampled).clamp(-20.0, 20.0).exp()  # no infinity, not even in what is left out
    clipped = (ratio.detach() < 1 - clip_low) | (ratio.detach() > 1 + clip_high)
    return -(ratio.masked_fill(clipped, 0.0) * advantages).mean(), clipped


def rl_loss(
    model: GlmForCausalLM,
    batch: RolloutBatch,
    phase: Phase,
    *,
    clip_low: float,
    clip_high: float,
    gae_lambda: float,
    value_weight: float,
) -> RlLosses:
    """Loss of a batch of rollouts: PPO when the model has a value head, else GRPO."""
    hidden = model(
        ForwardBatch(
            token_ids=batch.token_ids,
            positions=batch.positions,
            layout=KeyLayout.packed(batch.segment_starts),
            attention=phase.attention,
        )
    ).index_select(0, batch.predictors)
    logprobs = -token_nats(model, hidden, batch.targets)
    lengths = torch.tensor([stop - start for start, stop in pairwise(batch.completion_starts)])
    head = dict(model.named_children()).get("value_head")
    value_loss = torch.zeros((), device=hidden.device)
    if head is None:
        advantages = group_advantages(batch.rewards, batch.groups).repeat_interleave(lengths).to(hidden.device)
    else:
        values = head(hidden)
        returns = torch.tensor(batch.rewards).repeat_interleave(lengths).to(hidden.device)
        advantages = token_advantages(values.detach(), batch.rewards, batch.completion_starts, gae_lambda)
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + EPSILON)
        value_loss = functional.mse_loss(values, returns)
    policy, clipped = policy_loss(logprobs, batch.sampled_logprobs, advantages, clip_low=clip_low, clip_high=clip_high)
    difference = (logprobs.detach() - batch.sampled_logprobs).abs()
    rewards = torch.tensor(batch.rewards)
    return RlLosses(
        total=policy + value_weight * value_loss,
        lm=-logprobs.detach().mean(),
        num_tokens=len(batch.targets),
        metrics={
            "reward": float(rewards.mean()),
            "reward_deviation": float(rewards.std(correction=0)),
            "completion_tokens": float(lengths.float().mean()),
            "logprob_difference": float(difference.mean()),
            "logprob_difference_max": float(difference.max()),
            "clipped": float(clipped.float().mean()),
            "value_loss": float(value_loss.detach()),
        },
    )
