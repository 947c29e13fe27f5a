"""Heuristics that tell a document worth reading from data, listings and machine output. Each says why, in one word.

The thresholds are those in common use for web text (Rae et al. 2021, appendix A: Gopher) and for code (Kocetkov et al.
2022: The Stack), where they were chosen by looking at what they drop. They look at bytes, not at languages: a byte
beyond ASCII counts as part of a letter.
"""

import re
import string

from indexshare.data.similarity import distinct_share

REASONS = {
    "unreadable": "could not be read as what its name says, or is a record without text; conversations go to recipes as"
    " they are",
    "binary": "holds a zero byte",
    "not-utf-8": "is not UTF-8",
    "too-small": "has fewer bytes than --min-bytes",
    "too-large": "has more bytes than --max-bytes",
    "license": "has no licence that --licenses allows",
    "generated": "says that a program wrote it, or is a lock file",
    "long-lines": "is code with a line longer than 1,000 characters, or text with one of 100,000",
    "minified": "is code with more than 100 characters a line",
    "few-letters": "has too few letters: under 60 % of text, 25 % of code",
    "data": "is mostly digits, or numbers and bytes written out",
    "word-length": "has words of fewer than 2 or more than 12 letters on average",
    "repeated-lines": "repeats more than 30 % of its lines",
    "repeated-phrases": "repeats more than 30 % of its sequences of five words",
    "exact-duplicate": "is the same as an earlier document but for white space",
    "near-duplicate": "is almost the same as an earlier document",
    "contaminated": "shares a sequence of words with an evaluation set or with the held-out documents",
}
MAX_CODE_LINE, MAX_TEXT_LINE, MAX_MEAN_LINE = 1_000, 100_000, 100
LOCK_FILES = frozenset(
    "package-lock.json npm-shrinkwrap.json yarn.lock pnpm-lock.yaml Cargo.lock poetry.lock uv.lock Pipfile.lock "
    "composer.lock Gemfile.lock go.sum".split()
)
_GENERATED = re.compile(
    r"auto-?\s?generated|automatically generated|generated automatically|@generated|do not (edit|modify)"
    r"|generated (by|from) .*\.(py|pl|sh|js|exe)\b|(file|code) (is|was) generated",
    re.IGNORECASE,
)
_GENERATED_HEAD = 600  # characters
_LETTERS = string.ascii_letters.encode()
_DIGITS = string.digits.encode()
_SPACE = string.whitespace.encode()
_NUMBERS = re.compile(
    r"(?:(?:\b0x[0-9a-fA-F]+|\\x[0-9a-fA-F]{2}|[-+]?\b\d+(?:\.\d+)?)\W{0,4}){8,}|[A-Za-z0-9+/=]{100,}"
)
_MIN_LINES = 10  # fewer repeat, or are long, by chance


def judge(text: str, *, is_code: bool) -> str | None:
    """Why a document is to be dropped, a key of REASONS, or None to keep it."""
    return _judge_code(text) if is_code else _judge_text(text)


def _judge_code(text: str) -> str | None:
    lines = text.splitlines() or [""]
    letters, digits, visible = _count(text)
    if _GENERATED.search(text[:_GENERATED_HEAD]):
        return "generated"
    if sum(len(run[0]) for run in _NUMBERS.finditer(text)) > 0.5 * max(visible, 1):
        return "data"
    if max(map(len, lines)) > MAX_CODE_LINE:
        return "long-lines"
    if len(text) > MAX_MEAN_LINE * max(len(lines), _MIN_LINES):
        return "minified"
    if letters + digits < 0.25 * max(len(text), 1):
        return "few-letters"
    return None


def _judge_text(text: str) -> str | None:
    letters, digits, visible = _count(text)
    if digits > 0.5 * max(visible, 1):
        return "data"
    if letters < 0.6 * max(visible, 1):
        return "few-letters"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if max(map(len, lines)) > MAX_TEXT_LINE:
        return "long-lines"
    words = text.split()
    if text.isascii() and not 2 <= visible / len(words) <= 12:  # not every script puts spaces between words
        return "word-length"
    if len(lines) >= _MIN_LINES and len(set(lines)) < 0.7 * len(lines):
        return "repeated-lines"
    if distinct_share(text) < 0.7:
        return "repeated-phrases"
    return None


def _count(text: str) -> tuple[int, int, int]:
    """Letters, digits and visible characters, counted in bytes of UTF-8."""
    visible = text.encode().translate(None, _SPACE)
    without_letters = visible.translate(None, _LETTERS + bytes(range(128, 256)))
    digits = len(without_letters) - len(without_letters.translate(None, _DIGITS))
    return len(visible) - len(without_letters), digits, len(visible)
