"""The engine: `schedule -> run -> postprocess`, with one step in flight."""

import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import count

import jax
import numpy as np

from helix_jax.engine.output_text import OutputText
from helix_jax.engine.page_allocator import PageAllocator, describe_prefix_caching
from helix_jax.engine.params import SamplingParams
from helix_jax.engine.programs import SampleOutput
from helix_jax.engine.requests import (
    CANCELLED,
    EngineStats,
    Event,
    FinishedEvent,
    Request,
    RequestOutput,
    TokenLogprobs,
)
from helix_jax.engine.runner import PendingStep, Runner
from helix_jax.engine.scheduler import Admission, ScheduledStep, Scheduler
from helix_jax.generation import DEFAULT_CHUNK, DEFAULT_PAGE
from helix_jax.mesh import DP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.processes import on_first_process
from helix_jax.step import check_model_placement
from helix_jax.text import Tokenizer
from helix_jax.validation import check_int, check_token_ids

# Text, or token ids.
Prompt = str | Sequence[int] | np.ndarray


@dataclass(eq=False, repr=False)
class Engine:
    """Prefills and decodes many requests together, over one cache of pages that all of them share.

    Each step is dispatched before the tokens of the previous one are read, because their places are known without them.
    A request that turns out to have ended therefore costs one token, which is discarded. If no page is free, the newest
    request is preempted and recomputed later; its output does not change.

    With several processes (`helix_jax.processes`), each has an engine over the same mesh. Creating it, `submit`,
    `cancel` and `step` are collective calls: all processes make the same calls in the same order.

    Args:
        model: A model of `load` or `shard`.
        plan: How the mesh decodes: the plan that the model was loaded with. Its mesh has dp 1.
        rows: Requests that run at once.
        pages: Pages per rank. None: as many as all rows can fill, or as the free memory of a device allows.
        page: Tokens per page.
        max_len: The most positions of a request, prompt and output. None: those of the model.
        chunk: Tokens to prefill per call.
        budget: Tokens to prefill per step, which bounds the time between decoded tokens. None: one chunk.
        tokenizer: Converts text prompts to tokens, and tokens to text. None: requests have token ids only.
        prefix_caching: Whether requests that start with the same tokens share their pages. Only the placement striped
            can do this, see `prefix_caching_status`.

    Raises:
        TypeError: A number is not an int.
        ValueError: The model was not loaded with this plan, the mesh has dp above 1 or does not divide the heads, a
            number is below 1, or `max_len` exceeds the positions of the model.
    """

    model: Transformer
    plan: Plan
    _: KW_ONLY
    rows: int = 8
    pages: int | None = None
    page: int = DEFAULT_PAGE
    max_len: int | None = None
    chunk: int = DEFAULT_CHUNK
    budget: int | None = None
    tokenizer: Tokenizer | None = None
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        plan, config = self.plan, self.model.config
        self._max_len = config.max_positions if self.max_len is None else self.max_len
        self._check_options()
        check_model_placement(self.model, plan)
        # All processes draw the same seeds.
        self._entropy = on_first_process(lambda: secrets.randbits(128))
        self.config = config
        self.runner = Runner(
            self.model,
            plan,
            rows=self.rows,
            pages=self.pages,
            page=self.page,
            max_len=self._max_len,
            chunk=self.chunk,
        )
        self.prefix_caching_status = describe_prefix_caching(plan.layout, self.page, enabled=self.prefix_caching)
        share = self.prefix_caching_status == "on"
        allocator = PageAllocator(plan.layout, self.runner.pages, self.page, share=share)
        self.scheduler = Scheduler(allocator, self.rows, self.budget or self.chunk, self.chunk)
        self.requests: dict[str, Request] = {}  # those that have not finished
        self._pending: deque[PendingStep] = deque()  # dispatched, not yet read
        self._events: deque[Event] = deque()  # not yet returned
        self._submitted = self._steps = self._prefilled = self._shared = self._decoded = self._finished = 0
        self._busy_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether a request has not finished, or an event was not returned."""
        return bool(self.requests or self._pending or self._events)

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, id: str | None = None) -> str:
        """Submit a request. It runs in the steps that follow.

        Args:
            prompt: Text, or token ids.
            params: How it continues. None: `SamplingParams()`.
            id: Its name. None: the engine chooses one.

        Returns:
            The id.

        Raises:
            TypeError: The prompt, `params` or `id` has the wrong type.
            ValueError: The prompt is empty or can never fit, a token id is not in the vocabulary, there is text without
                a tokenizer, or a request with this id has not finished.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params is {params!r}: give SamplingParams(...)")
        id = self._new_id() if id is None else id
        if not isinstance(id, str):
            raise TypeError(f"id is {id!r}: give a string, or none")
        if id in self.requests:
            raise ValueError(f"a request '{id}' has not finished yet: give another id")
        ids = self._encode(prompt, params)
        eos = () if params.ignore_eos else self.config.eos_token_ids
        request = Request(
            id=id,
            prompt=ids,
            params=self._with_seed(params),
            stop_token_ids=frozenset((*params.stop_token_ids, *eos)),
            order=self._submitted,
            text=OutputText(self.tokenizer, params.stop),
            submitted_s=time.perf_counter(),
        )
        self.check_fits(request)
        self._submitted += 1
        self.requests[id] = request
        self.scheduler.waiting.append(request)
        return id

    def cancel(self, id: str) -> None:
        """Finish a request where it is. The next step returns its event.

        Raises:
            ValueError: The id is unknown, or the request has finished.
        """
        self._events.append(self._finish(self.find_request(id), CANCELLED))

    def step(self) -> list[Event]:
        """Dispatch one step, then read the tokens of the previous one.

        An interrupt while it waits for the devices loses nothing: the next call returns the events.

        Returns:
            What happened since the last call.
        """
        start = time.perf_counter()
        step = self.scheduler.schedule()
        pending = self.runner.run(step, self.scheduler.row_pages)
        self._postprocess(step, pending)
        self._busy_s += time.perf_counter() - start
        events = list(self._events)
        self._events.clear()
        return events

    def drain(self, leave: int = 0) -> None:
        """Read the tokens of steps that were dispatched. The next call of `step` returns their events.

        Args:
            leave: How many of the latest outputs not to read.
        """
        while len(self._pending) > leave:
            output, requests = self._pending[0]
            if all(request.params.logprobs is None for _, request in requests):
                output = output._replace(logprobs=None)  # saves copying them to the host
            output = jax.tree.map(np.asarray, output)
            self._pending.popleft()
            self._events.extend(self._append_tokens(output, requests))

    def events(self) -> Iterator[Event]:
        """Step until all requests have finished. Yield what happens.

        If the caller stops early, a later call of `events` or `step` returns the remaining events.
        """
        while self.busy:
            self._events.extend(self.step())
            while self._events:
                yield self._events.popleft()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Run requests to their end, beside those that were submitted before.

        Args:
            prompts: Text or token ids, one per request.
            params: How they continue: one for all, or one each.

        Returns:
            The outputs, in the order of the prompts. Later calls of `step` return the events of other requests.

        Raises:
            TypeError: As `submit`, or `prompts` is a string.
            ValueError: As `submit`, or the number of params differs from that of prompts. Then nothing runs.
        """
        own_ids = self._submit_all(prompts, params)
        outputs: dict[str, RequestOutput] = {}
        others: list[Event] = []
        try:
            while len(outputs) < len(own_ids):
                for event in self.step():
                    if event.id not in own_ids:
                        others.append(event)
                    elif isinstance(event, FinishedEvent):
                        outputs[event.id] = event.result
        finally:
            self._events.extendleft(reversed(others))
        return [outputs[id] for id in own_ids]

    def warm_up(self, sampling: bool = True) -> float:
        """Compile the programs of a step. Without this, each is compiled when it is first needed.

        Args:
            sampling: Whether to compile also the programs for requests with a temperature, a repetition penalty or
                log-probabilities. They contain a sampler, and take longer to compile.

        Returns:
            The seconds that it took.

        Raises:
            ValueError: Requests are running. The compilation would write into their rows.
        """
        running = len(self.scheduler.running)
        if running:
            raise ValueError(f"{running} requests are running: call warm_up before them, or when they have finished")
        return self.runner.warm_up(sampling=sampling)

    def stats(self) -> EngineStats:
        """Return statistics since the start of the engine."""
        scheduler, allocator = self.scheduler, self.scheduler.allocator
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            finished=self._finished,
            pages=allocator.pages,
            pages_in_use=allocator.pages_in_use,
            pages_cached=allocator.pages_cached,
            steps=self._steps,
            prefilled_tokens=self._prefilled,
            shared_tokens=self._shared,
            decoded_tokens=self._decoded,
            preemptions=scheduler.preemptions,
            tokens_per_s=self._decoded / self._busy_s if self._busy_s else 0.0,
        )

    def find_request(self, id: str) -> Request:
        """Return a request that has not finished.

        Raises:
            ValueError: The id is unknown, or the request has finished.
        """
        if id not in self.requests:
            raise ValueError(f"no request '{id}' is waiting or running: it has finished, or was never submitted")
        return self.requests[id]

    def check_fits(self, request: Request) -> None:
        """Check that a request fits if it runs alone.

        Raises:
            ValueError: It has more positions than a row, or needs more pages than a rank has.
        """
        allocator, length, new = self.scheduler.allocator, len(request.prompt), request.params.max_new_tokens
        if length + new > self._max_len:
            raise ValueError(
                f"{length} tokens and {new} new ones exceed the {self._max_len} positions of a row: "
                "shorten the prompt, reduce max_new_tokens, or create the engine with a larger max_len"
            )
        needed = int(allocator.count_pages(request.max_computed, length).max())
        if needed > allocator.pages:
            raise ValueError(
                f"{length} tokens and {new} new ones need {needed} pages of {allocator.page} on one rank, "
                f"and it has {allocator.pages}: reduce max_new_tokens, or create the engine with more pages"
            )

    def discard(self, request: Request) -> None:
        """Remove a request without an event."""
        del self.requests[request.id]
        self.scheduler.remove(request)

    def adopt(self, request: Request) -> None:
        """Continue a request that was started in another engine. Its cache is in its pages here."""
        request.order = self._submitted
        self.requests[request.id] = request
        self._submitted += 1
        if request.row is None:
            self.scheduler.waiting.append(request)
        else:
            self.runner.admit(Admission(request, request.num_computed), self.scheduler.row_pages[request.id])

    def _check_options(self) -> None:
        options = {"rows": self.rows, "page": self.page, "max_len": self._max_len, "chunk": self.chunk}
        optional = {"pages": self.pages, "budget": self.budget}
        for name, value in (options | {name: value for name, value in optional.items() if value is not None}).items():
            check_int(name, value, least=1)
        positions = self.model.config.max_positions
        if self._max_len > positions:
            raise ValueError(f"max_len is {self._max_len}: give at most the model's {positions} positions")
        if self.plan.mesh.shape[DP] != 1:
            raise ValueError(f"the mesh has dp {self.plan.mesh.shape[DP]}: create one engine per replica, each of dp 1")

    def _new_id(self) -> str:
        names = (f"request-{number}" for number in count(self._submitted))
        return next(name for name in names if name not in self.requests)

    def _encode(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        if self.tokenizer is None and (isinstance(prompt, str) or params.stop):
            raise ValueError("text needs a tokenizer, and the engine has none: give token ids, and no stop strings")
        if self.tokenizer is None or not isinstance(prompt, str):
            return check_token_ids("the prompt", prompt, self.config.vocab)
        try:
            return check_token_ids("the prompt", self.tokenizer.encode(prompt), self.config.vocab)
        except UnicodeEncodeError as error:
            invalid = prompt[error.start : error.end]
            raise ValueError(f"the prompt contains {invalid!a}, half of a character: give valid Unicode") from None

    def _with_seed(self, params: SamplingParams) -> SamplingParams:
        """Draw a seed for a request that samples and has none."""
        if params.seed is not None or params.temperature == 0:
            return params
        sequence = np.random.SeedSequence(self._entropy, spawn_key=(self._submitted,))
        return replace(params, seed=int(sequence.generate_state(1, np.uint64)[0]))

    def _submit_all(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> dict[str, None]:
        """Submit all requests, or none if one is invalid. Return their ids, in order."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a string: give a list of prompts")
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"there are {len(each)} params for {len(prompts)} prompts: give one for all, or one each")
        ids: dict[str, None] = {}
        try:
            for prompt, own_params in zip(prompts, each, strict=True):
                ids[self.submit(prompt, own_params)] = None
        except (TypeError, ValueError):
            for id in ids:
                self.discard(self.requests[id])
            raise
        return ids

    def _postprocess(self, step: ScheduledStep, pending: list[PendingStep]) -> None:
        """Count what was dispatched, and read what was dispatched before it."""
        self._pending.extend(pending)
        self._steps += 1
        self._prefilled += sum(chunk.count for chunk in step.chunks)
        self._shared += sum(admission.num_cached for admission in step.admissions)
        self.drain(leave=len(pending))

    def _append_tokens(self, output: SampleOutput, requests: list[tuple[int, Request]]) -> Iterator[Event]:
        for index, request in requests:
            if self.requests.get(request.id) is not request:
                continue  # it had finished when this step was dispatched
            logprobs = _logprobs_of(output, index, request.params.logprobs)
            event, finish_reason = request.append_token(int(output.token_B[index]), logprobs, time.perf_counter())
            self._decoded += 1
            yield event
            if finish_reason:
                yield self._finish(request, finish_reason)

    def _finish(self, request: Request, finish_reason: str) -> FinishedEvent:
        self.discard(request)
        self._finished += 1
        return FinishedEvent(request.id, request.make_output(finish_reason))


def _logprobs_of(output: SampleOutput, index: int, num_top: int | None) -> TokenLogprobs | None:
    if num_top is None or output.logprobs is None:
        return None
    chosen_B, top_BC, ids_BC = output.logprobs
    top = zip(ids_BC[index].tolist(), top_BC[index].tolist(), strict=True)
    return float(chosen_B[index]), tuple(top)[:num_top]
