"""What is served: `nano`, or a seeded random checkpoint with a tokenizer made up for it.

A server needs a tokenizer although the benchmark sends token ids. Here each id is a word of its own, so that every
token is a piece of text and the text says which tokens were drawn. One of them ends a reply, since a server wants that.
"""

import json
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import checkpoints
import numpy as np

from indexshare.chat.tokenizer import GLM_SPLIT_PATTERN
from indexshare.engine.resolve import resolve_model
from indexshare.model.config import GlmConfig

FIRST_WORD = 257  # after the bytes and one merge
END = "<|endoftext|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """name: what the server is given as MODEL; directory: the same, with the files. can_draft: it has an MTP layer."""

    name: str
    directory: Path
    vocab_size: int
    can_draft: bool

    def prompt(self, seed: int, num_tokens: int) -> list[int]:
        """Random token ids, the same for the same seed."""
        generator = np.random.Generator(np.random.PCG64(seed))
        return generator.integers(FIRST_WORD, self.vocab_size - 36, size=num_tokens).tolist()  # no control tokens


def prepare(name: str, work: Path) -> Served:
    """`nano` as it is; `mid` and `tiny` from checkpoints.py, in `work`/NAME-served with a tokenizer."""
    directory = resolve_model(name) if name == "nano" else _with_tokenizer(checkpoints.make(name, work))
    config = GlmConfig.from_json(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    return Served(
        name=name if name == "nano" else str(directory),
        directory=directory,
        vocab_size=config.vocab_size,
        can_draft=config.num_nextn_predict_layers > 0,
    )


def _with_tokenizer(checkpoint: Path) -> Path:
    target = checkpoint.with_name(f"{checkpoint.name}-served")
    if (target / "tokenizer.json").is_file():
        return target
    target.mkdir(exist_ok=True)
    for weights in checkpoint.glob("*.safetensors*"):
        link = target / weights.name
        link.unlink(missing_ok=True)
        link.hardlink_to(weights)  # a symbolic one would lead out of the checkpoint, which loading refuses
    shutil.copy(checkpoint / "config.json", target)
    vocab_size = json.loads((target / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    (target / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
        )
    )
    (target / "tokenizer.json").write_text(json.dumps(tokenizer_spec(vocab_size)))  # last: it says that all is there
    return target


def tokenizer_spec(vocab_size: int) -> dict[str, object]:
    """A tokenizer.json: the bytes, "ab", and words such as " aaab", each in one token."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(byte) for byte in kept] + [chr(0x100 + index) for index in range(256 - len(kept))]  # as ByteLevel
    words = ("\u0120" + "".join(letters) for letters in product(ascii_lowercase, repeat=4))
    vocabulary = {token: index for index, token in enumerate((*alphabet, "ab"))}
    vocabulary |= {next(words): index for index in range(FIRST_WORD, vocab_size - 1)}
    end = {"id": vocab_size - 1, "content": END, "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    split = {"type": "Split", "pattern": {"Regex": GLM_SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [["a", "b"]],
        },
    }
