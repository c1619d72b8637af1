"""Requests, and the events and outputs that they produce."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from helix_jax.engine.logprobs import PromptLogprobs, TokenLogprobs
from helix_jax.engine.output_text import OutputText
from helix_jax.engine.params import SamplingParams
from helix_jax.validation import check_token_ids

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


class TokenEvent(NamedTuple):
    """A request has a new token.

    Attributes:
        id: The request.
        token: The token.
        text: The text that the token completes, which is often empty. None if the engine has no tokenizer.
        logprob: The log-probability of the token, before temperature, penalty and filters. None if not requested.
        top: The most probable tokens and their log-probabilities, as many as requested. None if not requested.
    """

    id: str
    token: int
    text: str | None
    logprob: float | None
    top: tuple[tuple[int, float], ...] | None


@dataclass(frozen=True)
class RequestOutput:
    """The output of a finished request.

    Attributes:
        id: The request.
        prompt_tokens: The length of the prompt.
        tokens: The generated tokens.
        text: Their text, without a stop string. None if the engine has no tokenizer.
        finish_reason: "stop" (an end-of-sequence or stop token, or a stop string), "length" or "cancelled".
        ttft_s: The time from submission to the first token. None if there is no token.
        s_per_token: The mean time between tokens. None if there are fewer than two.
        shared_tokens: Prompt tokens that were cached already, because another request, or another sample of the same
            prompt, starts with them too.
        preemptions: How often the request was preempted and recomputed.
        logprobs: For each token, its log-probability and the most probable tokens with theirs. None if not requested.
        seed: The seed that it was sampled with: of its parameters, or drawn at submission. None for a greedy request
            without one, which needs no seed.
        prompt_logprobs: For each token of the prompt but the first, or from `prompt_logprobs_start` on, as in
            `logprobs`. None if not requested. Of a cancelled request there may be fewer.
        index: Which of the samples of its prompt it is. 0 if there is one.
    """

    id: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str
    ttft_s: float | None
    s_per_token: float | None
    shared_tokens: int
    preemptions: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    seed: int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    index: int = 0


class FinishedEvent(NamedTuple):
    """A request has finished.

    Attributes:
        id: The request.
        result: Its output.
    """

    id: str
    result: RequestOutput


Event = TokenEvent | FinishedEvent


@dataclass(frozen=True)
class EngineStats:
    """Statistics of an engine, since its start.

    Attributes:
        waiting: Requests that wait for a row. Each sample of a prompt counts, here and below.
        running: Requests that have a row.
        finished: Requests that have finished.
        capacity: Tokens that the pages of all ranks can store.
        pages: Pages per rank.
        pages_in_use: Pages on each rank that rows use.
        pages_cached: Pages per rank that are cached with prefixes that no row uses.
        steps: Steps.
        prefilled_tokens: Tokens that were prefilled, those of recomputed requests included.
        shared_tokens: Tokens that were not prefilled because they were cached already.
        decoded_tokens: Tokens that were generated.
        preemptions: How often a request was preempted.
        tokens_per_s: Generated tokens per second of running time.
        prefix_caching: Whether requests share the pages of equal prefixes: "on", or "off: " and the reason.
        drafted_tokens: Draft tokens that were verified.
        accepted_tokens: Draft tokens that were right.
        tokens_per_step: Tokens that a request decoded per step, on average. It is 1 without drafts.
    """

    waiting: int
    running: int
    finished: int
    capacity: int
    pages: int
    pages_in_use: tuple[int, ...]
    pages_cached: int
    steps: int
    prefilled_tokens: int
    shared_tokens: int
    decoded_tokens: int
    preemptions: int
    tokens_per_s: float
    prefix_caching: str
    drafted_tokens: int
    accepted_tokens: int
    tokens_per_step: float


@dataclass(eq=False)  # compared by identity: two requests may be equal in all fields
class Request:
    """The state of a request in an engine. Each of several samples of a prompt is a request.

    Attributes:
        id: Its name.
        prompt: The token ids of the prompt. They never change, as the places of all tokens depend on their number. The
            samples of a prompt have the same list object.
        params: How it continues.
        stop_token_ids: Tokens that end it.
        order: The order of submission. The newest request has the largest.
        text: The text of its tokens.
        token_ids: The generated tokens.
        all_token_ids: The prompt and the generated tokens. They are prefilled when the request gets a row.
        num_computed: Positions that are in the cache after all steps that were dispatched.
        in_flight: Generated tokens that were dispatched and not yet read.
        shared_tokens: As in `RequestOutput`.
        preemptions: As in `RequestOutput`.
        row: Its row, or None while it waits.
        logprobs: Of each generated token, if requested.
        prompt_logprobs: Of the tokens of the prompt, in parts of consecutive tokens, if requested.
        num_scored: The positions of the prompt whose next tokens have log-probabilities after all steps that were
            dispatched, or need none. They outlast a preemption.
        submitted_s: The time of submission.
        first_token_s: The time of the first token.
        last_token_s: The time of the latest token.
        index: As in `RequestOutput`.
        parent_id: The id that was submitted, if its prompt has several samples.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    order: int
    text: OutputText
    token_ids: list[int] = field(default_factory=list)
    all_token_ids: list[int] = field(init=False)
    num_computed: int = 0
    in_flight: int = 0
    shared_tokens: int = 0
    preemptions: int = 0
    row: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    num_scored: int = 0
    submitted_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    index: int = 0
    parent_id: str | None = None

    def __post_init__(self) -> None:
        self.all_token_ids = self.prompt + self.token_ids

    @property
    def assigned_row(self) -> int:
        """The row of a request that has one."""
        assert self.row is not None
        return self.row

    @property
    def num_generated(self) -> int:
        """The number of generated tokens, those in flight included."""
        return len(self.token_ids) + self.in_flight

    @property
    def num_remaining(self) -> int:
        """The most tokens that it can still generate, besides those in flight."""
        return self.params.max_new_tokens - self.num_generated

    @property
    def max_computed(self) -> int:
        """The most positions that it can write, at least one. The last token, generated or not, is not written."""
        return max(1, len(self.prompt) + self.params.max_new_tokens - 1)

    @property
    def num_to_prefill(self) -> int:
        """The positions to prefill when the request gets a row."""
        return min(len(self.all_token_ids), self.max_computed)

    @property
    def num_shareable(self) -> int:
        """The positions that it can share with other samples of its prompt. Each appends the last token itself."""
        return len(self.prompt) - 1

    def is_sample_with(self, other: "Request") -> bool:
        """Return whether this request and `other` are samples of a prompt, whose pages `other` can share."""
        return self.prompt is other.prompt and self.num_shareable > 0 and not other.needs_scores

    @property
    def needs_scores(self) -> bool:
        """Whether log-probabilities of the prompt are requested and not yet dispatched."""
        return self.params.prompt_logprobs is not None and self.num_scored < len(self.prompt) - 1

    @property
    def uses_sampler(self) -> bool:
        """Whether its steps need the sampling programs, which also compute log-probabilities."""
        return not self.params.is_greedy or self.params.logprobs is not None

    def schedule_scores(self, first: int, end: int) -> range:
        """Return which positions from `first` up to `end` are to be scored, and count them as scored."""
        if not self.needs_scores:
            return range(0)
        scored = range(max(first, self.num_scored), min(end, len(self.prompt) - 1))
        self.num_scored = max(self.num_scored, scored.stop)
        return scored

    def append_token(self, token: int, logprobs: TokenLogprobs | None, now_s: float) -> tuple[TokenEvent, str | None]:
        """Append a generated token. Return its event, and the finish reason if the request is complete, else None."""
        self.first_token_s = self.first_token_s or now_s
        self.last_token_s = now_s
        self.in_flight -= 1
        self.token_ids.append(token)
        self.all_token_ids.append(token)
        if logprobs:
            self.logprobs.append(logprobs)
        stopped = self.text.append(token) or token in self.stop_token_ids
        is_last = len(self.token_ids) == self.params.max_new_tokens
        event = TokenEvent(self.id, token, self.text.emit(final=stopped or is_last), *(logprobs or (None, None)))
        return event, STOP if stopped else LENGTH if is_last else None

    def make_output(self, finish_reason: str) -> RequestOutput:
        """Return the output of the request, which has finished. Its text is what was emitted."""
        first, last, gaps = self.first_token_s, self.last_token_s, len(self.token_ids) - 1
        num_top = self.params.prompt_logprobs
        return RequestOutput(
            id=self.id,
            prompt_tokens=len(self.prompt),
            tokens=tuple(self.token_ids),
            text=self.text.emitted,
            finish_reason=finish_reason,
            ttft_s=None if first is None else first - self.submitted_s,
            s_per_token=None if first is None or last is None or gaps < 1 else (last - first) / gaps,
            shared_tokens=self.shared_tokens,
            preemptions=self.preemptions,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            seed=self.params.seed,
            prompt_logprobs=None if num_top is None else PromptLogprobs.concatenate(self.prompt_logprobs, num_top),
            index=self.index,
        )


def sample_ids(id: str, n: int) -> list[str]:
    """Return the ids of the samples of a request: its own if there is one, else `id/0`, `id/1` and so on."""
    return [id] if n == 1 else [f"{id}/{index}" for index in range(n)]


def check_prompt(
    name: str, prompt: Sequence[int] | np.ndarray, max_new_tokens: int, *, vocab: int, max_len: int
) -> list[int]:
    """Return the token ids of a prompt, checked.

    Args:
        name: The prompt, as error messages name it.
        prompt: The token ids.
        max_new_tokens: The most tokens to generate.
        vocab: The size of the vocabulary.
        max_len: The most positions of a request, prompt and output.

    Raises:
        TypeError: The prompt is not a sequence of token ids.
        ValueError: The prompt is empty or too long, or a token id is not in the vocabulary.
    """
    ids = check_token_ids(name, prompt, vocab)
    check_length(name, len(ids), max_new_tokens, max_len)
    return ids


def check_length(name: str, length: int, max_new_tokens: int, max_len: int, positions: int | None = None) -> None:
    """Check that a prompt and its output do not exceed `max_len` positions.

    If nothing is generated, the last token of the prompt needs no position.

    Args:
        name: The prompt, as error messages name it.
        length: Its tokens.
        max_new_tokens: The most tokens to generate.
        max_len: The most positions.
        positions: Those of the model, if `max_len` is an option that may be larger.

    Raises:
        ValueError: They do.
    """
    if length + (max_new_tokens or -1) > max_len:
        larger = f", or give a max_len of up to {positions}" if positions and positions > max_len else ""
        raise ValueError(
            f"{name}: {length} tokens and {max_new_tokens} new ones exceed the maximum of {max_len} positions: "
            f"shorten the prompt or reduce max_new_tokens{larger}"
        )
