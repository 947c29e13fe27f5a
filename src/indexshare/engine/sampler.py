"""Logits to a token: penalties, temperature, top-k, top-p, min-p, then one uniform number per token.

The order of the steps is fixed and each step sees the result of the one before:

    repetition, presence and frequency penalty -> temperature -> top-k -> top-p -> min-p -> renormalise -> draw

Ties go to the lower token id everywhere. A draw inverts the cumulative distribution at one uniform number from the
request's own CPU generator, so a seed means the same tokens on every device and whatever else is being served.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypedDict

import numpy as np
import torch
from torch import Tensor

from indexshare.errors import CheckpointError, RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
LEADING = 1024  # tokens that are put in order first
NOT_FINITE = "the model's logits are not finite numbers: run `indexshare doctor` on it"


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is not an integer of the range (a bool is not): RequestError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer from {low:,} to {high:,}, not {value!r}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # a NaN fails every comparison
        raise RequestError(f"{name} must be a number from {low} to {high}, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request draws its tokens; the defaults are greedy decoding.

    max_new_tokens: how many tokens at most, 1 or more.
    temperature: 0 is greedy (argmax; top_k, top_p, min_p and seed then have no effect); at most 100.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the shortest prefix of the tokens in order of probability that holds at least this mass; in (0, 1].
    min_p: keep tokens at least this fraction as probable as the most probable one; in [0, 1].
    repetition_penalty: over prompt and output: divides positive logits, multiplies negative ones; in (0, 100].
    presence_penalty, frequency_penalty: over the output only: subtracted once, or once per occurrence; in [-2, 2].
    stop: texts (or one) that end the output and are not part of it; at most 16 of at most 1,024 characters.
    seed: of this request's own generator.
    logprobs: None, or how many of the most probable tokens to report beside each drawn one, 0 to 20.

    Raises RequestError, which names the field, when a value is of the wrong type or out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: Sequence[str] = ()
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        check_integer("top_k", self.top_k, 0, 2**31 - 1)
        _check_number("top_p", self.top_p, math.ulp(0.0), 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 1e-6, 100.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_integer("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list | tuple) or len(stops) > MAX_STOP_STRINGS:
            raise RequestError(f"stop must be at most {MAX_STOP_STRINGS} texts, not {stops!r:.200}")
        for text in stops:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise RequestError(f"stop: each text must have 1 to {MAX_STOP_LENGTH} characters, not {text!r:.200}")
        object.__setattr__(self, "stop", tuple(stops))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From keyword arguments. Raises RequestError for an unknown one too."""
        known = SamplingOptions.__annotations__
        if unknown := sorted(options.keys() - known.keys()):
            raise RequestError(f"unknown argument {unknown[0]!r}; those of sampling are {', '.join(known)}")
        return cls(**options)


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of a request; their meaning, ranges and defaults are those of `SamplingParams`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: Sequence[str]
    seed: int
    logprobs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """A drawn token. Log-probabilities are those of the model itself: before penalties, temperature and filters.

    logprob and top_logprobs [(token id, log-probability)] are None unless the request asked for `logprobs`.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


def candidate_distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The distribution that a draw follows, from logits that already carry the penalties.

    logits: [vocab] fp32. Needs temperature > 0.
    Returns (token ids [n] int64, probabilities [n] fp64, summing to 1): all tokens by id where there is no filter, else
    those that pass, most probable first, ties by lower id.
    """
    scaled = logits.double()
    scaled = (scaled - scaled.max()) / params.temperature  # shifted first: a tiny temperature must not overflow
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return torch.arange(len(scaled), device=scaled.device), torch.softmax(scaled, dim=-1)
    if params.top_k > 0:
        ordered, token_ids = _largest(scaled, params.top_k)
        probabilities = torch.softmax(ordered, dim=-1)
    else:
        # Nearly always the filters cut within the first few tokens; sorting a whole vocabulary takes milliseconds.
        norm = scaled.logsumexp(dim=-1)
        ordered, token_ids = _largest(scaled, LEADING)
        probabilities = (ordered - norm).exp()
        is_cut = probabilities.sum() > params.top_p or probabilities[-1] < params.min_p * probabilities[0]
        if len(ordered) < len(scaled) and not is_cut:
            ordered, token_ids = _largest(scaled, len(scaled))
            probabilities = (ordered - norm).exp()
    if params.top_p < 1.0:
        mass_before = torch.cumsum(probabilities, dim=-1) - probabilities
        num_kept = max(1, int((mass_before < params.top_p).sum()))
        probabilities, token_ids = probabilities[:num_kept], token_ids[:num_kept]
    if params.min_p > 0.0:
        num_kept = int((probabilities >= params.min_p * probabilities[0]).sum())
        probabilities, token_ids = probabilities[:num_kept], token_ids[:num_kept]
    return token_ids, probabilities / probabilities.sum()


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of values [n] and their indices, in descending order, ties by lower index."""
    if count >= len(values):
        return torch.sort(values, descending=True, stable=True)
    floor = values.topk(count).values[-1]
    indices = (values >= floor).nonzero()[:, 0]  # with all that tie with the last one
    ordered, order = torch.sort(values[indices], descending=True, stable=True)
    return ordered[:count], indices[order[:count]]


def draw(weights: Tensor, generator: torch.Generator) -> int:
    """An index of weights [n] fp64, which are not negative and not all 0, in proportion to them; one uniform number."""
    bounds = torch.cumsum(weights, dim=-1)
    uniform = torch.rand((), dtype=torch.float64, generator=generator).to(bounds.device)
    return int(torch.searchsorted(bounds, uniform * bounds[-1], right=True))  # below the last bound, also rounded


def _greedy(logits: Tensor) -> int:
    return int(logits.cpu().numpy().argmax())  # the lowest id of equals, which torch.argmax does not promise


class Sampler:
    """Draws the tokens of one request and remembers what the penalties need.

    prompt_ids: the tokens before the first drawn one (they count for repetition_penalty only).
    """

    def __init__(self, params: SamplingParams, *, prompt_ids: Sequence[int] = ()) -> None:
        self._params = params
        self._generator = torch.Generator(device="cpu").manual_seed(params.seed)
        self._prompt_ids = tuple(set(prompt_ids)) if params.repetition_penalty != 1.0 else ()
        self._counts: Tensor | None = None  # [vocab] how often each token was drawn, kept when a penalty needs it
        self._seen: Tensor | None = None  # [vocab] in the prompt or drawn

    @property
    def generator(self) -> torch.Generator:
        """The request's own generator: everything random about the request comes from it."""
        return self._generator

    @property
    def is_plainly_greedy(self) -> bool:
        """Whether the most probable token is drawn, whatever came before."""
        return self._params.temperature == 0.0 and not self._has_penalties

    def next(self, logits: Tensor) -> SampledToken:
        """Draw one token from logits [vocab] fp32 on any device, and count it.

        Raises CheckpointError when the logits are not numbers.
        """
        return self.record(self.draw(logits), logits)

    def draw(self, logits: Tensor) -> int:
        """Draw one token, as `next`, without counting it."""
        penalised = self._penalise(logits)
        if self._params.temperature == 0.0:
            return _greedy(penalised)
        token_ids, probabilities = candidate_distribution(penalised, self._params)
        return int(token_ids[draw(probabilities, self._generator)])

    def greedy(self, logits: Tensor) -> list[int]:
        """The most probable token of each row of logits [n, vocab], without counting it; when `is_plainly_greedy`."""
        rows = logits.cpu().numpy()
        chosen = rows.argmax(-1)  # a NaN is found before any number
        best = rows[np.arange(len(rows)), chosen]
        if not np.isfinite(best).all():
            raise CheckpointError(NOT_FINITE)
        return chosen.tolist()

    def probabilities(self, logits: Tensor, *, ahead: Sequence[int] = ()) -> Tensor:
        """What `next` would draw from after the tokens `ahead`, which are not counted: fp64 [vocab], summing to 1.

        Greedy: 1 for one token. Errors as in `next`.
        """
        penalised = self._penalise(logits, ahead)
        spread = torch.zeros_like(penalised, dtype=torch.float64)
        if self._params.temperature == 0.0:
            spread[_greedy(penalised)] = 1.0
            return spread
        token_ids, probabilities = candidate_distribution(penalised, self._params)
        return spread.index_copy_(0, token_ids, probabilities)

    def record(self, token_id: int, logits: Tensor) -> SampledToken:
        """Count a token that was drawn after `logits`, by `next` or by other means, and report it."""
        if self._counts is not None and self._seen is not None:
            self._counts[token_id] += 1
            self._seen[token_id] = True
        return self.report(token_id, logits)

    def report(self, token_id: int, logits: Tensor) -> SampledToken:
        """A token after `logits`, with log-probabilities if the request asked for them."""
        num_logprobs = self._params.logprobs
        if num_logprobs is None:
            return SampledToken(token_id=token_id)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        ordered, token_ids = _largest(logprobs, max(num_logprobs, 1))
        top = zip(token_ids[:num_logprobs].tolist(), ordered[:num_logprobs].tolist(), strict=True)
        return SampledToken(token_id=token_id, logprob=float(logprobs[token_id]), top_logprobs=tuple(top))

    @property
    def _has_penalties(self) -> bool:
        params = self._params
        return not (
            params.repetition_penalty == 1.0 and params.presence_penalty == 0.0 and params.frequency_penalty == 0.0
        )

    def _penalise(self, logits: Tensor, ahead: Sequence[int] = ()) -> Tensor:
        """logits with the penalties applied, `ahead` counted as drawn; the input itself when there are none."""
        if not math.isfinite(float(logits.max())):  # max() hands a NaN on
            raise CheckpointError(NOT_FINITE)
        params = self._params
        if not self._has_penalties:
            return logits
        if self._counts is None or self._seen is None:
            self._counts = torch.zeros_like(logits)
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            self._seen[list(self._prompt_ids)] = True
        counts, seen = self._counts, self._seen
        if ahead:
            counts, seen = counts.clone(), seen.clone()
            for token_id in ahead:
                counts[token_id] += 1
                seen[token_id] = True
        factor = torch.where(logits > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
        repeated = torch.where(seen, logits * factor, logits)
        return repeated - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
