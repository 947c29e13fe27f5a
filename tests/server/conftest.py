"""The shipped model, loaded once."""

import pytest

from indexshare.engine.llm import LLM, load


@pytest.fixture(scope="session")
def nano() -> LLM:
    return load("nano", device="cpu", threads=1)
