"""What a person does on the page, in words for the tests."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

STORY = "The keeper of the lighthouse was Ada Holm. Every night she wrote the storm log. "
FILLER = "Supplies came by boat every second week. Flour, coffee and letters were carried up the stairs. "
DOCUMENT = FILLER * 20 + STORY + FILLER * 20
QUESTION = "Who kept the lighthouse?"


def open_page(tab: "Page", url: str, max_tokens: int | None = None) -> None:
    if max_tokens is not None:
        tab.add_init_script(f"""localStorage["indexshare.settings"] ??= '{{"maxTokens": "{max_tokens}"}}'""")
    tab.goto(url)
    tab.wait_for_selector("#send:enabled")


def send(tab: "Page", text: str) -> None:
    tab.fill("#draft", text)
    tab.press("#draft", "Enter")


def attach(tab: "Page", text: str, name: str = "story.txt") -> None:
    count = tab.locator("#attachments li").count()
    tab.set_input_files("#files", files=[{"name": name, "mimeType": "text/plain", "buffer": text.encode()}])
    tab.locator("#attachments li").nth(count).wait_for()


def finished_reply(tab: "Page") -> "Locator":
    tab.wait_for_selector(".reply:last-child[aria-busy=false]")
    return tab.locator(".reply").last


def ask(tab: "Page", text: str, document: str = "") -> "Locator":
    if document:
        attach(tab, document)
    send(tab, text)
    return finished_reply(tab)


def lit_texts(tab: "Page", level: int | None = None) -> list[str]:
    """What is lit in the prompt, in the order of the document; on all levels, or one."""
    return highlighted(tab, [f"level-{level}"] if level else [f"level-{k}" for k in range(1, 6)])


def highlighted(tab: "Page", names: list[str]) -> list[str]:
    """The texts under some of the panel's highlights, in the order of the document."""
    found = tab.evaluate(
        """names => {
            const pane = document.querySelector("#reading-text");
            const chunks = [...pane.querySelectorAll("span")].map((span) => span.firstChild);
            return names.flatMap((name) => [...CSS.highlights.get(name)])
                .map((range) => [chunks.indexOf(range.startContainer), range.startOffset,
                                 range.startContainer.data.slice(range.startOffset, range.endOffset)]);
        }""",
        names,
    )
    return [text for _, _, text in sorted(found)]


def number_in(text: str | None) -> int:
    match = re.search(r"[\d,]+", text or "")
    assert match, text
    return int(match[0].replace(",", ""))
