"""The tokenizer of nano, and a corpus."""

from pathlib import Path

import pytest
from data.corpus import write_corpus

from indexshare.chat.tokenizer import Tokenizer
from indexshare.engine.resolve import packaged_model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(packaged_model())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")
