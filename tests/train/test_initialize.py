"""The structured start: what its heads and indexers are made for, they do before any training."""

import torch

from indexshare.kernels.layout import KeyLayout
from indexshare.model import recipes
from indexshare.model.batch import ForwardBatch, Trace
from indexshare.model.glm import GlmForCausalLM
from indexshare.train.initialize import initialize_induction


def test_an_untrained_model_continues_what_it_has_seen_before() -> None:
    config = recipes.nano()
    model = GlmForCausalLM(config)
    model.init_weights(0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    initialize_induction(model, 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert not any("mlp" in name or "layernorm" in name or "down_proj" in name for name in changed)

    unit = torch.randint(60, 4000, (120,), generator=torch.Generator().manual_seed(2))
    token_ids = torch.cat((unit, unit))
    batch = ForwardBatch(
        token_ids=token_ids, positions=torch.arange(240), layout=KeyLayout.packed((0, 240)), attention="dense"
    )
    with torch.inference_mode():
        guesses = model.logits(model(batch)).argmax(-1)
    right = (guesses[:-1] == token_ids[1:]).float()
    assert right[123:].mean() > 0.9  # from the first three repeated tokens on
    assert right[:119].mean() < 0.1  # nothing to copy yet


def test_untrained_indexers_select_the_neighbourhood_however_long_the_text() -> None:
    num_tokens, near, last = 4096, 100, slice(-16, None)
    model = GlmForCausalLM(recipes.nano())
    model.init_weights(0)
    initialize_induction(model, 1)
    token_ids = torch.randint(60, 4000, (num_tokens,), generator=torch.Generator().manual_seed(2))
    trace = Trace()
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=torch.arange(num_tokens) + 500_000,
        layout=KeyLayout.packed((0, num_tokens)),
        trace=trace,
    )
    with torch.inference_mode():
        model.mtp(model(batch), token_ids.roll(-1), batch)
    assert len(trace.selections) == 5
    for layer, rows in trace.selections.items():
        assert rows is not None
        distances = torch.arange(num_tokens)[last, None] - rows[last]
        assert ((distances < near).sum(1) >= 0.9 * near).all(), layer
