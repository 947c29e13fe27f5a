"""What the documents tell people to type exists: commands with their options, files of this repository."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from indexshare.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
COMMAND = re.compile(r"^    (?:\S*bin/)?(?:torchrun .*? -m )?indexshare (.+)$", re.MULTILINE)


def commands(document: str) -> Iterator[str]:
    """Lines of code blocks, without what is said beside them."""
    for line in COMMAND.findall((ROOT / document).read_text(encoding="utf-8")):
        command = re.split(r"\s{2,}|\s#\s", line)[0]
        if "..." not in command and "$(" not in command:
            yield command.replace("|", " ").strip()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_a_document_can_be_typed(document: str) -> None:
    for command in commands(document):
        try:
            app.parse_args(shlex.split(command), exit_on_error=False, print_error=False)
        except CycloptsError as error:
            pytest.fail(f"{document}: indexshare {command}\n{error}")


def test_the_commands_are_found() -> None:
    assert sum(1 for _ in commands("README.md")) > 15


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_links_to_is_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#[^)]*)?\)", text)
    missing = [link for link in links if link and not ((ROOT / document).parent / link).exists()]
    assert not missing, f"{document}: {missing}"
