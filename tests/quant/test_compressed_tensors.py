"""The library compressed-tensors, and transformers with it, read the directories that we write: the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import decompress_module
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CompressedTensorsConfig, GlmMoeDsaForCausalLM

from indexshare.kernels.formats import QuantizedWeight
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import ForwardBatch
from indexshare.model.glm import GlmForCausalLM, weights_of
from indexshare.model.recipes import tiny
from indexshare.model.stored_weight import views
from indexshare.model.weights import load_model, save_model
from indexshare.quant.policy import Policy

# The loader of transformers and pydantic schemas warn of their own business.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    model = GlmForCausalLM(tiny(dtype="bfloat16", latent_norm_eps=1e-6, index_n_heads=16)).bfloat16()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    save_model(model, directory)
    return directory


def skeleton(wide: dict[str, Tensor]) -> nn.Module:
    """A Linear for every matrix of the checkpoint under its name: what a reader of the format builds."""
    root = nn.Module()
    for name, weight in wide.items():
        if weight.dim() != 2 or "embed_tokens" in name:
            continue
        *path, last = name.removesuffix(".weight").split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16))
    return root


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_the_library_reads_the_same_weights(plain: Path, tmp_path: Path, weight_format: str) -> None:
    """Its own matching of targets and ignored modules, its own unpacking."""
    model = load_model(plain, quant=weight_format)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    held = dict(views(weights_of(model), {}))
    wide = {
        name: weight.dequantize(torch.bfloat16) if isinstance(weight, QuantizedWeight) else weight
        for name, weight in held.items()
    }
    root = skeleton(wide)
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    apply_quantization_config(root, QuantizationConfig.model_validate(content), show_progress=False)
    checked = 0
    for name, module in root.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        assert hasattr(module, "quantization_scheme") == isinstance(held[f"{name}.weight"], QuantizedWeight), name
        if hasattr(module, "quantization_scheme"):
            for key in list(module._parameters):
                delattr(module, key)
            for key in ("weight", "weight_packed", "weight_scale", "weight_shape"):
                if f"{name}.{key}" in tensors:
                    module.register_parameter(key, nn.Parameter(tensors[f"{name}.{key}"], requires_grad=False))
            decompress_module(module)
            assert torch.equal(module.weight, wide[f"{name}.weight"]), name
            checked += 1
    assert checked == sum(isinstance(weight, QuantizedWeight) for weight in held.values()) > 100


@torch.no_grad()
def test_transformers_reads_int4(plain: Path, tmp_path: Path) -> None:
    """With the head kept: transformers 5.23 reads one scheme for all dense layers of a model, and no int8 experts."""
    model = load_model(plain, quant=Policy(format="int4", group_size=32, keep=("lm_head.weight",)))
    save_model(model, tmp_path)
    theirs: Any = GlmMoeDsaForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    ours = load_model(tmp_path, quant="none").float()  # they widen to the bfloat16 of the scales
    theirs_by_name = theirs.float().state_dict()  # it leaves experts in bfloat16
    for name, weight in ours.named_parameters():
        if not name.startswith("model.layers.6."):  # transformers has no MTP layer
            assert torch.equal(theirs_by_name[name], weight), name
    tokens = torch.arange(40) * 37 % 256
    layout = KeyLayout.packed((0, 40))
    mine = ours.logits(ours(ForwardBatch(token_ids=tokens, positions=torch.arange(40), layout=layout)))
    other = theirs.eval()(tokens[None]).logits[0]
    torch.testing.assert_close(other.log_softmax(-1), mine.log_softmax(-1), rtol=0, atol=1e-4)
