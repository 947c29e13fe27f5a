import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, GlmMoeDsaConfig

from indexshare.errors import ConfigError
from indexshare.model.config import GlmConfig, derive_indexer_types
from indexshare.model.recipes import RECIPES, glm_5_2, mid, nano, recipe, tiny

GLM_5_2_FULL = (0, 1, 2, *range(6, 78, 4))

# config.json of GLM-5.2 as released, key by key
RELEASED: dict[str, object] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "transformers_version": "5.12.0",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "num_hidden_layers": 78,
    "hidden_act": "silu",
    "intermediate_size": 12288,
    "rms_norm_eps": 1e-05,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "pretraining_tp": 1,
    "ep_size": 1,
    "max_position_embeddings": 1048576,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "rope_interleave": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "head_dim": 192,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 256,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_topk_pattern": None,
    "index_share_for_mtp_iteration": True,
    "indexer_rope_interleave": True,
    "indexer_types": ["full" if layer in GLM_5_2_FULL else "shared" for layer in range(78)],
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "moe_router_dtype": "float32",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
}
INDEX_KEYS = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")


def released(*without: str, **changes: object) -> dict[str, object]:
    return {key: value for key, value in (RELEASED | changes).items() if key not in without}


def test_the_released_file_is_the_recipe() -> None:
    config = GlmConfig.from_json(RELEASED)
    assert config == glm_5_2()
    assert config.full_layers == GLM_5_2_FULL
    assert (config.qk_head_dim, config.latent_dim, config.num_layers_with_mtp) == (256, 576, 79)
    assert config.is_full(78) and config.is_sparse(78)  # the MTP layer
    assert config.rope_theta == 8e6 and config.latent_norm_eps == 1e-5
    assert config.eos_token_id == (154820, 154827, 154829)


@pytest.mark.parametrize("name", RECIPES)
def test_written_and_read_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    config = recipe(name)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json_dict()))
    assert GlmConfig.from_json(tmp_path) == config
    assert GlmConfig.from_json(tmp_path / "config.json") == config


def test_the_latent_epsilon_is_written_only_when_it_is_its_own() -> None:
    assert "latent_norm_eps" not in tiny().to_json_dict()
    config = GlmConfig.from_json(tiny().to_json_dict(), latent_norm_eps=1e-6)
    assert config.latent_norm_eps == 1e-6 and config.rms_norm_eps == 1e-5
    assert GlmConfig.from_json(config.to_json_dict()) == config


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    config = recipe(name)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json_dict()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, GlmMoeDsaConfig)
    assert theirs.indexer_types == list(config.indexer_types)
    assert theirs.mlp_layer_types == list(config.mlp_layer_types)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    for field in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "v_head_dim", "index_topk", "routed_scaling_factor"):
        assert getattr(theirs, field) == getattr(config, field)


def test_transformers_reads_ours_as_it_reads_the_released_file(tmp_path: Path) -> None:
    for name, content in (("released", RELEASED), ("ours", glm_5_2().to_json_dict())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    expected = AutoConfig.from_pretrained(tmp_path / "released").to_dict()
    found = AutoConfig.from_pretrained(tmp_path / "ours").to_dict()
    for content in (expected, found):
        content.pop("transformers_version", None)
        content.pop("_name_or_path", None)
    assert found == expected


@pytest.mark.parametrize("name", ["tiny", "nano", "glm-5.2"])
def test_we_read_what_transformers_writes(name: str, tmp_path: Path) -> None:
    config = recipe(name)
    source = tmp_path / "ours"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config.to_json_dict()))
    theirs = AutoConfig.from_pretrained(source)
    theirs.save_pretrained(tmp_path / "theirs")
    assert GlmConfig.from_json(tmp_path / "theirs") == config
    assert GlmConfig.from_json(theirs.to_dict()) == config


def test_we_read_the_defaults_of_transformers() -> None:
    config = GlmConfig.from_json(GlmMoeDsaConfig().to_dict())
    assert config.full_layers == tuple(range(78))
    assert config.num_nextn_predict_layers == 0


def test_glm_5_without_index_keys_has_an_indexer_in_every_layer() -> None:
    older = released(*INDEX_KEYS, "index_share_for_mtp_iteration", "rope_parameters", rope_theta=1000000)
    config = GlmConfig.from_json(older)
    assert config.full_layers == tuple(range(78))
    assert config.rope_theta == 1e6


def test_layers_come_from_the_list_then_the_pattern_then_the_frequency() -> None:
    pattern = "FFSF" + "S" * 74
    assert GlmConfig.from_json(released("indexer_types")).full_layers == GLM_5_2_FULL
    assert GlmConfig.from_json(released("indexer_types", index_topk_pattern=pattern)).full_layers == (0, 1, 3)
    as_list = ["full", "full", "shared", "full"] + ["shared"] * 74
    assert GlmConfig.from_json(released("indexer_types", index_topk_pattern=as_list)).full_layers == (0, 1, 3)
    assert GlmConfig.from_json(released(index_topk_pattern=pattern)).full_layers == GLM_5_2_FULL
    assert GlmConfig.from_json(RELEASED, index_pattern=pattern).full_layers == (0, 1, 3)


@pytest.mark.parametrize("freq", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
def test_frequency_and_offset_mean_what_they_mean_in_transformers(freq: int, offset: int) -> None:
    theirs = GlmMoeDsaConfig(num_hidden_layers=12, index_topk_freq=freq, index_skip_topk_offset=offset)
    assert list(derive_indexer_types(12, freq=freq, offset=offset)) == theirs.indexer_types


def test_dense_layers_come_from_the_list_or_the_number() -> None:
    assert GlmConfig.from_json(released("mlp_layer_types")).mlp_layer_types == ("dense",) * 3 + ("sparse",) * 75


def test_the_fp8_build_is_known_by_its_format() -> None:
    content: dict[str, object] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    content |= {"activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    config = GlmConfig.from_json(released(quantization_config=content))
    assert config == replace(glm_5_2(), quantization="fp8")
    assert GlmConfig.from_json(config.to_json_dict()) == config


def test_a_single_end_token_becomes_a_tuple() -> None:
    assert GlmConfig.from_json(released(eos_token_id=7)).eos_token_id == (7,)
    assert GlmConfig.from_json(released(eos_token_id=None)).eos_token_id == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": 1}, "attention_bias"),
        ({"n_group": 7}, "n_group is 7"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
        ({"architectures": ["GlmMoeDsaModel"]}, "architectures"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 4}}, "rope_parameters may hold"),
        ({"rope_parameters": None}, "lacks rope_parameters"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling is not supported"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "method 'modelopt'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "128, 128"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ({"_attn_implementation_internal": "x"}, "_attn_implementation_internal"),
        ({"hidden_size": "6144"}, r"Expected `int`, got `str` - at `\$\.hidden_size`"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size must be greater than 0"),
        ({"num_hidden_layers": 3.5}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 10**12}, "more than 10,000"),
        ({"num_hidden_layers": 77}, "indexer_types has 78 entries for 77 layers"),
        ({"indexer_types": ["shared"] * 78}, "first layer must be full"),
        ({"indexer_types": ["full"] * 77 + ["ful"]}, "not ful"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"qk_head_dim": 192}, "qk_head_dim is 192"),
        ({"qk_rope_head_dim": 63, "qk_head_dim": 255}, "must be even"),
        ({"index_head_dim": 32}, "index_head_dim 32"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok 300"),
        ({"num_nextn_predict_layers": 3}, "num_nextn_predict_layers"),
        ({"dtype": "float8"}, "dtype"),
        ({"eos_token_id": [154880]}, "154880 is outside"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "`rms_norm_eps`"),
        ({"indexer_types": None, "index_topk_pattern": [["F"]]}, r"not \['F'\]"),
    ],
)
def test_what_this_model_cannot_be_is_an_error_that_names_the_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GlmConfig.from_json(released(**changes))


def test_unknown_keys_are_errors_and_by_a_flag_warnings() -> None:
    content = released(sliding_window=4096, index_magic=1)
    with pytest.raises(ConfigError, match=r"index_magic, sliding_window.*strict=False"):
        GlmConfig.from_json(content)
    with pytest.warns(UserWarning, match="index_magic, sliding_window"):
        assert GlmConfig.from_json(content, strict=False) == glm_5_2()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("FFS", "3 entries for 78"), ("F" * 77 + "X", "not X"), ("S" * 78, "first layer must be full")],
)
def test_a_wrong_pattern_is_an_error(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GlmConfig.from_json(RELEASED, index_pattern=pattern)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', '"x"', '{"a":' * 50_000])
def test_a_file_that_is_no_configuration_is_an_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        GlmConfig.from_json(file)


@pytest.mark.parametrize("content", [b'{"a": "\xff"}', b"\xff\xfe{\x00}\x00"])
def test_a_file_that_is_not_utf_8_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        GlmConfig.from_json(tmp_path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration at"):
        GlmConfig.from_json(tmp_path)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: Is a directory"):
        GlmConfig.from_json(tmp_path)


def test_a_variant_is_checked_again() -> None:
    with pytest.raises(ConfigError, match="indexer_types has 6 entries for 4 layers"):
        replace(tiny(), num_hidden_layers=4)
    assert tiny(index_topk=64, index_topk_pattern=None, index_topk_freq=2).full_layers == (0, 1, 3, 5)


def test_recipes_are_what_they_promise() -> None:
    assert tiny().full_layers == (0, 1, 4) and tiny().mlp_layer_types.count("dense") == 1
    assert nano().full_layers == mid(num_hidden_layers=8).full_layers == (0, 1, 2, 6)
    assert mid().full_layers == (0, 1, 2, 6, 10, 14)
    with pytest.raises(ConfigError, match=r"tiny, nano, mid, glm-5\.2"):
        recipe("huge")
