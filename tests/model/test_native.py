"""Whole layers in C++ against the same layers operation by operation, for every shape of batch and every format."""

import copy
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from indexshare.engine.cache import PagedCache
from indexshare.engine.llm import LLM
from indexshare.engine.sampler import SamplingParams
from indexshare.errors import KernelError
from indexshare.kernels import native, registry
from indexshare.kernels.cache_formats import CacheFormats
from indexshare.kernels.layout import KeyLayout
from indexshare.kernels.packed import Matrix, PackedWeight
from indexshare.model import recipes
from indexshare.model.batch import ForwardBatch, Trace
from indexshare.model.glm import GlmForCausalLM, weights_of
from indexshare.model.native import Layer, Model, pack_model
from indexshare.model.weights import load_checkpoint, save_model

INSTRUCTION_SETS = native.runnable()
BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = 2e-4  # of fp32 log-probabilities, sums in another order
NUM_TOKENS = 150
TEXT = (torch.arange(NUM_TOKENS) * 37 % 251).tolist()

ROUNDED = CacheFormats(latents="int8", index_keys="int8")

pytestmark = pytest.mark.skipif(native.enable() is not None, reason="there is no C++ compiler")


def make_model(dtype: torch.dtype = FP32, **changes: object) -> GlmForCausalLM:
    """Weights that keep activations near one, so that selections and experts differ from token to token."""
    torch.manual_seed(1)
    model = GlmForCausalLM(recipes.tiny(**changes)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.normal_(0, 0.02)
        elif parameter.dim() == 1:
            parameter.normal_(1, 0.1)
        else:
            parameter.normal_(0, 1 if "embed" in name else parameter.shape[-1] ** -0.5)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(FP32 if parameter.dim() == 1 and len(parameter) == 4 else dtype)
    return model


def packed(model: GlmForCausalLM) -> GlmForCausalLM:
    twin = copy.deepcopy(model)
    assert pack_model(twin) is None
    return twin


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "instruction_set", lambda: request.param)
    return request.param


def ran_in_one_call(function: Callable[[], Tensor]) -> Tensor:
    before = registry.hits["run_layers", native.NAME]
    result = function()
    assert registry.hits["run_layers", native.NAME] > before
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"index_topk_pattern": "FFFFFF"},
        {"rope_interleave": False, "indexer_rope_interleave": False},
        {"norm_topk_prob": False, "n_shared_experts": 2, "num_experts_per_tok": 1},
        {"num_attention_heads": 20, "kv_lora_rank": 48, "v_head_dim": 24, "qk_nope_head_dim": 12, "index_n_heads": 6},
        {"hidden_size": 72, "q_lora_rank": 20, "index_topk": 3, "index_head_dim": 40, "intermediate_size": 100},
    ],
    ids=lambda changes: "-".join(changes) or "tiny",
)
def test_logprobs_are_those_of_the_specification(isa: str, changes: dict[str, object]) -> None:
    model = make_model(**changes)
    expected = LLM(model).logprobs(TEXT)
    found = ran_in_one_call(lambda: LLM(packed(model)).logprobs(TEXT))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_bfloat16_is_no_further_from_fp64_than_the_specification(isa: str) -> None:
    model = make_model(BF16)
    reference = LLM(copy.deepcopy(model).double()).logprobs(TEXT)
    errors = [(LLM(each).logprobs(TEXT) - reference).abs().mean() for each in (packed(model), copy.deepcopy(model))]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantised_weights(isa: str, tmp_path: Path, quant: str) -> None:
    save_model(make_model(), tmp_path)
    model, _ = load_checkpoint(tmp_path, dtype=FP32, quant=quant)
    expected = LLM(copy.deepcopy(model)).logprobs(TEXT)
    found = ran_in_one_call(lambda: LLM(packed(model)).logprobs(TEXT))
    # Until a sum in another order crosses the border between two levels; from there activations differ by one level.
    torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=TOLERANCE)
    assert (found - expected).abs().mean() < 0.02


@pytest.mark.parametrize(
    "caches", [CacheFormats(latents="int8"), CacheFormats(index_keys="int8"), ROUNDED], ids=["latents", "keys", "both"]
)
def test_rounded_caches(isa: str, caches: CacheFormats) -> None:
    model = make_model()
    expected = LLM(copy.deepcopy(model), caches=caches).logprobs(TEXT)
    found = ran_in_one_call(lambda: LLM(packed(model), caches=caches).logprobs(TEXT))
    # Until a sum in another order crosses the border between two levels, as with quantised weights.
    torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=TOLERANCE)
    assert (found - expected).abs().mean() < 0.02
    assert not torch.equal(found, LLM(packed(model)).logprobs(TEXT))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("quant", [None, "int8", "int4", "caches"])
def test_the_same_answer_always(isa: str, tmp_path: Path, dtype: torch.dtype, quant: str | None) -> None:
    """Bit-identical log-probabilities whatever the chunks, the threads, the pages and what was read before."""
    save_model(make_model(dtype), tmp_path)
    model, _ = load_checkpoint(tmp_path, dtype=dtype, quant=None if quant == "caches" else quant)
    assert pack_model(model) is None
    llm = LLM(model, caches=ROUNDED) if quant == "caches" else LLM(model)
    expected = llm.logprobs(TEXT)
    for chunk_size in (1, 7, 50, 128):
        assert torch.equal(llm.logprobs(TEXT, chunk_size=chunk_size), expected)
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(llm.logprobs(TEXT), expected)
        assert torch.equal(llm.logprobs(TEXT, chunk_size=1), expected)
    for page_size in (1, 4, 100):
        with llm.open_session(NUM_TOKENS, page_size=page_size) as session:
            session.prefill(TEXT[:90])
            session.truncate(33)  # as when a prefix was found in a cache
            assert torch.equal(session.logprobs(TEXT[33:]), expected[32:])


def test_sequences_of_a_batch_do_not_see_each_other(isa: str) -> None:
    """Three sequences, some with a past, in pages that lie in no order: each gets its own result, bit for bit."""
    model = packed(make_model())
    lengths, news = (70, 9, 41), (5, 9, 1)
    cache = PagedCache(model.config, num_pages=64, page_size=4, dtype=FP32, device=torch.device("cpu"))
    tables = [torch.tensor([cache.allocate(80)]) for _ in lengths]
    tables = [table.flip(1) for table in tables]
    texts = [torch.tensor(TEXT[i * 20 : i * 20 + length]) for i, length in enumerate(lengths)]

    def batch(chosen: list[int], starts: list[int], ends: list[int]) -> ForwardBatch:
        news = [end - start for start, end in zip(starts, ends, strict=True)]
        return ForwardBatch(
            token_ids=torch.cat([texts[b][s:e] for b, s, e in zip(chosen, starts, ends, strict=True)]),
            positions=torch.cat([torch.arange(s, e) for s, e in zip(starts, ends, strict=True)]),
            layout=KeyLayout(
                sequence_starts=(0, *torch.tensor(news).cumsum(0).tolist()),
                context_lengths=tuple(ends),
                page_table=torch.cat([tables[b] for b in chosen]),
                page_size=4,
            ),
            cache=cache.view(),
        )

    alone = []
    for b, (length, new) in enumerate(zip(lengths, news, strict=True)):
        if length > new:
            model(batch([b], [0], [length - new]))
        alone.append(model(batch([b], [length - new], [length])))
    together = model(batch([0, 1, 2], [n - k for n, k in zip(lengths, news, strict=True)], list(lengths)))
    assert torch.equal(together, torch.cat(alone))


def test_drafts_are_those_of_the_specification(isa: str) -> None:
    """The MTP layer and its query-only steps; short contexts, where everything is attended to, and long ones."""
    model = make_model()
    params = SamplingParams(max_new_tokens=40)
    for length in (3, 60):
        found = []
        for each in (packed(model), copy.deepcopy(model)):
            with LLM(each).open_session(120, num_draft_tokens=3) as session:
                tokens = [token.token_id for token in session.stream(TEXT[:length], params)]
                found.append((tokens, session.statistics))
        assert found[0] == found[1]
        assert sum(found[0][1].drafted) > 0


def test_drafts_with_rounded_caches_change_no_token(isa: str) -> None:
    """The MTP layer's caches are rounded too; whatever is drafted, greedy tokens are those of plain decoding."""
    llm = LLM(packed(make_model()), caches=ROUNDED)
    params = SamplingParams(max_new_tokens=40)
    for length in (3, 60):
        found = []
        for num_draft_tokens in (0, 3):
            with llm.open_session(120, num_draft_tokens=num_draft_tokens) as session:
                found.append([token.token_id for token in session.stream(TEXT[:length], params)])
        assert found[0] == found[1]


def test_a_trace_sees_the_selections(isa: str) -> None:
    model = make_model()
    for length in (5, 60):
        seen = []
        for each in (packed(model), copy.deepcopy(model)):
            with LLM(each).open_session(80) as session:
                session.prefill(TEXT[:length])
                seen.append(session.selected_positions([7]))
        assert seen[0].keys() == seen[1].keys()
        for layer, positions in seen[0].items():
            assert (positions is None) == (seen[1][layer] is None) == (length == 5)
            assert positions is None or torch.equal(positions, seen[1][layer])


def test_nan_names_the_layer() -> None:
    model = make_model()
    model.model.layers[4].self_attn.indexer.wk.weight[0, 0] = float("nan")
    llm = LLM(packed(model))
    for chunk_size in (512, 1):
        with pytest.raises(KernelError, match=r"layer 4: .* NaN; run `indexshare doctor`"):
            llm.logprobs(TEXT, chunk_size=chunk_size)


def test_what_replaces_the_parameters_afterwards_is_not_read() -> None:
    model = packed(make_model(BF16))
    llm = LLM(model)
    expected = llm.logprobs(TEXT)
    weight = model.model.embed_tokens.weight
    size, weight.data = weight.shape, torch.zeros(1, dtype=BF16)
    taken = [torch.ones(size, dtype=BF16) for _ in range(8)]  # where the old numbers were, if they were freed
    assert torch.equal(llm.logprobs(TEXT), expected)
    del taken


def test_threads_of_the_caller_do_not_meet() -> None:
    llm = LLM(packed(make_model()))
    texts = [list(range(1, 20)), list(range(30, 90))]
    expected = [llm.logprobs(text) for text in texts]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: (i % 2, llm.logprobs(texts[i % 2])), range(60)))
    assert all(torch.equal(result, expected[which]) for which, result in found)


def test_structures_are_those_of_the_kernels(isa: str) -> None:
    sizes = [native.load(isa).structure_size(which) for which in range(3)]
    assert sizes == [ctypes.sizeof(each) for each in (Matrix, Layer, Model)]


def test_dense_attention_goes_operation_by_operation() -> None:
    model = make_model()
    before = registry.hits["run_layers", registry.SPECIFICATION]
    found = LLM(packed(model)).logprobs(TEXT, attention="dense")
    assert registry.hits["run_layers", registry.SPECIFICATION] > before
    torch.testing.assert_close(found, LLM(model).logprobs(TEXT, attention="dense"), rtol=0, atol=TOLERANCE)


def test_packing_keeps_the_numbers_and_a_packed_model_can_be_saved(tmp_path: Path) -> None:
    model = make_model(BF16)
    save_model(packed(model), tmp_path / "packed")
    save_model(model, tmp_path / "plain")
    name = "model.safetensors"
    assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_packing_replaces_what_it_packs() -> None:
    """Memory is that of the weights: plain copies stay of kv_b_proj, routers and index head weights alone."""
    model = packed(make_model())
    plain = {name for name, weight in weights_of(model).items() if isinstance(weight, Tensor) and weight.dim() > 1}
    kept = ("kv_b_proj.weight", "mlp.gate.weight", "weights_proj.weight", "embed_tokens.weight")
    assert all(name.endswith(kept) for name in plain)
    assert sum(isinstance(weight, PackedWeight) for weight in weights_of(model).values()) > 40


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({"kv_lora_rank": 24}, FP32, "multiples of 16"),
        ({"moe_intermediate_size": 24}, FP32, "multiples of 16"),
        ({}, torch.float16, "float16"),
    ],
)
def test_a_model_that_cannot_be_packed_stays_as_it_is(
    changes: dict[str, object], dtype: torch.dtype, reason: str
) -> None:
    model = make_model(dtype, **changes)
    assert reason in str(pack_model(model))
    assert not any(isinstance(weight, PackedWeight) for weight in weights_of(model).values())


def test_other_caches_are_not_taken() -> None:
    model = packed(make_model())
    cache = PagedCache(model.config, num_pages=8, page_size=4, dtype=BF16, device=torch.device("cpu"))
    layout = KeyLayout(sequence_starts=(0, 2), context_lengths=(2,), page_table=torch.tensor([[0]]), page_size=4)
    batch = ForwardBatch(
        token_ids=torch.tensor([1, 2]), positions=torch.arange(2), layout=layout, cache=cache.view(), trace=Trace()
    )
    twin = registry.get("run_layers").twins[0]
    tokens = batch.token_ids
    assert "caches are torch.bfloat16" in str(twin.supports(model.stack, tokens, None, batch, 0))
    assert "training" in str(twin.supports(model.stack, tokens, None, replace(batch, cache=None), 0))
    assert "dense" in str(twin.supports(model.stack, tokens, None, replace(batch, attention="dense"), 0))
    assert "packed" in str(twin.supports(make_model().stack, tokens, None, batch, 0))
