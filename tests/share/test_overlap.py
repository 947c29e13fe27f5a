"""Overlap of choices: against sets in Python, and where the answer is known."""

import pytest
import torch
from planted import own_answers, planted_model

from indexshare.errors import ConfigError
from indexshare.model.batch import ForwardBatch, Trace
from indexshare.share import overlap as module
from indexshare.share.overlap import measure_overlap


def test_overlap_is_that_of_sets() -> None:
    model = planted_model("FSFS", seed=3, spread=0.7)
    rows = own_answers(model, 2, 40, seed=1)
    topk = model.config.index_topk
    expected = torch.zeros(4, 4)
    for row in rows:
        trace = Trace()
        with torch.no_grad():
            model(ForwardBatch(token_ids=row.token_ids, positions=row.positions, layout=row.layout, trace=trace))
        sets = [[set(rows.tolist()) for rows in trace.selections[layer]] for layer in range(4)]
        for first in range(4):
            for second in range(4):
                pairs = list(zip(sets[first], sets[second], strict=True))[topk:]
                expected[first, second] += sum(len(one & other) for one, other in pairs)
    result = measure_overlap(model, rows)
    assert (result.num_queries, result.num_rows) == (2 * (40 - topk), 2)
    torch.testing.assert_close(torch.tensor(result.matrix), expected / (result.num_queries * topk))
    assert result.matrix[0][0] == 1.0


def test_layers_that_choose_alike_by_construction_overlap_wholly() -> None:
    model = planted_model("FSSFSF", seed=4)
    matrix = measure_overlap(model, own_answers(model, 2, 40, seed=1)).matrix
    assert matrix[0][1] == matrix[1][2] == matrix[3][4] == 1.0
    assert matrix[2][3] < 0.9 > matrix[4][5]


def test_layers_without_an_indexer_are_left_out_and_one_is_nothing_to_compare() -> None:
    model = planted_model("FSFS", seed=3)
    rows = own_answers(model, 1, 40, seed=1)
    model.stack.layers[1].self_attn.indexer = None
    assert measure_overlap(model, rows).layers == (0, 2, 3)
    model.stack.layers[2].self_attn.indexer = model.stack.layers[3].self_attn.indexer = None
    with pytest.raises(ConfigError, match="nothing to compare"):
        measure_overlap(model, rows)


def test_long_rows_are_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUERIES", 10)
    model = planted_model("FF", seed=3)
    seen: list[tuple[int, int]] = []
    rows = own_answers(model, 3, 48, seed=1)
    result = measure_overlap(model, rows, lambda done, total: seen.append((done, total)))
    assert result.num_queries == 30
    assert seen == [(1, 3), (2, 3), (3, 3)]
