"""A model of dense attention, given indexers and distilled: a checkpoint from which transformers computes the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import TRANSFORMERS_LOGPROBS
from torch import Tensor
from transformers import GlmMoeDsaForCausalLM

import indexshare
from indexshare.engine.resolve import packaged_model
from indexshare.kernels.layout import KeyLayout
from indexshare.model import recipes
from indexshare.model.batch import ForwardBatch, Trace
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model
from indexshare.share.distill import IndexSizes, Schedule, distill_model
from indexshare.train.export import export_model

LENGTH = 120


def dense_model(directory: Path) -> Path:
    """GLM-4.7-Flash's kind in small, with nano's tokenizer and weights of unit scale."""
    sizes = {"index_n_heads": 0, "index_head_dim": 0, "index_topk": 0, "index_topk_pattern": None}
    tiny = recipes.tiny(vocab_size=4096)
    config = replace(tiny, model_type="glm4_moe_lite", indexer_types=(), latent_norm_eps=1e-6, **sizes)
    model = GlmForCausalLM(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return export_model(model, packaged_model(), directory)


def stable_topk(scores: Tensor, k: int, dim: int = -1, **_: Any) -> Any:
    """Ties go to the lower position, as ours do; torch.topk takes any."""
    values, indices = scores.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def test_the_same_logprobs_after_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, texts, output = dense_model(tmp_path / "dense"), tmp_path / "text.txt", tmp_path / "shared"
    texts.write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 100, 1500))))
    schedule = Schedule(warmup_steps=4, sparse_steps=2, length=64, batch_size=2, held_out_rows=2, sparse_rate=1e-3)
    sizes = IndexSizes(num_heads=8, topk=16)  # with fewer heads more scores are exactly 0, and tied
    distill_model(str(source), [texts], output, pattern="FSSFSS", sizes=sizes, schedule=schedule)
    tokens = torch.randint(1, 4096, (LENGTH,))

    ours, trace = load_model(output, dtype=torch.float32), Trace()
    layout = KeyLayout.packed((0, LENGTH))
    batch = ForwardBatch(token_ids=tokens, positions=torch.arange(LENGTH), layout=layout, trace=trace)
    with torch.no_grad():
        logprobs = ours.logits(ours(batch)).log_softmax(-1)
    assert {layer for layer, rows in trace.selections.items() if rows is not None} == {0, 3}

    theirs = GlmMoeDsaForCausalLM.from_pretrained(output, dtype=torch.float32, attn_implementation="eager").eval()
    assert list(theirs.config.indexer_types) == ["full", "shared", "shared"] * 2
    monkeypatch.setattr(torch.Tensor, "topk", stable_topk)
    with torch.no_grad():
        expected = theirs(tokens[None], use_cache=False).logits[0].log_softmax(-1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=TRANSFORMERS_LOGPROBS)


def test_the_engine_runs_what_was_distilled(tmp_path: Path) -> None:
    source, texts, output = dense_model(tmp_path / "dense"), tmp_path / "text.txt", tmp_path / "shared"
    texts.write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 100, 1500))))
    schedule = Schedule(warmup_steps=1, sparse_steps=0, length=64, batch_size=1, held_out_rows=1)
    distill_model(str(source), [texts], output, freq=2, sizes=IndexSizes(topk=16), schedule=schedule)
    llm = indexshare.load(output, dtype="float32", device="cpu")
    tokens = torch.randint(1, 4096, (LENGTH,))
    layout = KeyLayout.packed((0, LENGTH))
    with torch.no_grad():
        model = load_model(output, dtype=torch.float32)
        batch = ForwardBatch(token_ids=tokens, positions=torch.arange(LENGTH), layout=layout)
        expected = model.logits(model(batch)).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    found = torch.as_tensor(np.asarray(llm.logprobs(tokens.tolist())))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=TRANSFORMERS_LOGPROBS)
