import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from indexshare import terminal
from indexshare.chat.types import Done, Error, Event, Reasoning, Start, Text, ToolCallEvent, Warning
from indexshare.errors import MemoryLimitError, RequestError


class ScriptedModel:
    """Replies with given events and remembers what it was asked; an exception among them is raised."""

    def __init__(self, *replies: Sequence[Event | BaseException]) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[list[Mapping[str, Any]], dict[str, Any]]] = []

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Iterator[Event]:
        self.asked.append((list(messages), options))
        for event in self.replies.pop(0):
            if isinstance(event, BaseException):
                raise event
            yield event


def talk(monkeypatch: pytest.MonkeyPatch, model: ScriptedModel, *lines: str, effort: str = "max") -> tuple[str, Any]:
    """What a conversation shows for these lines, and the conversation."""
    waiting = iter(lines)

    def type_line(prompt: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_line)
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    conversation = terminal.Conversation(
        model, "session", system="Be brief.", effort=effort, sampling={"seed": 3}, console=console
    )
    conversation.run()
    return shown.getvalue(), conversation


HELLO: tuple[Event, ...] = (Start(5), Reasoning("greet"), Text("Hel"), Text("lo [b]"), Done("stop"))


def test_a_conversation_streams_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScriptedModel(HELLO, [Text("again"), Done("stop")])
    shown, conversation = talk(monkeypatch, model, "hi", "", "once more")
    assert "greet\nHello [b]" in shown
    messages, options = model.asked[1]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "Hello [b]" and messages[2]["reasoning_content"] == "greet"
    assert callable(options.pop("progress"))
    assert options == {"stream": True, "session": "session", "reasoning_effort": "max", "seed": 3}
    assert conversation.messages[-1] == {"role": "assistant", "content": "again"}


def test_commands_reset_save_and_set_the_effort(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    model = ScriptedModel(HELLO, HELLO, HELLO)
    lines = ("/effort high", "hi", f"/save {file}", "/reset", "/effort off", "hi", "/effort low", "/nonsense", "/quit")
    shown, conversation = talk(monkeypatch, model, *lines, "never read")
    assert [message["role"] for message in json.loads(file.read_text())] == ["system", "user", "assistant"]
    assert model.asked[0][1]["reasoning_effort"] == "high"
    assert model.asked[1][1]["enable_thinking"] is False and "reasoning_effort" not in model.asked[1][1]
    assert len(model.asked[1][0]) == 2  # forgotten: the system message and the question
    assert shown.count(terminal.HELP) == 3
    assert len(model.asked) == 2 and conversation.effort == "off"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RequestError("no such word"), Error("broken")])
def test_a_reply_that_fails_is_not_remembered(monkeypatch: pytest.MonkeyPatch, failure: Any) -> None:
    model = ScriptedModel([Text("par"), failure], HELLO)
    shown, _ = talk(monkeypatch, model, "first", "second")
    assert any(text in shown for text in ("stopped", "error: no such word", "error: broken"))
    assert [message["content"] for message in model.asked[1][0]] == ["Be brief.", "second"]


def test_a_full_conversation_is_told_in_the_words_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    too_few_pages = MemoryLimitError("open the session with a larger max_tokens")
    model = ScriptedModel([Start(9), too_few_pages], HELLO, [Start(99), too_few_pages], HELLO)
    shown, _ = talk(monkeypatch, model, "long " * 99, "hi", "and then?", "/reset", "hi")
    assert "max_tokens" not in shown and shown.count("Hello") == 2
    full = "start with a larger --context or a smaller --max-new-tokens"
    assert f"error: the question is too long: shorten it, or {full}" in shown
    assert f"error: the conversation is full: /reset, or {full}" in shown


@pytest.mark.parametrize(
    ("context", "sampling", "fits"),
    [(1024, {}, False), (1025, {}, True), (512, {"max_new_tokens": 64}, True), (None, {}, True)],
)
def test_a_context_without_room_for_an_answer_is_refused_at_the_start(
    context: int | None, sampling: dict[str, Any], fits: bool
) -> None:
    def begin() -> None:
        model: Any = ScriptedModel()
        session: Any = "session"
        terminal.Conversation(model, session, system=None, effort="max", sampling=sampling, context=context)

    if fits:
        begin()
    else:
        with pytest.raises(RequestError, match=r"1,024 tokens cannot hold .* 1,024: start with a larger --context"):
            begin()


def test_calls_warnings_and_the_limit_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    call = ToolCallEvent(id="1", name="look_up", arguments={"word": "x"})
    shown, _ = talk(monkeypatch, ScriptedModel([call, Warning("odd"), Done("length")]), "hi")
    assert "calls look_up {'word': 'x'}" in shown and "warning: odd" in shown and "--max-new-tokens" in shown


def test_saving_where_one_cannot_is_an_error_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, _ = talk(monkeypatch, ScriptedModel(HELLO), "/save /nowhere/at/all.json", "hi")
    assert "error: cannot write /nowhere/at/all.json" in shown and "Hello" in shown


def test_a_model_cannot_command_the_terminal() -> None:
    assert terminal.printable("a\x1b[2Jb\r\x9b1m\n\tc") == "a␛[2Jb␍\ufffd1m\n\tc"


def test_a_stream_is_written_as_it_comes() -> None:
    file = io.StringIO()
    terminal.write_stream(iter(["a\x1b", "b"]), file)
    assert file.getvalue() == "a\x1bb\n"  # a file gets the text as it is


@pytest.mark.parametrize(
    ("total", "is_terminal", "seen"), [(9999, True, True), (10, True, False), (9999, False, False)]
)
def test_the_bar_is_for_terminals_and_long_readings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int, is_terminal: bool, seen: bool
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(is_terminal)))
    with terminal.progress_bar("reading") as report:
        report(1, total)
        report(total, total)
    captured = capsys.readouterr()
    assert captured.out == "" and ("reading" in captured.err) == seen
    assert seen or captured.err == ""


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[1, "2"]', "[1.5, 2]", "[1, 2"])
def test_token_files_are_checked(text: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(text)
    with pytest.raises(RequestError, match=r"tokens\.json"):
        terminal.read_token_ids(str(file))


def test_texts_are_read_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text"
    file.write_bytes("a\r\nä".encode())
    assert terminal.read_text(str(file)) == "a\r\nä"
    monkeypatch.setattr("sys.stdin", io.StringIO("[1, 2]"))
    assert terminal.read_token_ids("-") == [1, 2]
    file.write_bytes(b"\xff")
    for name in (str(file), str(tmp_path / "missing")):
        with pytest.raises(RequestError, match="cannot read"):
            terminal.read_text(name)
