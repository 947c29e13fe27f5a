"""A browser and a server for the tests of the page: the fake one, or the one at $E2E_URL.

`make test-e2e` runs them. They need the extra `e2e` and a Chromium at $CHROMIUM or /usr/bin/chromium.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.fake_server import FakeState, running

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra e2e is not installed")

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))


@pytest.fixture(scope="session")
def browser() -> Iterator["sync_api.Browser"]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}; set CHROMIUM")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def state() -> FakeState:
    return FakeState()


@pytest.fixture
def fake_url(state: FakeState) -> Iterator[str]:
    with running(state) as url:
        yield url


@pytest.fixture
def base_url(request: pytest.FixtureRequest) -> str:
    return os.environ.get("E2E_URL") or request.getfixturevalue("fake_url")


@pytest.fixture
def tab(browser: "sync_api.Browser") -> Iterator["sync_api.Page"]:
    """An English tab of its own. An error in a script or a breach of the content policy fails the test."""
    context = browser.new_context(locale="en-GB", viewport={"width": 1280, "height": 800})
    tab = context.new_page()
    tab.set_default_timeout(float(os.environ.get("E2E_TIMEOUT", "10")) * 1000)
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda message: "Content Security Policy" in message.text and problems.append(message.text))
    yield tab
    context.close()
    assert not problems
