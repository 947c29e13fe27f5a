"""The MTP layer is trained on what the engine asks of it, and its two losses are what they say, gradients included."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from indexshare.data.rows import Batch
from indexshare.engine.engine import Engine, EngineOptions
from indexshare.engine.llm import LLM
from indexshare.engine.sampler import SamplingParams
from indexshare.engine.scheduler import Limits
from indexshare.engine.sequence import Generation
from indexshare.errors import ConfigError
from indexshare.kernels.layout import KeyLayout
from indexshare.model import glm, recipes
from indexshare.model.batch import ForwardBatch, Selection
from indexshare.model.glm import GlmForCausalLM
from indexshare.train import cross_entropy
from indexshare.train import mtp as mtp_module
from indexshare.train.loop import train
from indexshare.train.losses import IGNORED, Losses, step_loss
from indexshare.train.mtp import STEP_DECAY, MtpLoss, draft_states, mtp_loss
from indexshare.train.optim import named_tensors
from indexshare.train.phases import Phase, TrainRecipe
from indexshare.train.recipes import phase_loss

VOCAB, STEPS = 61, 4
STARTS = (0, 23, 40)  # segments longer than index_topk, which is 8
LENGTH = STARTS[-1]
MTP_LAYER = "model.layers.6."


def model() -> GlmForCausalLM:
    built = GlmForCausalLM(recipes.tiny(vocab_size=VOCAB, initializer_range=0.15))
    built.init_weights(3)
    return built.double()


def text(seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(seed))


def packed(token_ids: Tensor, starts: tuple[int, ...] = STARTS) -> ForwardBatch:
    positions = torch.cat([torch.arange(stop - start) for start, stop in itertools.pairwise(starts)])
    return ForwardBatch(token_ids=token_ids, positions=positions, layout=KeyLayout.packed(starts))


def supervision(unsupervised: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Targets [T], where a segment ends the token after it, and unequal weights [T]."""
    targets = text().roll(-1)
    targets[[*unsupervised, LENGTH - 1]] = IGNORED
    return targets, torch.linspace(0.5, 2.0, LENGTH, dtype=torch.float64)


def is_supervised(targets: Tensor, anchor: int, step: int) -> bool:
    """Whether draft `step` (from 1) after token `anchor` predicts a token of the segment that is supervised."""
    end = next(stop for stop in STARTS[1:] if anchor < stop)
    return anchor + step < end and int(targets[anchor + step]) != IGNORED


def gradients(built: GlmForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    built.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None and p.grad.any()}


# ------------------------------------------------------------------------------------------------- as the engine drafts


class Recorder:
    """What the engine asks the MTP layer while it drafts for one sequence: (anchor, tokens read, states) by round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, built: GlmForCausalLM) -> None:
        self.rounds: list[tuple[int, list[int], list[Tensor]]] = []
        self._original = built.mtp
        monkeypatch.setattr(built, "mtp", self)

    def __call__(
        self, hidden: Tensor, ids: Tensor, batch: ForwardBatch, selected: Selection | None = None
    ) -> tuple[Tensor, Selection]:
        output, chosen = self._original(hidden, ids, batch, selected)
        if not batch.query_only:
            self.rounds.append((int(batch.positions[-1]), [], []))
        self.rounds[-1][1].append(int(ids[-1]))
        self.rounds[-1][2].append(output[-1])
        return output, chosen


@pytest.mark.parametrize("through", ["session", "engine"])
def test_every_step_predicts_from_what_the_engine_drafts_from(monkeypatch: pytest.MonkeyPatch, through: str) -> None:
    built = model()
    prompt, params = text()[:20].tolist(), SamplingParams(max_new_tokens=12, temperature=1.0, seed=4)
    llm, recorder = LLM(built), Recorder(monkeypatch, built)
    tokens: list[int] = list(prompt)
    if through == "session":
        with llm.open_session(64, num_draft_tokens=STEPS) as session:
            tokens += [token.token_id for token in session.stream(prompt, params)]
    else:
        options = EngineOptions(
            limits=Limits(max_sequences=2, max_step_tokens=48), cache_tokens=256, num_drafts=STEPS, adapts_drafts=False
        )
        engine = Engine(
            llm, options, deliver=lambda outputs: tokens.extend(t.token_id for o in outputs for t in o.tokens)
        )
        engine.submit(Generation(prompt_ids=tuple(prompt), params=params))
        while engine.step():
            pass
    assert len(tokens) == 32
    monkeypatch.undo()
    compared = 0
    for anchor, read, states in recorder.rounds:
        if len(states) < 2:
            continue
        sequence = torch.tensor([*tokens[: anchor + 1], *read])
        batch = packed(sequence, (0, len(sequence)))
        with torch.no_grad():
            drafts = draft_states(built, built(batch), batch, len(states))
        for step, (ours, theirs) in enumerate(zip(drafts, states, strict=True)):
            torch.testing.assert_close(ours[anchor], theirs, msg=f"anchor {anchor}, step {step + 1}")
            compared += 1
    assert compared >= 2 * STEPS


def test_a_later_step_sees_no_drafted_token_and_trains_the_first_steps_keys() -> None:
    built, token_ids = model(), text()
    batch = packed(token_ids)
    hidden = built(batch).detach()
    state = draft_states(built, hidden, batch, 3)[2][10]
    found = gradients(built, state.square().sum())
    assert MTP_LAYER + "self_attn.kv_a_proj_with_mqa.weight" in found
    assert not any(".indexer." in name for name in found)
    changed = hidden.clone()
    changed[11:] += 1.0  # what only drafted tokens would be read with
    torch.testing.assert_close(draft_states(built, changed, batch, 3)[2][10], state, rtol=0, atol=0)
    changed[4:] += 1.0
    assert not torch.allclose(draft_states(built, changed, batch, 3)[2][10], state)


# ----------------------------------------------------------------------------------------------------------- the losses


def loss_of(built: GlmForCausalLM, targets: Tensor, weights: Tensor, **options: object) -> MtpLoss:
    batch = packed(text())
    return mtp_loss(built, built(batch), targets, weights, batch, num_steps=STEPS, **options)


def plain_cross_entropy(built: GlmForCausalLM, targets: Tensor, weights: Tensor) -> Tensor:
    batch = packed(text())
    drafts = draft_states(built, built(batch), batch, STEPS)
    means = []
    for step, draft in enumerate(drafts, start=1):
        nats, total = [], 0.0
        for anchor in range(LENGTH):
            if is_supervised(targets, anchor, step):
                place = anchor + step
                log_probabilities = built.logits(draft[anchor]).log_softmax(-1)
                nats.append(-weights[place] * log_probabilities[targets[place]])
                total += float(weights[place])
        means.append(torch.stack(nats).sum() / total)
    shares = [STEP_DECAY**step for step in range(STEPS)]
    return sum(share * mean for share, mean in zip(shares, means, strict=True)) / sum(shares)


def plain_rejected(built: GlmForCausalLM, targets: Tensor, weights: Tensor) -> Tensor:
    """n - sum_j prod_{k<=j} sum_y min(p_k(y), q_k(y)), token by token."""
    batch = packed(text())
    with torch.no_grad():
        hidden = built(batch)
        target = built.logits(hidden).softmax(-1)
    drafts = draft_states(built, hidden, batch, STEPS)
    lost, total = [], 0.0
    for anchor in range(LENGTH):
        steps = next((k - 1 for k in range(1, STEPS + 1) if not is_supervised(targets, anchor, k)), STEPS)
        if steps == 0:
            continue
        kept, expected = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for step in range(1, steps + 1):
            draft = built.logits(drafts[step - 1][anchor]).softmax(-1)
            kept = kept * torch.minimum(target[anchor + step], draft).sum()
            expected = expected + kept
        lost.append(weights[anchor + 1] * (steps - expected))
        total += float(weights[anchor + 1])
    return torch.stack(lost).sum() / total


@pytest.mark.parametrize("tile", [1000, 7])
def test_cross_entropy_and_its_gradient_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(cross_entropy, "tile_rows", lambda _: tile)
    built = model()
    targets, weights = supervision(unsupervised=[3, 12, 30])
    loss, expected = loss_of(built, targets, weights).loss, plain_cross_entropy(built, targets, weights)
    torch.testing.assert_close(loss, expected)
    found, wanted = gradients(built, loss), gradients(built, expected)
    assert (
        found.keys() == wanted.keys() and "lm_head.weight" in found and "model.layers.0.input_layernorm.weight" in found
    )
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


@pytest.mark.parametrize("tile", [1000, 7])
def test_expected_rejections_and_their_gradient_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(mtp_module, "tile_rows", lambda _: tile)
    built = model()
    built.lm_head.requires_grad_(False)
    built.model.embed_tokens.requires_grad_(False)
    targets, weights = supervision(unsupervised=[3, 12, 30])
    loss = loss_of(built, targets, weights, objective="acceptance").loss
    expected = plain_rejected(built, targets, weights)
    torch.testing.assert_close(loss, expected)
    found, wanted = gradients(built, loss), gradients(built, expected)
    assert found.keys() == wanted.keys() and all(name.startswith(MTP_LAYER) for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


def test_both_objectives_report_the_same_acceptance_by_step() -> None:
    built = model()
    targets, weights = supervision(unsupervised=[3, 12])
    batch = packed(text())
    target = built.logits(built(batch)).softmax(-1)
    expected = []
    for step, draft in enumerate(draft_states(built, built(batch), batch, STEPS), start=1):
        places = [
            a for a in range(LENGTH) if is_supervised(targets, a, step) and is_supervised(targets, a + step - 1, 1)
        ]
        common = torch.minimum(target[[a + step for a in places]], built.logits(draft[places]).softmax(-1)).sum(-1)
        expected.append(common.mean())
    for objective in ("cross_entropy", "acceptance"):
        found = loss_of(built, targets, weights, objective=objective).acceptance
        torch.testing.assert_close(found, torch.stack(expected).detach())


@pytest.mark.parametrize("objective", ["cross_entropy", "acceptance"])
def test_no_step_looks_into_the_next_segment(objective: str) -> None:
    built = model()
    targets, weights = supervision(unsupervised=range(STARTS[1], LENGTH))
    results = []
    for seed in (1, 2):
        token_ids = torch.cat((text()[: STARTS[1]], text(seed)[STARTS[1] :]))
        batch = packed(token_ids)
        results.append(
            mtp_loss(built, built(batch), targets, weights, batch, num_steps=STEPS, objective=objective).loss
        )
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("objective", ["cross_entropy", "acceptance"])
def test_long_segments_gather_what_short_ones_mask(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    built = model()
    targets, weights = supervision()
    masked = loss_of(built, targets, weights, objective=objective).loss
    expected = gradients(built, masked)
    monkeypatch.setattr(glm, "MASKED_MAX_CONTEXT", 0)
    gathered = loss_of(built, targets, weights, objective=objective).loss
    torch.testing.assert_close(gathered, masked)
    for name, gradient in gradients(built, gathered).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("objective", ["cross_entropy", "acceptance"])
def test_nothing_supervised_is_no_loss(objective: str) -> None:
    built = model()
    targets, weights = supervision(unsupervised=range(LENGTH))
    result = loss_of(built, targets, weights, objective=objective)
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0 and result.acceptance.tolist() == [0.0] * STEPS


def test_a_draft_that_is_the_model_is_never_rejected() -> None:
    built = model()
    with torch.no_grad():
        built.lm_head.weight.zero_()  # flat p and q
    targets, weights = supervision()
    result = loss_of(built, targets, weights, objective="acceptance")
    assert float(result.loss.detach()) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(result.acceptance, torch.ones(STEPS, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- the phase


def losses_of_phase(built: GlmForCausalLM, **options: object) -> Losses:
    targets, weights = supervision()
    batch = packed(text())
    options = {"trains": "mtp", "mtp_weight": 1.0, "index_weight": 0.0, "mtp_num_steps": 3} | options
    return step_loss(built, batch.token_ids, targets, batch.positions, weights, STARTS, attention="sparse", **options)


def test_a_phase_for_the_mtp_layer_leaves_everything_else_alone() -> None:
    for objective in ("cross_entropy", "acceptance"):
        built = model()
        built.lm_head.requires_grad_(False)
        built.model.embed_tokens.requires_grad_(False)
        losses = losses_of_phase(built, mtp_objective=objective)
        found = gradients(built, losses.total)
        assert found and all(name.startswith(MTP_LAYER) and ".indexer." not in name for name in found)
        assert set(losses.expert_counts) == {6}
        assert losses.mtp_acceptance.shape == (3,) and bool((losses.mtp_acceptance > 0).all())
        with_indexer = losses_of_phase(built, mtp_objective=objective, index_weight=1.0)
        names = {name for name in gradients(built, with_indexer.total) if ".indexer." in name}
        assert names and all(name.startswith(MTP_LAYER) for name in names)


def test_a_run_that_trains_the_mtp_layer_changes_nothing_else_and_logs_its_acceptance(tmp_path: Path) -> None:
    built, objectives = model().float(), ("cross_entropy", "acceptance")
    before = {name: tensor.clone() for name, tensor in named_tensors(built)}
    phases = tuple(
        Phase(
            name=objective,
            num_steps=2,
            attention="sparse",
            trains="mtp",
            mtp_loss_weight=1.0,
            mtp_num_steps=3,
            mtp_objective=objective,
            sequence_length=LENGTH,
            batch_size=1,
        )
        for objective in objectives
    )
    recipe = TrainRecipe(
        name="mtp",
        model=built.config,
        phases=phases,
        seed=0,
        learning_rate_muon=1e-3,
        learning_rate_adamw=1e-3,
        warmup_steps=0,
        log_every=1,
    )
    targets, weights = supervision()
    arrays = (text(), targets, weights.float(), packed(text()).positions)
    batch = Batch(
        **{
            name: array.numpy()[None]
            for name, array in zip(("token_ids", "targets", "loss_weights", "positions"), arrays, strict=True)
        },
        segment_starts=STARTS,
    )
    train(recipe, tmp_path, model=built, batches=lambda _: batch, step_loss=phase_loss(), progress=False)
    changed = {name for name, tensor in named_tensors(built) if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(MTP_LAYER) for name in changed)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in records] == ["cross_entropy"] * 2 + ["acceptance"] * 2
    for record in records:
        assert len(record["mtp_acceptance"]) == 3 and all(0 < share < 1 for share in record["mtp_acceptance"])


def test_training_by_acceptance_raises_it() -> None:
    built = model().float()
    parameters = [p for name, p in built.named_parameters() if name.startswith(MTP_LAYER) and p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        losses = losses_of_phase(built, mtp_objective="acceptance")
        losses.total.backward()
        optimizer.step()
        values.append((float(losses.mtp), losses.mtp_acceptance))
    assert values[-1][0] < values[0][0] - 0.1
    assert bool((values[-1][1] > values[0][1]).all())


@pytest.mark.parametrize(("changes", "weight"), [({}, 0.0), ({"num_nextn_predict_layers": 0}, 1.0)])
def test_a_phase_for_an_mtp_layer_that_is_not_trained_says_so(changes: dict[str, int], weight: float) -> None:
    built = GlmForCausalLM(recipes.tiny(vocab_size=VOCAB, **changes))
    built.init_weights(0)
    with pytest.raises(ConfigError, match="mtp_loss_weight"):
        losses_of_phase(built, mtp_weight=weight)
