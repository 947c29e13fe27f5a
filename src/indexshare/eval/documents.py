"""Long documents of real source files with facts hidden in them, as prompts of the chat template.

The files are those of the Python that runs: held-out modules and training modules alike, because the facts are always
new. A document is read once, as the beginning of the prompt that the template gives for any question about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from indexshare.chat.template import ChatTemplate, encode_chat
from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.session import Session
from indexshare.errors import RequestError
from indexshare.train import corpus
from indexshare.train.data import tokenize_file
from indexshare.train.episodes import Fact, SourceFile, answer, build_document, fact_line, make_facts, question
from indexshare.train.tokenizer import TextEncoder

MIN_FILES = 48  # a short document opens with four of them, drawn at random
MAX_CUT = 8  # tokens that the end of a document may lose


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """A fact in a document. position: that of the first token of its value in the prompt; depth: its share, 0 to 1."""

    fact: Fact
    position: int
    depth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text and the beginning of every prompt about it: token_ids end with the last token of the text."""

    text: str
    token_ids: tuple[int, ...]
    needles: tuple[Needle, ...]

    def messages(self, fact: Fact) -> list[dict[str, str]]:
        """The conversation that asks for a fact; to be rendered with enable_thinking=False."""
        return [{"role": "user", "content": f"{self.text}\n\n{question(fact)}"}]


class Library:
    """Makes documents for the tokenizer and the chat template of a model directory.

    Raises TrainingError when the tokenizer lacks GLM's control tokens or there is no Python source on this machine.
    """

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_directory(directory)
        self.template = ChatTemplate.from_directory(directory)
        self._encoder = TextEncoder(directory)
        self._paths = corpus.library_files()
        self._files: dict[str, SourceFile] = {}

    def document(self, rng: np.random.Generator, num_tokens: int, num_facts: int) -> Document:
        """A document of `num_tokens` tokens or up to 128 fewer, with `num_facts` facts at uniform depths."""
        facts = make_facts(rng, num_facts)
        files = self._sample(rng, num_tokens)
        token_ids, spans = build_document(rng, files, facts, num_tokens, self._encoder.encode)
        # Where the text breaks off inside a table, its last token may join with the question: end a token earlier.
        last_fact = max(end for _, end in spans)
        for cut in range(len(token_ids), max(last_fact, len(token_ids) - MAX_CUT) - 1, -1):
            text = self._encoder.decode(token_ids[:cut].tolist())
            messages = Document(text=text, token_ids=(), needles=()).messages(facts[0])
            prompt = encode_chat(self.tokenizer, self.template, messages, enable_thinking=False)
            begin = prompt.index(self.tokenizer.control_id("<|user|>")) + 1
            end = begin + cut
            if prompt[begin:end] == token_ids[:cut].tolist():
                break
        else:
            raise RequestError(
                "this model's tokenizer joins lines into one token, so a document cannot be put together"
            )
        positions = [
            begin + start + self._value_offset(fact_line(fact), fact)
            for fact, (start, _) in zip(facts, spans, strict=True)
        ]
        needles = [
            Needle(fact=fact, position=position, depth=position / end)
            for fact, position in zip(facts, positions, strict=True)
        ]
        return Document(text=text, token_ids=tuple(prompt[:end]), needles=tuple(needles))

    def selected(self, session: Session, needle: Needle) -> dict[int, bool]:
        """For each full layer: is the needle in the set it selects at the step that has to state it?

        The step is the one whose output is the first token of the value: the session holds the prompt of the question,
        and the right answer up to the value is read after it. The needle counts as selected when the position of the
        value's first token in the document is. A layer that attends to everything is left out.
        """
        stated = answer(needle.fact)
        lead = self._encoder.encode(stated)[: self._value_offset(stated, needle.fact)]
        found = session.selected_positions(lead)
        return {layer: bool((each == needle.position).any()) for layer, each in found.items() if each is not None}

    def _value_offset(self, text: str, fact: Fact) -> int:
        """Index of the token of `text` that holds the first character of the fact's value."""
        target = text.rindex(fact.value)  # the texts are ASCII: characters are bytes
        length = 0
        for index, token_id in enumerate(self._encoder.encode(text)):
            length += len(self.tokenizer.token_bytes(token_id))
            if length > target:
                return index
        raise AssertionError("a text holds its own end")

    def _sample(self, rng: np.random.Generator, num_tokens: int) -> Sequence[SourceFile]:
        """Files in random order, with at least `num_tokens` tokens together as far as the library reaches."""
        chosen: list[SourceFile] = []
        total = 0
        for index in rng.permutation(len(self._paths)):
            path = self._paths[index]
            if path not in self._files:
                self._files[path] = tokenize_file(path, corpus.read_text(path), self._encoder)
            chosen.append(self._files[path])
            total += len(chosen[-1].token_ids)
            if total >= num_tokens and len(chosen) >= MIN_FILES:
                break
        return chosen
