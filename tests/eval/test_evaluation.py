"""The evaluation of a model: what is asked at which length, and the table."""

from __future__ import annotations

import io

import msgspec
import pytest
import torch
from rich.console import Console

from indexshare.chat.template import ChatTemplate
from indexshare.engine.cache import bytes_per_token
from indexshare.engine.llm import LLM
from indexshare.errors import MemoryLimitError, RequestError
from indexshare.eval.cache_quality import lines, shared_rows
from indexshare.eval.evaluation import Evaluation, evaluate_model, render
from indexshare.kernels.cache_formats import CacheFormats
from indexshare.train import corpus


def test_an_evaluation_has_every_length(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "held_out_files", lambda root=None: ["bisect.py"])
    monkeypatch.setattr("indexshare.eval.retrieval.ANSWER_TOKENS", 4)
    evaluation = evaluate_model(llm, lengths=(512, 300, 512), num_questions=2, dense_up_to=400)
    assert [each.num_tokens for each in evaluation.sparse] == [300, 512]
    assert [(each.num_tokens, each.attention) for each in evaluation.dense] == [(300, "dense")]
    assert evaluation.language.num_files == 1
    assert evaluation.tools.num_requests == 2
    assert msgspec.json.decode(msgspec.json.encode(evaluation), type=Evaluation) == evaluation
    console = Console(file=io.StringIO(), width=140, record=True)
    console.print(render(evaluation))
    shown = console.export_text()
    assert shown.count("0 of 2") == 4  # three lengths and the tool calls
    assert f"{evaluation.language.bits_per_byte:.3f}; xz -9e needs" in shown


def test_rounded_caches_are_compared(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "held_out_files", lambda root=None: ["bisect.py"])
    monkeypatch.setattr("indexshare.eval.retrieval.ANSWER_TOKENS", 4)
    caches = CacheFormats(latents="int8", index_keys="int8")
    template = ChatTemplate.from_directory(llm.directory)
    rounded = LLM(llm.model, tokenizer=llm.tokenizer, template=template, directory=llm.directory, caches=caches)
    result = evaluate_model(rounded, lengths=(400,), num_questions=1, dense_up_to=0).caches
    assert result is not None
    assert result.bytes_per_token == bytes_per_token(llm.config, torch.float32, with_mtp=False, formats=caches)
    assert result.bytes_per_token < result.plain_bytes_per_token / 2
    recall = result.recall[0]
    assert (recall.num_tokens, len(recall.by_layer)) == (400, len(llm.config.full_layers))
    assert 0.9 < recall.mean < 1
    assert 0 < result.text.kl_mean < 0.5  # random weights have many near ties
    shown = lines(result)
    assert "int8 caches (latents and index keys)" in shown[0]
    assert f"{recall.mean:.2%} of what" in shown[1]


def test_shared_rows() -> None:
    expected, found = torch.tensor([[3, 5, 9, -1], [0, 1, 2, 3]]), torch.tensor([[5, 7, 9, -1], [0, 1, 2, 3]])
    assert shared_rows(expected, found, 10) == pytest.approx((2 / 3 + 1) / 2)


def test_impossible_lengths_are_refused_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="1,048,576 positions"):
        evaluate_model(llm, lengths=(512, 2**20 + 1))
    monkeypatch.setattr("indexshare.runtime.available_memory_bytes", lambda device: 256 * 2**20 + 1000)
    with pytest.raises(MemoryLimitError, match="bytes of cache"):
        evaluate_model(llm, lengths=(2**20,))
