"""What quantisation costs: KL against a formula, bits per byte and retrieval as the other measures count them."""

from pathlib import Path

import pytest
import torch

from indexshare.engine.llm import LLM, load
from indexshare.errors import RequestError
from indexshare.eval import quality
from indexshare.eval.documents import Library
from indexshare.eval.language import measure_language
from indexshare.eval.quality import compare_retrieval, compare_text
from indexshare.eval.retrieval import evaluate_length

FILES = {"signal.py": "def first(value):\n    return value + 1\n" * 40, "uu.py": "x = [1, 2, 3]\n" * 20}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A library of which two files are held out."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture(scope="module")
def quantised(model_directory: Path) -> LLM:
    return load(model_directory, device="cpu", dtype="float32", threads=1, quant="int4")


@pytest.mark.parametrize("window", [8192, 64])
def test_text_is_measured_as_elsewhere(llm: LLM, quantised: LLM, root: Path, window: int) -> None:
    result = compare_text(llm, quantised, window=window, root=root)
    for model, bits in ((llm, result.reference_bits_per_byte), (quantised, result.bits_per_byte)):
        expected = measure_language(model, root=root, window=window)
        assert bits == pytest.approx(expected.bits_per_byte, rel=1e-5)
        assert (result.num_files, result.num_bytes) == (expected.num_files, expected.num_bytes)
    assert 0 < result.kl_mean < result.kl_p99
    assert 0 < result.top1_agreement < 1


def test_divergence_is_the_formula(llm: LLM, quantised: LLM, root: Path) -> None:
    (root / "uu.py").unlink()
    text = FILES["signal.py"][:200]
    (root / "signal.py").write_text(text)
    result = compare_text(llm, quantised, root=root)
    token_ids = llm.tokenizer.encode("# signal.py\n" + text)
    num_header = len(llm.tokenizer.encode("# signal.py\n"))
    pair = []
    for model in (llm, quantised):
        with model.open_session(len(token_ids)) as session:
            rows = [session.decode(token) for token in token_ids[:-1]][num_header - 1 :]
        pair.append(torch.stack(rows).double().softmax(-1))
    expected, found = pair
    divergences = (expected * (expected / found).log()).sum(-1)
    assert result.num_tokens == len(divergences) == len(token_ids) - num_header
    assert result.kl_mean == pytest.approx(float(divergences.mean()), rel=1e-3)
    assert result.kl_p99 == pytest.approx(float(divergences.quantile(0.99, interpolation="higher")), rel=1e-2)
    same = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(same), abs=2 / len(divergences))


def test_a_model_is_like_itself(llm: LLM, root: Path) -> None:
    result = compare_text(llm, llm, root=root, max_tokens=1)
    assert (result.num_files, result.kl_mean, result.top1_agreement) == (1, 0.0, 1.0)
    assert result.bits_per_byte == result.reference_bits_per_byte


def test_retrieval_asks_both_the_same(
    llm: LLM, quantised: LLM, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "facts_per_document", lambda num_tokens: 2)
    result = compare_retrieval(llm, quantised, 512, num_documents=1)
    expected = evaluate_length(llm, library, 512, num_questions=2)
    assert (result.num_questions, result.reference_correct) == (2, expected.num_correct)


def test_no_tokens_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="must be 1 or more, not 0"):
        compare_text(llm, llm, max_tokens=0)
