"""How a request goes on from its prompt: validated before it is taken in."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from helix_jax.config import ModelConfig
from helix_jax.sampling import MAX_LOGPROBS

_MOST = 1e30  # of a number that float32 is to hold


@dataclass(frozen=True)
class SamplingParams:
    """How one request goes on from its prompt.

    temperature: 0 is greedy. top_k: only the k likeliest tokens (0: all). top_p: only the fewest of the likeliest whose
    probability reaches p. min_p: only tokens at least so probable as this share of the likeliest. repetition_penalty:
    what the logit of a token that was there already is divided by, or, below 0, multiplied with. seed: with the
    position it is all that a draw depends on. stop: strings that end it, themselves left out. stop_token_ids: tokens that end
    it (None: the model's own; they are given out). logprobs: so many of the likeliest tokens are told with each.

    Raises:
        ValueError: a value outside of its range.
    """

    max_new_tokens: int = 128
    temperature: int | float = 0
    top_k: int = 0
    top_p: int | float = 1
    min_p: int | float = 0
    repetition_penalty: int | float = 1
    seed: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("max_new_tokens", "top_k", "seed"):
            _check(_whole(getattr(self, name)), name, getattr(self, name), "a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            _check(_number(getattr(self, name)), name, getattr(self, name), "a number")
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _check(0 <= self.temperature < _MOST, "temperature", self.temperature, "0 (greedy) or a positive number")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "a probability above 0, at most 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "a share from 0 to 1")
        penalty = self.repetition_penalty
        _check(1 / _MOST < penalty < _MOST, "repetition_penalty", penalty, "a positive number, above 1 to penalise")
        _check(_listed(self.stop, str) and all(self.stop), "stop", self.stop, "a list of strings that are not empty")
        _check(self.stop_token_ids is None or _listed(self.stop_token_ids, int), "stop_token_ids", self.stop_token_ids, "a list of token ids")
        told = self.logprobs
        _check(told is None or (_whole(told) and 0 <= told <= MAX_LOGPROBS), "logprobs", told, f"0 to {MAX_LOGPROBS}")


def sampling_params(given: dict[str, Any]) -> SamplingParams:
    """From a mapping, of JSON for example.

    Raises:
        ValueError: a field that is unknown, or a value outside of its range.
    """
    known = [field.name for field in fields(SamplingParams)]
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field '{name}': choose among {', '.join(known)}")
    return SamplingParams(**given)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(value: Any, kind: type) -> bool:
    return isinstance(value, Sequence) and all(isinstance(x, kind) and not isinstance(x, bool) for x in value)


def _check(good: bool, name: str, value: Any, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} is {value!r}: give {wanted}")


def check_prompt(config: ModelConfig, prompt: Iterable[Any]) -> list[int]:
    """The prompt as a list of ids.

    Raises:
        ValueError: an empty one, an id outside of the vocabulary.
    """
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError("the prompt is no sequence of token ids: give whole numbers") from None
    if not ids:
        raise ValueError("the prompt is empty: give at least one token")
    for token in ids:
        if not 0 <= token < config.vocab:
            raise ValueError(f"token id {token!r} is not one of the vocabulary: give ids from 0 to {config.vocab - 1}")
    return ids
