"""The engine: `schedule -> run -> postprocess`, with one step in flight."""

import secrets
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from itertools import chain, count

import jax
import numpy as np

from helix_jax.arrays import fetch
from helix_jax.decoding import DEFAULT_STEPS, DecodeOutput
from helix_jax.engine.logprobs import PromptLogprobs, logprobs_of, prompt_logprobs_of
from helix_jax.engine.options import DEFAULT_PAGE, DEFAULT_ROWS, check_options, make_decode_options
from helix_jax.engine.output_text import OutputText
from helix_jax.engine.page_allocator import PageAllocator, describe_prefix_caching
from helix_jax.engine.params import SamplingParams, check_num_top, params_of_each
from helix_jax.engine.requests import (
    CANCELLED,
    LENGTH,
    EngineStats,
    Event,
    FinishedEvent,
    Request,
    RequestOutput,
    check_length,
    sample_ids,
)
from helix_jax.engine.runner import PendingStep, Runner, default_chunk
from helix_jax.engine.scheduler import Admission, Chunk, ScheduledStep, Scheduler
from helix_jax.mesh import DP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.processes import on_first_process
from helix_jax.sampling import Logprobs
from helix_jax.speculation import SpeculationCounts
from helix_jax.step import check_model_placement
from helix_jax.text import Tokenizer, check_stop_string, encode_text
from helix_jax.validation import check_in_vocabulary, check_token_ids, check_type

# Text, or token ids.
Prompt = str | Sequence[int] | np.ndarray


@dataclass(eq=False, repr=False)
class Engine:
    """Prefills and decodes many requests together, over one cache of pages that all of them share.

    A step prefills chunks of prompts and decodes several tokens per row. Each step is dispatched before the tokens of
    the previous one are read, because their places are known without them. Tokens after the end of a request are
    discarded. If no page is free, the newest request is preempted and recomputed later; its output does not change.

    With several processes (`helix_jax.processes`), each has an engine over the same mesh. Creating it, `submit`,
    `cancel` and `step` are collective calls: all processes make the same calls in the same order.

    Args:
        model: A model of `load` or `shard`.
        plan: How the mesh decodes: the plan that the model was loaded with.
        rows: Requests that run at once. Each dp group of the mesh has an equal share of them.
        pages: Pages per rank. None: as many as all rows can fill, or as the free memory of a device allows. Layers with
            a window have further pages, if there are other layers: for each row as many as a window needs.
        page: Tokens per page.
        max_len: The most positions of a request, prompt and output. None: those of the model.
        chunk: Tokens to prefill per call in each dp group: of one prompt, or of several short ones. None: 2,048 on a
            GPU, 512 elsewhere.
        budget: Tokens to prefill per step, which bounds the time between decoded tokens. None: one call.
        steps_per_call: The most tokens per row that one call decodes. While a prompt is prefilled it is 1. A request
            that is submitted, cancelled or ended by a stop string waits for the call in progress.
        tokenizer: Converts text prompts to tokens, and tokens to text. None: requests have token ids only.
        speculate: How tokens are drafted, which are then verified several at once. The output does not change. "ngram"
            takes those that followed the last occurrence of the most recent tokens. A smaller model with the same
            vocabulary, loaded with the same plan, draws them. Its cache has as many pages as that of the model, and its
            layers with a window keep all positions if a layer of the model does. None: one token is decoded per step.
        draft_tokens: The most tokens to draft per row and step, up to 7. A row whose drafts are wrong drafts fewer.
            None: 5 with a model, 7 with "ngram".
        prefix_caching: Whether requests that start with the same tokens share their pages. Only the placement striped
            can do this, and only for models without windows, see `prefix_caching_status`.

    Raises:
        TypeError: The model, the plan, the tokenizer or an option has the wrong type.
        ValueError: The model was not loaded with this plan, the mesh does not divide the heads or dp the rows, a number
            is below 1, `max_len` exceeds the positions of the model, or the draft model does not fit the model, see
            `check_draft_model`.
    """

    model: Transformer
    plan: Plan
    _: KW_ONLY
    rows: int = DEFAULT_ROWS
    pages: int | None = None
    page: int = DEFAULT_PAGE
    max_len: int | None = None
    chunk: int | None = None
    budget: int | None = None
    steps_per_call: int = DEFAULT_STEPS
    tokenizer: Tokenizer | None = None
    prefix_caching: bool = True
    speculate: str | Transformer | None = None
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        check_type("the model", self.model, Transformer, "a model of helix_jax.load or helix_jax.shard")
        check_type("plan", self.plan, Plan, "a helix_jax.Plan")
        plan, config = self.plan, self.model.config
        self._max_len = config.max_positions if self.max_len is None else self.max_len
        self.chunk = default_chunk(plan.mesh) if self.chunk is None else self.chunk
        options = {field.name: getattr(self, field.name) for field in fields(self)} | {"max_len": self._max_len}
        check_options(config, plan, options)
        check_model_placement(self.model, plan)
        decoding = make_decode_options(config, plan, options)
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
            decoding=decoding,
        )
        self.prefix_caching_status = describe_prefix_caching(
            plan.layout, self.page, enabled=self.prefix_caching, windows=bool(config.windowed_layers)
        )
        share = self.prefix_caching_status == "on"
        groups, ring = range(plan.mesh.shape[DP]), self.runner.ring
        self.scheduler = Scheduler(
            [PageAllocator(plan.layout, self.runner.pages, self.page, share=share, ring=ring) for _ in groups],
            rows=self.rows,
            budget=self.budget or len(groups) * self.chunk,
            chunk=self.chunk,
            max_steps=self.steps_per_call,
            windows=bool(config.windowed_layers),
        )
        self.requests: dict[str, Request] = {}  # those that have not finished, each sample by its own id
        self._samples: dict[str, list[Request]] = {}  # those of each id that was submitted with several
        self._pending: deque[PendingStep] = deque()  # dispatched, not yet read
        self._events: deque[Event] = deque()  # not yet returned
        self._submitted = self._steps = self._prefilled = self._shared = self._decoded = self._finished = 0
        self._row_steps = self._drafted = self._accepted = 0
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
            The id. With several samples (`params.n`), each is a request with events and an output of its own. Their ids
            are `id/0`, `id/1` and so on.

        Raises:
            TypeError: The prompt, `params` or `id` has the wrong type.
            ValueError: The prompt is empty or can never fit, a token id is not in the vocabulary, there is text without
                a tokenizer, or a request with this id has not finished.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params is {params!r}: give SamplingParams(...)")
        return self._submit("the prompt", prompt, params, id)[0]

    def submit_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        ids: Sequence[str] | None = None,
    ) -> list[str]:
        """Submit several requests, or none if one is invalid.

        Args:
            prompts: Text or token ids, one per request.
            params: How they continue: one for all, or one each.
            ids: Their names. None: the engine chooses them.

        Returns:
            The ids, in the order of the prompts.

        Raises:
            TypeError: As `submit`, or `prompts` is a string.
            ValueError: As `submit`, or the number of params or ids differs from that of prompts.
        """
        return [id for id, _ in self._submit_all(prompts, params, ids)]

    def _submit_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        ids: Sequence[str] | None = None,
    ) -> list[tuple[str, list[Request]]]:
        """Submit like `submit_all`. Return each id and its samples."""
        submitted: list[tuple[str, list[Request]]] = []
        all_params = params_of_each(params, prompts)
        if isinstance(ids, str):
            raise TypeError(f"ids is the string '{ids}': give a list of strings, one for each prompt")
        all_ids = [None] * len(prompts) if ids is None else ids
        if len(all_ids) != len(prompts):
            raise ValueError(f"there are {len(all_ids)} ids for {len(prompts)} prompts: give one each")
        try:
            for index, (prompt, own, id) in enumerate(zip(prompts, all_params, all_ids, strict=True)):
                submitted.append(self._submit(f"prompt {index}", prompt, own, id))
        except (TypeError, ValueError):
            for request in chain.from_iterable(samples for _, samples in submitted):
                self.discard(request)
            raise
        return submitted

    def _submit(self, name: str, prompt: Prompt, params: SamplingParams, id: str | None) -> tuple[str, list[Request]]:
        id = self._new_id() if id is None else id
        if not isinstance(id, str):
            raise TypeError(f"id is {id!r}: give a string, or none")
        own_ids = sample_ids(id, params.n)
        for used in (id, *own_ids):
            if used in self.requests or used in self._samples:
                raise ValueError(f"a request '{used}' has not finished yet: give another id")
        token_ids = check_token_ids(name, self._encode(name, prompt, params), self.config.vocab)
        check_in_vocabulary("stop_token_ids", params.stop_token_ids, self.config.vocab)
        all_params = self._with_seed(params).of_samples()
        samples = [self._make_request(own_id, token_ids, own) for own_id, own in zip(own_ids, all_params, strict=True)]
        self.check_fits(samples[0], name)
        for index, request in enumerate(samples):
            request.index, request.order = index, self._submitted
            request.parent_id = id if len(samples) > 1 else None
            self._submitted += 1
            self._add(request)
            self.scheduler.add(request)
        return id, samples

    def _make_request(self, id: str, prompt: list[int], params: SamplingParams) -> Request:
        eos = () if params.ignore_eos else self.config.eos_token_ids
        return Request(
            id=id,
            prompt=prompt,
            params=params,
            stop_token_ids=frozenset((*params.stop_token_ids, *eos)),
            order=self._submitted,
            text=OutputText(self.tokenizer, params.stop, prompt),
            num_scored=params.prompt_logprobs_start - 1,
            submitted_s=time.perf_counter(),
        )

    def _add(self, request: Request) -> None:
        self.requests[request.id] = request
        if request.parent_id is not None:
            self._samples.setdefault(request.parent_id, []).append(request)

    def cancel(self, id: str) -> None:
        """Finish a request where it is. The next step returns its event.

        Args:
            id: The request: one sample of a prompt, such as `id/0`, or all that have not finished, if it is the id that
                was submitted.

        Raises:
            TypeError: The id is not a string.
            ValueError: The id is unknown, or the request has finished.
        """
        check_type("id", id, str, "the id of a request, a string")
        requests = list(self._samples[id]) if id in self._samples else [self.find_request(id)]
        self._events.extend([self._finish(request, CANCELLED) for request in requests])

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
            output, requests, scores, chunks = self._pending[0]
            output, scores = jax.tree.map(fetch, (output, scores))
            self._pending.popleft()
            self._count_drafts(output.speculation)
            self._events.extend(self._append_scores(scores, chunks))
            self._events.extend(self._append_tokens(output, requests))

    def events(self, ids: Collection[str] | None = None) -> Iterator[Event]:
        """Step until requests have finished. Yield what happens to them.

        If the caller stops early, a later call of `events` or `step` returns the remaining events.

        Args:
            ids: The requests, each sample by its own id. Later calls return the events of others. None: all requests.
        """
        while True:
            while (event := self._pop_event(ids)) is not None:
                yield event
            if not self.busy if ids is None else self.requests.keys().isdisjoint(ids):
                return
            self._events.extend(self.step())

    def _pop_event(self, ids: Collection[str] | None) -> Event | None:
        """Remove the first event of some requests, or of any, and return it."""
        for index, event in enumerate(self._events):
            if ids is None or event.id in ids:
                del self._events[index]
                return event
        return None

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Run requests to their end, beside those that were submitted before.

        Args:
            prompts: Text or token ids, one per request.
            params: How they continue: one for all, or one each.

        Returns:
            The outputs, in the order of the prompts. With several samples (`params.n`), there is one of each, in order
            of their `index`. Later calls of `step` return the events of other requests. After an interrupt, nothing of
            these requests is left.

        Raises:
            TypeError: As `submit_all`.
            ValueError: As `submit_all`. Then nothing runs.
        """
        own_ids = [request.id for _, samples in self._submit_all(prompts, params) for request in samples]
        outputs: dict[str, RequestOutput] = {}
        try:
            for event in self.events(frozenset(own_ids)):
                if isinstance(event, FinishedEvent):
                    outputs[event.id] = event.result
        finally:
            if len(outputs) < len(own_ids):  # an interrupt
                self.abandon(own_ids)
        return [outputs[id] for id in own_ids]

    def score(self, texts: Sequence[Prompt], top: int = 0) -> list[PromptLogprobs]:
        """Compute the log-probability of each token of some texts but the first, given the tokens before it.

        Nothing is generated. The logits of a few tokens are in memory at a time, so texts may be as long as prompts.

        Args:
            texts: Text or token ids, at most `max_len` + 1 tokens, because the last one is scored and not read.
            top: How many of the most probable tokens to return with each token, 0 to 20.

        Returns:
            The log-probabilities of each text. Those of a text of one token are empty.

        Raises:
            TypeError: As `submit_all`, or `top` is not an int.
            ValueError: As `submit_all`, or `top` is out of range. Then nothing runs.
        """
        check_num_top("top", top)
        outputs = self.generate(texts, SamplingParams(max_new_tokens=0, prompt_logprobs=top))
        return [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]

    def warm_up(self, *, greedy: bool = True, sampling: bool = True) -> float:
        """Compile the programs of a step. Without this, each is compiled when it is first needed.

        Args:
            greedy: Whether to compile the decode program for greedy requests.
            sampling: Whether to compile the programs for requests with a temperature, a repetition penalty or
                log-probabilities. They contain a sampler, and take longer to compile.

        Returns:
            The seconds that it took.

        Raises:
            ValueError: Requests are running. The compilation would write into their rows.
        """
        running = len(self.scheduler.running)
        if running:
            raise ValueError(f"{running} requests are running: call warm_up before them, or when they have finished")
        return self.runner.warm_up(greedy=greedy, sampling=sampling)

    def stats(self) -> EngineStats:
        """Return statistics since the start of the engine."""
        scheduler, allocators = self.scheduler, self.scheduler.allocators
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            finished=self._finished,
            capacity=len(allocators) * allocators[0].pages * self.plan.layout.ranks * self.page,
            pages=allocators[0].pages,
            pages_in_use=tuple(count for allocator in allocators for count in allocator.pages_in_use),
            pages_cached=sum(allocator.pages_cached for allocator in allocators),
            steps=self._steps,
            prefilled_tokens=self._prefilled,
            shared_tokens=self._shared,
            decoded_tokens=self._decoded,
            preemptions=scheduler.preemptions,
            tokens_per_s=self._decoded / self._busy_s if self._busy_s else 0.0,
            prefix_caching=self.prefix_caching_status,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            tokens_per_step=1 + self._accepted / max(self._row_steps, 1),
        )

    def find_request(self, id: str) -> Request:
        """Return a request that has not finished.

        Raises:
            ValueError: The id is unknown, or the request has finished.
        """
        if id in self._samples:
            names = ", ".join(f"'{request.id}'" for request in self._samples[id][:2])
            raise ValueError(
                f"request '{id}' has {len(self._samples[id])} samples: give the id of one, such as {names}"
            )
        if id not in self.requests:
            raise ValueError(f"no request '{id}' is waiting or running: it has finished, or was never submitted")
        return self.requests[id]

    def check_fits(self, request: Request, name: str = "the prompt") -> None:
        """Check that a request fits if it runs alone.

        Raises:
            ValueError: It has more positions than a row, or needs more pages than a rank has.
        """
        limits = {"max_len": self._max_len, "positions": self.config.max_positions}
        check_length(name, len(request.prompt), request.params.max_new_tokens, **limits)
        allocator, length = self.scheduler.allocators[0], len(request.prompt)
        if (start := request.params.prompt_logprobs_start) > length:
            raise ValueError(
                f"{name}: prompt_logprobs_start is {start}, but there are {length} tokens: give at most {length}"
            )
        needed = int(allocator.count_pages(request.max_computed, length).max())
        if needed > allocator.pages:
            raise ValueError(
                f"{length} tokens and {request.params.max_new_tokens} new ones need {needed} pages of {allocator.page} "
                f"on one rank, and it has {allocator.pages}: "
                f"reduce max_new_tokens, or create the engine with more pages"
            )

    def abandon(self, ids: Collection[str]) -> None:
        """Remove requests and their events, which nothing waits for any more, wherever they are.

        Args:
            ids: The requests, each sample by its own id. Those that have finished may be among them.
        """
        for id in ids:
            if id in self.requests:
                self.discard(self.requests[id])
        while self._pop_event(ids) is not None:
            pass

    def discard(self, request: Request) -> None:
        """Remove a request without an event."""
        del self.requests[request.id]
        if request.parent_id is not None:
            self._samples[request.parent_id].remove(request)
            if not self._samples[request.parent_id]:
                del self._samples[request.parent_id]
        self.scheduler.remove(request)

    def adopt(self, request: Request) -> None:
        """Continue a request that was started in another engine. Its cache is in its pages here."""
        request.order = self._submitted
        self._add(request)
        self._submitted += 1
        if request.row is None:
            self.scheduler.add(request)
        else:
            admission = Admission(request, request.num_computed)
            self.runner.admit([(admission, self.scheduler.row_pages[request.id])])
            self.runner.prefill_drafts(request)

    def _new_id(self) -> str:
        names = (f"request-{number}" for number in count(self._submitted))
        return next(name for name in names if name not in self.requests and name not in self._samples)

    def _encode(self, name: str, prompt: Prompt, params: SamplingParams) -> Sequence[int] | np.ndarray:
        if self.tokenizer is None and (isinstance(prompt, str) or params.stop):
            raise ValueError("text needs a tokenizer, and the engine has none: give token ids, and no stop strings")
        for stop in params.stop:
            check_stop_string(self.tokenizer, stop)
        if not isinstance(prompt, str):
            return prompt
        assert self.tokenizer is not None
        return encode_text(name, prompt, self.tokenizer)

    def _with_seed(self, params: SamplingParams) -> SamplingParams:
        """Draw a seed for a request that samples and has none."""
        if params.seed is not None or params.temperature == 0:
            return params
        sequence = np.random.SeedSequence(self._entropy, spawn_key=(self._submitted,))
        return replace(params, seed=int(sequence.generate_state(1, np.uint64)[0]))

    def _postprocess(self, step: ScheduledStep, pending: list[PendingStep]) -> None:
        """Count what was dispatched, and read what was dispatched before it."""
        self._pending.extend(pending)
        self._steps += 1
        self._prefilled += sum(chunk.count for chunk in step.chunks)
        self._shared += sum(admission.num_cached for admission in step.admissions)
        self.drain(leave=len(pending))

    def _count_drafts(self, counts: SpeculationCounts | None) -> None:
        if counts is not None:
            self._row_steps += int(counts.steps_B.sum())
            self._drafted += int(counts.drafted_B.sum())
            self._accepted += int(counts.accepted_B.sum())

    def _append_scores(self, scores: Logprobs | None, chunks: list[tuple[int, Chunk]]) -> Iterator[Event]:
        """Append log-probabilities of prompts to their requests, and finish those that generate nothing."""
        for index, chunk in chunks:
            request = chunk.request
            if self.requests.get(request.id) is not request:
                continue  # it was cancelled
            if scores is not None and chunk.scored:
                num_top = request.params.prompt_logprobs
                request.prompt_logprobs.append(prompt_logprobs_of(scores, index, chunk.scored_tokens, num_top))
            if chunk.finishes:
                yield self._finish(request, LENGTH)

    def _append_tokens(self, output: DecodeOutput, requests: list[tuple[int, Request]]) -> Iterator[Event]:
        """Append the tokens of a call to their requests, in the order in which they were decoded."""
        now_s = time.perf_counter()
        for step in range(output.tokens_BS.shape[1]):
            for index, request in requests:
                if step >= output.count_B[index] or self.requests.get(request.id) is not request:
                    continue  # it had finished before this step
                logprobs = logprobs_of(output.logprobs_BS, (index, step), request.params.logprobs)
                event, finish_reason = request.append_token(int(output.tokens_BS[index, step]), logprobs, now_s)
                self._decoded += 1
                yield event
                if finish_reason:
                    yield self._finish(request, finish_reason)

    def _finish(self, request: Request, finish_reason: str) -> FinishedEvent:
        self.discard(request)
        self._finished += 1
        return FinishedEvent(request.id, request.make_output(finish_reason))
