"""The tokenizer of `nano`: byte-level BPE with the pre-tokenizer of GLM-5.2 and its 36 added tokens as the last ids.

Two differences: digits stand alone, so that a number of five digits is always five tokens, and there are 4,096 tokens
in all instead of 154,856.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from indexshare.chat.tokenizer import GLM_SPECIAL_TOKENS, GLM_SPLIT_PATTERN
from indexshare.errors import TrainingError

VOCAB_SIZE = 4096
MAX_POSITIONS = 1_048_576

# The first 18 are control tokens that decoding may skip; the rest carry text that a parser must see.
NUM_SKIPPABLE = 18


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Trains the BPE on `texts`; the same texts in the same order give the same tokenizer.

    The last 36 of the `vocab_size` ids are GLM's special tokens. Raises TrainingError when the texts hold too few
    merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    num_regular = vocab_size - len(GLM_SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=num_regular,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != num_regular:
        raise TrainingError(
            f"the texts hold only {tokenizer.get_vocab_size()} tokens of {num_regular}; "
            "train on more text or lower vocab_size"
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=index < NUM_SKIPPABLE, normalized=False)
            for index, token in enumerate(GLM_SPECIAL_TOKENS)
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json; transformers' AutoTokenizer and PreTrainedTokenizerFast load
    them. Raises TrainingError when they cannot be written."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "padding_side": "left",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(GLM_SPECIAL_TOKENS[:NUM_SKIPPABLE]),
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # not `tokenizer.save`, which raises a bare Exception when it cannot write
        (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"cannot write to {directory}: {error.strerror}. Name another directory.") from error


class TextEncoder:
    """Encodes ordinary text and names control tokens, kept apart: a control token written in a text stays text.

    Attributes: `special`, name to id; `vocab_size`, added tokens included; `sha256` of tokenizer.json;
    bool [vocab_size] about the text of each token: `newline_end`, ends with a newline; `has_newline`, has one;
    `is_newlines`, is nothing but newlines; `word_end`, ends with a letter or digit.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory, "tokenizer.json")
        if not self.path.is_file():
            raise TrainingError(f"{self.path} does not exist; prepare the data or pass the directory of a tokenizer")
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        description = json.loads(content)
        self.special: dict[str, int] = {token["content"]: token["id"] for token in description["added_tokens"]}
        missing = [token for token in GLM_SPECIAL_TOKENS if token not in self.special]
        if missing:
            raise TrainingError(f"{self.path} lacks the control tokens {missing}; training needs those of GLM-5.2")
        # Without its added tokens the tokenizer cannot produce a control token, whatever the text says.
        description["added_tokens"] = []
        self._plain = Tokenizer.from_str(json.dumps(description))
        self._full = Tokenizer.from_str(content.decode("utf-8"))
        self.vocab_size: int = self._full.get_vocab_size()
        self.newline_end = np.zeros(self.vocab_size, dtype=bool)
        self.has_newline = np.zeros(self.vocab_size, dtype=bool)
        self.is_newlines = np.zeros(self.vocab_size, dtype=bool)
        self.word_end = np.zeros(self.vocab_size, dtype=bool)
        for token, index in self._plain.get_vocab().items():
            # "Ċ" is the byte-level spelling of a newline, "Ġ" of a space.
            self.newline_end[index] = token.endswith("Ċ")
            self.has_newline[index] = "Ċ" in token
            self.is_newlines[index] = not token.strip("Ċ")
            self.word_end[index] = token[-1].isascii() and token[-1].isalnum()

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several ordinary texts."""
        return [encoding.ids for encoding in self._plain.encode_batch(texts, add_special_tokens=False)]

    def encode_with_control_tokens(self, text: str) -> list[int]:
        """Token ids of a trusted text: control tokens written in it become control tokens. Never for a user's text."""
        return self._full.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`, control tokens spelled out."""
        return self._full.decode(list(token_ids), skip_special_tokens=False)
