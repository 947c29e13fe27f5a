"""Where a model may be cut into pipeline stages: at full layers, or the selection is sent along with the hidden states.

A shared layer uses the choice of the last full layer before it. A stage that begins with one would need that choice,
int32 [T, index_topk], from the stage before; a stage that begins with a full layer needs the hidden states alone.
"""

from __future__ import annotations

from indexshare.errors import ConfigError
from indexshare.model.config import GlmConfig


def check_stages(config: GlmConfig, first_layers: tuple[int, ...]) -> None:
    """Raises ConfigError unless these (from 0, ascending) can begin stages that only hidden states pass between."""
    if first_layers[:1] != (0,) or list(first_layers) != sorted(set(first_layers)):
        raise ConfigError(f"stages begin at layer 0 and ascend, not at {first_layers}")
    for layer in first_layers:
        if layer >= config.num_hidden_layers or not config.is_full(layer):
            near = min(config.full_layers, key=lambda full: abs(full - layer))
            raise ConfigError(f"a stage cannot begin at layer {layer}, which has no indexer; the nearest is {near}")


def choose_stages(config: GlmConfig, num_stages: int) -> tuple[int, ...]:
    """First layers of stages of which the longest is as short as it can be. Raises ConfigError for too many stages."""
    full, end = config.full_layers, config.num_hidden_layers
    if not 1 <= num_stages <= len(full):
        raise ConfigError(f"{len(full)} full layers begin at most as many stages, not {num_stages}")
    # best[i]: the longest stage and the first layers when the layers from full[i] on make `stages` stages
    best = {index: (end - layer, (layer,)) for index, layer in enumerate(full)}
    for _ in range(num_stages - 1):
        best = {
            index: min(
                (max(full[after] - layer, longest), (layer, *rest))
                for after, (longest, rest) in best.items()
                if after > index
            )
            for index, layer in enumerate(full)
            if any(after > index for after in best)
        }
    return best[0][1]
