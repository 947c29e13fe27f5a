"""Indexers for models without, and fewer for models with: what is shared, what is new, what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from indexshare.errors import ConfigError
from indexshare.kernels.layout import KeyLayout
from indexshare.model import recipes
from indexshare.model.batch import ForwardBatch
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model, save_model
from indexshare.share.attach import attach_indexers, default_sizes, pattern_of_frequency


def model(**changes: object) -> GlmForCausalLM:
    built = GlmForCausalLM(recipes.tiny(**changes))
    built.init_weights(0)
    return built


def dense_config() -> GlmConfig:
    """GLM-4.7-Flash's kind: the same model without indexers."""
    sizes = {"index_n_heads": 0, "index_head_dim": 0, "index_topk": 0, "index_topk_pattern": None}
    return replace(recipes.tiny(), model_type="glm4_moe_lite", indexer_types=(), **sizes)


def dense_model() -> GlmForCausalLM:
    built = GlmForCausalLM(dense_config())
    built.init_weights(0)
    return built


def hidden(model: GlmForCausalLM, attention: str) -> Tensor:
    token_ids = torch.arange(40) * 7 % model.config.vocab_size
    layout = KeyLayout.packed((0, 40))
    with torch.no_grad():
        return model(ForwardBatch(token_ids=token_ids, positions=torch.arange(40), layout=layout, attention=attention))


def owners(model: GlmForCausalLM) -> str:
    return "".join("S" if layer.self_attn.indexer is None else "F" for layer in model.model.layers)


def test_a_dense_model_gets_indexers_and_is_otherwise_itself() -> None:
    source = dense_model()
    before = {name: weight.clone() for name, weight in source.state_dict().items()}
    attached = attach_indexers(source, "FSSFSS")
    assert owners(attached) == "FSSFSSF", "the MTP layer gets its own"
    config = attached.config
    assert config.model_type == "glm_moe_dsa"
    assert (config.index_n_heads, config.index_head_dim) == (2, 16)
    mine = dict(attached.named_parameters())
    for name, parameter in source.named_parameters():
        assert mine.pop(name) is parameter
    assert mine and all(".indexer." in name for name in mine)
    assert torch.equal(hidden(attached, "dense"), hidden(source, "dense"))
    assert owners(source) == "SSSSSSS" and not source.config.has_indexers
    assert all(torch.equal(weight, before[name]) for name, weight in source.state_dict().items())


def test_new_indexers_choose_and_score_at_unit_scale() -> None:
    attached = attach_indexers(dense_model(), "FSSFSS", topk=8)
    assert attached.config.index_topk == 8
    assert not torch.equal(hidden(attached, "sparse"), hidden(attached, "dense"))
    again, other = (attach_indexers(dense_model(), "FSSFSS", seed=seed).state_dict() for seed in (0, 1))
    weights = attached.state_dict()
    key = "model.layers.0.self_attn.indexer.wq_b.weight"
    assert torch.equal(weights[key], again[key]) and not torch.equal(weights[key], other[key])
    assert not torch.equal(weights[key], weights[key.replace(".0.", ".3.")])
    assert 0.8 < float(weights[key].std() * weights[key].shape[1] ** 0.5) < 1.2


def test_fewer_indexers_are_those_that_were_there() -> None:
    source = model()
    attached = attach_indexers(source, "FSSSSS")
    assert owners(attached) == "FSSSSSF"
    assert all(parameter is source.get_parameter(name) for name, parameter in attached.named_parameters())
    assert torch.equal(hidden(attached, "dense"), hidden(source, "dense"))
    assert owners(source) == "FFSSFSF"


def test_more_indexers_are_new_beside_the_old() -> None:
    source = model()
    attached = attach_indexers(source, "FFFFFF")
    new = {name for name, _ in attached.named_parameters()} - {name for name, _ in source.named_parameters()}
    assert {int(name.split(".")[2]) for name in new} == {2, 3, 5}


def test_what_is_saved_is_read_back(tmp_path: object) -> None:
    attached = attach_indexers(dense_model(), "FSSFSS", topk=8)
    save_model(attached, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert loaded.config.indexer_types == attached.config.indexer_types
    assert torch.equal(hidden(loaded, "sparse"), hidden(attached, "sparse"))


@pytest.mark.parametrize(
    ("pattern", "sizes", "message"),
    [
        ("SFFFFF", {}, "first layer must be full"),
        ("FFS", {}, "3 entries for 6 layers"),
        ("FFSSFX", {}, "not X"),
        ("FFSSFS", {"num_heads": 3}, "same size"),
        ("FFSSFS", {"head_dim": 32}, "same size"),
    ],
)
def test_what_does_not_fit_is_refused(pattern: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach_indexers(model(), pattern, **sizes)


def test_sizes_are_those_of_the_released_model_in_proportion() -> None:
    released = recipes.glm_5_2()
    assert default_sizes(released) == (released.index_n_heads, released.index_head_dim, released.index_topk)
    assert default_sizes(replace(recipes.tiny(), max_position_embeddings=256)) == (2, 16, 32)


def test_patterns_of_a_frequency() -> None:
    released = recipes.glm_5_2()
    pattern = pattern_of_frequency(released, 4)
    assert [index for index, letter in enumerate(pattern) if letter == "F"] == list(released.full_layers)
    assert pattern_of_frequency(recipes.tiny(), 1) == "FFFFFF"
    assert pattern_of_frequency(recipes.tiny(), 2) == "FFFSFS"
    with pytest.raises(ConfigError, match="at least 1"):
        pattern_of_frequency(released, 0)


def test_a_rotation_that_other_software_would_read_otherwise_is_refused() -> None:
    source = GlmForCausalLM(replace(dense_config(), rope_interleave=False))
    with pytest.raises(ConfigError, match="rope_interleave is false"):
        attach_indexers(source, "FSSFSS")


def test_tied_weights_stay_tied() -> None:
    source = model(tie_word_embeddings=True)
    source.lm_head.weight = source.model.embed_tokens.weight
    attached = attach_indexers(source, "FSSFSS")
    assert attached.lm_head.weight is attached.model.embed_tokens.weight is source.model.embed_tokens.weight
