"""The page in a browser, against any server: the fake one, or a real one at $E2E_URL."""

from typing import TYPE_CHECKING

import pytest
from e2e.driving import DOCUMENT, FILLER, QUESTION, ask, attach, finished_reply, lit_texts, number_in, open_page, send

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


def test_a_question_is_answered_and_its_cost_shown(tab: "Page", base_url: str) -> None:
    open_page(tab, base_url, max_tokens=100)
    assert tab.title() == tab.locator("#model").inner_text() != "indexshare"
    assert number_in(tab.locator("#context").inner_text()) > 1000
    reply = ask(tab, QUESTION)
    assert tab.locator(".user").locator("p").inner_text() == QUESTION
    assert reply.locator(".answer").inner_text().strip() or reply.locator(".reasoning").count()
    assert not reply.locator(".problem").count()
    assert number_in(reply.locator(".usage").inner_text()) > 3
    assert "tokens/s" in reply.locator(".usage").inner_text()
    assert tab.locator("#draft").input_value() == ""


def test_a_second_question_continues_the_conversation(tab: "Page", base_url: str) -> None:
    open_page(tab, base_url, max_tokens=100)
    first = number_in(ask(tab, QUESTION).locator(".usage").inner_text())
    second = number_in(ask(tab, "And who wrote the log?").locator(".usage").inner_text())
    assert second > first
    assert tab.locator(".reply").count() == 2
    tab.click("#new-chat")
    assert not tab.locator(".reply").count()
    assert number_in(ask(tab, QUESTION).locator(".usage").inner_text()) == first


def test_an_attached_document_becomes_part_of_the_prompt(tab: "Page", base_url: str) -> None:
    open_page(tab, base_url, max_tokens=100)
    short = number_in(ask(tab, QUESTION).locator(".usage").inner_text())
    tab.click("#new-chat")
    attach(tab, DOCUMENT)
    send(tab, QUESTION)
    assert number_in(finished_reply(tab).locator(".usage").inner_text()) > short + 500
    assert not tab.locator("#attachments li").count()
    details = tab.locator("details.attached")
    assert "story.txt" in details.inner_text()
    details.locator("summary").click()
    assert "Ada Holm" in details.inner_text()


def test_the_panel_shows_the_prompt_and_what_each_token_read(tab: "Page", base_url: str) -> None:
    open_page(tab, base_url, max_tokens=100)
    tab.click("#reading-switch")
    assert tab.locator("#reading-empty").is_visible()
    ask(tab, QUESTION, DOCUMENT)
    prompt = tab.locator("#reading-text").text_content()
    assert prompt is not None
    assert DOCUMENT in prompt
    assert QUESTION in prompt
    assert len(prompt) > len(DOCUMENT + QUESTION)  # with the control tokens of the template
    tokens = tab.locator("#reading-tokens span")
    assert tokens.count() > 0
    whole = lit_texts(tab)
    assert whole
    tokens.last.click()
    assert tokens.last.get_attribute("aria-selected") == "true"
    assert lit_texts(tab) != whole
    assert f"Token {tokens.count()} " in tab.locator("#reading-note").inner_text()


def test_the_arrow_keys_move_between_tokens(tab: "Page", base_url: str) -> None:
    open_page(tab, base_url, max_tokens=100)
    tab.click("#reading-switch")
    ask(tab, QUESTION, DOCUMENT)
    tokens = tab.locator("#reading-tokens span")
    tab.locator("#reading-whole").focus()
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    assert tokens.nth(1).get_attribute("aria-selected") == "true"
    tab.keyboard.press("End")
    assert tokens.last.get_attribute("aria-selected") == "true"
    tab.keyboard.press("Escape")
    assert not tab.locator("#reading-tokens [aria-selected=true]").count()
    assert tab.locator("#reading-whole").get_attribute("aria-pressed") == "true"


def test_each_layer_group_can_be_seen_alone(tab: "Page", base_url: str) -> None:
    open_page(tab, base_url, max_tokens=100)
    tab.click("#reading-switch")
    ask(tab, QUESTION, DOCUMENT)
    tab.locator("#reading-tokens span").last.click()
    groups = tab.locator("#reading-group option").all_inner_texts()
    assert groups[0] == "all layer groups"
    assert len(groups) > 1
    seen = set()
    for i in range(1, len(groups)):
        tab.select_option("#reading-group", index=i)
        seen.add("|".join(lit_texts(tab)))
    assert len(seen) == len(groups) - 1  # what each group read, not the same for all


def test_the_buttons_go_from_place_to_place(tab: "Page", base_url: str) -> None:
    open_page(tab, base_url, max_tokens=100)
    tab.click("#reading-switch")
    ask(tab, QUESTION, FILLER * 100 + DOCUMENT)
    tab.locator("#reading-tokens span").last.click()
    total = number_in(tab.locator("#reading-place").inner_text().split()[-1])
    assert total > 1
    tab.evaluate("document.querySelector('#reading-text').scrollTop = 0")
    tab.click("#reading-previous")
    assert tab.locator("#reading-place").inner_text() == f"{total} of {total}"
    assert tab.evaluate("document.querySelector('#reading-text').scrollTop") > 100
    tab.click("#reading-next")
    assert tab.locator("#reading-place").inner_text() == f"1 of {total}"


def test_the_language_can_be_switched_and_is_remembered(tab: "Page", base_url: str) -> None:
    open_page(tab, base_url, max_tokens=100)
    ask(tab, QUESTION)
    assert tab.locator("#new-chat").inner_text().strip() == "New chat"
    tab.click("#language")
    assert tab.locator("#new-chat").inner_text().strip() == "新对话"
    assert "词元" in tab.locator(".usage").inner_text()
    assert tab.locator("html").get_attribute("lang") == "zh-CN"
    tab.reload()
    assert tab.locator("#new-chat").inner_text().strip() == "新对话"


def test_a_telephone_shows_everything_without_scrolling_sideways(tab: "Page", base_url: str) -> None:
    tab.set_viewport_size({"width": 390, "height": 844})
    open_page(tab, base_url, max_tokens=100)
    tab.click("#reading-switch")
    ask(tab, QUESTION, DOCUMENT)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("#reading-text", "#reading-tokens", "#draft", "#send", "#open-settings", ".reply >> nth=0"):
        box = tab.locator(name).bounding_box()
        assert box is not None
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, name
    box = tab.locator("#send").bounding_box()
    assert box is not None and box["y"] + box["height"] <= 844
