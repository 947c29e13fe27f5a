"""Checkpoints without indexers against transformers: GLM-4.7-Flash, DeepSeek-V3 and V2 in small and random.

Weights of unit scale as in `test_transformers_parity`. One thing follows transformers and not the files' own code and
the engines: the epsilon of the latent norms, 1e-6 whatever `rms_norm_eps` says (1e-5 in GLM-4.7-Flash).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import TRANSFORMERS_LOGPROBS
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmMoeDsaForCausalLM,
)

import indexshare
from indexshare.engine.cache import PagedCache
from indexshare.engine.sampler import SamplingParams
from indexshare.engine.session import Session
from indexshare.kernels import native, registry
from indexshare.kernels.layout import KeyLayout
from indexshare.model.batch import ForwardBatch
from indexshare.model.glm import GlmForCausalLM
from indexshare.model.weights import load_model, save_model
from indexshare.share.attach import attach_indexers

PAGE_SIZE = 16
CLASSES: dict[str, tuple[Any, Any]] = {
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
}
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "flash": ("glm4_moe_lite", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "flash, tied": (
        "glm4_moe_lite",
        {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 3, "rope_interleave": False},
    ),
    "flash, layers listed": (
        "glm4_moe_lite",
        {"mlp_layer_types": ["dense", "sparse", "dense"], "attention_bias": True, "n_shared_experts": 2},
    ),
    "v3": (
        "deepseek_v3",
        {
            "n_group": 4,
            "topk_group": 2,
            "qk_rope_head_dim": 16,
            "rope_parameters": YARN
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
            | {"original_max_position_embeddings": 512},
        },
    ),
    "v3, other lengths of rotated vectors": (
        "deepseek_v3",
        {
            "n_group": 2,
            "topk_group": 1,
            "n_routed_experts": 12,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 8, "beta_slow": 2},
        },
    ),
    "v3, yarn without mscale": (
        "deepseek_v3",
        {"n_group": 1, "topk_group": 1, "rope_interleave": False, "rope_parameters": YARN | {"factor": 4.0}},
    ),
    "v2 lite": (
        "deepseek_v2",
        {
            "topk_method": "greedy",
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "v2": (
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "attention_bias": True,
            "first_k_dense_replace": 0,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        },
    ),
}


@torch.no_grad()
def reference(shape: str, **changes: Any) -> Any:
    """A random model of transformers; linears N(0, 1/fan_in), norms N(1, 0.1), small biases."""
    family, own = SHAPES[shape]
    config_class, model_class = CLASSES[family]
    model = model_class(config_class(**(COMMON | own | changes), attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(7)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1.0 + 0.1 * noise)
        elif name.endswith(("_bias", ".bias")):
            tensor.copy_((0.02 if name.endswith("_bias") else 0.3) * noise)
        elif "embed_tokens" in name:
            tensor.copy_(noise)
        elif "inv_freq" not in name:
            gain = 2.0 if "q_b_proj" in name or "q_proj" in name or "lm_head" in name else 1.0
            tensor.copy_(noise * gain * tensor.shape[-1] ** -0.5)
    return model


def saved(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


@torch.inference_mode()
def expected(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens[None], use_cache=False).logits[0].log_softmax(-1)


@torch.inference_mode()
def trained(model: GlmForCausalLM, tokens: Tensor) -> Tensor:
    """By the training path: no cache."""
    layout = KeyLayout.packed((0, len(tokens)))
    batch = ForwardBatch(token_ids=tokens, positions=torch.arange(len(tokens)), layout=layout)
    return model.logits(model(batch)).log_softmax(-1)


@torch.inference_mode()
def served(model: GlmForCausalLM, tokens: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """Through a paged cache whose pages lie in no order, so many tokens at a time."""
    num_pages = -(-len(tokens) // PAGE_SIZE)
    cache = PagedCache(model.config, num_pages=num_pages + 2, page_size=PAGE_SIZE, dtype=torch.float32)
    assert not any(keys is not None for keys in cache.view().index_keys)
    pages = torch.tensor(cache.allocate(num_pages * PAGE_SIZE))[torch.randperm(num_pages)]
    found, start = [], 0
    for size in chunks:
        layout = KeyLayout(
            sequence_starts=(0, size), context_lengths=(start + size,), page_table=pages[None], page_size=PAGE_SIZE
        )
        own = slice(start, start + size)
        batch = ForwardBatch(
            token_ids=tokens[own], positions=torch.arange(own.start, own.stop), layout=layout, cache=cache.view()
        )
        found.append(model.logits(model(batch)).log_softmax(-1))
        start += size
    return torch.cat(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_same_logprobs_and_same_tokens(tmp_path: Path, shape: str) -> None:
    theirs = reference(shape)
    ours = load_model(saved(theirs, tmp_path), dtype=torch.float32, latent_norm_eps=1e-6)
    assert not ours.config.has_indexers and ours.config.model_type == SHAPES[shape][0]
    tokens = torch.randint(96, (150,))
    wanted = expected(theirs, tokens)
    for found in (
        trained(ours, tokens),
        served(ours, tokens, (150,)),  # expanded
        served(ours, tokens, (20, 63, 64, 1, 1, 1)),  # absorbed, expanded over a past, one by one
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=TRANSFORMERS_LOGPROBS)

    session = Session(ours, PagedCache(ours.config, num_pages=12, page_size=PAGE_SIZE, dtype=torch.float32))
    drawn = [token.token_id for token in session.stream(tokens, SamplingParams(max_new_tokens=12))]
    with torch.inference_mode():
        assert drawn == theirs.generate(tokens[None], max_new_tokens=12, do_sample=False)[0, 150:].tolist()


@pytest.mark.parametrize(("key", "other"), [("mscale_all_dim", 0.4), ("factor", 4.0), ("beta_fast", 4)])
def test_every_parameter_of_yarn_matters(tmp_path: Path, key: str, other: float) -> None:
    theirs = reference("v3")
    saved(theirs, tmp_path)
    ours = load_model(tmp_path, dtype=torch.float32, latent_norm_eps=1e-6)
    tokens = torch.randint(96, (120,))
    changed = reference("v3", rope_parameters=SHAPES["v3"][1]["rope_parameters"] | {key: other})
    assert (trained(ours, tokens) - expected(changed, tokens)).abs().max() > 100 * TRANSFORMERS_LOGPROBS


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_we_write(tmp_path: Path, shape: str) -> None:
    ours = load_model(saved(reference(shape), tmp_path / "theirs"), dtype=torch.float32, latent_norm_eps=1e-6)
    save_model(ours, tmp_path / "ours")
    theirs = CLASSES[SHAPES[shape][0]][1].from_pretrained(tmp_path / "ours", dtype=torch.float32)
    tokens = torch.randint(96, (70,))
    torch.testing.assert_close(trained(ours, tokens), expected(theirs, tokens), rtol=0, atol=TRANSFORMERS_LOGPROBS)
    again = load_model(tmp_path / "ours", dtype=torch.float32)
    assert again.config == ours.config
    assert torch.equal(trained(again, tokens), trained(ours, tokens))


@pytest.mark.parametrize("shape", ["flash", "v3", "flash, layers listed"])
def test_with_indexers_it_is_glm_moe_dsa_for_transformers_too(tmp_path: Path, shape: str) -> None:
    """YaRN, groups and biases survive; up to top-k keys all are selected, so nothing changes but the name."""
    dense = load_model(saved(reference(shape), tmp_path / "dense"), dtype=torch.float32, latent_norm_eps=1e-6)
    sparse = attach_indexers(dense, "FSF", num_heads=32, head_dim=16, topk=64)
    save_model(sparse, tmp_path / "sparse")
    theirs = GlmMoeDsaForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    for length in (60, 130):
        tokens = torch.randint(96, (length,))
        found = trained(sparse, tokens)
        torch.testing.assert_close(found, expected(theirs, tokens), rtol=0, atol=TRANSFORMERS_LOGPROBS)
        gap = (found - trained(dense, tokens)).abs().max()
        assert gap <= TRANSFORMERS_LOGPROBS if length <= 64 else gap > TRANSFORMERS_LOGPROBS


@pytest.mark.parametrize("shape", ["flash", "v3"])
@torch.inference_mode()
def test_the_mtp_layer_is_a_layer_behind_two_norms(tmp_path: Path, shape: str) -> None:
    """The last layer of a model of transformers as MTP layer; the paper's formula around it (arXiv 2412.19437, 2.2)."""
    theirs = reference(shape)
    saved(theirs, tmp_path)
    file, last = tmp_path / "model.safetensors", "model.layers.2."
    tensors = load_file(file)
    tensors |= {last + name: 1 + 0.1 * torch.randn(48) for name in ("enorm.weight", "hnorm.weight")}
    tensors[last + "eh_proj.weight"] = torch.randn(48, 96) * 96**-0.5
    tensors[last + "shared_head.norm.weight"] = 1 + 0.1 * torch.randn(48)
    tensors[last + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[last + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    if "mlp_layer_types" in config:
        config["mlp_layer_types"] = config["mlp_layer_types"][:2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_model(tmp_path, dtype=torch.float32, latent_norm_eps=1e-6)

    tokens = torch.randint(96, (101,))
    layout = KeyLayout.packed((0, 100))
    batch = ForwardBatch(token_ids=tokens[:-1], positions=torch.arange(100), layout=layout)
    found = ours.logits(ours.mtp(ours(batch), tokens[1:], batch)[0]).log_softmax(-1)

    def norm(x: Tensor, name: str) -> Tensor:
        return tensors[last + name] * x / (x.square().mean(-1, keepdim=True) + theirs.config.rms_norm_eps).sqrt()

    layer = theirs.model.layers[2]
    theirs.config.num_hidden_layers = 2
    hidden = theirs.model(tokens[None, :-1], use_cache=False).last_hidden_state
    embedded = theirs.model.embed_tokens(tokens[None, 1:])
    joined = torch.cat((norm(embedded, "enorm.weight"), norm(hidden, "hnorm.weight")), dim=-1)
    mixed = joined @ tensors[last + "eh_proj.weight"].T
    positions = torch.arange(100)[None]
    output = layer(
        mixed,
        attention_mask=torch.full((100, 100), float("-inf")).triu(1)[None, None],
        position_ids=positions,
        position_embeddings=theirs.model.rotary_emb(mixed, positions),
    )
    wanted = theirs.lm_head(norm(output, "shared_head.norm.weight"))[0].log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TRANSFORMERS_LOGPROBS)


def test_load_runs_with_packed_weights(tmp_path: Path) -> None:
    """What `indexshare.load` gives, C++ kernels included where there is a compiler, is the reference too."""
    theirs = reference("v3", kv_lora_rank=32, moe_intermediate_size=32, num_mtp_layers=0)
    llm = indexshare.load(saved(theirs, tmp_path), device="cpu", dtype="float32", latent_norm_eps=1e-6)
    before = registry.hits.copy()
    tokens = torch.randint(96, (100,))
    with llm.open_session(200) as session:
        found = session.prefill(tokens).log_softmax(-1)
        torch.testing.assert_close(found, expected(theirs, tokens)[-1], rtol=0, atol=TRANSFORMERS_LOGPROBS)
    ran = {name for name, twin in registry.hits - before if twin == native.NAME}
    assert {"linear", "moe_experts"} <= ran or native.enable() is not None
