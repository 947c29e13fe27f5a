"""How far the choices of two layers agree: |T_i ∩ T_j| / k, the mean over queries (IndexCache, arXiv 2603.12201, 3.2).

Agreement says where sharing may be cheap, not that it is: which of the keys that are missed matter is for the loss to
tell.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from indexshare.errors import ConfigError
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import Trace
from indexshare.model.glm import GlmForCausalLM, RopeTable
from indexshare.share.calibration import CalibrationRow, check_rows, forward_batch

MAX_QUERIES = 256  # of a row, equally spaced: neighbours choose much the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Mean overlap of all pairs of layers that run an indexer. matrix[a][b] belongs to layers[a] and layers[b].

    num_queries: queries compared, all with more visible keys than index_topk.
    """

    layers: tuple[int, ...]
    matrix: tuple[tuple[float, ...], ...]
    index_topk: int
    num_rows: int
    num_queries: int


@torch.inference_mode()
def measure_overlap(
    model: GlmForCausalLM, rows: tuple[CalibrationRow, ...], progress: Callable[[int, int], None] | None = None
) -> Overlap:
    """Run the model over the rows and compare what its indexers choose. progress(rows done, rows in all).

    Raises ConfigError for a model with a single indexer, TrainingError when no document is longer than index_topk.
    """
    check_rows(rows, model.config)
    topk = model.config.index_topk
    layers = tuple(layer.self_attn.layer for layer in model.stack.layers if layer.self_attn.indexer is not None)
    if len(layers) < 2:
        raise ConfigError("this model has one indexer: there is nothing to compare")
    common = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    num_queries = 0
    for done, row in enumerate(rows, start=1):
        queries = _queries(row.layout, topk)
        if len(queries):
            choices = _choices(model, row)
            common += _num_common([choices[layer][queries.to(choices[layer].device)] for layer in layers])
            num_queries += len(queries)
        if progress is not None:
            progress(done, len(rows))
    matrix = tuple(tuple(line) for line in (common / (num_queries * topk)).tolist())
    return Overlap(layers=layers, matrix=matrix, index_topk=topk, num_rows=len(rows), num_queries=num_queries)


def _queries(layout: KeyLayout, topk: int) -> Tensor:
    """Tokens with more than `topk` visible keys, thinned out to MAX_QUERIES: int64, ascending."""
    ends = zip(layout.sequence_starts[:-1], layout.sequence_starts[1:], strict=True)
    wide = torch.cat([torch.arange(min(start + topk, stop), stop) for start, stop in ends])
    return wide[:: max(1, -(-len(wide) // MAX_QUERIES))]


def _choices(model: GlmForCausalLM, row: CalibrationRow) -> dict[int, Tensor]:
    """By layer with an indexer, the rows that it selects: int32 [T, K]."""
    trace = Trace()
    batch = forward_batch(model, row, trace)
    hidden, selected = model.model.embed_tokens(row.token_ids), None
    rope = RopeTable(row.positions, model.config, hidden.dtype)
    for layer in model.stack.layers:
        hidden, selected = layer(hidden, selected, batch, rope)
    return {layer: rows for layer, rows in trace.selections.items() if rows is not None}


def _num_common(choices: list[Tensor]) -> Tensor:
    """Keys that each pair of layers has in common, summed over queries: [layers, layers]. choices int32 [Q, K] each."""
    num_layers, num_keys = len(choices), int(max(rows.max() for rows in choices)) + 1
    common = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    member = torch.zeros(len(choices[0]), num_keys, dtype=torch.bool, device=choices[0].device)
    for first, rows in enumerate(choices):
        member.zero_().scatter_(1, rows.long(), value=True)
        for second in range(first, num_layers):
            shared = member.gather(1, choices[second].long()).sum()
            common[first, second] = common[second, first] = float(shared)
    return common
