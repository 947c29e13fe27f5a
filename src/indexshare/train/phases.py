"""What a training run consists of, as frozen values: its phases, rates and lengths. All that decides the result."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from indexshare.model.config import GlmConfig

# What a recipe's file may say; without a NaN or an infinity.
Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0.0, le=sys.float_info.max)]
Positive = Annotated[float, Meta(gt=0.0, le=sys.float_info.max)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training with one objective.

    `trains` says which parameters move: "indexer" is the dense warm-up of DSA (all else frozen), "model" its opposite,
    "mtp" the MTP layer alone.
    `learning_rate_scale` multiplies the recipe's schedule in this phase; `data` replaces entries of the recipe's.
    balance_loss_weight: of the sequence-level loss that balances experts (GLM-4.5 and DeepSeek-V3 train with 1e-4).
    mtp_num_steps drafts after each token are trained, by likelihood or by expected acceptance (see `mtp_loss`).
    recompute: activations of layers are not kept but computed again on the way back; for long rows.
    index_stride and index_target say over which tokens and which keys the indexers' loss is taken (see `step_loss`).
    """

    name: str
    num_steps: Count
    attention: Literal["dense", "sparse"]
    trains: Literal["all", "indexer", "model", "mtp"] = "all"
    index_loss_weight: NotNegative = 0.0
    mtp_loss_weight: NotNegative = 0.0
    mtp_num_steps: Count = 1
    mtp_objective: Literal["cross_entropy", "acceptance"] = "cross_entropy"
    balance_loss_weight: NotNegative = 0.0
    index_stride: Count = 4
    index_target: Literal["selected", "visible"] = "selected"
    recompute: bool = False
    sequence_length: Count
    batch_size: Count
    learning_rate_scale: NotNegative = 1.0
    data: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRecipe:
    """All that decides the result of a run. Learning rates are peaks; one warm-up and one cosine span all phases."""

    name: str
    model: GlmConfig
    phases: tuple[Phase, ...]
    seed: Annotated[int, Meta(ge=0)]
    learning_rate_muon: NotNegative
    learning_rate_adamw: NotNegative
    warmup_steps: Annotated[int, Meta(ge=0)]
    min_lr_ratio: Share = 0.1
    weight_decay: NotNegative = 0.1
    gradient_clip: Positive = 1.0
    bias_update_rate: NotNegative = 0.001
    muon_split: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: Count = 200
    log_every: Count = 10
    data: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.num_steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase that step `step` (from 0) belongs to; the last one beyond the end."""
        ends = itertools.accumulate(phase.num_steps for phase in self.phases)
        return next((phase for phase, end in zip(self.phases, ends, strict=True) if step < end), self.phases[-1])
