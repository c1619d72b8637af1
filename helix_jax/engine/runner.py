"""Runs scheduled steps: keeps the arrays on the devices, and calls the jitted programs."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helix_jax.arrays import put
from helix_jax.cache import (
    CacheSpec,
    cache_specs,
    fixed_pages,
    max_pages_per_row,
    per_row,
    ring_pages,
)
from helix_jax.decoding import DecodeOutput, decode_program, decode_steps
from helix_jax.drafting import CATCH_UP, Drafter, DraftOptions, draft_cache_spec
from helix_jax.engine import programs
from helix_jax.engine.output_text import OutputText
from helix_jax.engine.page_allocator import RowPages
from helix_jax.engine.params import SamplingParams
from helix_jax.engine.prefill_shapes import PrefillShape, divide_chunks, prefill_shapes
from helix_jax.engine.programs import Chunks, RowUpdates
from helix_jax.engine.requests import Request
from helix_jax.engine.scheduler import Admission, Chunk, ScheduledStep, make_page_table
from helix_jax.engine.state import StateShape
from helix_jax.mesh import COPIES_Z2X, DP, REPLICATED, ROWS_B, AnyMesh, first_device, sharding
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.sampling import MAX_LOGPROBS, Logprobs, RowSampling, make_host_sampling
from helix_jax.speculation import MAX_DRAFT_TOKENS

_EDITS_PER_CALL = 64
_ADMISSIONS_PER_CALL = 8
_COPIES_PER_CALL = 8  # pages of each rank in each cache group, all of which are in memory twice meanwhile
_NUM_TOP = (0, 1, MAX_LOGPROBS)  # numbers of most probable tokens for which a program scores prompts
_CHUNK, _GPU_CHUNK = 512, 2048  # tokens to prefill per call


class PendingStep(NamedTuple):
    """The output of a program that was dispatched and is not yet read.

    Attributes:
        output: The chosen tokens.
        requests: The requests that get them, each with its index in the output.
        scores: The log-probabilities of prompts, None if none are requested.
        chunks: The chunks that get them, or that end their requests, each with its index in the scores.
    """

    output: DecodeOutput
    requests: list[tuple[int, Request]]
    scores: Logprobs | None
    chunks: list[tuple[int, Chunk]]


class DecodeOptions(NamedTuple):
    """How rows decode.

    Attributes:
        max_steps: The most tokens per row and call.
        draft_tokens: The most tokens that are drafted for a row in a step. None: none are.
        draft_model: The model that drafts them. None: they are looked up in the row.
    """

    max_steps: int
    draft_tokens: int | None = None
    draft_model: Transformer | None = None

    @property
    def in_flight(self) -> int:
        """The most tokens of a row that a step of decoding appends or undoes."""
        if self.draft_tokens is None:
            return 1
        return max(1 + MAX_DRAFT_TOKENS, CATCH_UP if self.draft_model else 0)


class Runner:
    """The device side of an engine: the weights, the pages, and the state of each row.

    Args:
        model: A model of `load` or `shard`.
        plan: How the mesh decodes.
        rows: Requests that run at once.
        pages: Pages per rank. None: as many as all rows can fill, or as the free memory of a device allows.
        page: Tokens per page.
        max_len: The most positions of a request.
        chunk: Tokens to prefill per call, in each dp group.
        decoding: How rows decode.
    """

    def __init__(
        self,
        model: Transformer,
        plan: Plan,
        *,
        rows: int,
        pages: int | None,
        page: int,
        max_len: int,
        chunk: int,
        decoding: DecodeOptions,
    ):
        self.config, self.plan, self.rows = model.config, plan, rows
        self._decode_steps = decode_steps(plan, decoding.max_steps, rows=rows, drafts=decoding.draft_tokens is not None)
        self._decode_program = decode_program(plan)
        self.specs, self.page = cache_specs(model.config, plan.cache_dtype_for(model.dtype)), page
        self._weights = model.weights()
        self._device = min(model.embed_VD[...].sharding.addressable_devices, key=lambda device: device.id)
        in_flight = max(chunk, decoding.in_flight)
        self.pages_per_row = [_most_pages(plan, spec, max_len, in_flight, page) for spec in self.specs]
        self._drafter, self._draft_spec = _make_drafter(plan, decoding, self.specs[0])
        # Only pages of the first cache group are allocated. The others are rings, whose pages belong to the rows.
        self.ring = self.pages_per_row[0] if self.specs[0].window else None
        self._groups = plan.mesh.shape[DP]
        self._shapes = prefill_shapes(chunk, rows // self._groups)
        self._last_output: Any = None  # on a CPU, the output of the latest program
        self._last_counts: tuple[tuple[int, ...], jax.Array] | None = None
        self._shape = StateShape(
            plan=plan,
            rows=rows,
            vocab=model.embed_VD.shape[0],  # padding included
            page=page,
            specs=self.specs,
            pages_per_row=tuple(self.pages_per_row),
            draft_spec=self._draft_spec,
            drafted_from=None if self._drafter is None else max_len,
        )
        self.pages = self._shape.pages_that_fit(self._device) if pages is None else pages
        self.state = self._shape.empty_state(self.pages)

    def warm_up(self, *, greedy: bool, sampling: bool) -> float:
        """Compile the programs, with calls that change no row.

        Args:
            greedy: Whether to compile the greedy decode program.
            sampling: Whether to compile the programs with a sampler.

        Returns:
            The seconds that it took.
        """
        start = time.perf_counter()
        compiled = self._compile_concurrently(greedy=greedy, sampling=sampling)
        self._edit_page_table([])
        self._copy_pages([[] for _ in self.specs])
        self.admit([])
        # On a CPU, a compiled program needs no first call, and to prefill padding takes as long as to prefill tokens.
        for shape in [] if compiled and self._device.platform == "cpu" else self._shapes:
            self._prefill(shape, {}, uses_sampler=sampling)
        for needed, is_greedy in ((greedy, True), (sampling, False)):
            for steps in self._decode_steps if needed else ():
                _, self.state = self.call(self._decode_program, *self._decode_arguments({}, is_greedy, steps))
        jax.block_until_ready(self.state)
        return time.perf_counter() - start

    def run(self, step: ScheduledStep, row_pages: Mapping[str, RowPages]) -> list[PendingStep]:
        """Dispatch one step.

        Args:
            step: The work.
            row_pages: The pages of each request that has a row.

        Returns:
            The outputs that will be read later.
        """
        pending = []
        if step.page_copies or any(admission.source_row is not None for admission in step.admissions):
            self._copy_pages(self._list_copies(step))
        if step.table_edits:
            self._edit_page_table(step.table_edits)
        if step.decodes:
            output = self._decode(step.decodes, not any(request.uses_sampler for request in step.decodes))
            pending.append(_pending(output, [(request.assigned_row, request) for request in step.decodes]))
        if step.admissions:
            self.admit([(admission, row_pages[admission.request.id]) for admission in step.admissions])
        for shape, chunks in divide_chunks(step.chunks, self._shapes, self._groups):
            first = [(index, chunk.request) for index, chunk in chunks.items() if chunk.generates]
            scored = [(index, chunk) for index, chunk in chunks.items() if chunk.scored or chunk.finishes]
            output, scores = self._prefill(shape, chunks, uses_sampler=any(one.uses_sampler for _, one in first))
            if first or scored:
                pending.append(_pending(output, first, scores, scored))
        return pending

    def admit(self, admissions: Sequence[tuple[Admission, RowPages]]) -> None:
        """Write the state of the rows of requests.

        Several are one program, because the devices wait for the host: with a program and ten copies for each, 32
        prompts of 512 tokens took 498 ms on one H200, of which it computed for 367.
        """
        for first in range(0, max(len(admissions), 1), _ADMISSIONS_PER_CALL):
            updates = [self._row_update(*admission) for admission in admissions[first : first + _ADMISSIONS_PER_CALL]]
            updates += [self._no_update] * (_ADMISSIONS_PER_CALL - len(updates))
            stacked = jax.tree.map(lambda *of_rows: np.stack(of_rows), *updates)
            self.state = self.call(programs.admit, self.plan, self.state, self.put(stacked))

    def prefill_drafts(self, request: Request) -> None:
        """Append what is cached of a request to the cache of the draft model, if there is one."""
        group, width = request.assigned_row // (self.rows // self._groups), max(shape.width for shape in self._shapes)
        for first in range(0, request.num_computed if self._draft_spec else 0, width):
            chunk = Chunk(request, first, min(width, request.num_computed - first), False, group)
            for shape, chunks in divide_chunks([chunk], self._shapes, self._groups):
                self._prefill_drafts(chunks, self._prefill_arguments(shape, chunks)[-1])

    def row_table(self, group: int, row: int, row_pages: RowPages) -> np.ndarray:
        """Return the page table of a row in a cache group, [R, M]."""
        pages = self.pages_per_row[group]
        if group == 0:
            return make_page_table(row_pages, pages)
        return np.broadcast_to(fixed_pages(self.plan, self.rows, pages)[row], (self.plan.layout.ranks, pages))

    def put(self, value: Any) -> Any:
        """Copy small arrays to all devices."""
        return put(value, self.plan.mesh, REPLICATED)

    def call(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """Dispatch a program.

        On a CPU that is split into devices, programs that queue up deadlock. There, wait for the previous one first.
        """
        if self._device.platform == "cpu":
            jax.block_until_ready(self._last_output)
        output = program(*arguments)
        self._last_output = output if self._device.platform == "cpu" else None
        return output

    def _compile_concurrently(self, *, greedy: bool, sampling: bool) -> bool:
        """Compile the large programs in threads, because XLA compiles each on little more than one core.

        Several processes compile in order, because they may have to agree on a program.

        Returns:
            Whether the programs are compiled.
        """
        if jax.process_count() > 1:
            return False
        calls: list[tuple[Any, tuple[Any, ...]]] = []
        # Those that take longest to compile are lowered first.
        for is_greedy in [True] * greedy + [False] * sampling:
            calls += [
                (self._decode_program, self._decode_arguments({}, is_greedy, steps)) for steps in self._decode_steps
            ]
        for shape in self._shapes:
            arguments = self._prefill_arguments(shape, {})
            calls.append((programs.prefill, arguments))
            if self._draft_spec:
                calls.append((programs.prefill_drafts, self._prefill_drafts_arguments({}, arguments[-1])))
            if sampling:
                logits_shape = (self._groups * shape.chunks, self._shape.vocab)
                where = sharding(self.plan.mesh, ROWS_B)
                logits_XV = jax.ShapeDtypeStruct(logits_shape, jnp.float32, sharding=where)
                calls.append((programs.choose_first, (self.plan, self.state, arguments[-1], logits_XV)))
        with ThreadPoolExecutor(len(calls)) as pool:
            for compiling in [pool.submit(program.lower(*arguments).compile) for program, arguments in calls]:
                compiling.result()
        return True

    @cached_property
    def _no_update(self) -> RowUpdates:
        """The update of a row that does not exist."""
        idle = Request("", [0], SamplingParams(), frozenset(), -1, OutputText(None, ()))
        idle.row = self.rows
        return self._row_update(Admission(idle, 0), RowPages.empty(self.plan.layout.ranks))

    def _row_update(self, admission: Admission, row_pages: RowPages) -> RowUpdates:
        """Return the new state of one row, as arrays of the host without the dimension X."""
        request, num_cached = admission.request, admission.num_cached
        tokens, params, row = request.all_token_ids, request.params, request.assigned_row
        settings = params.temperature, params.top_k, params.top_p, params.seed or 0, params.min_p
        sampling: list[Any] = [
            jax.tree.map(lambda setting_1: setting_1[0], make_host_sampling(1, *settings)),
            np.float32(params.repetition_penalty),
            np.bool_(params.logprobs is not None),
            _mask(tokens, self._shape.vocab),
        ]
        update: list[Any] = [
            np.int32(row),
            self.row_table(0, row, row_pages),
            np.int32(num_cached),
            np.int32(tokens[min(num_cached, len(tokens) - 1)]),
            np.int32(len(request.prompt)),
            _mask(request.stop_token_ids, self._shape.vocab),
            RowSampling(*sampling),
            None if self._shape.drafted_from is None else _padded(tokens, self._shape.drafted_from),
        ]
        return RowUpdates(*update)

    def _list_copies(self, step: ScheduledStep) -> list[list[tuple[int, int, int]]]:
        """Return the pages that a step copies in each cache group, as (rank, source, page).

        The rank is among those of all dp groups. A row that is forked gets a copy of the whole rings of the other row.
        """
        ranks, rows_per_group = self.plan.layout.ranks, self.rows // self._groups
        copies = [
            [(copy.row // rows_per_group * ranks + copy.rank, copy.source, copy.page) for copy in step.page_copies]
        ]
        forks = [
            (admission.request.assigned_row, admission.source_row)
            for admission in step.admissions
            if admission.source_row is not None
        ]
        for pages in self.pages_per_row[1:]:
            table_BM = fixed_pages(self.plan, self.rows, pages)
            copies.append(
                [
                    (row // rows_per_group * ranks + rank, int(source), int(page))
                    for row, source_row in forks
                    for source, page in zip(table_BM[source_row], table_BM[row], strict=True)
                    for rank in range(ranks)
                ]
            )
        return copies

    def _copy_pages(self, copies: list[list[tuple[int, int, int]]]) -> None:
        """Copy pages, given for each cache group as (rank among those of all dp groups, source, page)."""
        batches = [_batch_copies(group, self._groups * self.plan.layout.ranks) for group in copies]
        for index in range(max(map(len, batches))):
            arrays = tuple(group[index] if index < len(group) else np.full_like(group[0], -1) for group in batches)
            arguments = self.plan, self.state, put(arrays, self.plan.mesh, COPIES_Z2X)
            self.state = self.call(programs.copy_pages, *arguments)

    def _edit_page_table(self, edits: list[tuple[int, int, int, int]]) -> None:
        no_edit = (self.plan.layout.ranks, 0, 0, 0)  # a rank that does not exist
        for first in range(0, max(len(edits), 1), _EDITS_PER_CALL):
            batch = edits[first : first + _EDITS_PER_CALL]
            edits_X4 = self.put(np.asarray(batch + [no_edit] * (_EDITS_PER_CALL - len(batch)), np.int32))
            self.state = self.call(programs.edit_page_table, self.plan, self.state, edits_X4)

    def _decode(self, counts: Mapping[Request, int], greedy: bool) -> DecodeOutput:
        steps = next(steps for steps in self._decode_steps if steps >= max(counts.values()))
        output, self.state = self.call(self._decode_program, *self._decode_arguments(counts, greedy, steps))
        return output

    def _decode_arguments(self, counts: Mapping[Request, int], greedy: bool, steps: int) -> tuple[Any, ...]:
        count_by_row = [0] * self.rows
        for request, count in counts.items():
            count_by_row[request.assigned_row] = count
        model = self.config, self.plan, self._weights
        return *model, self.state, self._put_counts(tuple(count_by_row)), steps, greedy, self._drafter

    def _put_counts(self, counts: tuple[int, ...]) -> jax.Array:
        """Return how many tokens each row decodes, in the array of the previous call if they are the same.

        They mostly are, and a copy to the devices takes the host half a millisecond.
        """
        if self._last_counts is None or self._last_counts[0] != counts:
            self._last_counts = counts, per_row(self.plan, counts)
        return self._last_counts[1]

    def _prefill(
        self, shape: PrefillShape, chunks: Mapping[int, Chunk], *, uses_sampler: bool
    ) -> tuple[DecodeOutput, Logprobs | None]:
        """Prefill chunks, given by their index among those of the call."""
        arguments, scores = self._prefill_arguments(shape, chunks), None
        if any(chunk.scored for chunk in chunks.values()):
            output, logits_XV, x_XTD, self.state = self.call(programs.prefill_to_score, *arguments)
            scores = self._score(x_XTD, chunks)
        else:
            output, logits_XV, self.state = self.call(programs.prefill, *arguments)
        if uses_sampler:
            output, self.state = self.call(programs.choose_first, self.plan, self.state, arguments[-1], logits_XV)
        if self._draft_spec:
            self._prefill_drafts(chunks, arguments[-1])
        return output, scores

    def _prefill_drafts(self, chunks: Mapping[int, Chunk], arrays: Chunks) -> None:
        arguments = self._prefill_drafts_arguments(chunks, arrays)
        self.state = self.call(programs.prefill_drafts, *arguments)

    def _prefill_drafts_arguments(self, chunks: Mapping[int, Chunk], arrays: Chunks) -> tuple[Any, ...]:
        first_X = np.zeros(arrays.row_X.shape)
        for index, chunk in chunks.items():
            first_X[index] = chunk.first
        return self.plan, self._drafter, self.state, arrays, per_row(self.plan, first_X)

    def _score(self, x_XTD: jax.Array, chunks: Mapping[int, Chunk]) -> Logprobs:
        """Compute the log-probabilities of chunks from their hidden states."""
        next_XT, requested = np.zeros(x_XTD.shape[:2]), 0
        for index, chunk in chunks.items():
            tokens = chunk.request.prompt[chunk.first + 1 : chunk.first + 1 + chunk.count]
            next_XT[index, : len(tokens)] = tokens
            requested = max(requested, chunk.request.params.prompt_logprobs or 0)
        num_top = next(number for number in _NUM_TOP if number >= requested)
        model = self.config, self.plan, self._weights
        return self.call(programs.score_tokens, *model, x_XTD, per_row(self.plan, next_XT), num_top)

    def _prefill_arguments(self, shape: PrefillShape, chunks: Mapping[int, Chunk]) -> tuple[Any, ...]:
        number = self._groups * shape.chunks
        row_X, count_X = np.full(number, self.rows), np.zeros(number)  # a row that does not exist
        tokens_XT, is_last_X = np.zeros((number, shape.width)), np.zeros(number, bool)
        for index, chunk in chunks.items():
            row_X[index], count_X[index] = chunk.request.assigned_row, chunk.count
            tokens_XT[index, : chunk.count] = chunk.request.all_token_ids[chunk.first : chunk.first + chunk.count]
            is_last_X[index] = chunk.generates
        where = partial(per_row, self.plan)
        is_last = put(is_last_X, self.plan.mesh, ROWS_B)
        arrays = Chunks(where(row_X), where(tokens_XT), where(count_X), is_last)
        return self.config, self.plan, self._weights, self.state, arrays


def _most_pages(plan: Plan, spec: CacheSpec, max_len: int, in_flight: int, page: int) -> int:
    """Return the pages that a row needs on each rank for the layers of a cache group."""
    pages = max_pages_per_row(plan.layout, max_len, page)
    return min(pages, ring_pages(plan.layout, spec.window, in_flight, page)) if spec.window else pages


def _make_drafter(plan: Plan, decoding: DecodeOptions, first: CacheSpec) -> tuple[Drafter | None, CacheSpec | None]:
    """Return what drafts tokens, and what its model caches if it has one, in pages like those of a cache group."""
    model = decoding.draft_model
    if decoding.draft_tokens is None:
        return None, None
    if model is None:
        return Drafter(DraftOptions(decoding.draft_tokens)), None
    spec = draft_cache_spec(model.config, plan.cache_dtype_for(model.dtype), first)
    return Drafter(DraftOptions(decoding.draft_tokens, model.config), model.weights()), spec


def _pending(
    output: DecodeOutput,
    requests: list[tuple[int, Request]],
    scores: Logprobs | None = None,
    chunks: Iterable[tuple[int, Chunk]] = (),
) -> PendingStep:
    """Start to copy an output to the host, as soon as it is computed."""
    if all(request.params.logprobs is None for _, request in requests):
        output = output._replace(logprobs_BS=None)
    for array in jax.tree.leaves((output, scores)):
        array.copy_to_host_async()
    return PendingStep(output, requests, scores, list(chunks))


def _batch_copies(copies: Iterable[tuple[int, int, int]], ranks: int) -> list[np.ndarray]:
    """Return copies of pages, given as (rank, source, page), as at least one array [Z, 2, X] for a call each."""
    of_rank: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for rank, *pages in copies:
        of_rank[rank].append((pages[0], pages[1]))
    batches = max(1, -(-max(map(len, of_rank)) // _COPIES_PER_CALL))
    copies_ZX2 = np.full((ranks, batches * _COPIES_PER_CALL, 2), -1, np.int32)
    for rank, own in enumerate(of_rank):
        copies_ZX2[rank, : len(own)] = np.asarray(own, np.int32).reshape(-1, 2)
    return np.split(copies_ZX2.swapaxes(1, 2), batches, axis=2)


def default_chunk(mesh: AnyMesh) -> int:
    """Return how many tokens to prefill per call in each dp group, on the devices of a mesh."""
    device = first_device(mesh)
    return _GPU_CHUNK if device and device.platform == "gpu" else _CHUNK


def _padded(tokens: Sequence[int], length: int) -> np.ndarray:
    padded_S = np.zeros(length, np.int32)
    padded_S[: len(tokens)] = tokens
    return padded_S


def _mask(tokens: Iterable[int], vocab: int) -> np.ndarray:
    mask_V = np.zeros(vocab, bool)
    mask_V[[token for token in tokens if 0 <= token < vocab]] = True
    return mask_V
