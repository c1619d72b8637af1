"""Many requests on one mesh: `schedule -> run -> collect`, one step ahead of the devices."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import jax
import numpy as np

from helix_jax.engine.page_allocator import PageAllocator, prefix_block_len
from helix_jax.engine.params import SamplingParams, check_prompt
from helix_jax.engine.programs import SampleOutput
from helix_jax.engine.requests import CANCELLED, FinishedEvent, Event, EngineStats, Request, RequestOutput
from helix_jax.engine.runner import PendingStep, Runner
from helix_jax.engine.output_text import OutputText
from helix_jax.engine.scheduler import Scheduler, Admission
from helix_jax.generation import DEFAULT_CHUNK, DEFAULT_PAGE, check_placed
from helix_jax.mesh import DP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.text import Tokenizer

# OutputText, or token ids.
Prompt = str | Sequence[int] | np.ndarray


class Engine:
    """Prefills and decodes many requests together, over one cache of pages that all of them share.

    It and its scheduler are the only mutable state of the library. Each step is dispatched before the tokens of the one
    before are read: where a token goes is known without it. A request that turns out to have ended costs one token that
    nobody sees.

    rows: requests that run at once. pages: of each rank (None: what all rows can fill, as far as the free memory of a
    device goes). page: tokens per page. max_len: positions of a request at most (None: the model's). chunk:
    tokens of a prompt per call. budget: such tokens per step, so that decoding never waits for longer (None: a chunk).
    share_prefixes: requests that begin alike read the same pages, where places do not depend on the prompt's length:
    `sharing` says whether and why not.

    Of several processes (`helix_jax.processes`) each has an engine over the same mesh, and `submit`, `cancel` and
    `step` are collective calls: all make the same ones, in one order. Nothing is decided by a clock, so they agree.

    Raises:
        ValueError: weights on another mesh than the plan's, dp, heads that the mesh does not divide, a number below 1,
            more positions than the model has.
    """

    def __init__(
        self,
        model: Transformer,
        plan: Plan,
        *,
        rows: int = 8,
        pages: int | None = None,
        page: int = DEFAULT_PAGE,
        max_len: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        budget: int | None = None,
        tokenizer: Tokenizer | None = None,
        share_prefixes: bool = True,
    ):
        config = model.config
        max_len = config.max_positions if max_len is None else max_len
        budget = chunk if budget is None else budget
        _check_numbers(rows=rows, page=page, max_len=max_len, chunk=chunk, budget=budget)
        if pages is not None:
            _check_numbers(pages=pages)
        if max_len > config.max_positions:
            raise ValueError(f"max_len is {max_len}: the model has {config.max_positions} positions, give no more")
        if plan.mesh.shape[DP] != 1:
            raise ValueError(f"the mesh has dp {plan.mesh.shape[DP]}: make one engine for each, of dp 1")
        check_placed(model, plan)
        self.config, self.plan, self.max_len = config, plan, max_len
        self.sharing = _sharing(plan, page, share_prefixes)
        self.runner = Runner(model, plan, rows=rows, pages=pages, page=page, max_len=max_len, chunk=chunk)
        memory = PageAllocator(plan.layout, self.runner.pages, page, share=self.sharing == "on")
        self.scheduler = Scheduler(memory, rows, budget, chunk)
        self._tokenizer = tokenizer
        self.requests: dict[str, Request] = {}  # those that have not ended
        self._flights: deque[PendingStep] = deque()  # dispatched, not yet read
        self._events: deque[Event] = deque()  # read, not yet told
        self._submitted = self._steps = self._prefilled = self._shared = self._decoded = self._finished = 0
        self._busy_s = 0.0

    # What is asked

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, id: str | None = None) -> str:
        """Takes a request in; it runs in the steps that follow. Returns its id.

        Raises:
            ValueError: an empty prompt, an id outside of the vocabulary, one that could never fit, text without a
                tokenizer, an id of a request that has not ended.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params are {params!r}: give SamplingParams(...)")
        id = self._new_id() if id is None else id
        if not isinstance(id, str):
            raise ValueError(f"the id is {id!r}: give a string, or none")
        if id in self.requests:
            raise ValueError(f"a request '{id}' has not ended yet: give another id")
        if self._tokenizer is None and (isinstance(prompt, str) or params.stop):
            raise ValueError("text needs a tokenizer, and the engine has none: give token ids, and no stop strings")
        ids = check_prompt(self.config, self._encoded(prompt))
        ends = self.config.eos_token_ids if params.stop_token_ids is None else params.stop_token_ids
        text = OutputText(self._tokenizer, params.stop)
        request = Request(id, ids, params, frozenset(ends), self._submitted, text, submitted_s=time.perf_counter())
        self.check_room(request)
        self._submitted += 1
        self.requests[id] = request
        self.scheduler.waiting.append(request)
        return id

    def _new_id(self) -> str:
        names = (f"request-{number}" for number in count(self._submitted))
        return next(name for name in names if name not in self.requests)

    def _encoded(self, prompt: Prompt) -> Any:
        if self._tokenizer is None or not isinstance(prompt, str):
            return prompt
        try:
            return self._tokenizer.encode(prompt)
        except UnicodeEncodeError as error:
            held = prompt[error.start : error.end]
            raise ValueError(f"the prompt holds {held!a}, half of a character: give valid Unicode") from None

    def check_room(self, request: Request) -> None:
        """Raises ValueError if a request could never fit, be it alone."""
        memory, length, new = self.scheduler.memory, len(request.prompt), request.params.max_new_tokens
        if length + new > self.max_len:
            raise ValueError(
                f"{length} tokens and {new} new ones exceed the {self.max_len} positions of a row: "
                "shorten the prompt, ask for fewer, or give the engine a longer max_len"
            )
        need = int(memory.needed(request.most, length).max())
        if need > memory.pages:
            raise ValueError(
                f"{length} tokens and {new} new ones need {need} pages of {memory.page} on one rank, "
                f"and it has {memory.pages}: ask for fewer tokens, or give more pages"
            )

    def cancel(self, id: str) -> None:
        """Ends a request where it is; the next step tells.

        Raises:
            ValueError: an id that is unknown, or of a request that has ended.
        """
        if id not in self.requests:
            raise ValueError(f"no request '{id}' is waiting or running: it has ended, or was never submitted")
        self._events.append(self._end(self.requests[id], CANCELLED))

    # What is done

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do, or to tell."""
        return bool(self.requests or self._flights or self._events)

    def step(self) -> list[Event]:
        """Dispatches one step, then reads what the one before it said.

        Interrupted while it reads, where it spends its time, nothing is lost: the next step tells it.
        """
        began = time.perf_counter()
        work = self.scheduler.schedule()
        flights = self.runner.run(work, self.scheduler.held)
        self._flights.extend(flights)
        self._prefilled += sum(chunk.count for chunk in work.chunks)
        self._shared += sum(seat.cached for seat in work.seats)
        self._steps += 1
        self.drain(ahead=len(flights))
        self._busy_s += time.perf_counter() - began
        events = list(self._events)
        self._events.clear()
        return events

    def drain(self, ahead: int = 0) -> None:
        """Reads what was dispatched, but for the last so many; the next step tells it."""
        while len(self._flights) > ahead:
            told, whose = self._flights[0]
            asked = any(request.params.logprobs is not None for _, request in whose)
            told = jax.tree.map(np.asarray, told if asked else told._replace(logprobs=None))
            self._flights.popleft()
            self._events.extend(self._collect(told, whose))

    def events(self) -> Iterator[Event]:
        """Steps until nothing is left to do, and tells all that happens. Who leaves early finds the rest later."""
        while self.busy:
            self._events.extend(self.step())
            while self._events:
                yield self._events.popleft()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """The results of these prompts, in their order; params: for all, or one each.

        Other requests go on beside them; what is told of those is kept for the next step.

        Raises:
            ValueError: as `submit`, before anything runs; another number of params than of prompts.
        """
        if isinstance(prompts, str):
            raise ValueError("the prompts are one text: give a list of them")
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} params, but {len(prompts)} prompts: give one for all, or one each")
        ids: list[str] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                ids.append(self.submit(prompt, one))
        except ValueError:
            for id in ids:
                self.let_go(self.requests[id])
            raise
        results: dict[str, RequestOutput] = {}
        others: list[Event] = []
        ours = set(ids)
        try:
            while len(results) < len(ours):
                for event in self.step():
                    if event.id not in ours:
                        others.append(event)
                    elif isinstance(event, FinishedEvent):
                        results[event.id] = event.result
        finally:
            self._events.extendleft(reversed(others))
        return [results[id] for id in ids]

    def warm_up(self) -> float:
        """Compiles every program that steps are made of. Returns the seconds that it took.

        Raises:
            ValueError: requests that run: it would write into their rows.
        """
        if self.scheduler.running:
            raise ValueError(
                f"{len(self.scheduler.running)} requests are running: warm up before, or when they are done"
            )
        return self.runner.warm_up()

    def stats(self) -> EngineStats:
        """How it stands."""
        scheduler, memory = self.scheduler, self.scheduler.memory
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            finished=self._finished,
            pages=memory.pages,
            pages_in_use=memory.in_use(),
            pages_cached=memory.cached(),
            steps=self._steps,
            prefilled_tokens=self._prefilled,
            shared_tokens=self._shared,
            decoded_tokens=self._decoded,
            preemptions=scheduler.preemptions,
            tokens_per_s=self._decoded / self._busy_s if self._busy_s else 0.0,
        )

    # What is handed over

    def let_go(self, request: Request) -> None:
        """Forgets a request, and tells nothing of it."""
        del self.requests[request.id]
        self.scheduler.drop(request)

    def adopt(self, request: Request) -> None:
        """Goes on with a request that was begun elsewhere: what is written of it lies in its pages here."""
        request.order = self._submitted
        self.requests[request.id] = request
        self._submitted += 1
        if request.row is None:
            self.scheduler.waiting.append(request)
        else:
            self.runner.admit(Admission(request, request.written), self.scheduler.held[request.id])

    # collect

    def _collect(self, read: SampleOutput, whose: list[tuple[int, Request]]) -> Iterator[Event]:
        for place, request in whose:
            if self.requests.get(request.id) is not request:
                continue  # it had ended when this was dispatched
            told = None
            if request.params.logprobs is not None and read.logprobs:
                chosen_B, top_BC, ids_BC = read.logprobs
                top = zip(ids_BC[place].tolist(), top_BC[place].tolist(), strict=True)
                told = float(chosen_B[place]), tuple(top)[: request.params.logprobs]
            said, reason = request.append_token(int(read.token_B[place]), told, time.perf_counter())
            self._decoded += 1
            yield said
            if reason:
                yield self._end(request, reason)

    def _end(self, request: Request, reason: str) -> FinishedEvent:
        del self.requests[request.id]
        self.scheduler.drop(request)
        self._finished += 1
        return FinishedEvent(request.id, request.result(reason))


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}: give a whole number, at least 1")


def _sharing(plan: Plan, page: int, wanted: bool) -> str:
    layout = plan.layout
    if not wanted:
        return "off: not asked for"
    if not layout.prefix_stable:
        return f"off: under {layout.placement} places depend on the prompt's length (choose striped)"
    if prefix_block_len(layout, page) is None:
        return f"off: neither of page {page} and block {layout.block} divides the other"
    return "on"
