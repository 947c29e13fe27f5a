from math import prod

import msgspec
import pytest
import torch
from rich.console import Console

from indexshare.kernels.formats import QuantizedWeight
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.inspect import inspect_model, render, token_work, weight_bytes, weight_groups
from indexshare.model.recipes import glm_5_2, mid, nano, recipe, tiny
from indexshare.quant.policy import IntegerFormat, Policy


def test_glm_5_2_to_the_parameter() -> None:
    inspection = inspect_model(glm_5_2(), "glm-5.2")
    assert inspection.parameters == 753_329_921_024
    assert inspection.parameters_without_mtp == 743_377_000_704
    assert inspection.activated_parameters == 40_297_758_720
    assert inspection.full_layers == (0, 1, 2, *range(6, 78, 4)) and len(inspection.full_layers) == 21
    assert inspection.num_shared_layers == 57
    assert inspection.latent_cache_bytes_per_token == 89_856
    assert inspection.index_cache_bytes_per_token == 5_376


def test_glm_5_2_part_by_part() -> None:
    """The counts of the released checkpoint's headers."""
    parts = {part.name: part.parameters for part in inspect_model(glm_5_2(), "glm-5.2").parts}
    assert parts == {
        "routed experts": 734_439_407_616,
        "attention": 13_036_552_192,
        "shared experts": 2_868_903_936,
        "embedding and head": 1_903_165_440,
        "dense feed-forward": 679_477_248,
        "indexers": 206_176_256,
        "routers": 119_537_664,
        "MTP projection": 75_497_472,
        "norms": 1_203_200,
    }


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_weights_to_the_byte(weight_format: IntegerFormat, tied: bool) -> None:
    """As many bytes as the weights of a model with these formats take."""
    config = nano(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    if tied:
        model.lm_head.weight = model.get_parameter("model.embed_tokens.weight")
    policy, total = Policy(format=weight_format), 0
    for name, tensor in model.named_parameters():
        chosen = policy.format_of(name, tensor.shape[-1], config.num_hidden_layers)
        if chosen is not None:
            total += QuantizedWeight.empty(chosen[0], tuple(tensor.shape), chosen[1], "meta").nbytes
        else:
            total += tensor.numel() * (4 if name.endswith("correction_bias") else 2)
    assert weight_bytes(config, weight_format) == total


def test_the_fp8_checkpoint_to_the_byte() -> None:
    """755.617 GB in the released shards; their headers come on top."""
    config = glm_5_2()
    assert weight_bytes(config, "fp8") == 755_617_140_416
    plain = sum(group.size * group.copies * (1 if group.in_fp8 else 2) for group in weight_groups(config))
    scales = (weight_bytes(config, "fp8") - plain) // 4
    assert scales == 45_853_104 + 19_456  # block scales and router biases, fp32


@pytest.mark.parametrize("name", ["tiny", "nano", "mid"])
def test_the_counts_are_those_of_the_network(name: str) -> None:
    with torch.device("meta"):
        model = GlmForCausalLM(recipe(name))
    sizes = {key: prod(tensor.shape) for key, tensor in model.state_dict().items()}
    counted = sum(size for key, size in sizes.items() if not key.endswith("e_score_correction_bias"))
    assert inspect_model(recipe(name), name).parameters == counted


def test_sizes_of_the_recipes() -> None:
    assert inspect_model(nano(), "nano").parameters <= 12_000_000
    assert weight_bytes(nano(), "bfloat16") <= 24_000_000
    assert round(inspect_model(mid(), "mid").parameters / 1e9, 2) == 1.52
    assert round(inspect_model(mid(), "mid").activated_parameters / 1e6) == 260


def test_work_per_token_of_glm_5_2() -> None:
    work = token_work(glm_5_2(), 1_048_576)
    assert work.indexer == 21 * 2 * 32 * 128 * 1_048_576
    assert work.indexer_in_every_layer == 78 * 2 * 32 * 128 * 1_048_576
    assert work.weights == 2 * 40_297_758_720
    assert work.sparse_attention == 78 * 64 * 2048 * (576 + 512) * 2 == token_work(glm_5_2(), 2048).sparse_attention
    every_layer = work.total - work.indexer + work.indexer_in_every_layer
    assert round(every_layer / work.total, 2) == 2.73


def test_sparse_attention_is_dense_up_to_top_k() -> None:
    work = token_work(tiny(), 8)
    assert work.sparse_attention == work.dense_attention
    work = token_work(tiny(), 9)
    assert work.sparse_attention < work.dense_attention


def test_a_tied_head_is_counted_once() -> None:
    untied, tied = inspect_model(tiny(), "x"), inspect_model(tiny(tie_word_embeddings=True), "x")
    assert untied.parameters - tied.parameters == tiny().vocab_size * tiny().hidden_size
    assert untied.activated_parameters == tied.activated_parameters


def test_contexts_stop_at_the_limit_of_the_model() -> None:
    inspection = inspect_model(tiny(max_position_embeddings=16_384), "x")
    assert [row.context for row in inspection.work] == [4096, 16_384]


def test_it_is_shown_as_a_table_and_as_json() -> None:
    inspection = inspect_model(glm_5_2(), "glm-5.2")
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(inspection))
    shown = capture.get()
    for text in ("753,329,921,024", "743,377,000,704", "40,297,758,720", "89,856", "5,376", "21 full, 57 shared"):
        assert text in shown
    content = msgspec.json.decode(msgspec.json.encode(inspection))
    assert content["parameters"] == 753_329_921_024 and content["full_layers"][-1] == 74
