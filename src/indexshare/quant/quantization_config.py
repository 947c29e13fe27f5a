"""`quantization_config` of config.json: written for what a model holds, checked when one is read. No torch.

int8 and int4 go in the layout of the library compressed-tensors (0.20), which transformers and vLLM read: int8 as
"int-quantized" (W8A8 with activations by token), int4 as "pack-quantized" (W4A16). Those engines round activations
otherwise than this one, or not at all: the weights are the same, the logits are close. FP8 goes as in the released
files.
"""

import re
from collections.abc import Mapping

from indexshare.errors import ConfigError
from indexshare.quant.policy import GROUP_SIZES

METHOD = "compressed-tensors"
FP8_CONFIG: dict[str, object] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
NAMES = {"int8": "int-quantized", "int4": "pack-quantized"}
NUMBERED = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"\.experts\.\d+\.")
UNSUPPORTED = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")


def describe(modules: Mapping[str, tuple[str, int] | None]) -> dict[str, object] | None:
    """The `quantization_config` of a model; None when nothing is quantised.

    modules: every matrix that a linear layer multiplies with, by the name of its module in a checkpoint: its format
    ("int8", "int4" or "fp8") and group size, or None when it is not quantised.
    """
    plain = sorted(name for name, held in modules.items() if held is None)
    schemes: dict[tuple[str, int], list[str]] = {}
    for name, held in modules.items():
        if held is not None:
            schemes.setdefault(held, []).append(name)
    if not schemes:
        return None
    if "fp8" in {weight_format for weight_format, _ in schemes}:
        assert len(schemes) == 1, "FP8 blocks and compressed-tensors cannot be in one checkpoint"
        return FP8_CONFIG | {"modules_to_not_convert": plain}
    groups = {}
    for number, (scheme, names) in enumerate(sorted(schemes.items(), key=lambda item: -len(item[1]))):
        # Readers prefer a pattern to the name of a class: the largest group is what no pattern of another one matches.
        targets = (["Linear"] if number == 0 else []) + _patterns(names)
        groups[f"group_{number}"] = _group(*scheme, targets)
    formats = {NAMES[weight_format] for weight_format, _ in schemes}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
        "kv_cache_scheme": None,
    }


def _group(weight_format: str, group_size: int, targets: list[str]) -> dict[str, object]:
    integers = {"type": "int", "symmetric": True}
    if weight_format == "int8":
        weights = integers | {"num_bits": 8, "strategy": "channel", "dynamic": False}
        activations = integers | {"num_bits": 8, "strategy": "token", "dynamic": True}
    else:
        weights = integers | {"num_bits": 4, "strategy": "group", "group_size": group_size, "dynamic": False}
        activations = None
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": NAMES[weight_format],
    }


def _patterns(names: list[str]) -> list[str]:
    """Patterns that match exactly these modules of the model: one for each kind of module, with all its layers."""
    layers: dict[str, set[int]] = {}
    patterns = set()
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match is None:
            patterns.add(name)
        else:
            kind = r"\.experts\.\d+\.".join(re.escape(part) for part in EXPERT.split("." + match[2]))
            layers.setdefault(kind, set()).add(int(match[1]))
    for kind, numbers in layers.items():
        patterns.add(rf"re:model\.layers\.({'|'.join(map(str, sorted(numbers)))}){kind}$")
    return sorted(patterns)


def check(content: object) -> str:
    """The method of a `quantization_config`: "fp8" or "compressed-tensors". ConfigError names what is not supported."""
    method = content.get("quant_method") if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or method not in ("fp8", METHOD):
        raise ConfigError(
            f"quantization_config: method {method!r} is not supported; fp8 with 128x128 blocks and {METHOD} are"
        )
    if method == "fp8":
        if content.get("weight_block_size") != [128, 128] or content.get("fmt", "e4m3") != "e4m3":
            raise ConfigError("quantization_config: only fp8 e4m3 with weight_block_size [128, 128] is supported")
        return "fp8"
    for key in UNSUPPORTED:
        if content.get(key):
            raise ConfigError(f"quantization_config: {key} is not supported; this checkpoint has {content[key]!r:.200}")
    groups = content.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError("quantization_config: config_groups must say how which weights are quantised")
    for name, group in groups.items():
        _check_group(str(name), group, content.get("format"))
    return METHOD


def _check_group(name: str, group: object, default_format: object) -> None:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise ConfigError(f"quantization_config: {name} does not say how its weights are stored")
    common = {"type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    for key, expected in common.items():
        if weights.get(key, expected) != expected:
            raise ConfigError(f"quantization_config: {name} has {key} {weights[key]!r}; only {expected!r} is supported")
    found = (weights.get("num_bits"), weights.get("strategy"), group.get("format") or default_format)
    allowed = {"int8": (8, "channel", NAMES["int8"]), "int4": (4, "group", NAMES["int4"])}
    if found not in allowed.values():
        raise ConfigError(
            f"quantization_config: {name} is {found[0]} bits by {found[1]} as {found[2]!r}; supported are 8 bits by "
            f"channel as {NAMES['int8']!r} and 4 bits by group as {NAMES['int4']!r}"
        )
    if found == allowed["int4"] and weights.get("group_size") not in GROUP_SIZES:
        raise ConfigError(
            f"quantization_config: {name} has groups of {weights.get('group_size')!r}; supported are 32, 64 and 128"
        )
    activations = group.get("input_activations")
    if activations is not None and not (isinstance(activations, Mapping) and activations.get("dynamic") is True):
        raise ConfigError(f"quantization_config: {name} has stored activation scales; only dynamic ones are supported")
