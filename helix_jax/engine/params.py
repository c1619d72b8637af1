"""The parameters of a request, checked when they are created."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np

from helix_jax.sampling import MAX_LOGPROBS, SEEDS, check_sampling, check_seed
from helix_jax.validation import check_int, check_keys, check_number, check_type

_LARGEST = 1e30  # a setting must be finite in float32
_MOST_SAMPLES = 16384


@dataclass(frozen=True)
class SamplingParams:
    """How one request continues its prompt.

    Args:
        max_new_tokens: The most tokens to generate. With `prompt_logprobs` it may be 0.
        temperature: Divides the logits. 0 is greedy.
        top_k: Keep only the k most probable tokens. 0 keeps all.
        top_p: Keep only the smallest set of most probable tokens with total probability at least p. 1 keeps all.
        min_p: Keep only tokens with at least this fraction of the largest probability. 0 keeps all.
        repetition_penalty: Positive logits of tokens that the prompt or the output contains are divided by it, negative
            ones multiplied. 1 changes nothing.
        seed: The seed of the draws, 0 to 2^64 - 1. A draw depends on the seed and the position, and not on other
            requests. None draws a seed when a request with a temperature is submitted, and reports it as
            `RequestOutput.seed`, with which the request can be repeated.
        stop: Strings that end the request. They are not part of its text.
        stop_token_ids: Tokens that end the request, besides the model's end-of-sequence tokens. They are part of its
            tokens.
        ignore_eos: Whether to continue past the model's end-of-sequence tokens.
        logprobs: How many of the most probable tokens to report with each token, 0 to 20. None reports no
            log-probabilities, 0 those of the chosen tokens alone.
        prompt_logprobs: How many of the most probable tokens to report with each token of the prompt but the first, 0
            to 20. None reports no log-probabilities of the prompt, 0 those of its tokens alone.
            With several samples, the first one reports them.
        prompt_logprobs_start: The index of the first token of the prompt to report, at least 1. If another request has
            cached the beginning of the prompt, it is used only as far as nothing is reported.
        n: How many samples to generate, 1 to 16,384. More than one need a temperature. Sample i equals the output of a
            request with the seed `seed + i` (modulo 2^64), but the prompt is prefilled once, and its pages are shared.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range. The message names the range.
    """

    max_new_tokens: int = 128
    temperature: int | float = 0
    top_k: int = 0
    top_p: int | float = 1
    min_p: int | float = 0
    repetition_penalty: int | float = 1
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 1
    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_num_top(name, getattr(self, name))
        check_int("prompt_logprobs_start", self.prompt_logprobs_start, least=1)
        if self.prompt_logprobs is None and self.prompt_logprobs_start > 1:
            start = self.prompt_logprobs_start
            raise ValueError(f"prompt_logprobs_start is {start} without prompt_logprobs: give prompt_logprobs too")
        check_int("max_new_tokens", self.max_new_tokens, least=1 if self.prompt_logprobs is None else 0)
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if self.seed is not None:
            check_seed(self.seed)
        self._check_penalty()
        self._check_stop()
        self._check_n()

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the most probable one, without a penalty."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def of_samples(self) -> "Sequence[SamplingParams]":
        """Return the parameters of each sample, as a request of its own."""
        if self.n == 1:
            return [self]
        assert self.seed is not None  # the engine draws one
        first = replace(self, n=1)
        others = replace(first, prompt_logprobs=None, prompt_logprobs_start=1)
        return [first, *(replace(others, seed=(self.seed + index) % SEEDS) for index in range(1, self.n))]

    def _check_n(self) -> None:
        check_int("n", self.n, least=1)
        if self.n > _MOST_SAMPLES:
            raise ValueError(f"n is {self.n}: give at most {_MOST_SAMPLES}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n is {self.n} with temperature 0, so that all samples are equal: give a temperature too")
        if self.n > 1 and self.max_new_tokens == 0:
            raise ValueError(f"n is {self.n} with max_new_tokens 0, so that nothing is sampled: give n 1")

    def _check_penalty(self) -> None:
        check_number("repetition_penalty", self.repetition_penalty)
        if not 1 / _LARGEST < self.repetition_penalty < _LARGEST:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}: give a positive number, above 1 to penalise"
            )

    def _check_stop(self) -> None:
        if not isinstance(self.stop, Sequence) or not all(isinstance(text, str) for text in self.stop):
            raise TypeError(f"stop is {self.stop!r}: give a list of strings")
        if not all(self.stop):
            raise ValueError(f"stop is {self.stop!r}: give a list of strings that are not empty")
        ids = self.stop_token_ids
        if not isinstance(ids, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise TypeError(f"stop_token_ids is {ids!r}: give a list of token ids")
        if min(ids, default=0) < 0:
            raise ValueError(f"stop_token_ids is {ids!r}: give token ids of 0 or more")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos is {self.ignore_eos!r}: give true or false")


def sampling_params(mapping: Mapping[str, Any]) -> SamplingParams:
    """Create SamplingParams from a mapping, for example a JSON object. A value of None means the default.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A key is unknown, or a value is out of range.
    """
    check_keys("request", mapping, [field.name for field in fields(SamplingParams)])
    return SamplingParams(**{name: value for name, value in mapping.items() if value is not None})


def check_no_sampling(options: Collection[str]) -> None:
    """Check that no option of an engine is a parameter of a request.

    Raises:
        TypeError: One is.
    """
    for field in fields(SamplingParams):
        if field.name in options:
            raise TypeError(
                f"{field.name} is not an option of an engine: give helix_jax.SamplingParams({field.name}=...) as params"
            )


def check_num_top(name: str, num_top: int) -> None:
    """Check how many of the most probable tokens are requested.

    Raises:
        TypeError: It is not an int.
        ValueError: It is not between 0 and `MAX_LOGPROBS`.
    """
    check_int(name, num_top)
    if not 0 <= num_top <= MAX_LOGPROBS:
        raise ValueError(f"{name} is {num_top}: give 0 to {MAX_LOGPROBS}")


def params_of_each(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: Sequence[object]
) -> list[SamplingParams]:
    """Return how each prompt continues.

    Raises:
        TypeError: `prompts` is not a list, or `params` has the wrong type.
        ValueError: The number of params differs from that of prompts.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is a string: give a list of prompts")
    check_type("prompts", prompts, Sequence | np.ndarray | jax.Array, "a list of prompts")
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if not isinstance(params, Sequence) or not all(isinstance(own, SamplingParams) for own in params):
        raise TypeError(f"params is {params!r}: give SamplingParams(...), or a list of them")
    if len(params) != len(prompts):
        raise ValueError(f"there are {len(params)} params for {len(prompts)} prompts: give one for all, or one each")
    return list(params)
