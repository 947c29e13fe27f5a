"""Which weights of a model are quantised, and to what. No torch.

Quantised are the weights that make up the size of a model and of each token's work: the projections of attention and
indexer, all feed-forward matrices, and the output head. They stay as they are elsewhere: embeddings (one row is looked
up), norms, routers and index head weights (small, and they decide what is read), `kv_b_proj` (small, and absorption
uses it in two directions), `eh_proj` of the MTP layer.

int4 stops at int8 for the output head, whose errors reach the choice of a token unsoftened while it is a small share of
the bytes per token, and for the MTP layer, whose drafts are worth their cost only when they are accepted.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from indexshare.errors import ConfigError

IntegerFormat = Literal["int8", "int4"]
HEAD = "lm_head.weight"
QUANTIZED = re.compile(
    r"lm_head\.weight|model\.layers\.(?P<layer>\d+)\.("
    r"self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj|indexer\.(wq_b|wk))\.weight"
    r"|mlp\.(shared_experts\.)?(gate|up|down)_proj\.weight"
    r"|mlp\.experts\.(gate_up_proj|down_proj))"
)
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to quantise to. group_size: of int4, 32, 64 or 128. keep: shell patterns of checkpoint names that stay."""

    format: IntegerFormat
    group_size: int = 128
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in ("int8", "int4"):
            raise ConfigError(f"weights are quantised to int8 or int4, not {self.format!r}")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"groups of int4 weights have 32, 64 or 128 inputs, not {self.group_size}")

    def format_of(self, name: str, num_inputs: int, num_layers: int) -> tuple[IntegerFormat, int] | None:
        """Format and group size (0 for int8) of a parameter of the model, None to leave it; `keep` does not count.

        num_layers: of the main model; the layer after them is the MTP layer.
        """
        match = QUANTIZED.fullmatch(name)
        if match is None:
            return None
        if self.format == "int8" or name == HEAD or int(match["layer"]) >= num_layers:
            return "int8", 0
        return "int4", fitting_group(num_inputs, self.group_size)

    def keeps(self, names: Sequence[str]) -> bool:
        """Whether one parameter, under the names it has in a checkpoint, stays; ConfigError when only a part would."""
        kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.keep)]
        if kept and len(kept) < len(names):
            left = next(name for name in names if name not in kept)
            raise ConfigError(
                f"--keep matches {kept[0]} but not {left}: the experts of a layer, and gate with up, are kept together"
            )
        return bool(kept)

    def check_used(self, names: Iterable[str]) -> None:
        """Raise ConfigError for a pattern of `keep` that matches none of the names that could be quantised."""
        names = list(names)
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"--keep {pattern!r} matches no weight that would be quantised; names look like {names[0]!r}"
                )


def is_quantizable(name: str) -> bool:
    """Whether a parameter of the model may be held quantised at all."""
    return QUANTIZED.fullmatch(name) is not None


def fitting_group(num_inputs: int, group_size: int) -> int:
    """The largest of 128, 64 and 32 up to `group_size` that divides the inputs; `group_size` itself when none does."""
    return next((size for size in GROUP_SIZES if size <= group_size and num_inputs % size == 0), group_size)
