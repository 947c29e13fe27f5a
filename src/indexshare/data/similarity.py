"""What two documents have in common: a hash for the same text, signatures for almost the same, n-grams for a part.

Everything is a pure function of the text, on every machine and in every process.
"""

import hashlib
import re
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexshare.errors import TrainingError

NUM_PERMUTATIONS = 128
SHINGLE = 5  # words
_SEED = 42
_MIN_RECALL = 0.9  # of pairs at the threshold that the bands must bring together; more bands cost memory
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # scripts without spaces: a character is a word
_WORD = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+")
_MAX_REMEMBERED = 1_000_000


class _WordHashes(dict[str, int]):
    """64-bit hash of a word, computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_REMEMBERED:
            self.clear()
        value = self[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return value


_hashes = _WordHashes()


def content_hash(text: str) -> bytes:
    """16 bytes that are the same for texts that differ only in white space or in the form of their accents."""
    words = unicodedata.normalize("NFC", text).split()
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def ngrams(text: str, size: int) -> NDArray[np.uint64]:
    """Hashes of every `size` words in a row, case and punctuation left out; empty for a text of fewer words."""
    words = _WORD.findall(text.lower())
    hashes = np.fromiter(map(_hashes.__getitem__, words), np.uint64, len(words))
    if len(hashes) < size:
        return np.empty(0, np.uint64)
    count = len(hashes) - size + 1
    result = np.zeros(count, np.uint64)
    for offset in range(size):  # a polynomial modulo 2**64
        result = result * _MULTIPLIER + hashes[offset : offset + count]
    return result


def distinct_share(text: str) -> float:
    """The share of a text's sequences of five words that are not repetitions; 1 for a short text."""
    shingles = ngrams(text, SHINGLE)
    return len(np.unique(shingles)) / len(shingles) if len(shingles) else 1.0


def signature(text: str) -> bytes:
    """The MinHash of a text's sequences of five words, in the form `NearDuplicates` takes; empty for a short text."""
    shingles = np.unique(ngrams(text, SHINGLE)).tobytes()
    if not shingles:
        return b""
    sketch = _new_sketch()
    sketch.update([shingles[begin : begin + 8] for begin in range(0, len(shingles), 8)])
    return sketch.__getstate__()


class NearDuplicates:
    """Documents seen so far, by their signatures: under 3 KB each at a threshold of 0.8."""

    def __init__(self, threshold: float) -> None:
        """threshold: Jaccard similarity of the sets of five words in a row from which two documents are the same."""
        self._seen: Any = _rensa().RMinHashDeduplicator(threshold, NUM_PERMUTATIONS, True, num_bands(threshold), _SEED)

    def is_new(self, key: int, state: bytes) -> bool:
        """Whether no earlier document is almost the same; then this one is remembered."""
        if not state:
            return True
        sketch = _new_sketch()
        sketch.__setstate__(state)
        return self._seen.add(str(key), sketch)


def num_bands(threshold: float) -> int:
    """How many bands of the signature find 90 % of pairs at the threshold; what they find is then compared.

    With b bands of r rows a pair of similarity s meets in at least one with probability 1 - (1 - s^r)^b.
    """
    for rows in (32, 16, 8, 4, 2):
        bands = NUM_PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= _MIN_RECALL:
            return bands
    return NUM_PERMUTATIONS


def _new_sketch() -> Any:
    return _rensa().RMinHash(NUM_PERMUTATIONS, _SEED)


def _rensa() -> Any:  # the library has no type stubs
    try:
        import rensa
    except ImportError as error:
        raise TrainingError("finding duplicates needs rensa: pip install 'indexshare[train]'") from error
    return rensa
