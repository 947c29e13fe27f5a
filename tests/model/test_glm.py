"""The architecture, against a second writing of its formulas in fp64: one token, one head and one key at a time.

The reference here is meant to be read beside docs/indexshare.md; transformers is the other one (tests/oracle).
"""

from collections.abc import Iterator

import pytest
import torch
from tolerances import assert_near, relative_error
from torch import Tensor

from indexshare.engine.cache import PagedCache
from indexshare.kernels import ops, registry
from indexshare.kernels.layout import KeyLayout
from indexshare.model import glm
from indexshare.model.batch import ForwardBatch, Trace
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM, MtpLayer
from indexshare.model.recipes import glm_5_2, tiny

LENGTH = 24  # three times index_topk
FULL_LAYERS = (0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74)


@pytest.fixture
def model() -> GlmForCausalLM:
    """Random everything, norms and biases too, so that no formula is close to a simpler one; fp64."""
    model = GlmForCausalLM(tiny(rms_norm_eps=1e-2, latent_norm_eps=1e-3)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 1.0 if "norm" in name or "bias" in name or "embed" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * gain)
    return model


def packed_batch(*lengths: int, trace: Trace | None = None, **options: object) -> ForwardBatch:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return ForwardBatch(
        token_ids=torch.randint(1, 256, (starts[-1],)),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        layout=KeyLayout.packed(tuple(starts)),
        trace=trace,
        **options,
    )


class Reference:
    """The formulas of GLM-5.2 over the parameters of a model, by their checkpoint names."""

    def __init__(self, model: GlmForCausalLM) -> None:
        self.config = model.config
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.selected: dict[int, list[list[int]]] = {}

    def rms(self, x: Tensor, name: str, eps: float) -> Tensor:
        return self.weights[name] * x / (x.square().mean() + eps).sqrt()

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Interleaved pairs; written back in place, which no dot product can tell from halves."""
        result = x.clone()
        for j in range(len(x) // 2):
            angle = torch.tensor(position * self.config.rope_theta ** (-2 * j / len(x)), dtype=torch.float64)
            result[2 * j] = x[2 * j] * angle.cos() - x[2 * j + 1] * angle.sin()
            result[2 * j + 1] = x[2 * j + 1] * angle.cos() + x[2 * j] * angle.sin()
        return result

    def index(self, prefix: str, xs: list[Tensor], latents: list[Tensor]) -> list[list[int]]:
        """The selected positions of each token; the rotary dimensions of the indexer come first."""
        config, weights = self.config, self.weights
        rotary, size = config.qk_rope_head_dim, config.index_head_dim
        keys = []
        for position, x in enumerate(xs):
            key = weights[prefix + "wk.weight"] @ x
            key = (key - key.mean()) / ((key - key.mean()).square().mean() + 1e-6).sqrt()
            key = key * weights[prefix + "k_norm.weight"] + weights[prefix + "k_norm.bias"]
            keys.append(torch.cat((self.turn(key[:rotary], position), key[rotary:])))
        selected = []
        for position, (x, latent) in enumerate(zip(xs, latents, strict=True)):
            query = (weights[prefix + "wq_b.weight"] @ latent).view(config.index_n_heads, size)
            head_weights = (weights[prefix + "weights_proj.weight"] @ x) * config.index_n_heads**-0.5
            scores = []
            for key in keys[: position + 1]:
                score = 0.0
                for head in range(config.index_n_heads):
                    turned = torch.cat((self.turn(query[head, :rotary], position), query[head, rotary:]))
                    score += float(head_weights[head]) * max(0.0, float(turned @ key) * size**-0.5)
                scores.append(score)
            order = sorted(range(position + 1), key=lambda s: (-scores[s], s))
            selected.append(sorted(order[: config.index_topk]))
        return selected

    def attention(self, layer: int, xs: list[Tensor], selected: list[list[int]] | None) -> list[Tensor]:
        """In the expanded form; the rotary dimensions of the main queries come last."""
        config, weights, prefix = self.config, self.weights, f"model.layers.{layer}.self_attn."
        nope, rank, heads = config.qk_nope_head_dim, config.kv_lora_rank, config.num_attention_heads
        eps = config.latent_norm_eps
        latents = [self.rms(weights[prefix + "q_a_proj.weight"] @ x, prefix + "q_a_layernorm.weight", eps) for x in xs]
        if config.is_full(layer):
            selected = self.index(prefix + "indexer.", xs, latents)
            self.selected[layer] = selected
        assert selected is not None
        self.handed_on = selected
        keys, values = [], []
        for position, x in enumerate(xs):
            both = weights[prefix + "kv_a_proj_with_mqa.weight"] @ x
            latent = self.rms(both[:rank], prefix + "kv_a_layernorm.weight", eps)
            rotary = self.turn(both[rank:], position)
            expanded = (weights[prefix + "kv_b_proj.weight"] @ latent).view(heads, -1)
            keys.append([torch.cat((expanded[head, :nope], rotary)) for head in range(heads)])
            values.append([expanded[head, nope:] for head in range(heads)])
        outputs = []
        for position, latent in enumerate(latents):
            query = (weights[prefix + "q_b_proj.weight"] @ latent).view(heads, -1)
            attended = []
            for head in range(heads):
                turned = torch.cat((query[head, :nope], self.turn(query[head, nope:], position)))
                scores = torch.stack([turned @ keys[s][head] / config.qk_head_dim**0.5 for s in selected[position]])
                chances = scores.softmax(-1)
                attended.append(sum(c * values[s][head] for c, s in zip(chances, selected[position], strict=True)))
            outputs.append(weights[prefix + "o_proj.weight"] @ torch.cat(attended))
        return outputs

    def mlp(self, gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        inner = gate @ x
        return down @ (inner * inner.sigmoid() * (up @ x))

    def feed_forward(self, layer: int, x: Tensor) -> Tensor:
        config, weights, prefix = self.config, self.weights, f"model.layers.{layer}.mlp."

        def named(part: str) -> Tensor:
            return self.mlp(*(weights[f"{prefix}{part}{name}_proj.weight"] for name in ("gate", "up", "down")), x)

        if not config.is_sparse(layer):
            return named("")
        scores = (weights[prefix + "gate.weight"] @ x).sigmoid()
        biased = scores + weights[prefix + "gate.e_score_correction_bias"]
        chosen = biased.argsort(descending=True, stable=True)[: config.num_experts_per_tok]
        output = named("shared_experts.")  # not scaled
        for expert in chosen.tolist():
            gate, up = weights[prefix + "experts.gate_up_proj"][expert].chunk(2)
            share = config.routed_scaling_factor * scores[expert] / scores[chosen].sum()
            output = output + share * self.mlp(gate, up, weights[prefix + "experts.down_proj"][expert], x)
        return output

    def layer(self, layer: int, hidden: list[Tensor], selected: list[list[int]] | None) -> list[Tensor]:
        prefix, eps = f"model.layers.{layer}.", self.config.rms_norm_eps
        normed = [self.rms(h, prefix + "input_layernorm.weight", eps) for h in hidden]
        hidden = [h + a for h, a in zip(hidden, self.attention(layer, normed, selected), strict=True)]
        normed = [self.rms(h, prefix + "post_attention_layernorm.weight", eps) for h in hidden]
        return [h + self.feed_forward(layer, x) for h, x in zip(hidden, normed, strict=True)]

    def forward(self, tokens: Tensor) -> list[Tensor]:
        hidden = list(self.weights["model.embed_tokens.weight"][tokens])
        selected = None
        for layer in range(self.config.num_hidden_layers):
            hidden = self.layer(layer, hidden, selected)
            selected = self.handed_on
        return [self.rms(h, "model.norm.weight", self.config.rms_norm_eps) for h in hidden]

    def mtp(self, hidden: list[Tensor], next_tokens: Tensor) -> list[Tensor]:
        """The embedding of the next token first, the hidden state second."""
        layer, eps = self.config.num_hidden_layers, self.config.rms_norm_eps
        prefix = f"model.layers.{layer}."
        joined = []
        for h, token in zip(hidden, next_tokens.tolist(), strict=True):
            embedding = self.rms(self.weights["model.embed_tokens.weight"][token], prefix + "enorm.weight", eps)
            both = torch.cat((embedding, self.rms(h, prefix + "hnorm.weight", eps)))
            joined.append(self.weights[prefix + "eh_proj.weight"] @ both)
        return [self.rms(h, prefix + "shared_head.norm.weight", eps) for h in self.layer(layer, joined, None)]


@pytest.fixture
def cached_batch(model: GlmForCausalLM) -> ForwardBatch:
    """LENGTH tokens with a paged cache in fp64, pages backwards."""
    cache = PagedCache(model.config, num_pages=7, page_size=4, dtype=torch.float64)
    layout = KeyLayout(
        sequence_starts=(0, LENGTH),
        context_lengths=(LENGTH,),
        page_table=torch.arange(6, -1, -1)[None],
        page_size=4,
    )
    return ForwardBatch(
        token_ids=torch.randint(1, 256, (LENGTH,)),
        positions=torch.arange(LENGTH),
        layout=layout,
        cache=cache.view(),
        trace=Trace(),
    )


@pytest.mark.parametrize("path", ["training", "inference"])
@torch.no_grad()
def test_forward_by_the_formulas(model: GlmForCausalLM, cached_batch: ForwardBatch, path: str) -> None:
    trace = Trace()
    batch = cached_batch if path == "inference" else packed_batch(LENGTH, trace=trace)
    before = registry.hits.copy()
    result = model(batch)
    ran = {name for name, _ in registry.hits - before}
    assert ("mla_sparse" if path == "inference" else "mla_expanded") in ran
    reference = Reference(model)
    assert_near(result, torch.stack(reference.forward(batch.token_ids)))
    assert batch.trace is not None
    assert set(batch.trace.selections) == set(reference.selected) == {0, 1, 4}
    position_of_row = {row: position for position, row in enumerate(batch.layout.rows(0).tolist())}
    for layer, expected in reference.selected.items():
        rows = batch.trace.selections[layer]
        assert rows is not None
        assert [[position_of_row[row] for row in line if row >= 0] for line in rows.tolist()] == expected
    logits = model.logits(result)
    assert_near(logits, result @ reference.weights["lm_head.weight"].T)


@pytest.mark.parametrize("path", ["training", "inference"])
@torch.no_grad()
def test_mtp_by_the_formulas(model: GlmForCausalLM, cached_batch: ForwardBatch, path: str) -> None:
    """Post-norm hidden in, embedding first, its own indexer; twice, for a draft step feeds its result back."""
    batch = cached_batch if path == "inference" else packed_batch(LENGTH, trace=Trace())
    hidden = model(batch)
    next_tokens = torch.cat((batch.token_ids[1:], torch.tensor([5])))
    result, _ = model.mtp(hidden, next_tokens, batch)
    reference = Reference(model)
    assert_near(result, torch.stack(reference.mtp(list(hidden), next_tokens)))
    assert batch.trace is not None
    assert model.config.num_hidden_layers in batch.trace.selections
    again, _ = model.mtp(result, next_tokens, batch)
    assert_near(again, torch.stack(reference.mtp(list(result), next_tokens)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INDEX_KEY_NORM_EPS", 1.0),
        ("rms_norm_eps", 1e-1),
        ("latent_norm_eps", 1e-1),
        ("rope_interleave", False),
        ("indexer_rope_interleave", False),
        ("routed_scaling_factor", 1.0),
        ("norm_topk_prob", False),
        ("index_topk", 9),
        ("rope_theta", 20_000.0),
    ],
)
@torch.no_grad()
def test_each_detail_matters(
    model: GlmForCausalLM, monkeypatch: pytest.MonkeyPatch, name: str, value: float | bool
) -> None:
    """A model that differs in one detail differs from the reference: the comparison above can fail."""
    changes: dict[str, object] = {"rms_norm_eps": 1e-2, "latent_norm_eps": 1e-3}
    if name == "INDEX_KEY_NORM_EPS":
        monkeypatch.setattr(glm, name, value)
    else:
        changes[name] = value
    other = GlmForCausalLM(tiny(**changes)).double()
    other.load_state_dict(model.state_dict())
    batch = packed_batch(LENGTH)
    assert relative_error(other(batch), model(batch)) > 1e-4


def test_the_released_model_has_its_indexers_where_the_checkpoint_has_them() -> None:
    config = glm_5_2()
    assert config.full_layers == FULL_LAYERS
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    owners = {int(name.split(".")[2]) for name, _ in model.named_parameters() if ".indexer." in name}
    assert owners == {*FULL_LAYERS, 78}
    last = model.model.layers[78]
    assert isinstance(last, MtpLayer)
    names = {name for name, _ in last.named_parameters()}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= names
    assert not any("embed" in name or "head.weight" in name for name in names), "borrowed from the main model"
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["model.layers.6.self_attn.indexer.wq_b.weight"] == (4096, 2048)
    assert shapes["model.layers.6.self_attn.indexer.k_norm.bias"] == (128,)
    assert shapes["model.layers.5.self_attn.kv_b_proj.weight"] == (28672, 512)
    assert shapes["model.layers.78.eh_proj.weight"] == (6144, 12288)
    assert model.get_submodule("model.layers.0.self_attn").scale == 1 / 16


def test_shared_layers_have_no_index_keys_in_the_cache() -> None:
    config = tiny()
    view = PagedCache(config, num_pages=2, page_size=4, dtype=torch.float32).view()
    assert [keys is not None for keys in view.index_keys] == [True, True, False, False, True, False, True]
    assert len(view.latents) == 7


@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize("path", ["training", "inference"])
@torch.no_grad()
def test_up_to_top_k_sparse_is_dense(model: GlmForCausalLM, length: int, path: str) -> None:
    results = []
    for attention in ("sparse", "dense"):
        cache = PagedCache(model.config, num_pages=2, page_size=4, dtype=torch.float64)
        layout = KeyLayout(
            sequence_starts=(0, length), context_lengths=(length,), page_table=torch.tensor([[1, 0]]), page_size=4
        )
        torch.manual_seed(3)
        batch = packed_batch(length, attention=attention)
        if path == "inference":
            batch = ForwardBatch(
                token_ids=batch.token_ids,
                positions=batch.positions,
                layout=layout,
                cache=cache.view(),
                attention=attention,
            )
        results.append(model(batch))
    assert torch.equal(*results)


@torch.no_grad()
def test_beyond_top_k_sparse_is_not_dense(model: GlmForCausalLM) -> None:
    torch.manual_seed(3)
    sparse = model(packed_batch(LENGTH))
    torch.manual_seed(3)
    dense = model(packed_batch(LENGTH, attention="dense"))
    assert_near(sparse[:8], dense[:8])
    assert relative_error(sparse[8:], dense[8:]) > 1e-3


@torch.no_grad()
def test_later_tokens_and_other_sequences_change_nothing(model: GlmForCausalLM) -> None:
    """Causality before the top-k: what is not visible cannot take a place among the selected."""
    batch = packed_batch(LENGTH, 11)
    result = model(batch)
    tokens = batch.token_ids.clone()
    tokens[LENGTH - 6 : LENGTH] = 255
    tokens[LENGTH:] = 254
    other = model(ForwardBatch(token_ids=tokens, positions=batch.positions, layout=batch.layout))
    assert_near(other[: LENGTH - 6], result[: LENGTH - 6])
    alone = model(
        ForwardBatch(token_ids=batch.token_ids[LENGTH:], positions=torch.arange(11), layout=KeyLayout.packed((0, 11)))
    )
    assert_near(alone, result[LENGTH:])


def gradients(model: GlmForCausalLM, loss: Tensor) -> Iterator[tuple[str, bool]]:
    """Whether the loss moves each parameter."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        yield name, gradient is not None and bool((gradient != 0).any())


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_the_two_losses_train_disjoint_parts(model: GlmForCausalLM, attention: str) -> None:
    """The language model loss never reaches an indexer, the divergence nothing but the indexers."""
    trace = Trace()
    batch = packed_batch(
        LENGTH, 9, attention=attention, index_queries=[torch.arange(LENGTH), torch.arange(9)], trace=trace
    )
    hidden = model(batch)
    guess, _ = model.mtp(hidden, batch.token_ids.roll(-1), batch)
    losses = [
        torch.nn.functional.cross_entropy(model.logits(output), batch.token_ids.roll(-shift))
        for shift, output in ((1, hidden), (2, guess))
    ]
    language = dict(gradients(model, losses[0] + losses[1]))
    model.zero_grad()
    hidden = model(batch)
    model.mtp(hidden, batch.token_ids.roll(-1), batch)
    assert set(trace.index_losses) == set(range(7)), "every layer adds its term, shared ones too"
    divergence = dict(gradients(model, torch.stack(list(trace.index_losses.values())).sum()))
    assert {name for name, moved in language.items() if moved} == {name for name in language if ".indexer." not in name}
    assert {name for name, moved in divergence.items() if moved} == {name for name in divergence if ".indexer." in name}


@torch.no_grad()
def test_a_shared_layer_uses_what_it_is_handed(model: GlmForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection is made once for each full layer and passed on as a value."""
    seen: list[Tensor] = []
    original = ops.mla_sparse.specification

    def spy(query: Tensor, latents: Tensor, selection: Tensor, scale: float, latent_dim: int) -> Tensor:
        seen.append(selection)
        return original(query, latents, selection, scale, latent_dim)

    monkeypatch.setattr(ops.mla_sparse, "specification", spy)
    cache = PagedCache(model.config, num_pages=6, page_size=4, dtype=torch.float64)
    layout = KeyLayout(
        sequence_starts=(0, LENGTH), context_lengths=(LENGTH,), page_table=torch.arange(6)[None], page_size=4
    )
    calls = registry.num_calls("index_select")
    model(
        ForwardBatch(
            token_ids=torch.randint(1, 256, (LENGTH,)),
            positions=torch.arange(LENGTH),
            layout=layout,
            cache=cache.view(),
        )
    )
    assert registry.num_calls("index_select") - calls == 3
    assert len(seen) == 6
    same = [layer for layer in range(1, 6) if seen[layer] is seen[layer - 1]]
    assert same == [2, 3, 5], "F F S S F S"


@pytest.mark.parametrize("pattern", ["FFFFFF", "FSSSSS"])
def test_a_pattern_given_at_load_decides(pattern: str) -> None:
    config = GlmConfig.from_json(tiny().to_json_dict(), index_pattern=pattern)
    model = GlmForCausalLM(config)
    owners = [layer.get_submodule("self_attn").indexer is not None for layer in model.model.layers]
    assert owners == [letter == "F" for letter in pattern] + [True]
