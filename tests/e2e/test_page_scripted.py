"""The page against the fake server only: exact requests, exact selections, and everything that goes wrong."""

import re
from typing import TYPE_CHECKING

import pytest
from e2e.driving import DOCUMENT, QUESTION, ask, attach, finished_reply, highlighted, lit_texts, open_page, send
from e2e.fake_server import FakeState

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


def test_a_browser_in_chinese_gets_a_chinese_page(tab: "Page", fake_url: str) -> None:
    tab.add_init_script("Object.defineProperty(navigator, 'language', { get: () => 'zh-TW' })")
    open_page(tab, fake_url)
    assert tab.locator("#new-chat").inner_text().strip() == "新对话"


def test_a_request_carries_what_is_set_and_nothing_else(tab: "Page", fake_url: str, state: FakeState) -> None:
    open_page(tab, fake_url)
    ask(tab, QUESTION)
    (request,) = state.requests
    assert request == {
        "model": "fake-glm",
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tab.click("#open-settings")
    tab.fill("[name=system]", "Be brief.")
    tab.fill("[name=temperature]", "0.3")
    tab.fill("[name=maxTokens]", "5")
    tab.select_option("[name=reasoning]", "high")
    tab.click("#settings .strong")
    tab.click("#reading-switch")
    assert "limit of tokens" in ask(tab, "More?").locator(".remark").inner_text()
    request = state.requests[1]
    assert request["temperature"] == 0.3
    assert request["max_tokens"] == 5
    assert request["reasoning_effort"] == "high"
    assert request["indexshare"] == {"selected": True}
    assert [message["role"] for message in request["messages"]] == ["system", "user", "assistant", "user"]
    assert "Ada Holm" in request["messages"][2]["content"]
    assert "the lighthouse" in request["messages"][2]["reasoning_content"]
    tab.click("#open-settings")
    tab.select_option("[name=reasoning]", "off")
    tab.click("#settings .strong")
    ask(tab, "And now?")
    assert state.requests[2]["enable_thinking"] is False
    assert "reasoning_effort" not in state.requests[2]


def test_reasoning_is_folded_when_the_answer_begins(tab: "Page", fake_url: str, state: FakeState) -> None:
    state.delay = 0.02
    open_page(tab, fake_url)
    send(tab, QUESTION)
    tab.wait_for_selector(".reasoning[open]")
    reply = finished_reply(tab)
    assert reply.locator(".reasoning").get_attribute("open") is None
    assert re.search(r"Reasoning · 17 tokens · [\d.]+ s", reply.locator(".reasoning summary").inner_text())
    assert "I look for the places" not in reply.locator(".answer").inner_text()


def test_an_answer_that_is_only_reasoning_says_so(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    reply = ask(tab, "only think")
    assert "without an answer" in reply.locator(".remark").inner_text()
    assert reply.locator(".reasoning").get_attribute("open") is not None


def test_code_stands_apart_and_markup_stays_text(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    reply = ask(tab, "hostile")
    assert tab.title() == "fake-glm"
    assert not reply.locator("img, script, b").count()
    assert "<img src=x onerror=" in reply.locator(".answer p").inner_text()
    assert "`` a `code`" in reply.locator(".answer p").inner_text()
    assert reply.locator("pre code").text_content() == "<script>document.title='broken'</script>"
    assert ask(tab, QUESTION).locator("pre code").text_content() == "22 November: wind from the north-west"


def test_stop_ends_the_request_and_keeps_what_came(tab: "Page", fake_url: str, state: FakeState) -> None:
    state.delay = 0.02
    open_page(tab, fake_url)
    send(tab, "a slow answer")
    tab.wait_for_selector(".answer p")
    assert tab.locator("#send").is_hidden()
    tab.click("#stop")
    reply = finished_reply(tab)
    assert reply.locator(".remark").inner_text() == "Stopped."
    assert reply.locator(".answer").inner_text()
    assert state.cancelled.wait(5)
    assert tab.locator("#send").is_visible()


def test_a_new_chat_ends_the_old_reply(tab: "Page", fake_url: str, state: FakeState) -> None:
    state.delay = 0.02
    open_page(tab, fake_url)
    tab.click("#reading-switch")
    send(tab, "a slow answer")
    tab.wait_for_selector(".reasoning p")
    tab.click("#new-chat")
    assert state.cancelled.wait(5)
    assert not tab.locator("#turns > *").count()
    assert tab.locator("#reading-empty").is_visible()
    state.delay = 0
    ask(tab, QUESTION)
    assert len(state.requests[-1]["messages"]) == 1


def test_a_long_prefill_is_shown_as_such(tab: "Page", fake_url: str, state: FakeState) -> None:
    state.prefill = 60
    open_page(tab, fake_url)
    send(tab, QUESTION)
    tab.wait_for_selector("text=Reading the prompt … 1 s")
    tab.keyboard.press("Escape")
    finished_reply(tab)
    assert not tab.locator(".waiting").count()


def test_the_last_message_can_be_tried_again_and_edited(tab: "Page", fake_url: str, state: FakeState) -> None:
    open_page(tab, fake_url)
    ask(tab, QUESTION, DOCUMENT)
    tab.click("text=Try again")
    tab.wait_for_selector(".reply[aria-busy=true], .reply[aria-busy=false]")
    finished_reply(tab)
    assert state.requests[0] == state.requests[1]
    tab.click("text=Edit")
    assert not tab.locator("#turns > *").count()
    assert tab.locator("#draft").input_value() == QUESTION
    assert "story.txt" in tab.locator("#attachments").inner_text()
    ask(tab, "Another question")
    (message,) = state.requests[2]["messages"]
    assert message["content"] == f'<document name="story.txt">\n{DOCUMENT}\n</document>\n\nAnother question'


def test_long_text_that_is_pasted_becomes_a_document(tab: "Page", fake_url: str, state: FakeState) -> None:
    open_page(tab, fake_url)
    paste = """text => {
        const clipboardData = new DataTransfer();
        clipboardData.setData("text/plain", text);
        const event = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
        document.querySelector("#draft").dispatchEvent(event);
        return event.defaultPrevented;
    }"""
    assert not tab.evaluate(paste, QUESTION)  # the browser puts a short text into the field
    assert tab.evaluate(paste, DOCUMENT * 2)
    assert "Pasted text 1" in tab.locator("#attachments").inner_text()
    assert tab.locator("#draft").input_value() == ""
    tab.click("#attachments button")
    assert not tab.locator("#attachments li").count()


def test_a_file_that_is_no_text_is_refused(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    tab.set_input_files("#files", files=[{"name": "a.png", "mimeType": "image/png", "buffer": b"\x89PNG\xff"}])
    tab.wait_for_selector("text=a.png is not a text file")
    assert not tab.locator("#attachments li").count()


def test_the_key_is_asked_for_sent_and_kept_in_the_tab_only(tab: "Page", fake_url: str, state: FakeState) -> None:
    state.key = "a-key-of-some-length"
    tab.goto(fake_url)
    tab.wait_for_selector("#settings[open]")
    tab.wait_for_selector("text=The server wants an API key.")
    tab.fill("[name=key]", state.key)
    tab.press("[name=key]", "Enter")
    tab.wait_for_selector("#send:enabled")
    assert "Ada Holm" in ask(tab, QUESTION).inner_text()
    assert state.key not in tab.evaluate("JSON.stringify(localStorage)")
    state.key = "another-key-by-now"
    send(tab, "And now?")
    tab.wait_for_selector("#settings[open]")
    tab.fill("[name=key]", state.key)
    tab.press("[name=key]", "Enter")
    tab.wait_for_selector(".reply:last-child[aria-busy=false] .usage")
    assert not tab.locator(".problem").count()


def test_the_page_waits_for_the_model(tab: "Page", fake_url: str, state: FakeState) -> None:
    state.loading = "12 of 78 layers"
    tab.goto(fake_url)
    tab.wait_for_selector("text=The model is loading: 12 of 78 layers")
    assert tab.locator("#send").is_disabled()
    state.loading = ""
    tab.wait_for_selector("#send:enabled")
    assert tab.locator("#banner").is_hidden()


@pytest.mark.parametrize(
    ("message", "advice", "detail"),
    [
        ("too long", "Start a new chat or send a shorter document.", "1200000 tokens"),
        ("busy", "Try again in 7 s.", "12 requests are waiting"),
        ("fail in the middle", "look into its log", "a worker has ended"),
    ],
)
def test_errors_say_what_to_do(tab: "Page", fake_url: str, message: str, advice: str, detail: str) -> None:
    open_page(tab, fake_url)
    reply = ask(tab, message)
    assert advice in reply.locator(".problem").inner_text()
    assert detail in reply.locator(".problem").inner_text()
    assert bool(reply.locator(".answer").inner_text()) == (message == "fail in the middle")
    assert reply.locator("text=Try again").last.is_visible()


def test_a_server_that_is_gone_is_an_error_too(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    tab.route("**/v1/chat/completions", lambda route: route.abort())
    assert "`indexshare serve` is still running" in ask(tab, QUESTION).locator(".problem").inner_text()


def test_byte_offsets_become_the_right_characters(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    text = "a灯é𝄞b\n👩‍🚀塔." * 3
    starts = [len(text[:i].encode()) for i in range(len(text) + 1)]
    cases = [(starts[i], starts[j]) for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    script = """async ([text, bytes, cases]) => {
        const { Recording } = await import("/page/selection.js");
        const recording = new Recording();
        recording.add({ prompt: { text, bytes, messages: [] }, layer_groups: [] });
        return cases.map(([start, end]) => text.slice(...recording.span(start, end)));
    }"""
    expected = [text.encode()[start:end].decode() for start, end in cases]
    assert tab.evaluate(script, [text, len(text.encode()), cases]) == expected
    cut = [(2, 3), (3, 5), (1, 8)]  # inside 灯, from inside 灯 into é, into 𝄞's second byte
    assert tab.evaluate(script, [text, len(text.encode()), cut]) == ["灯", "灯é", "灯é𝄞"]


def test_a_token_lights_what_was_read_to_predict_it(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    tab.click("#reading-switch")
    story = "守塔人名叫林远。" + "补给船每两周来一次，送来面粉和信件。" * 30
    ask(tab, "谁是守塔人？", story)
    token = tab.locator("#reading-tokens span", has_text="林").first
    token.click()
    tab.select_option("#reading-group", label="2–5")
    assert any("人名叫林远" in text for text in lit_texts(tab, level=5))
    tokens = tab.locator("#reading-tokens span").all_inner_texts()
    lit = tab.locator("#reading-tokens [class^=level]").all_inner_texts()
    at = tokens.index("林")
    assert lit[-5:] == tokens[at - 5 : at]  # its neighbours before it; neither itself nor what follows
    tab.hover("#reading-tokens span >> nth=0")
    assert tab.locator("#reading-tokens [aria-selected=true]").inner_text() == tokens[0]
    tab.mouse.move(5, 400)
    assert tab.locator("#reading-tokens [aria-selected=true]").inner_text() == "林"


def test_a_click_on_a_lit_place_makes_it_the_current_one(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    tab.click("#reading-switch")
    ask(tab, QUESTION, DOCUMENT)
    tab.locator("#reading-tokens span", has_text="Holm").first.click()
    tab.click("#reading-next")
    point = tab.evaluate(
        """() => {
            const { startContainer, startOffset } = [...CSS.highlights.get("level-5")].find((range) =>
                range.startContainer.data.slice(range.startOffset, range.endOffset).includes("Ada Holm"));
            const range = document.createRange();
            range.setStart(startContainer, startOffset + 2);
            range.setEnd(startContainer, startOffset + 3);
            range.startContainer.parentElement.parentElement.scrollTop += range.getBoundingClientRect().top - 300;
            const box = range.getBoundingClientRect();
            return [box.left + 1, box.top + box.height / 2];
        }"""
    )
    tab.mouse.click(*point)
    assert "Ada Holm" in "".join(highlighted(tab, ["here"]))


def test_a_short_prompt_says_that_everything_was_read(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    tab.click("#reading-switch")
    ask(tab, QUESTION)
    tab.locator("#reading-tokens span").first.click()
    assert "attended to everything" in tab.locator("#reading-note").inner_text()
    assert not lit_texts(tab)
    tab.click("#reading-whole")
    assert "Not counted" in tab.locator("#reading-note").inner_text()


def test_an_earlier_answer_can_be_looked_at_again(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    tab.click("#reading-switch")
    ask(tab, QUESTION, DOCUMENT)
    first_tokens = tab.locator("#reading-tokens").inner_text()
    ask(tab, "灯塔？")
    assert tab.locator("#reading-tokens").inner_text() != first_tokens
    tab.click("#reading-close")
    tab.locator(".reply").first.locator("text=What it read").click()
    assert tab.locator("#reading-tokens").inner_text() == first_tokens
    assert first_tokens


def test_the_whole_answer_is_normalised_by_rank(tab: "Page", fake_url: str) -> None:
    """200 bytes: byte 0 read always, 1-5 often, the rest once or never: levels by rank, whatever the counts."""
    open_page(tab, fake_url)
    levels = tab.evaluate(
        """async () => {
            const { Recording, placesOf } = await import("/page/selection.js");
            const recording = new Recording();
            const prompt = { text: "x".repeat(200), bytes: 200, messages: [] };
            recording.add({ prompt, layer_groups: [{ indexer: 0, layers: [0] }] });
            recording.add({ tokens: [
                { index: 0, text: "a", ranges: [[[0, 1], [1, 6], [50, 150]]] },
                { index: 1, text: "b", ranges: [[[0, 6]]] },
                { index: 2, text: "c", ranges: [[[0, 1], [150, 160]]] },
                { index: 3, text: "d", ranges: [null] },
            ] });
            const { segments, numReads, numSkipped } = recording.reads(null, null);
            return [segments.map(({ start, end, level }) => [start, end, level]), numReads, numSkipped,
                    placesOf(segments, 1, 200).length, recording.reads(0, 0).segments.map(({ level }) => level)];
        }"""
    )
    assert levels == [[[0, 1, 5], [1, 6, 4], [50, 160, 1]], 3, 1, 1, [5, 5]]


def test_a_document_of_32k_tokens_stays_quick(tab: "Page", fake_url: str) -> None:
    open_page(tab, fake_url)
    tab.click("#reading-switch")
    document = (DOCUMENT * 40)[:130_000]
    attach(tab, document)
    send(tab, QUESTION)
    tab.set_default_timeout(60_000)
    finished_reply(tab)
    assert tab.locator("#reading-text *").count() < 100
    milliseconds = tab.evaluate(
        """() => {
            const tokens = document.querySelectorAll("#reading-tokens span");
            const start = performance.now();
            for (let i = 0; i < 20; i++) tokens[i].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
            return (performance.now() - start) / 20;
        }"""
    )
    assert milliseconds < 100
