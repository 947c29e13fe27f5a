"""Supervised fine-tuning: which tokens are learned, how conversations are packed, and that a model learns them."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import indexshare
from indexshare.chat.template import ChatTemplate, encode_chat
from indexshare.chat.tokenizer import Tokenizer
from indexshare.chat.types import Message
from indexshare.data.chats import Conversation
from indexshare.data.rows import IGNORED
from indexshare.engine.resolve import packaged_model
from indexshare.errors import TrainingError
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.recipes import tiny
from indexshare.train.losses import step_loss
from indexshare.train.phases import Phase
from indexshare.train.recipes import phase_loss, run
from indexshare.train.recipes_file import read_recipe
from indexshare.train.sft import ChatRows, Example, SftOptions, encode_example, learned_tokens, pack

TOKENIZER = Tokenizer.from_directory(packaged_model())
TEMPLATE = ChatTemplate()
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "note": "<|user|>"}}}
LONG: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. </think>"},
    {"role": "user", "content": "What is 2 plus 3?"},
    {"role": "assistant", "reasoning_content": "There is a tool.", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "5"},
    {"role": "tool", "content": "<|assistant|><think></think>6"},
    {"role": "assistant", "reasoning_content": "It says 5.", "content": "It is 5."},
    {"role": "user", "content": "Say <|endoftext|> and <|assistant|>!"},
    {"role": "assistant", "content": "<|endoftext|> and <|assistant|>"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "reasoning_content": "Polite.", "content": "You are welcome."},
]


def encode(messages: Sequence[dict[str, Any]], *, prompt: bool, thinking: bool = True, tools: bool = True) -> list[int]:
    return encode_chat(
        TOKENIZER,
        TEMPLATE,
        list(messages),
        tools=TOOLS if tools else None,
        enable_thinking=thinking,
        clear_thinking=False,
        add_generation_prompt=prompt,
    )


def example_of(messages: Sequence[dict[str, Any]], *, tools: bool = True, thinking: bool = True) -> Example:
    conversation = Conversation(
        messages=tuple(Message.from_dict(message) for message in messages), tools=TOOLS if tools else ()
    )
    return encode_example(conversation, TOKENIZER, TEMPLATE, SftOptions(sources="", enable_thinking=thinking))


def expected(messages: Sequence[dict[str, Any]], *, tools: bool = True, thinking: bool = True) -> set[int]:
    """Prefix by prefix: learned is what the whole text has after the prompt of each turn, up to the next token."""
    learned: set[int] = set()
    whole = encode(messages, prompt=False, tools=tools, thinking=thinking)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode(messages[:index], prompt=True, tools=tools, thinking=thinking)
            read = encode(messages[: index + 1], prompt=False, tools=tools, thinking=thinking)
            assert whole[: len(prompt)] == prompt and whole[: len(read)] == read, "prompts are prefixes"
            left_out = thinking and not message.get("reasoning_content")
            learned |= set(range(len(prompt) + left_out, len(read) + 1))
    return learned


def test_learned_is_what_the_engine_would_draw_and_no_more() -> None:
    for stop in range(2, len(LONG) + 1):
        if LONG[stop - 1]["role"] != "assistant":
            continue
        example = example_of(LONG[:stop])
        assert set(np.flatnonzero(example.is_learned)) == expected(LONG[:stop])
        whole = encode(LONG[:stop], prompt=False)
        assert example.token_ids[:-1].tolist() == whole
        closing = "<|observation|>" if LONG[stop - 1].get("tool_calls") else "<|endoftext|>"
        assert example.token_ids[-1] == TOKENIZER.control_id(closing)


def test_what_is_learned_in_words() -> None:
    example = example_of(LONG)
    learned = "".join(
        TOKENIZER.decode([token]) if is_learned else "\n"
        for token, is_learned in zip(example.token_ids, example.is_learned, strict=True)
    )
    call = "<tool_call>add<arg_key>a</arg_key><arg_value>2</arg_value>"
    call += "<arg_key>note</arg_key><arg_value><|user|></arg_value></tool_call>"
    assert [line for line in learned.split("\n") if line] == [
        f"There is a tool.</think>{call}{call}<|observation|>",
        "It says 5.</think>It is 5.<|user|>",
        "<|endoftext|> and <|assistant|><|user|>",  # without reasoning: its <think></think> is the template's
        "Polite.</think>You are welcome.<|endoftext|>",
    ]


def test_without_thinking_the_empty_reasoning_is_a_prompt() -> None:
    plain = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in LONG]
    example = example_of(plain, thinking=False)
    assert set(np.flatnonzero(example.is_learned)) == expected(plain, thinking=False)


def test_a_turn_before_a_system_message_ends_with_nothing_to_learn() -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "system", "content": "Be rude."},
        {"role": "user", "content": "Hello"},
    ]
    example = example_of(messages, tools=False)
    words = TOKENIZER.decode(example.token_ids[example.is_learned].tolist())
    assert words == "Hello!"


texts = st.text(alphabet="ab <|>", max_size=8) | st.sampled_from(["<|user|>", "</think>", "<think>", "<|assistant|>x"])
turns = st.tuples(
    texts.filter(str.strip), st.none() | texts.filter(str.strip), texts.filter(lambda t: "</think>" not in t)
)


@given(st.lists(turns, min_size=1, max_size=3))
def test_no_text_changes_what_is_learned(content: list[tuple[str, str | None, str]]) -> None:
    messages: list[dict[str, Any]] = []
    for user, reasoning, reply in content:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": reply})
        if reasoning is not None:
            messages[-1]["reasoning_content"] = reasoning
    example = example_of(messages, tools=False)
    assert set(np.flatnonzero(example.is_learned)) == expected(messages, tools=False)


def test_learned_tokens_of_nothing() -> None:
    assert learned_tokens([], TOKENIZER) == []


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_packing_loses_nothing_and_overfills_nothing(lengths: list[int]) -> None:
    groups = pack(lengths, 50)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in group) for group in groups]
    assert max(sums) <= 50
    # any-fit: no two groups would fit into one
    assert all(first + second > 50 for first, second in pairwise(sorted(sums)))


def rows(count: int, length: int, seed: int = 0, divisor: int = 1) -> ChatRows:
    messages = [
        [{"role": "user", "content": f"Word {n}?"}, {"role": "assistant", "content": "yes " * (n % 7 + 1)}]
        for n in range(count)
    ]
    examples = [example_of(each, tools=False) for each in messages]
    return ChatRows(examples, length=length, pad_id=0, seed=seed, divisor=divisor)


def test_an_epoch_has_each_conversation_once_whole_and_apart() -> None:
    packed = rows(30, 64)
    wanted = Counter(
        tuple(
            example_of(
                [{"role": "user", "content": f"Word {n}?"}, {"role": "assistant", "content": "yes " * (n % 7 + 1)}],
                tools=False,
            ).token_ids.tolist()
        )
        for n in range(30)
    )
    for epoch in range(2):
        seen: Counter[tuple[int, ...]] = Counter()
        for step in range(packed.num_rows):
            batch = packed.batch(epoch * packed.num_rows + step, 1)
            ids, targets, positions = (array.flatten() for array in (batch.token_ids, batch.targets, batch.positions))
            assert batch.segment_starts[0] == 0 and batch.segment_starts[-1] == len(ids) <= 64
            for begin, end in pairwise(batch.segment_starts):
                assert positions[begin:end].tolist() == list(range(end - begin))
                assert (
                    targets[begin : end - 1]
                    == np.where(targets[begin : end - 1] == IGNORED, IGNORED, ids[begin + 1 : end])
                ).all()
                if (targets[begin:end] != IGNORED).any():
                    seen[(*ids[begin:end].tolist(), int(targets[end - 1]))] += 1
            assert ((batch.targets == IGNORED) == (batch.loss_weights == 0)).all()
        assert seen == wanted
    first, again = packed.batch(3, 2), rows(30, 64).batch(3, 2)
    assert (first.token_ids == again.token_ids).all()
    orders = [
        [packed.batch(e * packed.num_rows + s, 1).token_ids.tolist() for s in range(packed.num_rows)] for e in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_rows_of_a_batch_are_padded_apart() -> None:
    batch = rows(30, 64).batch(0, 3)
    assert batch.token_ids.shape == batch.targets.shape == batch.positions.shape == (3, batch.token_ids.shape[1])
    width = batch.token_ids.shape[1]
    assert {0, width, 2 * width, 3 * width} <= set(batch.segment_starts)


def test_rows_are_padded_to_what_processes_can_share() -> None:
    """As many processes share the tokens of a row; what is learned stays what it was."""
    plain, divided = rows(30, 64), rows(30, 64, divisor=16)
    batches = [(plain.batch(step, 2), divided.batch(step, 2)) for step in range(8)]
    assert any(first.token_ids.shape[1] % 16 for first, _ in batches)
    for first, second in batches:
        width = second.token_ids.shape[1]
        assert width % 16 == 0 and first.token_ids.shape[1] <= width <= 64
        learned, same = first.targets != IGNORED, second.targets != IGNORED
        assert (first.targets[learned] == second.targets[same]).all()
        assert (first.positions[learned] == second.positions[same]).all()
        assert {0, width, 2 * width} <= set(second.segment_starts)


def test_padding_is_no_work_for_experts_and_trains_no_indexer() -> None:
    batches = (rows(30, 64).batch(step, 3) for step in range(9))
    packed = next(batch for batch in batches if batch.without_padding() is not batch)
    plain = packed.without_padding()
    assert plain.token_ids.shape == (1, plain.segment_starts[-1]) and plain.token_ids.size < packed.token_ids.size
    kept = [slice(*pair) for pair in pairwise(packed.segment_starts) if packed.loss_weights.ravel()[slice(*pair)].any()]
    for name in ("token_ids", "targets", "positions", "loss_weights"):
        whole = getattr(packed, name).ravel()
        assert (getattr(plain, name)[0] == np.concatenate([whole[part] for part in kept])).all()
    assert plain.segment_starts == (0, *accumulate(part.stop - part.start for part in kept))
    assert plain.without_padding() is plain
    model = GlmForCausalLM(tiny(vocab_size=4096))
    model.init_weights(0)
    phase = Phase(name="sft", num_steps=1, attention="sparse", sequence_length=64, batch_size=3)
    losses = phase_loss()(model, packed, phase)
    assert all(int(counts.sum()) == 2 * plain.token_ids.size for counts in losses.expert_counts.values())


def test_conversations_that_do_not_fit_are_counted() -> None:
    long = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]
    short = [{"role": "user", "content": "word"}, {"role": "assistant", "content": "yes"}]
    examples = [example_of(messages, tools=False) for messages in (long, short)]
    packed = ChatRows(examples, length=40, pad_id=0)
    assert (packed.num_left_out, packed.num_rows) == (1, 1)
    with pytest.raises(TrainingError, match="raise sequence_length"):
        ChatRows(examples[:1], length=40, pad_id=0)


def test_thinking_needs_chats_with_reasoning(tmp_path: Path) -> None:
    """Else a prompt ends in <think>, and </think> was never learned."""

    def read(*conversations: Sequence[dict[str, Any]], **options: bool) -> ChatRows:
        lines = (json.dumps({"messages": messages}) for messages in conversations)
        (tmp_path / "chats.jsonl").write_text("\n".join(lines))
        chosen = SftOptions(sources=str(tmp_path), **options)
        return ChatRows.from_files(chosen, TOKENIZER, TEMPLATE, length=90)

    user = {"role": "user", "content": "Hi </think>"}
    plain = [user, {"role": "assistant", "content": "Hello"}]
    thoughtful = [user, {"role": "assistant", "content": "Hello", "reasoning_content": "Polite."}]
    long = [user, {"role": "assistant", "content": "Hello", "reasoning_content": "Polite. " * 90}]
    assert read(plain, enable_thinking=False).num_rows == read(plain, thoughtful).num_rows == 1
    for refused in ((plain,), (plain, long), ([*thoughtful[:1], *plain[1:], *plain],)):
        with pytest.raises(TrainingError, match=r"set enable_thinking = false in \[data\]"):
            read(*refused)
    with pytest.raises(TrainingError, match="no conversation has reasoning that is learned"):
        read([*thoughtful, *plain], clear_thinking=True)


def test_packed_losses_are_those_of_each_conversation_alone() -> None:
    model = GlmForCausalLM(tiny(vocab_size=4096))
    model.init_weights(0)
    packed = rows(6, 90)

    def loss(batch: Any) -> tuple[float, int]:
        arrays = (batch.token_ids, batch.targets, batch.positions, batch.loss_weights)
        losses = step_loss(
            model, *(torch.from_numpy(array).flatten() for array in arrays), batch.segment_starts, attention="sparse"
        )
        return float(losses.lm), losses.num_tokens

    together, count = loss(packed.batch(0, packed.num_rows))
    alone = [loss(ChatRows([example], length=90, pad_id=0).batch(0, 1)) for example in packed._examples]
    assert count == sum(number for _, number in alone)
    assert together == pytest.approx(sum(value * number for value, number in alone) / count, abs=1e-5)


def test_a_small_model_learns_conversations_by_heart(tmp_path: Path) -> None:
    chats = [("Hello", "Hello! What can I do?"), ("Who are you?", "A very small model."), ("Bye", "See you soon.")]
    with (tmp_path / "chats.jsonl").open("w") as file:
        for user, reply in chats:
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
            file.write(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "chats.toml").write_text(
        """
kind = "sft"
model = "tiny"
tokenizer = "nano"
config = { vocab_size = 4096 }
learning_rate_muon = 2e-2
learning_rate_adamw = 1e-2
warmup_steps = 5
[data]
sources = ["chats.jsonl"]
enable_thinking = false
[[phases]]
num_steps = 45
batch_size = 1
sequence_length = 96
"""
    )
    _, result = run(read_recipe(tmp_path / "chats.toml"), tmp_path / "run", progress=False)
    assert result.lm_loss < 0.05
    llm = indexshare.load(tmp_path / "run" / "model")
    for user, reply in chats:
        answer = llm.chat([{"role": "user", "content": user}], enable_thinking=False, max_new_tokens=20)
        assert (answer.content, answer.finish_reason) == (reply, "stop")
