"""What is asked of an engine, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from helix_jax.config import ModelConfig
from helix_jax.engine.said import Text
from helix_jax.sampling import MOST_LOGPROBS

_MOST = 1e30  # of a number that float32 is to hold
STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclass(frozen=True)
class SamplingParams:
    """How one request goes on from its prompt.

    temperature: 0 is greedy. top_k: only the k likeliest tokens (0: all). top_p: only the fewest of the likeliest whose
    probability reaches p. min_p: only tokens at least so probable as this share of the likeliest. repetition_penalty:
    what the logit of a token that was there already is divided by, or, below 0, multiplied with. seed: with the
    position it is all that a draw depends on. stop: strings that end it, themselves left out. stop_ids: tokens that end
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
    stop: str | tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
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
        _check(0 < penalty < _MOST, "repetition_penalty", penalty, "a positive number, above 1 to penalise")
        _check(_listed(self.stop, str) and all(self.stop), "stop", self.stop, "a list of strings that are not empty")
        _check(self.stop_ids is None or _listed(self.stop_ids, int), "stop_ids", self.stop_ids, "a list of token ids")
        told = self.logprobs
        _check(told is None or (_whole(told) and 0 <= told <= MOST_LOGPROBS), "logprobs", told, f"0 to {MOST_LOGPROBS}")


def sampling_params(given: dict[str, Any]) -> SamplingParams:
    """From a mapping, of JSON for example.

    Raises:
        ValueError: a field that is unknown, or a value outside of its range.
    """
    known = [field.name for field in fields(SamplingParams)]
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field '{name}': choose among {', '.join(known)}")
    lists: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    return SamplingParams(**lists)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(value: Any, kind: type) -> bool:
    return isinstance(value, Sequence) and all(isinstance(x, kind) and not isinstance(x, bool) for x in value)


def _check(good: bool, name: str, value: Any, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} is {value!r}: give {wanted}")


class Said(NamedTuple):
    """A request's next token. text: what it completes, often nothing, of a model without a tokenizer None.

    logprob: of the token, before temperature and filters; top: the likeliest tokens and theirs, as many as were asked
    for. Both None if none were.
    """

    id: str
    token: int
    text: str | None
    logprob: float | None
    top: tuple[tuple[int, float], ...] | None


@dataclass(frozen=True)
class Result:
    """A request that has ended. reason: 'stop', 'length' or 'cancelled'.

    ttft_s: from submission to the first token. s_per_token: between tokens, of all but the first. None if there were
    none. text: None of a model without a tokenizer.
    """

    id: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str | None
    reason: str
    ttft_s: float | None
    s_per_token: float | None
    shared_tokens: int
    preemptions: int
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] | None = None


class Ended(NamedTuple):
    """A request is over."""

    id: str
    result: Result


Event = Said | Ended


@dataclass(frozen=True)
class Figures:
    """How an engine stands. pages_in_use: of each rank, prefixes that nobody reads left out (they are pages_cached).

    Counts of tokens, steps, traces and preemptions are since its start; tokens_per_s over the time that it ran.
    """

    waiting: int
    running: int
    finished: int
    pages: int
    pages_in_use: tuple[int, ...]
    pages_cached: tuple[int, ...]
    steps: int
    prefilled_tokens: int
    shared_tokens: int
    decoded_tokens: int
    preemptions: int
    tokens_per_s: float


@dataclass
class Request:
    """One request, as the engine keeps it.

    prompt: never changes, and with it the places of all tokens. tokens: what it said. running_ahead: tokens that were
    dispatched and not yet read. written: positions that the dispatched steps fill.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    order: int  # of submission: the youngest has the highest
    text: Text
    tokens: list[int] = field(default_factory=list)
    written: int = 0
    running_ahead: int = 0
    shared: int = 0
    preemptions: int = 0
    row: int | None = None
    logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    submitted_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None

    @property
    def known(self) -> list[int]:
        """What its cache is made from when it starts, or starts again."""
        return self.prompt + self.tokens

    @property
    def said(self) -> int:
        """Tokens said, those under way included."""
        return len(self.tokens) + self.running_ahead

    @property
    def most(self) -> int:
        """Positions that it can come to fill: the last token is said, not cached."""
        return len(self.prompt) + self.params.max_new_tokens - 1


def check_prompt(config: ModelConfig, prompt: Sequence[int], params: SamplingParams, max_len: int) -> list[int]:
    """The prompt as a list of ids.

    Raises:
        ValueError: an empty one, an id outside of the vocabulary, more positions than there is room for.
    """
    ids = list(prompt)
    if not ids:
        raise ValueError("the prompt is empty: give at least one token")
    for token in ids:
        if not _whole(token) or not 0 <= token < config.vocab:
            raise ValueError(f"token id {token!r} is not one of the vocabulary: give ids from 0 to {config.vocab - 1}")
    if len(ids) + params.max_new_tokens > max_len:
        raise ValueError(
            f"{len(ids)} tokens and {params.max_new_tokens} new ones exceed the {max_len} positions of a row: "
            "shorten the prompt, ask for fewer, or give the engine a longer max_len"
        )
    return ids
