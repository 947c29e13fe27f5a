"""Documents are exactly what the chat template renders, and answers and selected sets are counted as they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from indexshare.chat.template import encode_chat
from indexshare.engine.llm import LLM
from indexshare.engine.session import Session
from indexshare.errors import RequestError
from indexshare.eval import documents, retrieval
from indexshare.eval.documents import Document, Library
from indexshare.eval.language import measure_language
from indexshare.eval.measure import indexer_in_every_layer
from indexshare.eval.retrieval import depth_grid, evaluate_length, summarise, wilson_interval
from indexshare.kernels import ops
from indexshare.model.glm import weights_of
from indexshare.train import corpus
from indexshare.train.episodes import Episode, answer, question, render_episode
from indexshare.train.tokenizer import TextEncoder


@pytest.fixture(scope="module")
def document(library: Library) -> Document:
    return library.document(np.random.default_rng(1), 1500, 6)


def test_a_prompt_is_the_document_then_the_question(library: Library, document: Document, model_directory: Any) -> None:
    """The same tokens from the chat template, from the document read beforehand, and from the training episodes."""
    encoder = TextEncoder(model_directory)
    assert 1500 - 128 <= len(document.token_ids) <= 1500 + 3
    for needle in document.needles:
        messages = document.messages(needle.fact)
        prompt = encode_chat(library.tokenizer, library.template, messages, enable_thinking=False)
        assert prompt[: len(document.token_ids)] == list(document.token_ids)
        episode = Episode(
            messages=(
                {"role": "user", "content": f"\n\n{question(needle.fact)}"},
                {"role": "assistant", "content": answer(needle.fact)},
            ),
            document=np.asarray(document.token_ids[3:]),
        )
        rendered = render_episode(episode, encoder)[0].tolist()
        assert prompt == rendered[: len(prompt)]
        assert library.tokenizer.decode(rendered[len(prompt) :]) == answer(needle.fact) + "<|endoftext|>"


def test_a_text_that_breaks_off_before_a_newline_loses_it(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last token would join with the empty line before the question."""
    build = documents.build_document
    num_added = 1

    def with_newline(*arguments: Any) -> Any:
        token_ids, spans = build(*arguments)
        newline = library._encoder.encode("\n")
        return np.concatenate([token_ids, newline * num_added]), spans

    whole = library.document(np.random.default_rng(3), 600, 2)
    monkeypatch.setattr(documents, "build_document", with_newline)
    cut = library.document(np.random.default_rng(3), 600, 2)
    assert cut.token_ids == whole.token_ids
    assert cut.needles == whole.needles
    num_added = 2 * documents.MAX_CUT
    with pytest.raises(RequestError, match="joins lines"):
        library.document(np.random.default_rng(3), 600, 2)


def test_needles_stand_where_they_are_said_to(library: Library, document: Document) -> None:
    for needle in document.needles:
        before, after = document.token_ids[: needle.position], document.token_ids[needle.position :]
        assert library.tokenizer.decode(before).rstrip(" ").endswith(f"access code of {needle.fact.subject} is")
        assert library.tokenizer.decode(after).lstrip(" ").startswith(f"{needle.fact.value}.\n")
        assert needle.depth == pytest.approx(needle.position / len(document.token_ids))
    assert len({needle.position for needle in document.needles}) == len(document.needles)


def test_selected_positions_are_those_of_the_trace(llm: LLM, library: Library, document: Document) -> None:
    """Whatever pages a session got, the positions are what the indexers chose, and the session is unchanged."""
    token_ids = list(document.token_ids[:200])
    expected = _selected_by_one_layer(llm, token_ids)
    with llm.open_session(512, page_size=4) as session:
        session.prefill(token_ids[:100])
        session._cache.pages._free.reverse()  # the next pages come from the other end of the pool
        session.prefill(token_ids[100:150])
        found = session.selected_positions(token_ids[150:])
        assert session.context_length == 150
        session._cache.check_conservation()
    assert set(found) == {0, 1, 4}
    first = found[0]
    assert first is not None
    assert first.tolist() == expected
    with llm.open_session(512) as session:
        assert session.selected_positions(token_ids[:8]) == {0: None, 1: None, 4: None}  # index_topk keys: all of them


def _selected_by_one_layer(llm: LLM, token_ids: list[int]) -> list[int]:
    """The top-k of the first layer for the last token, from its parts."""
    from indexshare.model.glm import RopeTable

    model, config = llm.model, llm.config
    layer = model.model.layers[0]
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(torch.tensor(token_ids)))
        rope = RopeTable(torch.arange(len(token_ids)), config, hidden.dtype)
        query_latent = layer.self_attn.q_a_layernorm(layer.self_attn.q_a_proj(hidden))
        query, weights, keys = layer.self_attn.indexer(hidden, query_latent, rope)
        scores = (weights[-1][:, None] * (query[-1] @ keys.T).relu()).sum(0)
    # Many scores are exactly zero after the ReLU; ties go to the lower position.
    return sorted(scores.sort(descending=True, stable=True).indices[: config.index_topk].tolist())


def test_an_oracle_scores_full_marks(llm: LLM, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def oracle(llm: LLM, session: Session, library: Library, document: Document, needle: Any) -> retrieval.Answer:
        reply = answer(needle.fact) if needle.depth < 0.5 else "I do not know."
        return retrieval.judge(session, library, document, needle, reply, session.context_length)

    monkeypatch.setattr(retrieval, "ask", oracle)
    result = evaluate_length(llm, library, 1024, num_questions=7, questions_per_document=4)
    assert (result.num_documents, result.num_questions) == (2, 7)
    early = sum(each.depth < 0.5 for each in result.answers)
    assert result.num_correct == early
    assert sum(right for right, _ in depth_grid(result)) == early
    assert sum(asked for _, asked in depth_grid(result)) == 7
    assert set(result.selected_by_layer) == {0, 1, 4}
    assert result.num_selected is not None
    assert max(result.selected_by_layer.values()) <= result.num_selected <= sum(result.selected_by_layer.values())


def test_the_model_is_asked_the_same_whatever_its_attention(llm: LLM, library: Library) -> None:
    steps: list[tuple[str, int, int]] = []
    sparse = evaluate_length(llm, library, 1024, num_questions=2, report=lambda *step: steps.append(step))
    dense = evaluate_length(llm, library, 1024, num_questions=2, attention="dense")
    assert [each.value for each in sparse.answers] == [each.value for each in dense.answers]
    assert (sparse.num_correct, dense.num_selected, dense.selected_by_layer) == (0, None, {})  # the weights are random
    assert steps[-1] == ("1,024 tokens, sparse, document 1 of 1: asking", 2, 2)
    again = evaluate_length(llm, library, 1024, num_questions=2)
    assert again.answers == sparse.answers


def test_asking_on_a_read_document_is_asking_at_once(llm: LLM, library: Library, document: Document) -> None:
    needle = document.needles[2]
    options: dict[str, Any] = {"enable_thinking": False, "max_new_tokens": retrieval.ANSWER_TOKENS, "temperature": 0.0}
    at_once = llm.chat(document.messages(needle.fact), **options)
    with llm.open_session(1700) as session:
        session.prefill(document.token_ids)
        for each in document.needles[:3]:
            found = retrieval.ask(llm, session, library, document, each)
            assert session.token_ids == document.token_ids
    assert found.reply == at_once.content


@pytest.mark.parametrize(("num_questions", "num_tokens"), [(0, 4096), (10, 200)])
def test_impossible_numbers_are_refused(llm: LLM, library: Library, num_questions: int, num_tokens: int) -> None:
    with pytest.raises(RequestError, match="at least"):
        evaluate_length(llm, library, num_tokens, num_questions=num_questions)


@pytest.mark.parametrize(
    ("num_correct", "num_questions", "low", "high"),
    [(95, 100, 0.8882, 0.9785), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(num_correct: int, num_questions: int, low: float, high: float) -> None:
    """Expected values from the formula by hand (and the tables in Newcombe 1998)."""
    assert wilson_interval(num_correct, num_questions) == pytest.approx((low, high), abs=1e-4)


def test_empty_answers_have_a_summary() -> None:
    result = summarise((), num_tokens=1, attention="sparse", num_documents=0, read_seconds=0.0, ask_seconds=0.0)
    assert (result.num_selected, result.low, result.high) == (None, 0.0, 1.0)


def test_bits_per_byte_do_not_depend_on_the_window_below_its_size(llm: LLM) -> None:
    """One window, two windows and the definition by hand; every token behind the header counts exactly once."""
    path = "bisect.py"
    header, text = f"# {path}\n", corpus.read_text(path)
    token_ids = llm.tokenizer.encode(header + text)
    num_header = len(llm.tokenizer.encode(header))
    nats = -float(llm.logprobs(token_ids)[num_header - 1 :].double().sum())
    whole = measure_language(llm, paths=[path])
    assert whole.bits_per_byte == pytest.approx(nats / np.log(2) / len(text.encode()), rel=1e-6)
    assert whole.xz_bits_per_byte == corpus.xz_bits_per_byte([text])
    assert (whole.num_files, whole.num_bytes, whole.num_tokens) == (1, len(text.encode()), len(token_ids))
    assert len(token_ids) < 2000
    windows = measure_language(llm, paths=[path], window=128)
    assert windows.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.1)  # less context, the same tokens


def place(weight: ops.Weight) -> int:
    return (weight if isinstance(weight, torch.Tensor) else weight.data).data_ptr()


def test_borrowed_indexers_share_memory_and_change_only_the_selection(llm: LLM, library: Library) -> None:
    every = indexer_in_every_layer(llm)
    assert [every.config.is_full(layer) for layer in range(6)] == [True] * 6
    own, borrowed = (weights_of(each.model) for each in (llm, every))
    for name, weight in own.items():
        assert place(borrowed[name]) == place(weight)
    key = "model.layers.{}.self_attn.indexer.wk.weight"
    assert place(borrowed[key.format(3)]) == place(own[key.format(1)])
    token_ids = library.tokenizer.encode(corpus.read_text("bisect.py"))[:300]
    dense = [each.logprobs(token_ids, attention="dense") for each in (llm, every)]
    torch.testing.assert_close(*dense, rtol=0, atol=0)
    assert not torch.equal(llm.logprobs(token_ids), every.logprobs(token_ids))


def test_results_are_plain_values(llm: LLM, library: Library) -> None:
    result = evaluate_length(llm, library, 1024, num_questions=1)
    assert dataclasses.replace(result) == result
