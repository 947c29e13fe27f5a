"""However a text is cut into chunks and pages, the log-probabilities and the tokens are the same (issue 2, proof 2)."""

from typing import Any

import pytest
import torch

from indexshare.engine.sampler import SamplingParams
from indexshare.engine.session import Session
from indexshare.errors import MemoryLimitError, RequestError
from indexshare.kernels import registry
from indexshare.model.glm import GlmForCausalLM

TOLERANCE = 1e-5
NUM_TOKENS = 150  # far beyond index_topk = 8, and several pages of 64


@pytest.fixture(scope="module")
def text() -> list[int]:
    return torch.randint(0, 256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()


def greedy(session: Session, token_ids: list[int], num_new: int = 20) -> list[int]:
    return [token.token_id for token in session.stream(token_ids, SamplingParams(max_new_tokens=num_new))]


def token_by_token(session: Session, text: list[int]) -> torch.Tensor:
    logits = session.prefill(text[:1])
    scores = []
    for token in text[1:]:
        scores.append(torch.log_softmax(logits, dim=-1)[token])
        logits = session.decode(token)
    return torch.stack(scores)


@pytest.mark.parametrize("page_size", [4, 64])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunks_and_pages_do_not_change_the_result(
    open_session: Any, text: list[int], chunk_size: int, page_size: int
) -> None:
    at_once = open_session(page_size=64).logprobs(text, chunk_size=NUM_TOKENS)
    before = registry.num_calls("index_select")
    session = open_session(page_size=page_size)
    in_chunks = session.logprobs(text, chunk_size=chunk_size)
    assert registry.num_calls("index_select") > before, "the sparse branch must have run"
    assert in_chunks.dtype == torch.float32
    assert in_chunks.shape == (NUM_TOKENS - 1,)
    torch.testing.assert_close(in_chunks, at_once, rtol=0, atol=TOLERANCE)

    session.truncate(0)
    session.prefill(text[:-1], chunk_size=chunk_size)
    assert greedy(session, text[-1:]) == greedy(open_session(page_size=64), text)


@pytest.mark.parametrize("page_size", [4, 64])
def test_token_by_token_equals_prefill(open_session: Any, text: list[int], page_size: int) -> None:
    at_once = open_session().logprobs(text, chunk_size=NUM_TOKENS)
    decoded = token_by_token(open_session(page_size=page_size), text)
    torch.testing.assert_close(decoded, at_once, rtol=0, atol=TOLERANCE)


def test_sparse_and_dense_differ_only_beyond_top_k(open_session: Any, text: list[int]) -> None:
    sparse = open_session().logprobs(text)
    dense = open_session(attention="dense").logprobs(text)
    torch.testing.assert_close(sparse[:7], dense[:7], rtol=0, atol=TOLERANCE)
    assert (sparse - dense).abs().max() > 1e-3


@pytest.mark.parametrize("chunk_size", [7, 256])
def test_logits_after_every_token(open_session: Any, text: list[int], chunk_size: int) -> None:
    session = open_session()
    session.prefill(text[:40])
    pieces = list(session.logits(text[40:], chunk_size=chunk_size))
    assert all(len(piece) <= chunk_size for piece in pieces)
    scores = torch.cat(pieces)[:-1].log_softmax(-1).gather(1, torch.tensor(text[41:])[:, None])[:, 0]
    torch.testing.assert_close(scores, open_session().logprobs(text)[40:], rtol=0, atol=TOLERANCE)


def test_logprobs_continue_a_context(open_session: Any, text: list[int]) -> None:
    whole = open_session().logprobs(text)
    session = open_session()
    session.prefill(text[:40])
    torch.testing.assert_close(session.logprobs(text[40:100]), whole[39:99], rtol=0, atol=TOLERANCE)
    session.truncate(60)  # the logits of token 59 are gone: it is read again
    torch.testing.assert_close(session.logprobs(text[60:]), whole[59:], rtol=0, atol=TOLERANCE)
    assert session.token_ids == tuple(text)


def test_scoring_in_tiles_equals_scoring_at_once(
    open_session: Any, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = open_session().logprobs(text)
    monkeypatch.setattr("indexshare.engine.session.LOGPROB_BYTES", 3 * 4 * 256)  # three rows of logits
    torch.testing.assert_close(open_session().logprobs(text), at_once, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 64, 99])
def test_truncate_then_continue_equals_fresh(open_session: Any, text: list[int], kept: int) -> None:
    session = open_session()
    session.prefill(text[:100])
    greedy(session, text[100:110])
    session.truncate(kept)
    assert session.context_length == kept
    question = text[110:140]
    fresh = open_session().prefill(text[:kept] + question)
    torch.testing.assert_close(session.prefill(question), fresh, rtol=0, atol=TOLERANCE)


def test_rewind_keeps_the_common_beginning(open_session: Any, text: list[int]) -> None:
    session = open_session()
    session.prefill(text[:50])
    assert list(session.rewind([*text[:30], 1, 2])) == [1, 2]
    assert session.context_length == 30
    assert list(session.rewind(text[:30])) == text[29:30]  # the last token is read again: its logits are wanted
    assert list(session.rewind([(text[0] + 1) % 256])) == [(text[0] + 1) % 256]
    assert session.context_length == 0
    assert list(session.rewind([])) == []


def test_two_sessions_share_one_cache(open_session: Any, tiny_model: GlmForCausalLM, text: list[int]) -> None:
    first = open_session(max_tokens=400)
    second = Session(tiny_model, first._cache)
    for start in range(0, 100, 10):  # their pages interleave
        first.prefill(text[start : start + 10])
        second.prefill(text[100 - start : 110 - start])
    assert first._pages != sorted(first._pages) or first._pages[-1] - first._pages[0] >= len(first._pages)
    expected = open_session().prefill(text[:100])
    first.truncate(99)
    torch.testing.assert_close(first.decode(text[99]), expected, rtol=0, atol=TOLERANCE)
    first.close()
    second.close()
    first._cache.check_conservation()
    assert first._cache.num_free_pages == first._cache.num_pages


def test_progress_counts_tokens(open_session: Any, text: list[int]) -> None:
    seen: list[tuple[int, int]] = []
    open_session().prefill(text[:50], chunk_size=20, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(20, 50), (40, 50), (50, 50)]


def test_an_interrupt_while_lost_logits_are_made_again_loses_no_token(
    open_session: Any, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session()
    session.prefill(text[:40])
    session.truncate(33)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.logprobs(text[33:40])
    assert session.token_ids == tuple(text[:33])
    expected = open_session()
    expected.prefill(text[:33])
    torch.testing.assert_close(session.logprobs(text[33:40]), expected.logprobs(text[33:40]))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_logits_need_a_chunk(open_session: Any, text: list[int], chunk_size: int) -> None:
    with pytest.raises(RequestError, match="chunk_size"):
        list(open_session().logits(text[:5], chunk_size=chunk_size))


def test_an_interrupted_read_leaves_the_session_as_it_was(open_session: Any, text: list[int]) -> None:
    session = open_session()
    session.prefill(text[:30])
    free_before = session._cache.num_free_pages

    def interrupt(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(text[30:90], chunk_size=8, progress=interrupt)
    assert session.context_length == 30
    assert session._cache.num_free_pages == free_before
    session._cache.check_conservation()
    expected = open_session().prefill(text[:60])
    torch.testing.assert_close(session.prefill(text[30:60]), expected, rtol=0, atol=TOLERANCE)


def test_stream_ends_at_a_stop_id_or_at_the_limit(open_session: Any, text: list[int]) -> None:
    tokens = greedy(open_session(), text, 12)
    assert len(tokens) == 12
    stop = tokens[5]
    session = open_session()
    stopped = [token.token_id for token in session.stream(text, SamplingParams(max_new_tokens=12), stop_ids=[stop])]
    assert stopped == tokens[: tokens.index(stop) + 1]
    assert session.token_ids == tuple(text + stopped[:-1])


@pytest.mark.parametrize("bad", [[], [-1], [256], [1.5], ["1"], [2**63]])
def test_bad_tokens_are_refused(open_session: Any, bad: list[Any]) -> None:
    session = open_session()
    for read in (session.prefill, session.logprobs):
        with pytest.raises(RequestError):
            read(bad)
    assert session.context_length == 0


def test_bad_arguments_are_refused(open_session: Any) -> None:
    session = open_session()
    for chunk_size in (0, -1, True, 1.5):
        with pytest.raises(RequestError, match="chunk_size"):
            session.prefill([1], chunk_size=chunk_size)
    session.prefill([1, 2, 3])
    for number in (-1, 4, True, 1.0, 2**63):
        with pytest.raises(RequestError, match="num_tokens"):
            session.truncate(number)
    with pytest.raises(RequestError, match="attention"):
        open_session(attention="both")


def test_a_full_cache_is_refused_before_anything_is_read(open_session: Any) -> None:
    session = open_session(max_tokens=16)
    with pytest.raises(MemoryLimitError, match="max_tokens"):
        session.prefill([1] * 17)
    with pytest.raises(MemoryLimitError, match="max_tokens"):
        next(session.stream([1] * 10, SamplingParams(max_new_tokens=8)))
    assert session.context_length == 0
    assert len(list(session.stream([1] * 10, SamplingParams(max_new_tokens=7)))) == 7
