"""The sampler against a naive reference in plain Python; greedy, seeds, penalties and log-probabilities."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from indexshare.engine import sampler
from indexshare.engine.sampler import Sampler, SamplingParams, candidate_distribution
from indexshare.errors import CheckpointError, RequestError

# Multiples of 1/4: ties are common, and no probability lies within rounding of a threshold by accident.
logit_lists = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=24)


def naive_distribution(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """temperature -> top-k -> top-p -> min-p, one token at a time."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.top_k:
        order = order[: params.top_k]
    weights = {token: math.exp((logits[token] - max(logits)) / params.temperature) for token in order}
    total = sum(weights.values())
    probabilities = {token: weight / total for token, weight in weights.items()}
    kept: list[int] = []
    mass = 0.0
    for token in order:
        if kept and params.top_p < 1.0 and mass >= params.top_p:
            break
        kept.append(token)
        mass += probabilities[token]
    kept = [token for token in kept if probabilities[token] >= params.min_p * probabilities[kept[0]]]
    total = sum(probabilities[token] for token in kept)
    return {token: probabilities[token] / total for token in kept}


@given(
    logits=logit_lists,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 30),
    top_p=st.sampled_from([0.05, 0.31, 0.613, 0.977, 1.0]),
    min_p=st.sampled_from([0.0, 0.0123, 0.217, 1.0]),
    leading=st.sampled_from([1, 3, 1024]),
)
def test_filters_equal_the_naive_reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, leading: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "LEADING", leading)
        token_ids, probabilities = candidate_distribution(torch.tensor(logits), params)
    found = dict(zip(token_ids.tolist(), probabilities.tolist(), strict=True))
    wanted = naive_distribution(logits, params)
    is_filtered = top_k > 0 or top_p < 1.0 or min_p > 0.0
    assert list(found) == (list(wanted) if is_filtered else sorted(wanted))
    assert found == pytest.approx(wanted, abs=1e-12)


@given(logits=logit_lists, seed=st.integers(0, 2**63 - 1))
def test_greedy_is_argmax_with_ties_to_the_lower_id(logits: list[float], seed: int) -> None:
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1, seed=seed)
    assert Sampler(params).next(torch.tensor(logits)).token_id == logits.index(max(logits))


@given(logits=logit_lists)
def test_top_k_of_one_and_a_tiny_temperature_are_greedy(logits: list[float]) -> None:
    best = logits.index(max(logits))
    assert Sampler(SamplingParams(temperature=2.0, top_k=1)).next(torch.tensor(logits)).token_id == best
    token = Sampler(SamplingParams(temperature=1e-300)).next(torch.tensor(logits)).token_id
    assert logits[token] == max(logits)


def draws(logits: Tensor, params: SamplingParams, num_draws: int) -> list[int]:
    one = Sampler(params)
    return [one.next(logits).token_id for _ in range(num_draws)]


def test_a_seed_is_reproducible_and_independent_of_the_global_generator() -> None:
    logits = torch.randn(50)
    params = SamplingParams(temperature=1.0, seed=7)
    first = draws(logits, params, 40)
    torch.manual_seed(123)
    torch.rand(10)
    assert draws(logits, params, 40) == first
    assert draws(logits, replace(params, seed=8), 40) != first


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 6,000 draws and 8 tokens: below the 99.99 % point for 7 degrees of freedom."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, 0.25])
    params = SamplingParams(temperature=1.3, seed=3)
    num_draws = 6000
    counts = torch.bincount(torch.tensor(draws(logits, params, num_draws)), minlength=8).double()
    expected = torch.softmax(logits.double() / 1.3, dim=-1) * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 29.9


def test_repetition_penalty_counts_prompt_and_output() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[0, 3])
    logits = torch.tensor([3.0, 2.0, 1.9, -0.5])
    # 0 is in the prompt: 1.5; then 1 was drawn: 1.0; then 2: 0.95; 0 leads again
    assert [sampler.next(logits).token_id for _ in range(4)] == [1, 2, 0, 0]
    only_negative = torch.tensor([-1.0, -1.9, -9.0, -9.0])
    assert Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[0]).next(only_negative).token_id == 1


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.tensor([2.0, 1.25, 0.0])
    presence = Sampler(SamplingParams(presence_penalty=1.0), prompt_ids=[0, 0, 0])
    assert [presence.next(logits).token_id for _ in range(4)] == [0, 1, 0, 0]  # subtracted once
    frequency = Sampler(SamplingParams(frequency_penalty=1.0), prompt_ids=[0, 0, 0])
    assert [frequency.next(logits).token_id for _ in range(4)] == [0, 1, 0, 1]  # 2, 1.25, 1, then 0 and .25


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(9)
    wanted = torch.log_softmax(logits, dim=-1)
    token = Sampler(SamplingParams(temperature=5.0, top_k=2, logprobs=3, seed=1)).next(logits)
    assert token.logprob == pytest.approx(float(wanted[token.token_id]))
    assert token.top_logprobs is not None
    values, token_ids = wanted.topk(3)
    assert [pair[0] for pair in token.top_logprobs] == token_ids.tolist()
    assert [pair[1] for pair in token.top_logprobs] == pytest.approx(values.tolist())
    assert Sampler(SamplingParams()).next(logits).logprob is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_named(bad: float) -> None:
    with pytest.raises(CheckpointError, match="doctor"):
        Sampler(SamplingParams()).next(torch.tensor([0.0, bad, 1.0]))


def test_masked_logits_are_never_drawn() -> None:
    assert set(draws(torch.tensor([-math.inf, 0.0, -math.inf, 0.0]), SamplingParams(temperature=9.0), 50)) == {1, 3}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", [0, -1, 1.0, True, "3", 2**31, 2**63, None]),
        ("temperature", [-0.1, math.nan, math.inf, True, "1", 101, None]),
        ("top_k", [-1, 1.5, True, 2**63, math.nan]),
        ("top_p", [0.0, -1, 1.01, math.nan, True]),
        ("min_p", [-0.1, 1.1, math.nan, False]),
        ("repetition_penalty", [0.0, -1.0, math.nan, True, math.inf]),
        ("presence_penalty", [-2.1, 2.1, math.nan, True]),
        ("frequency_penalty", [-2.1, 2.1, math.nan, True]),
        ("seed", [-1, 2**63, 1.0, True, None]),
        ("logprobs", [-1, 21, True, 1.0, math.nan]),
        ("stop", ["", None, {"a"}, ("",), (1,), ("x" * 1025,), ("x",) * 17]),
    ],
)
def test_bad_values_are_refused_by_name(field: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=field):
            SamplingParams(**{field: value})


def test_whole_numbers_are_numbers_and_one_text_is_a_stop_text() -> None:
    assert SamplingParams(temperature=1, top_p=1).temperature == 1
    assert SamplingParams(stop="one").stop == SamplingParams(stop=["one"]).stop == ("one",)
