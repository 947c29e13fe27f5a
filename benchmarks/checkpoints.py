"""Seeded random checkpoints in the released layout, whose activations and index scores spread as in a trained model.

Speed does not depend on what weights say, but it does depend on what they do: with equal index scores a top-k is easy,
with a dead router few experts are read. Hence unit-scale activations: linears N(0, 1 / fan_in), norms N(1, 0.1).
Outputs into the residual stream are smaller by sqrt(2 layers), as in a fresh model before training: without that, one
expert that BF16 chooses differently changes everything after it (KL 0.9 on `mid` between BF16 and float32 of the same
engine, with it 0.02), and no comparison of engines on these weights would mean anything.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from indexshare.model import recipes
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import save_model

SEED = 5
GAINS = {"q_b_proj.weight": 2.0, "lm_head.weight": 2.0}
INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight", "down_proj")
NORM_SPREAD = 0.1
ROUTER_BIAS, ROUTER_BIAS_SPREAD = "e_score_correction_bias", 0.02


def small(**changes: object) -> GlmConfig:
    """14.4 million parameters: the smallest with index heads that llama.cpp takes (64 dimensions or more)."""
    recipe: dict[str, object] = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "index_n_heads": 4,
        "index_head_dim": 64,
        "index_topk": 256,
        "index_topk_pattern": None,
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "dtype": "bfloat16",
    }
    return recipes.tiny(**(recipe | changes))


# With 4 index heads one score in sixteen is exactly zero and engines break the ties differently; with 16 they agree.
RECIPES: dict[str, Callable[[], GlmConfig]] = {
    "mid": recipes.mid,
    "tiny": small,
    "tiny16": lambda: small(index_n_heads=16),
}


def make(name: str, directory: Path) -> Path:
    """The checkpoint of a recipe in `directory`/name, written once. Exits when one of another recipe is there."""
    target = directory / name
    config = replace(RECIPES[name](), dtype="bfloat16")
    if (target / "config.json").is_file():
        if json.loads((target / "config.json").read_text(encoding="utf-8")) != config.to_json_dict():
            raise SystemExit(f"{target} was made by another recipe: remove it and the {name}-*.gguf beside it")
        return target
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    model.load_state_dict(draw_weights(model), assign=True)
    save_model(model, target)
    return target


def draw_weights(model: GlmForCausalLM) -> dict[str, Tensor]:
    """Seeded random weights for a model that may lie on `meta`, by name."""
    generator = torch.Generator().manual_seed(SEED)
    residual_gain = (2 * model.config.num_hidden_layers) ** -0.5
    return {key: _draw(key, value.shape, residual_gain, generator) for key, value in model.state_dict().items()}


def _draw(name: str, shape: torch.Size, residual_gain: float, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith(ROUTER_BIAS):
        return values * ROUTER_BIAS_SPREAD  # float32 in the released checkpoints
    if name.endswith("norm.weight"):
        values = 1 + NORM_SPREAD * values
    elif name.endswith("norm.bias"):
        values *= NORM_SPREAD
    elif not name.endswith("embed_tokens.weight"):
        gain = next((gain for ending, gain in GAINS.items() if name.endswith(ending)), 1.0)
        if name.endswith(INTO_RESIDUAL):
            gain = residual_gain
        values *= gain * shape[-1] ** -0.5
    return values.to(torch.bfloat16)
