"""Hashes and signatures: against sets of words, and against probabilities worked out by hand."""

import re
import subprocess
import sys

import numpy as np
import pytest
from data.corpus import prose
from hypothesis import given
from hypothesis import strategies as st

from indexshare.data import similarity
from indexshare.data.similarity import NearDuplicates, content_hash, distinct_share, ngrams, num_bands, signature


def word_sets(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[begin : begin + size]) for begin in range(len(words) - size + 1)}


@given(
    first=st.text("ab \n.-", max_size=60),
    second=st.text("ab \n.-", max_size=60),
    size=st.integers(1, 4),
)
def test_ngrams_are_shared_exactly_where_words_are(first: str, second: str, size: int) -> None:
    hashes = [set(ngrams(text, size).tolist()) for text in (first, second)]
    words = [word_sets(text, size) for text in (first, second)]
    assert [len(found) for found in hashes] == [len(found) for found in words]
    assert len(hashes[0] & hashes[1]) == len(words[0] & words[1])


def test_scripts_without_spaces_are_taken_by_characters() -> None:
    assert len(ngrams("今天天气很好 indeed", 3)) == 5
    assert ngrams("Straße, und", 2).tolist() == ngrams("straße und", 2).tolist() != []


def test_hashes_are_the_same_in_every_process() -> None:
    text = "one two three four five six"
    program = (
        "from indexshare.data.similarity import ngrams, signature; "
        f"print(*ngrams({text!r}, 5), signature({text!r}).hex())"
    )
    environment = {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [*map(str, ngrams(text, 5)), signature(text).hex()]


def test_a_full_table_of_words_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ngrams(prose(1), 5)
    monkeypatch.setattr(similarity, "_MAX_REMEMBERED", 3)
    assert np.array_equal(ngrams(prose(1), 5), before)


def test_white_space_and_accents_do_not_make_a_document() -> None:
    assert content_hash("a b\n  c") == content_hash(" a\tb\r\nc ") != content_hash("a bc")
    assert content_hash("caf\u00e9") == content_hash("cafe\u0301")


def changed(seed: int, share: float) -> str:
    """`prose(seed)` of 600 words, of which the last are others."""
    words = prose(seed, 600).split()
    keep = round(len(words) * (1 - share))
    return " ".join(words[:keep] + prose(seed + 10_000, 600).split()[keep:])


def test_almost_the_same_is_found_and_half_the_same_is_not() -> None:
    near = NearDuplicates(0.8)
    for seed in range(60):
        assert near.is_new(seed, signature(prose(seed, 600)))
    found = [not near.is_new(100 + seed, signature(changed(seed, 0.04))) for seed in range(60)]  # Jaccard 0.92
    kept = [near.is_new(200 + seed, signature(changed(seed, 0.5))) for seed in range(60)]  # Jaccard 0.33
    assert sum(found) >= 58 and all(kept)
    assert near.is_new(999, signature("two words")) and near.is_new(999, signature("two words"))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.95])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    bands = num_bands(threshold)
    rows = similarity.NUM_PERMUTATIONS // bands
    chance = np.random.default_rng(0)
    same = chance.random((2000, bands, rows)) < threshold  # a permutation agrees with this probability
    assert same.all(axis=2).any(axis=1).mean() > 0.88


def test_distinct_share() -> None:
    assert distinct_share("few words") == 1
    assert distinct_share("one two three four five " * 50) < 0.05 and distinct_share(prose(1)) > 0.95
