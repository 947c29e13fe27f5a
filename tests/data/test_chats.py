"""Conversations for fine-tuning: what is read, and that every wrong line is named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from indexshare.data.chats import read_chats
from indexshare.errors import TrainingError

USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_conversations_of_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"messages": [USER, ASSISTANT], "tools": [TOOL], "id": 7})
    (tmp_path / "note.txt").write_text("not a conversation")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    calling = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" + json.dumps({"messages": calling}).encode()))
    first, second = read_chats([tmp_path])
    assert first.source.endswith("a.jsonl.gz:2") and first.tools == ()
    assert first.messages[1].tool_calls[0].arguments == {"a": 2, "b": 2}
    assert [message.content for message in second.messages] == ["2 + 2?", "4"] and second.tools == (TOOL,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", '"messages"'),
        ('{"text": "x"}', '"messages"'),
        (json.dumps({"messages": [USER]}), "nothing to learn"),
        (json.dumps({"messages": [{"role": "robot", "content": "x"}]}), "robot"),
        (json.dumps({"messages": [USER, ASSISTANT], "tools": [{"name": "add"}]}), "tools must be"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"messages": [USER, ASSISTANT]}) + "\n" + line + "\n")
    with pytest.raises(TrainingError, match=rf"c\.jsonl:2.*{message}"):
        list(read_chats([file]))


def test_a_damaged_file_and_a_folder_without_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps({"messages": [USER, ASSISTANT]}).encode())[:-9])
    with pytest.raises(TrainingError, match=r"x\.jsonl\.gz"):
        list(read_chats([tmp_path]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="has no JSON lines"):
        list(read_chats([tmp_path / "empty"]))
