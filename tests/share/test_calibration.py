"""Losses of a model under patterns: against the model itself with that pattern, whole and from kept boundaries."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from planted import own_answers, planted_model
from torch.nn import functional

from indexshare import runtime
from indexshare.chat.tokenizer import Tokenizer
from indexshare.data.rows import IGNORED, Batch, TokenRows
from indexshare.engine.resolve import packaged_model
from indexshare.errors import ConfigError, TrainingError
from indexshare.kernels import registry
from indexshare.kernels.layout import KeyLayout
from indexshare.model import recipes
from indexshare.model.batch import ForwardBatch
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.inspect import token_work
from indexshare.share.calibration import (
    CalibrationRow,
    PatternRunner,
    check_pattern,
    fingerprint,
    own_pattern,
    read_rows,
    sharing,
    weights_fingerprint,
)

STARTS = (0, 23, 50, 60)


def full_model() -> GlmForCausalLM:
    model = GlmForCausalLM(recipes.tiny(index_topk_pattern="FFFFFF", initializer_range=0.2))
    model.init_weights(0)
    return model.requires_grad_(False)


def rows(number: int = 3) -> tuple[CalibrationRow, ...]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(number):
        tokens = torch.randint(0, 256, (61,), generator=generator)
        targets = tokens[1:].clone()
        targets[[22, 49]] = IGNORED
        positions = torch.cat([torch.arange(end - start) for start, end in pairwise(STARTS)])
        layout = KeyLayout.packed(STARTS)
        made.append(CalibrationRow(token_ids=tokens[:-1], targets=targets, positions=positions, layout=layout))
    return tuple(made)


def test_the_loss_is_that_of_a_model_built_with_the_pattern() -> None:
    """The other way to the same number: a model without those indexers, its training forward pass, plain logits."""
    full, pattern = full_model(), "FSSFSF"
    shared = GlmForCausalLM(recipes.tiny(index_topk_pattern=pattern))
    weights = full.state_dict()
    shared.load_state_dict({name: weights[name] for name in shared.state_dict()})
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows():
            hidden = shared(ForwardBatch(token_ids=row.token_ids, positions=row.positions, layout=row.layout))
            logits = shared.logits(hidden)
            total += float(functional.cross_entropy(logits, row.targets, reduction="sum", ignore_index=IGNORED))
            count += int((row.targets != IGNORED).sum())
    runner = PatternRunner(model=full, rows=rows())
    assert runner.num_supervised == count
    assert runner.loss(runner.run(pattern)) == pytest.approx(total / count, rel=1e-5)
    assert own_pattern(full) == "FFFFFF", "the indexers are back"
    assert abs(runner.loss(runner.run("FFFFFF")) - total / count) > 1e-3


@pytest.mark.parametrize("memory_bytes", [1, 60_000, 1 << 30])
def test_what_a_kept_boundary_saves_changes_no_bit(memory_bytes: int) -> None:
    runner = PatternRunner(model=full_model(), rows=rows(), memory_bytes=memory_bytes)
    base = runner.run("FFSFFF")
    for pattern in ("FFSSFF", "FFSFFS", "FSSFFF", "FFSFFF"):
        fresh = PatternRunner(model=runner.model, rows=runner.rows)
        again = runner.run(pattern, base)
        assert again.nats == fresh.run(pattern).nats
        assert runner.run("FSSSSS", again).nats == fresh.run("FSSSSS").nats


def test_work_is_layers_from_the_nearest_kept_boundary() -> None:
    runner = PatternRunner(model=full_model(), rows=rows(2))
    base = runner.run("FFFFFF")
    assert runner.work.layer_tokens == 2 * 60 * 6 and runner.work.head_tokens == 2 * 58
    assert runner.total_work(runner.work) == runner.pass_work() == 2 * 60 * 6 + runner.head_layers * 2 * 58
    runner.run("FFFFSF", base)
    assert runner.work.layer_tokens == 2 * 60 * (6 + 2)
    every_third = PatternRunner(
        model=runner.model, rows=runner.rows, memory_bytes=3 * 6 * 2 * 60 * (64 * 4 + 8 * 4) // 3
    )
    assert every_third.boundary_stride == 3
    every_third.run("FFFFSF", every_third.run("FFFFFF"))
    assert every_third.work.layer_tokens == 2 * 60 * (6 + 3)
    assert every_third.pass_work(4) == 2 * 60 * 3 + runner.head_layers * 2 * 58, "from layer 3 on"


def test_the_head_counts_as_layers_of_its_flop() -> None:
    """Of GLM-5.2: 154,880 x 6,144 numbers beside half a billion activated in a layer."""
    with torch.device("meta"):
        model = GlmForCausalLM(recipes.glm_5_2())
    config = model.config
    row = CalibrationRow(
        token_ids=torch.zeros(4096),
        targets=torch.zeros(4096),
        positions=torch.zeros(4096),
        layout=KeyLayout.packed((0, 4096)),
    )
    runner = PatternRunner(model=model, rows=(row,))
    of_a_layer = (token_work(config, 2048).total - 2 * config.vocab_size * config.hidden_size) / 78
    assert runner.head_layers == pytest.approx(2 * config.vocab_size * config.hidden_size / of_a_layer)
    assert 1 < runner.head_layers < 3


def test_any_changed_weight_is_another_model() -> None:
    model = full_model()
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(full_model())
    indexer = model.stack.layers[4].self_attn.indexer
    assert indexer is not None
    with torch.no_grad():
        indexer.k_norm.bias[3] += 1e-6
    assert weights_fingerprint(model) != before
    assert len({weights_fingerprint(full_model().to(dtype)) for dtype in (torch.float32, torch.bfloat16)}) == 2


def test_attention_runs_over_gathered_rows_as_in_inference() -> None:
    before = registry.num_calls("mla_sparse"), registry.num_calls("mla_expanded")
    PatternRunner(model=full_model(), rows=rows(1)).run("FSFSFS")
    assert (registry.num_calls("mla_sparse"), registry.num_calls("mla_expanded")) == (before[0] + 6, before[1])


def test_logits_in_tiles_give_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = PatternRunner(model=full_model(), rows=rows(1))
    whole = runner.run("FFFFFF").nats
    small = replace(runtime.settings(), workspace_mib=0)
    monkeypatch.setattr(runtime, "settings", lambda: small)
    assert runner.run("FFFFFF").nats == pytest.approx(whole, rel=1e-6)


def test_indexers_come_back_when_a_run_fails() -> None:
    model = full_model()

    def fail() -> None:
        with sharing(model, "FSSSSS"):
            assert own_pattern(model) == "FSSSSS"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert own_pattern(model) == "FFFFFF"


@pytest.mark.parametrize("pattern", ["FFF", "SFFFFF", "FFXFFF", ""])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="6 letters F and S"):
        check_pattern(full_model(), pattern)


def test_a_layer_without_an_indexer_cannot_be_full() -> None:
    with pytest.raises(ConfigError, match=r"layers \[3\] have no indexer"):
        check_pattern(GlmForCausalLM(recipes.tiny()), "FFSFSS")


def test_rows_must_be_longer_than_what_an_indexer_selects() -> None:
    model = planted_model("FS", seed=0)
    with pytest.raises(TrainingError, match="longer than index_topk, 8 tokens"):
        PatternRunner(model=model, rows=own_answers(model, 2, 8, seed=0))


def test_rows_come_from_files_and_are_known_again(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(packaged_model())
    lines = [json.dumps({"text": f"def f{number}(x): return x + {number}\n" * 9}) for number in range(40)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    arguments = {"num_rows": 3, "length": 48, "device": torch.device("cpu")}
    found = read_rows([tmp_path], tokenizer, **arguments)
    assert [len(row.token_ids) for row in found] == [48, 48, 48]
    assert fingerprint(found) == fingerprint(read_rows([tmp_path], tokenizer, **arguments))
    assert fingerprint(found) != fingerprint(read_rows([tmp_path], tokenizer, **arguments, seed=1))
    assert fingerprint(found) != fingerprint(found[:2])
    everything = TokenRows.from_files([tmp_path], tokenizer, length=48).num_rows
    assert len(read_rows([tmp_path], tokenizer, **arguments | {"num_rows": 9999})) == everything
    with pytest.raises(ConfigError, match="one row at least"):
        read_rows([tmp_path], tokenizer, **arguments | {"num_rows": 0})
    with pytest.raises(TrainingError, match="do not fill one row"):
        read_rows([tmp_path], tokenizer, **arguments | {"length": 10**6})


def test_documents_of_a_row_stay_apart() -> None:
    batch = Batch(
        token_ids=torch.arange(60).view(1, 60).numpy(),
        targets=torch.arange(60).view(1, 60).numpy(),
        loss_weights=torch.ones(1, 60).numpy(),
        positions=rows(1)[0].positions.view(1, 60).numpy(),
        segment_starts=STARTS,
    )
    row = CalibrationRow.from_batch(batch, torch.device("cpu"))
    changed = replace(row, token_ids=row.token_ids.clone())
    changed.token_ids[:23] += 100  # the first document; supervise only the second
    runs = []
    for one in (row, changed):
        targets = one.targets.clone()
        targets[:23] = IGNORED
        runner = PatternRunner(model=full_model(), rows=(replace(one, targets=targets),))
        runs.append(runner.run("FSFSFS").nats)
    assert runs[0] == runs[1]
