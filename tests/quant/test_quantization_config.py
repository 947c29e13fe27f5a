"""`quantization_config`: what is written, and which of those of others are refused by name."""

import copy
import re
from typing import Any

import pytest

from indexshare.errors import ConfigError
from indexshare.quant.quantization_config import check, describe

LAYERS = (1, 2)
EXPERTS = [f"model.layers.{layer}.mlp.experts.{number}.down_proj" for layer in LAYERS for number in range(3)]
INT4 = dict.fromkeys(EXPERTS, ("int4", 128)) | {"model.layers.0.self_attn.o_proj": ("int4", 128)}
INT8 = dict.fromkeys(("lm_head", "model.layers.3.self_attn.o_proj"), ("int8", 0))
PLAIN = dict.fromkeys(("model.layers.1.mlp.gate", "model.layers.0.self_attn.kv_b_proj"))


def matching(config: dict[str, Any], module: str) -> list[str]:
    """Groups with a pattern that matches a module; a class name only counts when no pattern does."""
    found = []
    for name, group in config["config_groups"].items():
        for target in group["targets"]:
            is_match = re.match(target[3:], module) if target.startswith("re:") else target == module
            found += [name] if is_match else []
    return found


def test_mixed_formats_are_groups_whose_patterns_do_not_overlap() -> None:
    config: Any = describe(INT4 | INT8 | PLAIN)
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]
    for name, held in (INT4 | INT8).items():
        assert matching(config, name) == ["group_0" if held == ("int4", 128) else "group_1"], name
    assert matching(config, "model.layers.11.mlp.experts.0.down_proj") == []
    assert len(config["config_groups"]["group_0"]["targets"]) == 3  # the class, all the experts, o_proj
    assert config["ignore"] == sorted(PLAIN)
    assert check(config) == "compressed-tensors"


def test_one_format_is_that_of_the_whole() -> None:
    config: Any = describe(INT8 | PLAIN)
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert check(config) == "compressed-tensors"
    other: Any = describe(INT4)
    assert other["config_groups"]["group_0"]["weights"]["group_size"] == 128
    assert check(other) == "compressed-tensors"


def test_fp8_is_declared_as_released() -> None:
    config: Any = describe({"a": ("fp8", 128), "b": None})
    assert config["modules_to_not_convert"] == ["b"]
    assert check(config) == "fp8"
    assert describe(PLAIN) is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("quant_method", "awq", "method 'awq' is not supported"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme is not supported"),
        ("sparsity_config", {"format": "sparse-24"}, "sparsity_config is not supported"),
        ("transform_config", {"r1": {}}, "transform_config is not supported"),
        ("config_groups", {}, "config_groups must say"),
        ("config_groups", {"W8A8": ["Linear"]}, "W8A8 does not say how"),
        ("config_groups.group_0.weights", None, "group_0 does not say how"),
        ("config_groups.group_0.weights.num_bits", 3, "group_0 is 3 bits by group"),
        ("config_groups.group_0.weights.strategy", "channel", "4 bits by channel"),
        ("config_groups.group_0.format", "marlin-24", "as 'marlin-24'"),
        ("config_groups.group_0.weights.group_size", 16, "groups of 16"),
        ("config_groups.group_0.weights.symmetric", False, "has symmetric False"),
        ("config_groups.group_0.weights.type", "float", "has type 'float'"),
        ("config_groups.group_0.weights.actorder", "group", "has actorder 'group'"),
        ("config_groups.group_0.input_activations", {"dynamic": False}, "stored activation scales"),
    ],
)
def test_what_is_not_supported_is_named(place: str, value: object, message: str) -> None:
    config: Any = copy.deepcopy(describe(INT4))
    *path, last = place.split(".")
    holder = config
    for key in path:
        holder = holder[key]
    holder[last] = value
    with pytest.raises(ConfigError, match=message):
        check(config)


@pytest.mark.parametrize("content", ["int8", [1], {}, {"quant_method": None}])
def test_what_is_no_configuration_is_refused(content: object) -> None:
    with pytest.raises(ConfigError, match="is not supported"):
        check(content)
