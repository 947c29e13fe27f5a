"""Rows to measure on, to search on and to train on: no document is in two of them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.build import BuildOptions, build
from indexshare.data.rows import IGNORED, Batch, TokenRows
from indexshare.engine.resolve import packaged_model
from indexshare.errors import ConfigError, TrainingError
from indexshare.share.split import Split, split_rows

LENGTH = 16
WORDS_A_DOCUMENT = 40


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(packaged_model())


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> list[int]:
    """Tokens that stay themselves when one stands after the other."""
    found = []
    for token in range(tokenizer.vocab_size):
        content = tokenizer.token_bytes(token)
        is_word = content.startswith(b" ") and content[1:].isalpha() and len(content) > 3
        if is_word and list(tokenizer.encode(content.decode() * 5)) == [token] * 5:
            found.append(token)
        if len(found) == 30:
            return found
    raise AssertionError("the tokenizer has words")


def write(path: Path, tokenizer: Tokenizer, words: list[int], repositories: list[str] | None = None) -> Path:
    """JSON lines, a document for each word that has nothing but this word."""
    records = [{"text": tokenizer.token_bytes(word).decode() * WORDS_A_DOCUMENT} for word in words]
    if repositories is not None:
        records = [record | {"repo": name} for record, name in zip(records, repositories, strict=True)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def count(rows: list[Batch] | tuple[Batch, ...], tokenizer: Tokenizer) -> Counter[int]:
    """How often each word is read."""
    found = Counter(int(token) for row in rows for token in row.token_ids.flat)
    del found[tokenizer.control_id("<|endoftext|>")]
    return found


def training(split: Split) -> list[Batch]:
    return [split.training.batch(row, 1) for row in range(split.training.num_rows)]


def test_no_document_is_in_two_parts_and_little_is_lost(tmp_path: Path, tokenizer: Tokenizer, words: list[int]) -> None:
    texts = write(tmp_path / "words.jsonl", tokenizer, words)
    split = split_rows([texts], tokenizer, length=LENGTH, num_held_out=5, num_calibration=6)
    parts = [split.held_out, split.calibration, training(split)]
    assert [len(part) for part in parts[:2]] == [5, 6]
    seen = [set(count(part, tokenizer)) for part in parts]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    aside = len(words) - len(seen[2])
    assert aside == 2 + 3, "81 and 97 tokens in documents of 41"
    assert sum(count(parts[2], tokenizer).values()) > WORDS_A_DOCUMENT * len(seen[2]) - LENGTH
    for rows in parts:  # a document sees itself only, and what follows its end is no target
        for row in rows:
            for begin, end in zip(row.segment_starts, row.segment_starts[1:], strict=False):
                assert len({int(token) for token in row.token_ids[0, begin:end]} & set(words)) <= 1
            is_word = (row.targets[0] != IGNORED) & (row.targets[0] != tokenizer.control_id("<|endoftext|>"))
            assert (row.targets[0] == row.token_ids[0])[is_word].all() and is_word.any()
    again = split_rows([texts], tokenizer, length=LENGTH, num_held_out=5, num_calibration=6)
    assert again.fingerprint == split.fingerprint and count(again.held_out, tokenizer) == count(parts[0], tokenizer)
    other = split_rows([texts], tokenizer, length=LENGTH, num_held_out=5, num_calibration=6, seed=1)
    assert other.fingerprint != split.fingerprint


def test_repositories_stay_together(tmp_path: Path, tokenizer: Tokenizer, words: list[int]) -> None:
    """In rows of several documents of one, and where one that was taken stood in between."""
    names = [f"repository-{index // 5}" for index in range(30)]
    texts = write(tmp_path / "words.jsonl", tokenizer, words, names)
    split = split_rows([texts], tokenizer, length=100, num_held_out=2, num_calibration=2)
    of = dict(zip(words, names, strict=True))
    several = 0
    for row in [*split.held_out, *split.calibration, *training(split)]:
        for begin, end in zip(row.segment_starts, row.segment_starts[1:], strict=False):
            inside = {int(token) for token in row.token_ids[0, begin:end]} & of.keys()
            assert len({of[word] for word in inside}) == 1
            several += len(inside) > 1
    assert several > 5


def test_changed_texts_have_another_fingerprint(tmp_path: Path, tokenizer: Tokenizer, words: list[int]) -> None:
    found = set()
    for order in (words, words[::-1], [*words[:-1], words[0]]):
        texts = write(tmp_path / "words.jsonl", tokenizer, order)
        found.add(split_rows([texts], tokenizer, length=LENGTH, num_held_out=2).fingerprint)
    assert len(found) == 3


def test_a_single_document_is_cut(tmp_path: Path, tokenizer: Tokenizer, words: list[int]) -> None:
    text = tmp_path / "book.txt"
    text.write_text("".join(tokenizer.token_bytes(word).decode() for word in words) * 4)  # 120 tokens and an end
    split = split_rows([text], tokenizer, length=LENGTH, num_held_out=2, num_calibration=2)
    assert split.training.num_rows == (121 - 2 * 33 - 1) // LENGTH
    with pytest.raises(TrainingError, match="121 tokens, and it takes 131"):
        split_rows([text], tokenizer, length=LENGTH, num_held_out=4, num_calibration=3)


@pytest.mark.parametrize(
    "wrong", [{"num_held_out": 0}, {"num_calibration": -1}, {"length": 1}, {"length": 0}, {"seed": -1}]
)
def test_numbers_that_cannot_be_are_refused(tokenizer: Tokenizer, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="take one row at least"):
        split_rows([], tokenizer, **{"length": LENGTH, "num_held_out": 1, **wrong})


def test_what_was_built_has_its_own_held_out_rows(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(60):
        lines = (f"def f{n}_{number}(x):\n    return x * {n} + {number}\n" for n in range(12))
        (tmp_path / f"{number}.py").write_text("\n".join(lines))
    data = tmp_path / "data"
    files = tuple(str(path) for path in sorted(tmp_path.glob("*.py")))
    options = BuildOptions(sources=files, output=data, tokenizer=packaged_model(), held_out=0.1, near_duplicates=1.0)
    build(options)
    held_out = TokenRows.from_directory(data / "held_out", length=LENGTH)
    split = split_rows([data], tokenizer, length=LENGTH, num_held_out=3, num_calibration=2)
    expected = [held_out.batch(row, 1).token_ids.tolist() for row in range(3)]
    assert [row.token_ids.tolist() for row in split.held_out] == expected and not capsys.readouterr().err
    train = TokenRows.from_directory(data / "train", length=LENGTH)
    assert train.num_rows - 20 < split.training.num_rows + 2 <= train.num_rows
    assert len(split_rows([data], tokenizer, length=LENGTH, num_held_out=9999).held_out) == held_out.num_rows
    assert f"measuring on {held_out.num_rows:,} rows, all that are held out, not 9,999" in capsys.readouterr().err
    only = split_rows([data / "held_out"], tokenizer, length=LENGTH, num_held_out=2)  # given by itself it is split
    assert 0 < only.training.num_rows < held_out.num_rows
    assert only.fingerprint != split.fingerprint
