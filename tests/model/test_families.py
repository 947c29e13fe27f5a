"""Families without indexers: what their config.json may say, and what the rest of the package makes of them.

That their mathematics is right is shown in tests/oracle/test_families.py, against transformers.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from indexshare import runtime
from indexshare.engine.engine import Engine, EngineOptions
from indexshare.engine.llm import LLM
from indexshare.engine.sampler import SamplingParams
from indexshare.engine.scheduler import Limits
from indexshare.engine.sequence import Generation, Output
from indexshare.engine.speculative import SpeculativeSession
from indexshare.errors import CheckpointError, ConfigError
from indexshare.kernels import native, registry
from indexshare.model.config import GlmConfig
from indexshare.model.glm import GlmForCausalLM, run_layers
from indexshare.model.inspect import cache_bytes_per_token, inspect_model, render, token_work, weight_bytes
from indexshare.model.native import pack_model
from indexshare.model.plan import make_plan, this_machine
from indexshare.model.rope_scaling import TYPE_KEYS, YARN_KEYS, RopeScaling
from indexshare.model.weights import load_checkpoint, load_model, save_model

VOCAB = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.15,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# As the released files say it, with old and new keys, in small.
FAMILIES: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 1,
        "rope_theta": 1000000,
        "rope_scaling": None,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "num_nextn_predict_layers": 1,
        "rope_theta": 10000,
        "rope_scaling": YARN,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "q_lora_rank": None,
        "rope_theta": 10000,
        "rope_scaling": YARN,
        "attention_bias": True,
    },
}


def content(family: str, *without: str, **changes: Any) -> dict[str, Any]:
    given = SMALL | {"model_type": family} | FAMILIES[family] | changes
    return {key: value for key, value in given.items() if key not in without}


def built(family: str, **changes: Any) -> GlmForCausalLM:
    model = GlmForCausalLM(GlmConfig.from_json(content(family, **changes)))
    model.init_weights(seed=3)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_written_and_read_again_it_is_the_same(family: str) -> None:
    config = GlmConfig.from_json(content(family))
    assert not config.has_indexers and config.full_layers == ()
    assert not any(config.is_full(layer) for layer in range(config.num_layers_with_mtp))
    written = json.loads(json.dumps(config.to_json_dict()))
    assert written["architectures"] == FAMILIES[family]["architectures"]
    assert not [key for key in written if key.startswith("index")]
    assert GlmConfig.from_json(written) == config


def test_what_an_absent_key_means() -> None:
    lite = GlmConfig.from_json(content("glm4_moe_lite", "first_k_dense_replace", "n_group", "topk_group"))
    assert lite.mlp_layer_types == ("dense", "sparse", "sparse") and lite.rope_interleave and lite.n_group == 1
    v2 = GlmConfig.from_json(content("deepseek_v2", "topk_method", "scoring_func", "norm_topk_prob", n_group=None))
    assert v2.topk_method == "greedy" and not v2.norm_topk_prob and v2.q_lora_rank is None
    fp8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert GlmConfig.from_json(content("deepseek_v3", quantization_config=fp8)).quantization == "fp8"
    assert GlmConfig.from_json(content("deepseek_v3")).rope_scaling == RopeScaling(
        factor=40, original_max_position_embeddings=256, mscale=1.0, mscale_all_dim=1.0
    )


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {"model_type": "deepseek_v4"}, "model_type is 'deepseek_v4'; supported are glm_moe_dsa, "),
        ("deepseek_v3", {"architectures": ["DeepseekV2ForCausalLM"]}, "model_type is 'deepseek_v3' but architectures"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; only 'sigmoid'"),
        ("deepseek_v3", {"scoring_func": "sqrtsoftplus"}, "scoring_func is 'sqrtsoftplus'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'; only 'noaux_tc'"),
        ("deepseek_v3", {"n_group": None}, "config.json lacks n_group"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3: 8 experts"),
        ("deepseek_v3", {"n_group": 8}, "n_group is 8"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group is 5"),
        ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 3}, "topk_group is 1"),
        (
            "deepseek_v3",
            {"rope_scaling": YARN | {"type": "llama3"}},
            "rope_type is 'llama3'; only 'default' and 'yarn'",
        ),
        ("deepseek_v3", {"rope_scaling": YARN | {"rope_type": "linear"}}, "rope_type is 'linear and yarn'"),
        ("deepseek_v3", {"rope_scaling": YARN | {"factor": None}}, "needs factor"),
        ("deepseek_v3", {"rope_scaling": YARN | {"factor": -2}}, r"rope_parameters\.factor"),
        (
            "deepseek_v3",
            {"rope_scaling": YARN | {"factor": "40"}},
            r"Expected `float`, got `str`.*rope_scaling\.factor",
        ),
        ("deepseek_v3", {"rope_scaling": YARN | {"mscale": None}}, "mscale and mscale_all_dim"),
        ("deepseek_v3", {"rope_scaling": YARN | {"attention_factor": 1.5}}, "attention_factor"),
        ("deepseek_v3", {"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ("deepseek_v3", {"rope_theta": None}, "lacks rope_parameters"),
        ("deepseek_v3", {"index_topk": 64}, "unknown keys in config.json: index_topk"),
        ("deepseek_v3", {"qk_nope_head_dim": None}, "lacks qk_nope_head_dim"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "only 'greedy' and 'group_limited_greedy'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("glm4_moe_lite", {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_that_names_it(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GlmConfig.from_json(content(family, **changes))


NUMBERS = (0, 1, 2, -1, 0.5, 1e-300, 1e300, float("nan"), float("inf"), 2**70)
JUNK = st.sampled_from((*NUMBERS, None, True, "", "yarn", "greedy", [], [1], {}, {"rope_type": "yarn"}, {"type": []}))


@given(family=st.sampled_from(tuple(FAMILIES)), data=st.data())
def test_no_configuration_is_anything_but_read_or_refused(family: str, data: st.DataObject) -> None:
    given_content = content(family)
    for key in data.draw(st.lists(st.sampled_from(sorted(given_content)), min_size=1, max_size=2, unique=True)):
        given_content[key] = data.draw(JUNK)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from((*YARN_KEYS, *TYPE_KEYS)))
        given_content["rope_scaling"] = YARN | {name: data.draw(JUNK)}
    try:
        config = GlmConfig.from_json(given_content)
    except ConfigError:
        return
    assert GlmConfig.from_json(json.loads(json.dumps(config.to_json_dict()))) == config
    if config.rope_scaling is not None and config.qk_rope_head_dim < 1000:
        frequencies = config.rope_scaling.frequencies(config.qk_rope_head_dim, config.rope_theta)
        assert len(frequencies) == config.qk_rope_head_dim // 2 and all(0 <= each <= 1 for each in frequencies)


def test_indexers_are_attached_or_there_is_a_reason() -> None:
    changes: dict[str, Any] = {"model_type": "glm_moe_dsa", "indexer_types": ("full", "shared", "full")}
    changes |= {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8}
    config = replace(GlmConfig.from_json(content("deepseek_v3")), **changes)
    assert config.full_layers == (0, 2) and config.is_full(3)
    assert GlmConfig.from_json(config.to_json_dict()) == config
    for changed, message in (
        ({}, "q_lora_rank is null: an indexer reads the query latent"),
        ({"q_lora_rank": 16}, "topk_method is 'group_limited_greedy'; only 'noaux_tc' is supported in glm_moe_dsa"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(GlmConfig.from_json(content("deepseek_v2", **changed)), **changes)
    with pytest.raises(ConfigError, match="deepseek_v3 has no indexers"):
        GlmConfig.from_json(content("deepseek_v3"), index_pattern="FSF")
    with pytest.raises(ConfigError, match="with some it is glm_moe_dsa"):
        replace(GlmConfig.from_json(content("deepseek_v3")), indexer_types=("full",) * 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_counts_the_network_and_plan_has_dense_attention(family: str) -> None:
    config = GlmConfig.from_json(content(family))
    with torch.device("meta"):
        tensors = GlmForCausalLM(config).state_dict()
    counted = sum(prod(t.shape) for name, t in tensors.items() if not name.endswith("e_score_correction_bias"))
    inspection = inspect_model(config, family)
    assert inspection.parameters == counted
    assert weight_bytes(config, "float32") == 4 * sum(prod(tensor.shape) for tensor in tensors.values())
    assert cache_bytes_per_token(config)[:2] == (3 * (32 + 8) * 2, 0)
    work = token_work(config, 1000)
    assert work.indexer == 0 and work.sparse_attention == work.dense_attention == work.total - work.weights
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(inspection))
    assert "3 layers: dense attention" in capture.get() and "no indexers" in capture.get()
    plan = make_plan(config, family, 4096, this_machine())
    assert any("dense attention" in note for note in plan.notes)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_gives_what_a_session_gives_and_so_do_drafts(family: str) -> None:
    """fp32; prompts longer than a page; without and with an MTP layer; weights packed where there is a compiler."""
    model = built(family)
    pack_model(model)
    llm = LLM(model)
    in_one_call = registry.hits[run_layers.name, native.NAME]
    prompts = [tuple(torch.randint(VOCAB, (length,)).tolist()) for length in (5, 90, 33)]
    params = SamplingParams(max_new_tokens=8)

    def alone(prompt: Sequence[int]) -> list[int]:
        with llm.open_session(120, page_size=16) as session:
            return [token.token_id for token in session.stream(prompt, params)]

    expected = [alone(prompt) for prompt in prompts]
    outputs: list[Output] = []
    limits = Limits(max_sequences=4, max_step_tokens=40)
    engine = Engine(llm, EngineOptions(limits=limits, page_size=16, cache_tokens=512), deliver=outputs.extend)
    wishes = [Generation(prompt_ids=prompt, params=params) for prompt in prompts]
    for wish in wishes:
        engine.submit(wish)
    while engine.step():
        pass
    found = [[t.token_id for o in outputs if o.generation is wish for t in o.tokens] for wish in wishes]
    assert found == expected
    if model.config.num_nextn_predict_layers:
        with llm.open_session(120, page_size=16, num_draft_tokens=3) as session:
            assert isinstance(session, SpeculativeSession)
            assert [token.token_id for token in session.stream(prompts[1], params)] == expected[1]
            assert session.statistics.drafted[0] > 0
    assert registry.hits[run_layers.name, native.NAME] == in_one_call, "dense attention goes operation by operation"


def test_a_long_context_is_attended_to_without_expanding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody counted the expanded keys and values of such a model: beyond half of the workspace they are not made."""
    llm = LLM(built("deepseek_v3"))
    tokens = torch.randint(VOCAB, (1000,)).tolist()

    def read() -> tuple[torch.Tensor, set[str]]:
        before = registry.hits.copy()
        with llm.open_session(1024) as session:
            logits = session.prefill(tokens)
        return logits, {name for name, _ in registry.hits - before}

    wide, with_room = read()
    monkeypatch.setenv("INDEXSHARE_WORKSPACE_MIB", "1")
    runtime.settings.cache_clear()
    try:
        narrow, without_room = read()
    finally:
        monkeypatch.undo()
        runtime.settings.cache_clear()
    assert "mla_dense" not in with_room and {"mla_dense", "mla_expanded"} <= without_room
    torch.testing.assert_close(wide, narrow, rtol=1e-4, atol=1e-4)


def with_copies(directory: Path, family: str, change: float = 0.0) -> Path:
    """A checkpoint whose MTP layer brings embedding and head along, as those of DeepSeek-V3 and GLM-4.7-Flash do."""
    model = built(family)
    save_model(model, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"] + change
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_copies_in_the_mtp_layer_are_borrowed_and_others_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexshare.model.opening.COMPARED_BYTES", 1000)
    for family in ("glm4_moe_lite", "deepseek_v3"):
        model, report = load_checkpoint(with_copies(tmp_path / family, family), dtype=torch.float32)
        assert model.mtp_stack is not None and not report.skipped_unexpected
    with pytest.raises(CheckpointError, match=r"shared_head\.head\.weight' is not a copy of 'lm_head\.weight'"):
        load_model(with_copies(tmp_path / "own", "deepseek_v3", change=1e-3))


def test_files_that_are_not_the_configurations(tmp_path: Path) -> None:
    save_model(built("deepseek_v2"), tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"q_lora_rank": 16}))
    with pytest.raises(CheckpointError, match=r"lacks .*q_a_proj"):
        load_model(tmp_path)
    file.write_text(json.dumps(written | {"attention_bias": False}))
    with pytest.raises(CheckpointError, match=r"o_proj\.bias.* without a place"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_while_loading_it_stays_close(tmp_path: Path, family: str) -> None:
    plain = built(family)
    save_model(plain, tmp_path)
    rounded = load_model(tmp_path, dtype=torch.float32, quant="int8")
    assert pack_model(rounded) is None or registry.get("linear").twins == []
    tokens = torch.randint(VOCAB, (80,)).tolist()
    logprobs = []
    for model in (plain, rounded):
        with LLM(model).open_session(128) as session:
            logprobs.append(session.prefill(tokens).log_softmax(-1))
    gap = (logprobs[0] - logprobs[1]).abs().max()
    assert 0 < gap < 0.5
