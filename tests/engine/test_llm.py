"""The Python API on a tiny random model: streams equal answers, requests end as they say, memory is given back."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from indexshare.chat.tokenizer import Tokenizer
from indexshare.chat.types import Done, Reasoning, Start, Text, ToolCall, ToolCallEvent, merge_events
from indexshare.engine import llm as llm_module
from indexshare.engine.llm import LLM, load
from indexshare.engine.output import Reply
from indexshare.engine.sampler import SampledToken, Sampler
from indexshare.engine.session import Session
from indexshare.errors import CheckpointError, ConfigError, MemoryLimitError, RequestError

PROMPT = "def main() -> None:\n    print('hello world')\n"
QUESTION = [{"role": "user", "content": "What is in the box? <|assistant|>"}]


class Script:
    """Replaces the model's choices: `script(tokenizer text)` makes the sampler draw exactly these tokens."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self._llm = llm
        self._monkeypatch = monkeypatch

    def __call__(self, text: str) -> int:
        token_ids = self._llm.tokenizer.encode(text, allow_control=True)
        remaining = iter(token_ids)

        def scripted(sampler: Sampler, logits: torch.Tensor) -> SampledToken:
            return SampledToken(token_id=next(remaining))

        self._monkeypatch.setattr(Sampler, "next", scripted)
        return len(token_ids)


@pytest.fixture
def script(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(tiny_llm, monkeypatch)


@pytest.fixture
def opened(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Session]]:
    """The sessions that a test's requests open; at its end all pages of all of them must be free."""
    sessions: list[Session] = []
    original = LLM.open_session

    def recording(llm: LLM, *args: Any, **options: Any) -> Session:
        sessions.append(original(llm, *args, **options))
        return sessions[-1]

    monkeypatch.setattr(LLM, "open_session", recording)
    yield sessions
    for session in sessions:
        session._cache.check_conservation()
        assert session._cache.num_free_pages == session._cache.num_pages


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 5, "top_p": 0.9}, {"repetition_penalty": 1.3}])
def test_a_stream_equals_the_answer(tiny_llm: LLM, opened: list[Session], sampling: dict[str, Any]) -> None:
    answer = tiny_llm.generate(PROMPT, max_new_tokens=40, **sampling)
    stream = tiny_llm.generate(PROMPT, max_new_tokens=40, stream=True, **sampling)
    pieces = list(stream)
    assert "".join(pieces) == answer.text
    assert all(pieces)
    assert stream.completion == answer
    assert len(opened) == 2
    num_prompt = len(tiny_llm.tokenizer.encode(PROMPT))
    assert answer.usage.num_prompt_tokens == num_prompt > tiny_llm.config.index_topk
    assert answer.usage.num_completion_tokens == len(answer.token_ids)
    assert answer.finish_reason == ("length" if len(answer.token_ids) == 40 else "stop")


def test_greedy_is_what_the_model_scores_highest(tiny_llm: LLM) -> None:
    answer = tiny_llm.generate(PROMPT, max_new_tokens=12, logprobs=2)
    prompt = tiny_llm.tokenizer.encode(PROMPT)
    scores = tiny_llm.logprobs([*prompt, *answer.token_ids])
    assert scores.dtype == torch.float32
    assert scores.shape == (len(prompt) + len(answer.token_ids) - 1,)
    assert answer.logprobs is not None
    drawn = torch.tensor([token.logprob for token in answer.logprobs])
    torch.testing.assert_close(drawn, scores[len(prompt) - 1 :], rtol=0, atol=1e-5)
    assert all(token.top_logprobs and token.top_logprobs[0][0] == token.token_id for token in answer.logprobs)
    torch.testing.assert_close(tiny_llm.logprobs(torch.tensor(prompt)), scores[: len(prompt) - 1], rtol=0, atol=1e-5)
    assert tiny_llm.logprobs([1]).shape == (0,)


def test_seeds_belong_to_the_request(tiny_llm: LLM) -> None:
    def draw(seed: int) -> Sequence[int]:
        return tiny_llm.generate(PROMPT, max_new_tokens=20, temperature=1.5, seed=seed).token_ids

    first = draw(1)
    torch.manual_seed(99)
    assert draw(1) == first
    assert draw(2) != first
    interleaved = [
        tiny_llm.generate(PROMPT, max_new_tokens=20, temperature=1.5, seed=seed, stream=True) for seed in (1, 2)
    ]
    for _ in range(20):
        for stream in interleaved:
            next(stream, None)
    assert interleaved[0].completion.token_ids == first


def test_stop_texts_over_token_borders(tiny_llm: LLM, script: Script, opened: list[Session]) -> None:
    text = "one two three <|user|>"
    for stop, expected in (("wo thr", "one t"), ("e", "on"), (["zzz", " t"], "one"), ("three !", "one two three ")):
        num_tokens = script(text)
        answer = tiny_llm.generate(PROMPT, stop=stop)
        assert (answer.text, answer.finish_reason) == (expected, "stop")
        script(text)
        assert "".join(tiny_llm.generate(PROMPT, stop=stop, stream=True)) == expected
        assert (len(answer.token_ids) < num_tokens) == (stop != "three !")


def test_the_limit_and_the_stop_id(tiny_llm: LLM, script: Script) -> None:
    num_tokens = script("one two<|endoftext|>never")
    answer = tiny_llm.generate(PROMPT)
    assert (answer.text, answer.finish_reason) == ("one two", "stop")
    assert answer.token_ids[-1] == tiny_llm.tokenizer.control_id("<|endoftext|>")
    script("one two<|endoftext|>never")
    cut = tiny_llm.generate(PROMPT, max_new_tokens=2)
    assert (cut.finish_reason, cut.usage.num_completion_tokens) == ("length", 2)
    assert num_tokens > 2


def test_characters_of_several_tokens_are_whole(tiny_llm: LLM, script: Script) -> None:
    script("né ∑ 漢字<|user|>")
    pieces = list(tiny_llm.generate(PROMPT, stream=True))
    assert "".join(pieces) == "né ∑ 漢字"
    assert not any("\ufffd" in piece for piece in pieces)
    script("漢字")
    assert tiny_llm.generate(PROMPT, max_new_tokens=2).text == "\ufffd"  # cut off inside a character


REPLY = (
    "I should look.</think>Let me see.<tool_call>open<arg_key>path</arg_key><arg_value>box.txt</arg_value>"
    "<arg_key>times</arg_key><arg_value>3</arg_value></tool_call><|observation|>"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "open",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "times": {"type": "integer"}},
            },
        },
    }
]


def test_chat_gives_reasoning_content_and_tool_calls(tiny_llm: LLM, script: Script, opened: list[Session]) -> None:
    num_tokens = script(REPLY)
    reply = tiny_llm.chat(QUESTION, tools=TOOLS, reasoning_effort="high")
    assert isinstance(reply, Reply)
    assert reply.reasoning_content == "I should look."
    assert reply.content == "Let me see."
    call = ToolCall(id="call_1_0", name="open", arguments={"path": "box.txt", "times": 3})
    assert reply.tool_calls == (call,)
    assert reply.finish_reason == "tool_calls"
    assert reply.usage.num_completion_tokens == len(reply.token_ids) == num_tokens

    script(REPLY)
    stream = tiny_llm.chat(QUESTION, tools=TOOLS, reasoning_effort="high", stream=True)
    events = merge_events(stream)
    assert [type(event) for event in events] == [Start, Reasoning, Text, ToolCallEvent, Done]
    assert events[0] == Start(reply.usage.num_prompt_tokens)
    assert events[-1] == Done("tool_calls", reply.usage)
    assert stream.reply == reply


def test_chat_without_thinking_starts_with_the_answer(tiny_llm: LLM, script: Script) -> None:
    script("Nothing.<|user|>")
    reply = tiny_llm.chat(QUESTION, enable_thinking=False)
    assert (reply.reasoning_content, reply.content, reply.finish_reason) == (None, "Nothing.", "stop")


def test_stop_texts_end_the_answer_not_the_reasoning(tiny_llm: LLM, script: Script) -> None:
    script("one STOP two</think>three STOP four<|user|>")
    reply = tiny_llm.chat(QUESTION, stop="STOP")
    assert (reply.reasoning_content, reply.content) == ("one STOP two", "three ")
    assert reply.finish_reason == "stop"
    script("one</think>two ST<|user|>")
    assert tiny_llm.chat(QUESTION, stop="STOP").content == "two ST"


def test_a_random_models_chat_is_the_same_streamed(tiny_llm: LLM, opened: list[Session]) -> None:
    reply = tiny_llm.chat(QUESTION, max_new_tokens=50, temperature=1.0, seed=3)
    stream = tiny_llm.chat(QUESTION, max_new_tokens=50, temperature=1.0, seed=3, stream=True)
    events = list(stream)
    assert stream.reply == reply
    assert isinstance(events[0], Start)
    assert events[-1] == Done(reply.finish_reason, reply.usage)


def test_a_document_is_read_once(tiny_llm: LLM) -> None:
    document = "The box holds a key.\n" * 10
    with tiny_llm.open_session(1000) as session:
        for question in ("What is in the box?", "Who has the key?"):
            messages = [{"role": "user", "content": document + question}]
            seen: list[tuple[int, int]] = []
            reply = tiny_llm.chat(
                messages,
                max_new_tokens=10,
                session=session,
                progress=lambda done, total, seen=seen: seen.append((done, total)),
            )
            fresh = tiny_llm.chat(messages, max_new_tokens=10)
            assert reply.token_ids == fresh.token_ids
            assert seen[-1][1] == reply.usage.num_prompt_tokens - reply.usage.num_cached_tokens
        assert reply.usage.num_cached_tokens > 0.8 * reply.usage.num_prompt_tokens
        assert session.context_length > 0
    assert session.context_length == 0


def test_closing_a_stream_frees_its_pages(tiny_llm: LLM, opened: list[Session]) -> None:
    for num_read in (0, 1, 3):
        stream = tiny_llm.generate(PROMPT, max_new_tokens=50, stream=True)
        for _ in range(num_read):
            next(stream)
        session = opened[-1]
        assert (session.context_length > 0) == (num_read > 0)
        stream.close()
        assert session._cache.num_free_pages == session._cache.num_pages
        assert stream.completion.finish_reason == "cancelled"
        assert next(stream, None) is None
    with tiny_llm.chat(QUESTION, stream=True) as events:
        next(events), next(events)
    dropped = tiny_llm.generate(PROMPT, stream=True)
    next(dropped)
    del dropped


def test_an_interrupt_while_reading_frees_the_pages(tiny_llm: LLM, opened: list[Session]) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for ask in (tiny_llm.generate, tiny_llm.logprobs):
        with pytest.raises(KeyboardInterrupt):
            ask([5] * 40, progress=interrupt)


def test_too_much_memory_is_refused_with_the_number(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module.runtime, "available_memory_bytes", lambda device: 300 * 2**20)
    assert tiny_llm.generate(PROMPT, max_new_tokens=2).usage.num_completion_tokens == 2
    # (7 - 1) layers of 24 numbers and 3 of 16, fp32; whole pages of 64
    needed = (6 * 24 + 3 * 16) * 4 * 1_000_000
    with pytest.raises(MemoryLimitError, match=f"{needed:,} bytes of cache .* {300 * 2**20:,} bytes are available"):
        tiny_llm.open_session(1_000_000)
    for stream in (False, True):
        with pytest.raises(MemoryLimitError):
            tiny_llm.generate(PROMPT, max_new_tokens=1_000_000, stream=stream)
    # 50,000 tokens take 37 MiB of cache; dense attention would expand them to 4 heads of 16 + 16 + 24 + 24 numbers
    tiny_llm.open_session(50_000).close()
    expanded = 50_000 * 4 * (16 + 16 + 24 + 24) * 4
    with pytest.raises(MemoryLimitError, match=f"{expanded:,} bytes of keys and values for dense attention"):
        tiny_llm.open_session(50_000, attention="dense")


def test_requests_that_cannot_be_served(tiny_llm: LLM) -> None:
    for bad in ({"temperature": -1.0}, {"max_new_tokens": 2**31}, {"stop": 3}, {"max_new_tokens": 1_048_577}):
        with pytest.raises(RequestError):
            tiny_llm.generate(PROMPT, stream=True, **bad)
    for prompt in ("", []):
        with pytest.raises(RequestError, match="empty"):
            tiny_llm.generate(prompt)
    with pytest.raises(RequestError, match="token ids"):
        tiny_llm.generate([100_000])
    with pytest.raises(RequestError):
        tiny_llm.logprobs([])
    for effort in ("some", ["high"], 3):
        with pytest.raises(RequestError, match="reasoning_effort"):
            tiny_llm.chat(QUESTION, reasoning_effort=effort)
    for nothing in (None, 5, torch.tensor(5)):
        with pytest.raises(RequestError, match="a text or a list of token ids"):
            tiny_llm.generate(nothing)
        with pytest.raises(RequestError, match="a list or a tensor of token ids"):
            tiny_llm.logprobs(nothing)
    with pytest.raises(RequestError, match="messages must be a list, not NoneType"):
        tiny_llm.chat(None)
    with pytest.raises(RequestError, match=r"unknown argument 'max_tokens'; .* max_new_tokens, temperature"):
        tiny_llm.generate(PROMPT, max_tokens=3)
    with pytest.raises(RequestError, match="unknown argument 'top'"):
        tiny_llm.chat(QUESTION, top=3)
    for number in (0, -1, True, 1.5, 2**63):
        with pytest.raises(RequestError):
            tiny_llm.open_session(number)
        with pytest.raises(RequestError, match="page_size"):
            tiny_llm.open_session(10, page_size=number)


def test_bfloat16_is_close_to_float32(tiny_llm: LLM, tiny_directory: Path) -> None:
    small = load(tiny_directory, device="cpu", threads=1)
    assert small.dtype == torch.bfloat16
    token_ids = tiny_llm.tokenizer.encode(PROMPT * 2)
    scores, exact = small.logprobs(token_ids), tiny_llm.logprobs(token_ids)
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().mean() < 0.1
    assert small.generate(PROMPT, max_new_tokens=5).usage.num_completion_tokens > 0


def test_int8_caches_are_close(tiny_llm: LLM, tiny_directory: Path) -> None:
    llm = load(tiny_directory, device="cpu", dtype="float32", threads=1, latent_cache="int8", index_cache="int8")
    token_ids = tiny_llm.tokenizer.encode(PROMPT * 2)
    expected, found = tiny_llm.logprobs(token_ids), llm.logprobs(token_ids)
    assert 0 < (found - expected).abs().mean() < 0.1
    assert (llm.logprobs(token_ids, attention="dense") - found).abs().max() > 1e-6
    assert llm.generate(PROMPT, max_new_tokens=5).usage.num_completion_tokens > 0
    with pytest.raises(ConfigError, match=r"the cache of latents can hold .* not 'int4'"):
        load(tiny_directory, device="cpu", latent_cache="int4")


def copy_of(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target / "copy"))


def test_without_a_tokenizer_it_still_scores(tiny_llm: LLM, tiny_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_directory, tmp_path)
    (directory / "tokenizer.json").unlink()
    bare = load(directory, device="cpu", dtype="float32", threads=1)
    token_ids = list(range(60))
    assert torch.equal(bare.logprobs(token_ids), tiny_llm.logprobs(token_ids))
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        bare.generate(PROMPT)
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        bare.chat(QUESTION)


def test_another_index_pattern_and_attention(tiny_llm: LLM, tiny_directory: Path) -> None:
    with pytest.warns(UserWarning, match="index pattern makes their layers shared: 10 tensors") as warned:
        shared = load(tiny_directory, device="cpu", dtype="float32", threads=1, index_pattern="FSSSSS")
    assert len(warned) == 1
    assert shared.load_report is not None and len(shared.load_report.skipped_indexers) == 10
    assert tiny_llm.load_report is not None and not tiny_llm.load_report.remarks()
    token_ids = tiny_llm.tokenizer.encode(PROMPT * 3)
    plain = tiny_llm.logprobs(token_ids)
    assert (shared.logprobs(token_ids) - plain).abs().max() > 1e-4
    dense = tiny_llm.logprobs(token_ids, attention="dense")
    assert (dense - plain).abs().max() > 1e-4
    torch.testing.assert_close(shared.logprobs(token_ids, attention="dense"), dense, rtol=0, atol=1e-5)


def test_what_loading_left_out_is_a_warning(tiny_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_directory, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.6.")}
    save_file(kept | {"model.extra.weight": torch.ones(3)}, directory / "model.safetensors")
    with pytest.warns(UserWarning, match="lack the MTP layer|without a place in the model") as warned:
        llm = load(directory, device="cpu", dtype="float32", threads=1, strict=False)
    first, second = (str(warning.message) for warning in warned)
    assert "lack the MTP layer" in first
    assert "1 tensor (model.extra.weight)" in second
    assert all(warning.filename == __file__ for warning in warned)
    assert llm.load_report is not None and llm.load_report.mtp_absent
    with pytest.raises(RequestError, match="no MTP layer"):
        llm.generate(PROMPT, num_draft_tokens=2)


def test_stop_tokens_come_from_all_three_files(tiny_directory: Path, tmp_path: Path, script: Script) -> None:
    directory = copy_of(tiny_directory, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    control = Tokenizer.from_directory(directory).control_ids
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": control["<|endoftext|>"]}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [control["<eop>"]]}))
    llm = load(directory, device="cpu", dtype="float32", threads=1)
    for stop in ("<|endoftext|>", "<|user|>", "<|observation|>", "<eop>"):
        script(f"</think>one{stop}two")
        reply = llm.chat(QUESTION, max_new_tokens=4)
        assert (reply.content, reply.finish_reason, reply.token_ids[-1]) == ("one", "stop", control[stop])
    for stop, ends in (("<|endoftext|>", True), ("<eop>", True), ("<|user|>", False)):
        num_tokens = script(f"one{stop}two")
        answer = llm.generate(PROMPT, max_new_tokens=num_tokens)
        assert answer.finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_links_out_of_the_directory_are_refused(tiny_directory: Path, tmp_path: Path, name: str) -> None:
    directory = copy_of(tiny_directory, tmp_path)
    outside = tmp_path / "outside"
    outside.write_text("{}")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{name} is a link to a file outside"):
        load(directory, device="cpu", threads=1)


def test_a_snapshot_in_the_cache_of_the_hub_is_loaded(tiny_directory: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny_directory, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load(snapshot, device="cpu", threads=1).generate(PROMPT, max_new_tokens=2).token_ids


def test_sampling_defaults_of_the_checkpoint(tiny_directory: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_directory, tmp_path)
    settings = directory / "generation_config.json"
    settings.write_text(json.dumps({"temperature": 1.0, "top_p": 0.95, "eos_token_id": [1]}))
    llm = load(directory, device="cpu", dtype="float32", threads=1)
    drawn = llm.chat(QUESTION, max_new_tokens=30, seed=4)
    assert llm.chat(QUESTION, max_new_tokens=30, seed=4, temperature=1.0, top_p=0.95) == drawn
    assert llm.chat(QUESTION, max_new_tokens=30, seed=4, temperature=0.0) != drawn
    settings.write_text(json.dumps({"repetition_penalty": 1.3}))
    penalised = load(directory, device="cpu", dtype="float32", threads=1).chat(QUESTION, max_new_tokens=30)
    assert penalised == llm.chat(QUESTION, max_new_tokens=30, temperature=0.0, top_p=1.0, repetition_penalty=1.3)
    assert penalised != llm.chat(QUESTION, max_new_tokens=30, temperature=0.0, top_p=1.0)
    settings.write_text(json.dumps({"temperature": -1.0}))
    with pytest.raises(ConfigError, match="temperature"):
        load(directory, device="cpu", dtype="float32", threads=1)


def test_a_tokenizer_of_another_model_is_refused(tiny_llm: LLM) -> None:
    from indexshare.model import recipes
    from indexshare.model.glm import GlmForCausalLM

    with pytest.raises(CheckpointError, match="not this model's"):
        LLM(GlmForCausalLM(recipes.tiny()), tokenizer=tiny_llm.tokenizer)
