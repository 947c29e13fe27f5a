"""Rows of documents: every token once an epoch, nothing predicted across documents, the same whatever came before."""

import json
from pathlib import Path

import numpy as np
import pytest

from indexshare.chat.tokenizer import MAX_TEXT_BYTES, Tokenizer
from indexshare.data.rows import IGNORED, TokenRows, open_rows
from indexshare.data.shards import ShardWriter, fingerprint
from indexshare.errors import TrainingError


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


def test_a_document_that_is_too_large_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("word\n" * (MAX_TEXT_BYTES // 5 + 1))
    with pytest.raises(TrainingError, match=r"a\.txt: .* bytes can be encoded"):
        open_rows([tmp_path], tokenizer, length=8)


def test_built_data_gives_the_rows_of_the_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"document {number} has some words of its own\n" * 3 for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    mark = fingerprint(tokenizer)
    end = tokenizer.control_id("<|endoftext|>")
    with ShardWriter(
        tmp_path / "train", vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=mark, shard_bytes=200
    ) as writer:
        for number, text in enumerate(texts):
            writer.add(np.asarray([*tokenizer.encode(text), end]), f"a.jsonl:{number + 1}", opens_segment=True)
    plain = open_rows([tmp_path / "a.jsonl"], tokenizer, length=24, seed=3)
    for source in (tmp_path, tmp_path / "train"):
        built = open_rows([source], tokenizer, length=24, seed=3)
        assert built.num_rows == plain.num_rows
        for step in (0, 1, plain.num_rows // 2, plain.num_rows):
            first, second = plain.batch(step, 3), built.batch(step, 3)
            assert first.segment_starts == second.segment_starts
            for name in ("token_ids", "targets", "loss_weights", "positions"):
                assert np.array_equal(getattr(first, name), getattr(second, name)), name
    with pytest.raises(TrainingError, match="give it alone"):
        open_rows([tmp_path, tmp_path / "a.jsonl"], tokenizer, length=24)
    with pytest.raises(TrainingError, match=r"has no index\.json"):
        TokenRows.from_directory(tmp_path / "nothing", length=24)


def test_data_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with ShardWriter(tmp_path / "train", vocab_size=tokenizer.vocab_size, tokenizer_fingerprint="other") as writer:
        writer.add(np.arange(100), "a", opens_segment=True)
    with pytest.raises(TrainingError, match="another tokenizer"):
        open_rows([tmp_path], tokenizer, length=8)


def test_an_index_of_another_program_is_a_file_like_others(tmp_path: Path, tokenizer: Tokenizer) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for content in ('{"pages": [1, 2]}', "[1, 2]"):
        (site / "index.json").write_text(content * 20)
        with pytest.raises(TrainingError, match="cannot be read"):
            open_rows([site], tokenizer, length=8)
        (site / "index.json").write_text(content)
        (site / "words.txt").write_text("some words of a document " * 10)
        assert open_rows([site], tokenizer, length=8).num_rows > 3


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = TokenRows(np.arange(1001), np.asarray([0]), length=10, seed=5)
    made: list[object] = []
    make = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or make(seed))
    order = [int(rows.batch(step, 4).token_ids[0, 0]) for step in range(50)]
    assert made == [[5, 0], [5, 1]]
    again = TokenRows(np.arange(1001), np.asarray([0]), length=10, seed=5)
    assert [int(again.batch(step, 4).token_ids[0, 0]) for step in reversed(range(50))] == order[::-1]


def test_files_of_a_repository_see_each_other(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "setup.py").write_text("from setuptools import setup\n" * 3)
        (tmp_path / folder / "a.py").write_text("import os\n" * 5)
    (tmp_path / "x.txt").write_text("alone")
    (tmp_path / "y.txt").write_text("alone as well")
    sizes = [len(tokenizer.encode(text)) + 1 for text in ("import os\n" * 5, "from setuptools import setup\n" * 3)] * 2
    sizes += [len(tokenizer.encode(text)) + 1 for text in ("alone", "alone as well")]
    batch = TokenRows.from_files([tmp_path], tokenizer, length=sum(sizes) - 1).batch(0, 1)
    ends = np.cumsum(sizes)
    assert batch.segment_starts == (0, int(ends[1]), int(ends[3]), int(ends[4]), sum(sizes) - 1)
    assert np.flatnonzero(batch.targets[0] == IGNORED).tolist() == (ends[:-1] - 1).tolist()
