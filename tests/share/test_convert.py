"""Conversion from end to end: a model without indexers, and one with an indexer in every layer."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from indexshare.data.rows import Batch
from indexshare.engine.llm import load
from indexshare.engine.resolve import packaged_model
from indexshare.errors import ConfigError, IndexShareError
from indexshare.model import recipes
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.share import convert, distill
from indexshare.share.attach import attach_indexers
from indexshare.share.calibration import CalibrationRow
from indexshare.share.convert import convert_model
from indexshare.share.distill import Schedule
from indexshare.share.index_quality import IndexQuality, measure_indexers
from indexshare.share.search import PatternSearch
from indexshare.train import export, loop

WORDS = "def return self value for in range if not else none true false class import from with as yield".split()
SHORT = Schedule(
    warmup_steps=4, sparse_steps=2, length=48, batch_size=2, held_out_rows=3, checkpoint_every=2, sparse_rate=1e-3
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for index in range(4):
        (directory / f"{index}.txt").write_text(" ".join(rng.choice(WORDS, 600)))
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with an indexer in every layer."""
    model = GlmForCausalLM(recipes.tiny(vocab_size=4096))
    model.init_weights(0)
    everywhere = attach_indexers(model, "F" * model.config.num_hidden_layers)
    return export.export_model(everywhere, packaged_model(), tmp_path_factory.mktemp("models") / "tiny")


def test_a_model_with_all_indexers_becomes_one_with_few(source: Path, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = convert_model(str(source), [texts], output, keep="1/3", num_rows=2, schedule=SHORT)
    pattern = result.search.pattern
    assert pattern.count("F") == 2 and pattern[0] == "F"
    names = [variant.name for variant in result.variants]
    assert names == ["dense attention", "as it was", "equal spacing", "searched", "searched and distilled"]
    assert [variant.index_bytes for variant in result.variants] == [0, 6 * 32, 2 * 32, 2 * 32, 2 * 32]

    written = json.loads((output / "report.json").read_bytes())
    assert written["variants"][4]["loss"] == pytest.approx(result.variants[4].loss)
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and not re.search(r"(src|href)=\"(?!data:)", page)
    assert f"{result.variants[3].loss:.4f}" in page and pattern in page
    assert "had 6 indexers; the result runs 2 in 6 layers" in page and result.pattern == "FFFFFF"
    for said in (written["distillation"], json.loads((output / "distillation.json").read_bytes())):
        assert Path(said["output"]) == output and said["pattern"] == pattern

    config = GlmConfig.from_json(output)
    assert "".join("F" if config.is_full(layer) else "S" for layer in range(6)) == pattern
    reply = load(output, device="cpu").generate("def value", max_new_tokens=4, temperature=0.0)
    assert reply.token_ids
    with pytest.raises(ConfigError, match="exists"):
        convert_model(str(source), [texts], output, keep="1/3", schedule=SHORT)


def test_what_was_stopped_goes_on(source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the last step; nothing that was done is done again, and the result is the same."""
    whole = convert_model(str(source), [texts], tmp_path / "whole", keep="1/3", num_rows=2, schedule=SHORT)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_report", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_model(str(source), [texts], tmp_path / "out", keep="1/3", num_rows=2, schedule=SHORT)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="begun with other values of keep, rows"):
        convert_model(str(source), [texts], tmp_path / "out", keep="1/2", num_rows=3, schedule=SHORT)
    (texts / "more.txt").write_text("value " * 500)
    with pytest.raises(ConfigError, match="begun with other values of data"):
        convert_model(str(source), [texts], tmp_path / "out", keep="1/3", num_rows=2, schedule=SHORT)
    (texts / "more.txt").unlink()
    monkeypatch.setattr(convert, "distill_model", stop)
    monkeypatch.setattr(convert, "measure_overlap", stop)
    resumed = convert_model(str(source), [texts], tmp_path / "out", keep="1/3", num_rows=2, schedule=SHORT)
    assert resumed.search.removals == whole.search.removals
    assert resumed.variants == whole.variants and (tmp_path / "out" / "model.safetensors").is_file()


def test_the_rows_of_search_and_report_are_not_trained_on(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `PatternSearch` and `measure_indexers` are given, against all that training reads."""
    searched: list[tuple[int, ...]] = []
    measured: list[tuple[int, ...]] = []
    trained: set[tuple[int, ...]] = set()

    class Watched(PatternSearch):
        def __init__(self, model: GlmForCausalLM, rows: tuple[CalibrationRow, ...], **options: Any) -> None:
            searched.extend(tuple(row.token_ids.tolist()) for row in rows)
            super().__init__(model, rows, **options)

    def watched_measure(model: GlmForCausalLM, batches: Sequence[Batch], **options: Any) -> IndexQuality:
        measured.extend(tuple(batch.token_ids[0].tolist()) for batch in batches)
        return measure_indexers(model, batches, **options)

    def watched_train(*arguments: Any, batches: Any, **options: Any) -> Any:
        for step in range(200):  # more than it asks for: all rows there are
            trained.update(tuple(row) for row in batches(step).token_ids.tolist())
        return loop.train(*arguments, batches=batches, **options)

    monkeypatch.setattr(convert, "PatternSearch", Watched)
    monkeypatch.setattr(distill, "measure_indexers", watched_measure)
    monkeypatch.setattr(distill, "train", watched_train)
    convert_model(str(source), [texts], tmp_path / "out", keep="1/3", num_rows=2, schedule=SHORT)
    assert (len(searched), len(set(measured))) == (2, 3) and len(trained) > 10
    pieces = {row[begin : begin + 8] for row in trained for begin in range(40)}
    for row in searched + measured:
        assert not pieces & {row[begin : begin + 8] for begin in range(40)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_rows": 0}, "rows must be at least 1"),
        ({"num_rows": 10_000}, "fewer with --held-out-rows and --rows"),
        ({"num_blocks": 7}, "blocks must be from 1 to 6"),
        ({"keep": "1"}, "are 6 indexers, and the model has 6"),
        ({"sources": ["missing.txt"]}, "missing.txt"),
    ],
)
def test_what_is_refused_leaves_nothing(
    source: Path, texts: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    arguments = {"sources": [texts], "output": tmp_path / "out", "schedule": SHORT, "num_rows": 2, **options}
    with pytest.raises(IndexShareError, match=said):
        convert_model(str(source), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_model_without_indexers_gets_some_first(source: Path, texts: Path, tmp_path: Path) -> None:
    from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

    torch.manual_seed(0)
    config = Glm4MoeLiteConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=256,
    )
    dense = tmp_path / "dense"
    Glm4MoeLiteForCausalLM(config).save_pretrained(dense)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (dense / name).write_bytes((source / name).read_bytes())
    output = tmp_path / "out"
    result = convert_model(str(dense), [texts], output, keep="1/2", num_rows=2, schedule=SHORT)
    assert result.search.start_pattern == "FFFF" and result.search.pattern.count("F") == 2
    names = [(variant.name, variant.pattern) for variant in result.variants[:2]]
    assert names == [("as it was: dense attention", None), ("an indexer in every layer", "FFFF")]
    page = (output / "report.html").read_text()
    assert "had no indexers, and attended to all keys; the result runs 2 in 4 layers" in page
    assert result.pattern is None and "in place of" not in page
    assert Path(json.loads((output / "report.json").read_bytes())["distillation"]["output"]) == output
    assert json.loads((output / "config.json").read_text())["model_type"] == "glm_moe_dsa"
    assert load(output, device="cpu").generate("def value", max_new_tokens=4, temperature=0.0).token_ids


def test_several_processes_would_write_the_same_run(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process: start it without torchrun"):
        convert_model(str(source), [texts], tmp_path / "out", schedule=SHORT)
    assert not list(tmp_path.iterdir())
