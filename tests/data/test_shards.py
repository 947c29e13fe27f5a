"""Tokens on disk: the same array back, and no damaged file is taken for a good one."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexshare.data.shards import ShardWriter, TokenFile, token_type, verify
from indexshare.errors import TrainingError


def write(directory: Path, documents: list[list[int]], *, vocab_size: int = 1000, shard_bytes: int = 64) -> TokenFile:
    with ShardWriter(directory, vocab_size=vocab_size, tokenizer_fingerprint="x", shard_bytes=shard_bytes) as writer:
        for number, document in enumerate(documents):
            writer.add(np.asarray(document, np.int64), f"d{number}", opens_segment=number % 2 == 0)
    return TokenFile(directory)


@settings(max_examples=25)  # files are flushed to the disk
@given(documents=st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=90), max_size=12), data=st.data())
def test_slices_are_those_of_one_array(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: st.DataObject
) -> None:
    tokens = write(tmp_path_factory.mktemp("shards") / "train", documents)
    stream = [token for document in documents for token in document]
    assert len(tokens) == len(stream) and tokens[0 : len(stream)].tolist() == stream
    begin, end = (data.draw(st.integers(0, len(stream) + 3)) for _ in range(2))
    assert tokens[begin:end].tolist() == stream[begin:end]
    lengths = np.cumsum([0, *map(len, documents)])[:-1]
    assert tokens.starts.tolist() == lengths[: len(documents)].tolist()
    assert tokens.segments.tolist() == lengths[: len(documents)].tolist()[::2]


def test_shards_are_small_and_of_the_smallest_type(tmp_path: Path) -> None:
    write(tmp_path / "train", [[1] * 100, [2] * 28], vocab_size=65_536)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "train").glob("*.bin"))]
    assert sizes == [64] * 4 and token_type(65_537).itemsize == 4
    verify(tmp_path / "train")


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train", [[1, 2, 3] * 30])
    shard = tmp_path / "train" / "tokens-00001.bin"
    good = shard.read_bytes()
    shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(TrainingError, match=r"tokens-00001\.bin is damaged"):
        verify(tmp_path / "train")
    shard.write_bytes(good[:-2])
    with pytest.raises(TrainingError, match=r"tokens-00001\.bin is missing or cut off"):
        TokenFile(tmp_path / "train")
    shard.unlink()
    with pytest.raises(TrainingError, match=r"tokens-00001\.bin is missing or cut off"):
        TokenFile(tmp_path / "train")
    index = tmp_path / "train" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "version": 99}))
    with pytest.raises(TrainingError, match="another format"):
        TokenFile(tmp_path / "train")
    index.write_text("{")
    with pytest.raises(TrainingError, match="cannot be read"):
        TokenFile(tmp_path / "train")


def test_nothing_is_there_before_all_of_it_is(tmp_path: Path) -> None:
    def stop() -> None:
        with ShardWriter(tmp_path / "train", vocab_size=10, tokenizer_fingerprint="x") as writer:
            writer.add(np.zeros(9, np.int64), "d", opens_segment=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert not (tmp_path / "train").exists()
    assert write(tmp_path / "train", [[1]])[0:1].tolist() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["train"]
