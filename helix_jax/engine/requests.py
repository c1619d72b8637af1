"""What is asked of an engine, and what it answers."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from helix_jax.engine.params import SamplingParams
from helix_jax.engine.output_text import OutputText

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


class TokenEvent(NamedTuple):
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
class RequestOutput:
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


class FinishedEvent(NamedTuple):
    """A request is over."""

    id: str
    result: RequestOutput


Event = TokenEvent | FinishedEvent


@dataclass(frozen=True)
class EngineStats:
    """How an engine stands. pages_in_use: of each rank, without those of prefixes that nobody reads (pages_cached, of
    every rank as many).

    Counts of tokens, steps and preemptions are since its start; tokens_per_s over the time that it ran.
    """

    waiting: int
    running: int
    finished: int
    pages: int
    pages_in_use: tuple[int, ...]
    pages_cached: int
    steps: int
    prefilled_tokens: int
    shared_tokens: int
    decoded_tokens: int
    preemptions: int
    tokens_per_s: float


@dataclass(eq=False)  # a request is itself, however alike two may be
class Request:
    """One request, as the engine keeps it.

    prompt: never changes, and with it the places of all tokens. tokens: what it said. known: both, what its cache is
    made from when it starts, or starts again. running_ahead: tokens that were dispatched and not yet read. written:
    positions that the dispatched steps fill.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    order: int  # of submission: the youngest has the highest
    text: OutputText
    tokens: list[int] = field(default_factory=list)
    known: list[int] = field(init=False)
    written: int = 0
    running_ahead: int = 0
    shared: int = 0
    preemptions: int = 0
    row: int | None = None
    logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    submitted_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None

    def __post_init__(self) -> None:
        self.known = self.prompt + self.tokens

    @property
    def said(self) -> int:
        """Tokens said, those under way included."""
        return len(self.tokens) + self.running_ahead

    @property
    def most(self) -> int:
        """Positions that it can come to fill: the last token is said, not cached."""
        return len(self.prompt) + self.params.max_new_tokens - 1

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.known.append(token)

    def append_token(self, token: int, told: tuple[float, Any] | None, now_s: float) -> tuple[TokenEvent, str | None]:
        """Takes the next token in; tells it, and the reason if it was the last."""
        self.first_s = self.first_s or now_s
        self.last_s = now_s
        self.running_ahead -= 1
        self.append(token)
        if told:
            self.logprobs.append(told)
        stopped = self.text.feed(token) or token in self.stop_token_ids
        full = len(self.tokens) == self.params.max_new_tokens
        said = TokenEvent(self.id, token, self.text.give(all=stopped or full), *(told or (None, None)))
        return said, STOP if stopped else LENGTH if full else None

    def result(self, reason: str) -> RequestOutput:
        """What it comes to, now that it is over: the text that was given out, and no more."""
        first, last, gaps = self.first_s, self.last_s, len(self.tokens) - 1
        return RequestOutput(
            id=self.id,
            prompt_tokens=len(self.prompt),
            tokens=tuple(self.tokens),
            text=self.text.given,
            finish_reason=finish_reason,
            ttft_s=None if first is None else first - self.submitted_s,
            s_per_token=None if first is None or last is None or gaps < 1 else (last - first) / gaps,
            shared_tokens=self.shared,
            preemptions=self.preemptions,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
        )
