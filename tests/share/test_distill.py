"""Distillation: indexers follow the layers they serve, what is frozen stays, a killed run goes on exactly."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import Batch, TokenRows
from indexshare.engine.resolve import packaged_model
from indexshare.errors import ConfigError, IndexShareError, MemoryLimitError, TrainingError
from indexshare.model import recipes
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model
from indexshare.share import distill
from indexshare.share.distill import IndexSizes, Schedule, StoppedError, distill_model, render, stages
from indexshare.share.index_quality import IndexQuality, measure_indexers
from indexshare.share.split import split_rows
from indexshare.train import export
from indexshare.train.losses import step_loss
from indexshare.train.optim import build_optimizers

LENGTH = 48
WORDS = "def return self value for in range if not else none true false class import from with as yield".split()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with nano's tokenizer; its attention is sharp enough for an indexer to have something to learn."""
    model = GlmForCausalLM(recipes.tiny(vocab_size=4096))
    model.init_weights(0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_b_proj.weight *= 20
            layer.self_attn.kv_a_proj_with_mqa.weight *= 5
    return export.export_model(model, packaged_model(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for index in range(4):
        words = rng.choice(WORDS, 600)
        (directory / f"{index}.txt").write_text(" ".join(words))
    return directory


SHORT = Schedule(
    warmup_steps=30, sparse_steps=3, length=LENGTH, batch_size=2, held_out_rows=3, checkpoint_every=5, sparse_rate=1e-3
)


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def test_indexers_follow_the_layers_they_serve(source: Path, texts: Path, tmp_path: Path) -> None:
    result = distill_model(str(source), [texts], tmp_path / "out", pattern="FSSFSS", schedule=SHORT)
    assert [layer.indexer for layer in result.after.layers] == [0, 0, 0, 3, 3, 3]

    def total(quality: IndexQuality) -> float:
        return sum(layer.kl for layer in quality.layers)

    assert total(result.after) < 0.8 * total(result.before)
    assert sum(layer.recall for layer in result.after.layers) > sum(layer.recall for layer in result.before.layers)
    assert all(0 < layer.recall <= 1 for layer in result.after.layers)

    written = json.loads((tmp_path / "out" / "distillation.json").read_bytes())
    assert written["pattern"] == "FSSFSS"
    assert written["after"]["layers"][5]["kl"] == pytest.approx(result.after.layers[5].kl)
    loaded = load_model(tmp_path / "out")
    assert loaded.config.indexer_types == ("full", "shared", "shared", "full", "shared", "shared")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    logs = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("log.jsonl"))
    assert logs == ["out-run/sparse/log.jsonl", "out-run/warm-up/log.jsonl"]
    assert not list(tmp_path.rglob("step-*")), "checkpoints go when the model is there"
    assert render(result) is not None
    with pytest.raises(ConfigError, match="exists"):
        distill_model(str(source), [texts], tmp_path / "out", pattern="FSSFSS", schedule=SHORT)


@pytest.mark.parametrize("steps", [{"sparse_steps": 0, "warmup_steps": 2}, {"only_indexers": True, "warmup_steps": 1}])
def test_a_frozen_model_stays_to_the_last_bit(source: Path, texts: Path, tmp_path: Path, steps: dict[str, int]) -> None:
    schedule = Schedule(**{**{name: getattr(SHORT, name) for name in SHORT.__slots__}, **steps})
    distill_model(str(source), [texts], tmp_path / "out", pattern="FFSSFS", schedule=schedule)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".indexer." in name for name in moved)
    assert {int(name.split(".")[2]) for name in moved} == {0, 1, 4, 6}


def test_the_sparse_stage_moves_the_whole_model(source: Path, texts: Path, tmp_path: Path) -> None:
    schedule = Schedule(**{**{name: getattr(SHORT, name) for name in SHORT.__slots__}, "warmup_steps": 0})
    distill_model(str(source), [texts], tmp_path / "out", pattern="FFSSFS", schedule=schedule)
    before, after = tensors(source), tensors(tmp_path / "out")
    for part in ("embed_tokens", "o_proj", ".indexer.wq_b", "experts.0.up_proj", "eh_proj"):
        assert any(part in name and not torch.equal(before[name], after[name]) for name in before), part
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("e_score_correction_bias"))


def test_rates_and_phases_are_those_of_the_papers() -> None:
    model = GlmForCausalLM(recipes.tiny())
    warm_up, sparse = stages(model, Schedule(), 64)
    assert (warm_up.num_steps, sparse.num_steps) == (1000, 4000)
    assert warm_up.learning_rate_muon * warm_up.min_lr_ratio == pytest.approx(2e-4)
    assert sparse.learning_rate_muon * sparse.min_lr_ratio == pytest.approx(1e-5)
    (phase,) = warm_up.phases
    assert (phase.attention, phase.trains, phase.index_target) == ("dense", "indexer", "visible")
    (phase,) = sparse.phases
    assert (phase.attention, phase.trains, phase.index_target) == ("sparse", "all", "selected")


# --- what a shared layer gains from the cross-layer loss


def planted() -> GlmForCausalLM:
    """Layer 0 attends to where its queries point, layer 1, which uses its indexer, somewhere else altogether."""
    model = GlmForCausalLM(recipes.tiny(num_hidden_layers=2, index_topk_pattern="FS", num_nextn_predict_layers=0))
    model.init_weights(3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
                weight = layer.self_attn.get_submodule(name).weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
            layer.self_attn.q_b_proj.weight *= 2
    return model


def random_rows() -> list[Batch]:
    token_ids = np.random.default_rng(1).integers(0, 256, 3000)
    rows = TokenRows(token_ids, np.arange(0, 3000, 48), length=48)
    return [rows.batch(step, 4) for step in range(12)]


def distilled(served: Sequence[int]) -> IndexQuality:
    """Trains the indexer of layer 0 for the attention of the layers in `served` and measures it on other rows."""
    model, (held_out, *training) = planted(), random_rows()
    indexer = model.model.layers[0].self_attn.indexer
    assert indexer is not None
    optimizer = torch.optim.AdamW(indexer.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in training * 6:
        inputs = (torch.from_numpy(each).flatten() for each in (batch.token_ids, batch.targets, batch.positions))
        weights = torch.ones(batch.token_ids.size)
        with pytest.MonkeyPatch.context() as patch:
            if 1 not in served:
                patch.setattr("indexshare.train.losses.index_loss", lambda config, by_layer: by_layer[0])
            loss = step_loss(
                model,
                *inputs,
                weights,
                batch.segment_starts,
                attention="dense",
                trains="indexer",
                index_target="visible",
            )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return measure_indexers(model, [held_out])


def test_the_cross_layer_loss_serves_the_shared_layer() -> None:
    both, own = distilled([0, 1]), distilled([0])
    assert both.layers[1].kl < 0.9 * own.layers[1].kl
    assert both.layers[1].recall > own.layers[1].recall
    assert sum(layer.kl for layer in both.layers) < sum(layer.kl for layer in own.layers)
    assert own.layers[0].kl < both.layers[0].kl, "what it costs the layer that owns the indexer"


# --- data


def test_rows_must_be_longer_than_the_choice(source: Path, texts: Path, tmp_path: Path) -> None:
    schedule = Schedule(warmup_steps=1, sparse_steps=0, length=8)
    with pytest.raises(TrainingError, match="longer than index_topk"):
        distill_model(str(source), [texts], tmp_path / "new" / "out", freq=4, schedule=schedule)
    assert not list(tmp_path.iterdir()), "what is refused leaves nothing"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sources": ["missing.txt"]}, "missing.txt"),
        ({"pattern": "FFFFF"}, "5 entries for 6 layers"),
        ({"sizes": IndexSizes(topk=0)}, "index_topk must be greater than 0"),
        ({"schedule": Schedule(length=48, held_out_rows=10_000)}, "fewer with --held-out-rows"),
    ],
)
def test_what_is_refused_leaves_nothing(
    source: Path, texts: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    arguments = {"sources": [texts], "output": tmp_path / "out", "pattern": "FFSSFS", "schedule": SHORT, **options}
    with pytest.raises(IndexShareError, match=said):
        distill_model(str(source), **arguments)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_said_before_anything_is_loaded(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and the optimizers' buffers: those of the memory that a step really holds."""
    config = GlmConfig.from_json(source)
    model = GlmForCausalLM(config)
    optimizers = build_optimizers(
        model, config, learning_rate_muon=1e-3, learning_rate_adamw=1e-3, weight_decay=0.0, muon_dtype=torch.float32
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    held = [*model.parameters(), *(parameter.grad for parameter in model.parameters()), *states]
    needed = sum({id(tensor): tensor.nbytes for tensor in held if torch.is_tensor(tensor)}.values())
    with monkeypatch.context() as patch:
        patch.setattr("indexshare.runtime.available_memory_bytes", lambda device: 1000)
        patch.setattr(distill, "load_model", None)
        with pytest.raises(MemoryLimitError, match="--only-indexers") as raised:
            distill_model(str(source), [texts], tmp_path / "out", freq=4, schedule=SHORT)
    said = int(re.search(r"take ([\d,]+) bytes", str(raised.value))[1].replace(",", ""))
    assert said == pytest.approx(needed, rel=0.05)
    monkeypatch.setattr("indexshare.runtime.available_memory_bytes", lambda device: said - 1)
    only = replace(SHORT, only_indexers=True, warmup_steps=1, sparse_steps=0)
    distill_model(str(source), [texts], tmp_path / "out", freq=4, schedule=only)


def test_an_output_that_cannot_be_written_is_said_before_the_work(source: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*file/out-run: Not a directory"):
        distill_model(str(source), [texts], tmp_path / "file" / "out", freq=4, schedule=SHORT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"warmup_steps": -1},
        {"sparse_rate": 0.0},
        {"warmup_end_rate": 1.0},
        {"stride": 0},
        {"length": 0},
        {"seed": -1},
    ],
)
def test_a_schedule_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Schedule(**wrong)


def test_a_pattern_or_a_frequency(tmp_path: Path) -> None:
    for given in ({}, {"pattern": "F", "freq": 1}):
        with pytest.raises(ConfigError, match="either a pattern"):
            distill_model("nano", [], tmp_path / "out", **given)


# --- stopped and killed

INTERRUPTED = Schedule(
    warmup_steps=8, sparse_steps=6, length=LENGTH, batch_size=2, held_out_rows=2, checkpoint_every=2, sparse_rate=1e-3
)
PROGRAM = """
import sys
from pathlib import Path
import torch
from indexshare.share.distill import Schedule, distill_model
torch.set_num_threads(1)
source, texts, output, *numbers = sys.argv[1:]
schedule = Schedule(**{name: float(n) if "." in n else int(n) for name, n in (pair.split("=") for pair in numbers)})
distill_model(source, [texts], Path(output), pattern="FSSFSS", schedule=schedule)
"""


def test_a_killed_distillation_goes_on_and_ends_the_same(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the warm-up, terminated in the sparse stage, then finished: the same bytes as without."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    numbers = [f"{name}={value:.4f}" if isinstance(value, float) else f"{name}={value}" for name, value in given()]
    arguments = [sys.executable, "-c", PROGRAM, str(source), str(texts), str(broken), *numbers]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 100
        while not list(tmp_path.glob("broken-run/warm-up/checkpoints/step-*4")):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not broken.exists()
    seen: list[int] = []
    batch = TokenRows.batch

    def terminating(self: TokenRows, step: int, batch_size: int) -> Batch:
        if batch_size == 1:  # to measure on
            return batch(self, step, batch_size)
        seen.append(step)
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, batch_size)

    monkeypatch.setattr(TokenRows, "batch", terminating)
    with pytest.raises(StoppedError, match=r"stopped \(signal\) at step 4 of 6 of the sparse stage.*the same command"):
        distill_model(str(source), [texts], broken, pattern="FSSFSS", schedule=INTERRUPTED)
    assert seen[0] >= 4 and not broken.exists()
    monkeypatch.undo()
    for output in (broken, whole):
        distill_model(str(source), [texts], output, pattern="FSSFSS", schedule=INTERRUPTED)
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    reports = [json.loads((path / "distillation.json").read_bytes()) for path in (whole, broken)]
    for report in reports:
        del report["output"]
    assert reports[0] == reports[1]


def given() -> list[tuple[str, float | int | bool]]:
    names = ("warmup_steps", "sparse_steps", "length", "batch_size", "held_out_rows", "checkpoint_every", "sparse_rate")
    return [(name, getattr(INTERRUPTED, name)) for name in names]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_kill_while_the_model_is_written_leaves_one_directory_at_most(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often: the next start begins with removing it. And what is measured is measured before."""
    schedule = Schedule(warmup_steps=2, sparse_steps=0, length=LENGTH, batch_size=1, held_out_rows=2)
    unfinished = tmp_path / "out-run" / "unfinished"
    with monkeypatch.context() as patch:
        patch.setattr(distill, "write_json", interrupt)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as after SIGKILL
        with pytest.raises(KeyboardInterrupt):
            distill_model(str(source), [texts], tmp_path / "out", pattern="FSSFSS", schedule=schedule)
    assert (unfinished / "model.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == ["out-run"]
    (unfinished / "stale").write_text("")
    monkeypatch.setattr(distill, "_train", lambda *_: 0)
    distill_model(str(source), [texts], tmp_path / "out", pattern="FSSFSS", schedule=schedule)
    assert not unfinished.exists() and not (tmp_path / "out" / "stale").exists()


def test_what_is_measured_is_what_is_written(source: Path, texts: Path, tmp_path: Path) -> None:
    result = distill_model(str(source), [texts], tmp_path / "out", pattern="FSSFSS", schedule=SHORT)
    written = load_model(tmp_path / "out", dtype=torch.float32, quant="none")
    rows = split_rows([texts], Tokenizer.from_directory(source), length=LENGTH, num_held_out=SHORT.held_out_rows)
    assert measure_indexers(written, rows.held_out) == result.after


def test_a_run_does_not_go_on_with_other_data_or_weights(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(warmup_steps=2, sparse_steps=0, length=LENGTH, batch_size=1, held_out_rows=2)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            distill_model(str(source), [texts], tmp_path / "out", pattern="FSSFSS", schedule=schedule)
    (texts / "more.txt").write_text("value " * 500)
    with pytest.raises(ConfigError, match=r"changed: data\.data\. Name another output, or remove this directory$"):
        distill_model(str(source), [texts], tmp_path / "out", pattern="FSSFSS", schedule=schedule)
    (texts / "more.txt").unlink()
    other = GlmForCausalLM(recipes.tiny(vocab_size=4096))
    other.init_weights(1)
    kept = shutil.copytree(source, tmp_path / "kept")
    try:
        export.export_model(other, kept, source)
        with pytest.raises(ConfigError, match="another recipe"):
            distill_model(str(source), [texts], tmp_path / "out", pattern="FSSFSS", schedule=schedule)
    finally:
        shutil.copytree(kept, source, dirs_exist_ok=True)
    distill_model(str(source), [texts], tmp_path / "out", pattern="FSSFSS", schedule=schedule)
