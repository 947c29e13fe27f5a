"""Chat episodes in the GLM-5.2 format, and the facts that retrieval asks for.

An episode is a list of messages; `render_episode` turns it into token ids and one loss weight per token, with the
rules of GLM's fine-tuning: reasoning, `</think>`, content, tool calls and the role token that ends
an assistant's turn are supervised; `<|assistant|>`, the opening `<think>`, other roles' text and `[gMASK]<sop>` are
not. The evaluation builds its documents, of up to a million tokens, with the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexshare.errors import TrainingError
from indexshare.train.tokenizer import TextEncoder
from indexshare.train.words import FIRST_WORDS, SECOND_WORDS

Encode = Callable[[str], list[int]]
Message = dict[str, Any]  # keys of the OpenAI chat format: role, content, reasoning_content, tool_calls
TokenIds = NDArray[np.int64]
Weights = NDArray[np.float32]

MAX_QUESTIONS = 48  # in one document
REPLY_WEIGHT = 2.0  # answers are few among the lines of code

TOOLS_HEAD = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
# The tags in this text are control tokens, as they are when the whole prompt is encoded at once.
TOOLS_TAIL = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)


# ---------------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing to remember: `subject` is two words, "amber-falcon"; `value` is one of 222 words."""

    subject: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A tokenised text with the places where a document made of it may be opened, interrupted and cut.

    `token_ids` [n] begins with the tokens of a header, "# path" and a newline; `num_header` counts those.
    `line_starts`: offsets where a line begins (a fact's line may stand before it). `line_ends`: offsets behind a
    line's last token and before its newline (a document may end there). Both keep the tokens what encoding the whole
    text gives.
    """

    path: str
    token_ids: TokenIds
    num_header: int
    line_starts: NDArray[np.int64]
    line_ends: NDArray[np.int64]


def make_facts(rng: np.random.Generator, num_facts: int, *, distinct_words: bool = True) -> list[Fact]:
    """Facts with different subjects. With `distinct_words` (and while the words last: 200 facts) no two
    subjects share a word."""
    firsts, seconds = len(FIRST_WORDS), len(SECOND_WORDS)
    if num_facts > firsts * seconds // 4:
        raise TrainingError(f"{num_facts} facts asked for, at most {firsts * seconds // 4} have subjects that differ")
    if distinct_words and num_facts <= min(firsts, seconds):
        pairs = list(zip(rng.permutation(firsts)[:num_facts], rng.permutation(seconds)[:num_facts], strict=True))
    else:
        pairs = [divmod(int(code), seconds) for code in rng.choice(firsts * seconds, size=num_facts, replace=False)]
    values = rng.integers(firsts, size=num_facts)
    return [
        Fact(subject=f"{FIRST_WORDS[first]}-{SECOND_WORDS[second]}", value=FIRST_WORDS[value])
        for (first, second), value in zip(pairs, values, strict=True)
    ]


def answer(fact: Fact) -> str:
    """The reply that states the fact. It repeats the wording of the document, so plain induction suffices."""
    return f"The access code of {fact.subject} is {fact.value}."


def fact_line(fact: Fact) -> str:
    """The fact as a comment line of source code, newline included."""
    return f"# {answer(fact)}\n"


def question(fact: Fact) -> str:
    """The user's question about the fact."""
    return f"What is the access code of {fact.subject}?"


def is_correct(fact: Fact, reply: str) -> bool:
    """True when the reply ends by stating the fact, in the wording of `answer`; its last statement counts."""
    _, found, rest = reply.strip().rpartition(f"access code of {fact.subject} is ")
    return bool(found) and rest.removesuffix(".") == fact.value


# ------------------------------------------------------------------------------------------------------------ documents


def build_document(
    rng: np.random.Generator,
    files: Sequence[SourceFile],
    facts: Sequence[Fact],
    num_tokens: int,
    encode: Encode,
) -> tuple[TokenIds, list[tuple[int, int]]]:
    """A document of source files with the facts hidden in it, each before a random line, depths uniform.

    Returns (token_ids [n], spans), n at most `num_tokens` and close to it; spans[i] = (begin, end) are the tokens of
    the line of facts[i]. It opens at a random line of one file and goes on with whole files in random order, again
    from the first when they run out. It ends without a newline: the question follows after "\\n\\n". Linear in
    `num_tokens`.
    """
    needles = [np.asarray(encode(fact_line(fact)), dtype=np.int64) for fact in facts]
    num_filler = num_tokens - sum(len(needle) for needle in needles)
    if num_filler < 16:
        raise TrainingError(
            f"{num_tokens} tokens do not hold {len(facts)} facts and some lines of text; ask for more tokens"
        )
    filler, starts = _fill(rng, files, num_filler)
    wanted = rng.random(len(facts)) * len(filler)
    nearest = starts[np.clip(np.searchsorted(starts, wanted, side="right") - 1, 0, len(starts) - 1)]
    pieces: list[TokenIds] = []
    spans = [(0, 0)] * len(facts)
    done = written = 0
    for index in np.argsort(wanted, kind="stable"):
        at, needle = int(nearest[index]), needles[index]
        pieces += [filler[done:at], needle]
        written += at - done + len(needle)
        spans[index] = (written - len(needle), written)
        done = at
    pieces.append(filler[done:])
    return np.concatenate(pieces), spans


def _fill(rng: np.random.Generator, files: Sequence[SourceFile], num_tokens: int) -> tuple[TokenIds, NDArray[np.int64]]:
    """(token_ids, line starts) of at most `num_tokens` tokens of source files."""
    if not files:
        raise TrainingError("no source files to build a document from")
    pieces: list[TokenIds] = []
    starts: list[NDArray[np.int64]] = []
    ends: list[NDArray[np.int64]] = []
    length = 0
    while length < num_tokens:
        for index in rng.permutation(len(files)) if num_tokens > 20_000 else rng.integers(0, len(files), size=4):
            file = files[index]
            begin = file.num_header
            if length == 0 and len(file.line_starts):
                begin = int(rng.choice(file.line_starts))
            shift = length + file.num_header - begin
            pieces += [file.token_ids[: file.num_header], file.token_ids[begin:]]
            starts.append(file.line_starts[file.line_starts >= begin] + shift)
            ends.append(file.line_ends[file.line_ends > begin] + shift)
            length = shift + len(file.token_ids)
            if length >= num_tokens:
                break
    token_ids, line_starts, line_ends = np.concatenate(pieces), np.concatenate(starts), np.concatenate(ends)
    usable = line_ends[: np.searchsorted(line_ends, num_tokens, side="right")]
    # Where no line ends near (a table of numbers), the document ends in the middle of one.
    cut = int(usable[-1]) if len(usable) and usable[-1] > num_tokens - 128 else num_tokens
    line_starts = line_starts[: np.searchsorted(line_starts, cut)]
    return token_ids[:cut], line_starts if len(line_starts) else np.zeros(1, dtype=np.int64)


# ------------------------------------------------------------------------------------------------------------ rendering


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A conversation to learn from.

    `effort`: "Max" or "High" with thinking on, None with thinking off. `keep_reasoning`: whether reasoning before the
    last user message stays in the text (`clear_thinking=false` of the template). `document` [n], if any, stands before
    the text of the first user message, and `document_weights` [n] are its loss weights. `reply_weight` is that of the
    assistant's content.
    """

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    effort: str | None = None
    keep_reasoning: bool = False
    document: TokenIds | None = None
    document_weights: Weights | None = None
    reply_weight: float = 1.0


class _Writer:
    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.token_ids: list[int] = []
        self.weights: list[float] = []

    def control(self, token: str, weight: float = 0.0) -> None:
        self.token_ids.append(self.encoder.special[token])
        self.weights.append(weight)

    def text(self, text: str, weight: float = 0.0) -> None:
        self.ids(encode_cached(self.encoder, text), weight)

    def ids(self, token_ids: Sequence[int], weight: float) -> None:
        self.token_ids.extend(token_ids)
        self.weights.extend([weight] * len(token_ids))


@lru_cache(maxsize=20_000)
def encode_cached(encoder: TextEncoder, text: str) -> tuple[int, ...]:
    """Token ids of a short text; episodes repeat most of theirs."""
    return tuple(encoder.encode(text))


def render_episode(episode: Episode, encoder: TextEncoder) -> tuple[TokenIds, Weights]:
    """(token_ids [n], weights [n]) of an episode; weights[i] is the loss weight of *predicting* token i.

    The last assistant turn ends with `<|endoftext|>`, every other with the role token that follows.
    """
    writer = _Writer(encoder)
    writer.control("[gMASK]")
    writer.control("<sop>")
    if episode.effort is not None:
        writer.control("<|system|>")
        writer.text(f"Reasoning Effort: {episode.effort}")
    if episode.tools:
        _write_tools(writer, episode.tools)
    roles = [message["role"] for message in episode.messages]
    last_user = len(roles) - 1 - roles[::-1].index("user")
    document = episode.document
    previous = ""
    for index, message in enumerate(episode.messages):
        role = message["role"]
        ends_turn = float(previous == "assistant")
        if role == "assistant":
            show = episode.effort is not None and (episode.keep_reasoning or index > last_user)
            _write_assistant(writer, message, show, episode.reply_weight)
        elif role == "tool":
            if previous != "tool":
                writer.control("<|observation|>", ends_turn)
            writer.control("<tool_response>")
            writer.text(message["content"])
            writer.control("</tool_response>")
        else:
            writer.control(f"<|{role}|>", ends_turn)
            if role == "user" and document is not None:
                writer.ids(document.tolist(), 0.0)
                if episode.document_weights is not None:
                    writer.weights[-len(document) :] = episode.document_weights.tolist()
                document = None
            writer.text(message["content"])
        previous = role
    if previous == "assistant":
        writer.control("<|endoftext|>", 1.0)
    return np.asarray(writer.token_ids, dtype=np.int64), np.asarray(writer.weights, dtype=np.float32)


def _write_assistant(writer: _Writer, message: Message, show_reasoning: bool, reply_weight: float) -> None:
    writer.control("<|assistant|>")
    writer.control("<think>")
    reasoning = message.get("reasoning_content", "") if show_reasoning else ""
    if reasoning:
        writer.text(reasoning, 1.0)
    writer.control("</think>", 1.0 if reasoning else 0.0)
    if message.get("content"):
        writer.text(message["content"].strip(), reply_weight)
    for call in message.get("tool_calls", ()):
        writer.control("<tool_call>", 1.0)
        writer.text(call["function"]["name"], 1.0)
        for key, value in call["function"]["arguments"].items():
            writer.control("<arg_key>", 1.0)
            writer.text(key, 1.0)
            writer.control("</arg_key>", 1.0)
            writer.control("<arg_value>", 1.0)
            writer.text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 1.0)
            writer.control("</arg_value>", 1.0)
        writer.control("</tool_call>", 1.0)


def _write_tools(writer: _Writer, tools: Sequence[Message]) -> None:
    writer.control("<|system|>")
    writer.text(TOOLS_HEAD)
    for tool in tools:
        writer.text(json.dumps(tool["function"], ensure_ascii=False) + "\n")
    writer.ids(_encode_tags(writer.encoder, TOOLS_TAIL), 0.0)


@lru_cache(maxsize=4)
def _encode_tags(encoder: TextEncoder, text: str) -> tuple[int, ...]:
    """Token ids of a trusted text of the template, whose tags are control tokens."""
    return tuple(encoder.encode_with_control_tokens(text))


# ------------------------------------------------------------------------------------------------------------ retrieval


def make_retrieval(
    rng: np.random.Generator,
    files: Sequence[SourceFile],
    encoder: TextEncoder,
    num_tokens: int,
    document_weight: float = 1.0,
) -> Episode:
    """A document with facts, read once and asked about each of them; at most `num_tokens` (200 or more) when rendered.

    Lines of code in the document carry `document_weight` as ordinary text to learn; lines with facts carry none,
    because their values are random. One episode in four shares words between subjects, one in four thinks before it
    answers.
    """
    effort = str(rng.choice(["Max", "High"])) if rng.random() < 0.25 else None
    # A fact, its question and its answer take about 45 tokens, 75 with reasoning; the rest is left for the code.
    most = min(MAX_QUESTIONS, num_tokens // (60 if effort is None else 100))
    facts = make_facts(rng, int(rng.integers(min(2, most), most + 1)), distinct_words=rng.random() < 0.75)
    asked = [facts[i] for i in rng.permutation(len(facts))]
    messages: list[Message] = []
    for fact in asked:
        user = question(fact) if messages else "\n\n" + question(fact)
        messages.append({"role": "user", "content": user})
        reply: Message = {"role": "assistant", "content": answer(fact)}
        if effort is not None:
            asks = f"The user asks for the access code of {fact.subject}. " if effort == "Max" else ""
            reply["reasoning_content"] = f"{asks}The document says: {answer(fact)}"
        messages.append(reply)
    episode = Episode(messages=tuple(messages), effort=effort, keep_reasoning=rng.random() < 0.5)
    num_talk = len(render_episode(episode, encoder)[0])
    document, spans = build_document(
        rng, files, facts, num_tokens - num_talk, lambda text: list(encode_cached(encoder, text))
    )
    weights = np.full(len(document), document_weight, dtype=np.float32)
    for begin, end in spans:
        weights[begin:end] = 0.0
    weights[0] = 0.0
    return Episode(
        messages=episode.messages,
        effort=effort,
        keep_reasoning=episode.keep_reasoning,
        document=document,
        document_weights=weights,
        reply_weight=REPLY_WEIGHT,
    )
