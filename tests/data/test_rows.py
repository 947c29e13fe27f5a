"""Rows of documents: every token once an epoch, nothing predicted across documents, the same whatever came before."""

import json
from pathlib import Path

import numpy as np
import pytest

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import IGNORED, TokenRows
from indexshare.engine.resolve import packaged_model
from indexshare.errors import TrainingError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(packaged_model())


def test_every_row_comes_once_an_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"document {number} has some words of its own\n" * 3 for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = TokenRows.from_files([tmp_path], tokenizer, length=32, seed=1)
    end = tokenizer.control_id("<|endoftext|>")
    stream = [token for text in texts for token in (*tokenizer.encode(text), end)]
    batches = [rows.batch(step, 1) for step in range(rows.num_rows)]
    seen = sorted(tuple(batch.token_ids[0].tolist()) for batch in batches)
    assert seen == sorted(tuple(stream[32 * row : 32 * row + 32]) for row in range(rows.num_rows))
    for batch in batches:
        before, after = batch.token_ids[0], batch.targets[0]
        assert np.array_equal(after == IGNORED, before == end) and np.array_equal(
            batch.loss_weights[0] == 0, before == end
        )
        starts = np.asarray(batch.segment_starts[:-1])
        assert set(starts[1:]) == set(np.flatnonzero(before == end) + 1) - {32}
        assert all(batch.positions[0, start] == 0 for start in starts)
    other = TokenRows.from_files([tmp_path], tokenizer, length=32, seed=1)
    assert np.array_equal(other.batch(rows.num_rows + 3, 2).token_ids, rows.batch(rows.num_rows + 3, 2).token_ids)


def test_too_little_data_and_wrong_lines_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("few words")
    with pytest.raises(TrainingError, match="do not fill one row"):
        TokenRows.from_files([tmp_path], tokenizer, length=512)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"words": 1}\n')
    with pytest.raises(TrainingError, match=r"b\.jsonl:2"):
        TokenRows.from_files([tmp_path / "b.jsonl"], tokenizer, length=8)
