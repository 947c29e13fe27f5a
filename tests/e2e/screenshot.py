"""Take the picture of the page for the README: a fact in 8,000 tokens of source code, and what was read to answer.

indexshare serve &
python tests/e2e/screenshot.py docs/images/page.png
"""

import argparse
import os
from importlib.resources import files
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from indexshare.eval.documents import Library
from indexshare.train.episodes import question

SHOW_PLACE = """words => {
    const pane = document.querySelector("#reading-text");
    for (const { firstChild: node } of pane.children) {
        const at = node.data.indexOf(words);
        if (at < 0) continue;
        const range = document.createRange();
        range.setStart(node, at);
        range.setEnd(node, at + 1);
        pane.scrollTop += range.getBoundingClientRect().top - pane.getBoundingClientRect().top - pane.clientHeight / 3;
    }
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="the PNG file to write")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--layers", default="2–5", help="layer group to show, as the page names it")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    library = Library(Path(str(files("indexshare") / "models" / "nano")))
    document = library.document(np.random.default_rng([0, 3]), 8000, 3)
    fact = document.needles[1].fact
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=options.chromium, args=arguments)
        scheme = "dark" if options.dark else "light"
        tab = browser.new_page(viewport={"width": 1280, "height": 800}, locale="en-GB", color_scheme=scheme)
        values = '{"maxTokens": "100", "temperature": "0", "reading": true}'
        tab.add_init_script(f'localStorage["indexshare.settings"] = {values!r}')
        tab.goto(options.url)
        tab.wait_for_selector("#send:enabled")
        content = document.text.encode()
        tab.set_input_files("#files", files=[{"name": "library.txt", "mimeType": "text/plain", "buffer": content}])
        tab.fill("#draft", question(fact))
        tab.press("#draft", "Enter")
        tab.wait_for_selector(".reply[aria-busy=false]", timeout=120_000)
        tab.select_option("#reading-group", label=options.layers)
        tokens = tab.locator("#reading-tokens span").all_text_contents()
        value = len(tokens) - tokens[::-1].index(" is")  # the token after the last "is"
        tab.locator("#reading-tokens span").nth(value).click()
        tab.evaluate(SHOW_PLACE, f"access code of {fact.subject} is")
        tab.wait_for_timeout(200)  # one picture after the last scroll
        tab.screenshot(path=options.picture)
        print(f"{fact}; the model said: {tab.locator('.answer').inner_text()}")
        browser.close()


if __name__ == "__main__":
    main()
