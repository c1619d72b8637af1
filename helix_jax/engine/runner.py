"""Runs what was scheduled: keeps what lies on the devices, and turns each step's work into calls of their programs."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helix_jax.arrays import put
from helix_jax.cache import CacheSpec, KVCache, Rows, make_pools, max_pages_per_row, per_row
from helix_jax.engine import programs
from helix_jax.engine.page_allocator import RowPages
from helix_jax.engine.params import SamplingParams
from helix_jax.engine.programs import RowSampling, DeviceState, SampleOutput
from helix_jax.engine.requests import Request
from helix_jax.engine.output_text import OutputText
from helix_jax.engine.scheduler import Chunk, Admission, ScheduledStep, row_of, table_of
from helix_jax.mesh import REPLICATED, ROWS_B, TABLE_RBM, TP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.processes import min_over_processes
from helix_jax.sampling import make_sampling

_SHARE_OF_MEMORY = 0.9  # of what is free, for pages
_EDITS = 64  # of the table, in one call
_SHORTER = (4, 16)  # a chunk that is so many times shorter has a program of its own


class PendingStep(NamedTuple):
    """What was dispatched and is not yet read: outputs, and whose token stands in which place of them."""

    told: SampleOutput
    whose: list[tuple[int, Request]]


class Runner:
    """The devices' side of an engine: weights, pages, and a row for each request that runs.

    pages: of each rank; None: what all rows can fill, as far as the free memory of a device goes.
    """

    def __init__(
        self, model: Transformer, plan: Plan, *, rows: int, pages: int | None, page: int, max_len: int, chunk: int
    ):
        self.config, self.plan = model.config, plan
        self.spec, self.page = CacheSpec.from_config(model.config, model.dtype), page
        self._weights = model.weights()
        self._device = min(model.embed_VD[...].sharding.addressable_devices, key=lambda device: device.id)
        self._entries = max_pages_per_row(plan.layout, max_len, page)
        self._widths = sorted({chunk, *(max(1, chunk // times) for times in _SHORTER)})
        self._under_way: Any = None  # on a CPU
        self.pages = self._pages_that_fit(rows) if pages is None else pages
        self.state = self._empty_state(rows, model.embed_VD.shape[0])

    def warm_up(self) -> float:
        """Compiles every program that steps are made of. Returns the seconds that it took."""
        began = time.perf_counter()
        nobody = Request("", [0], SamplingParams(), frozenset(), -1, OutputText(None, ()), row=0)
        self._edit_page_table([])
        self.admit(Admission(nobody, 0), RowPages([[] for _ in range(self.plan.layout.ranks)]))
        for width in self._widths:
            self._prefill(Chunk(nobody, 0, 0, False), width)
        self._decode([])
        jax.block_until_ready(self.state)
        return time.perf_counter() - began

    def run(self, work: ScheduledStep, held: Mapping[str, RowPages]) -> list[PendingStep]:
        """Dispatches one step; `held`: the pages of every request that has a row."""
        flights = []
        if work.edits:
            self._edit_page_table(work.edits)
        if work.decodes:
            flights.append(PendingStep(self._decode(work.decodes), [(row_of(r), r) for r in work.decodes]))
        for seat in work.seats:
            self.admit(seat, held[seat.request.id])
        for chunk in work.chunks:
            told = self._prefill(chunk, next(width for width in self._widths if chunk.count <= width))
            if chunk.last:
                flights.append(PendingStep(told, [(0, chunk.request)]))
        return flights

    def _edit_page_table(self, edits: list[tuple[int, int, int, int]]) -> None:
        nothing = (self.plan.layout.ranks, 0, 0, 0)
        for first in range(0, max(len(edits), 1), _EDITS):
            some = edits[first : first + _EDITS]
            edits_X4 = self.put(np.asarray(some + [nothing] * (_EDITS - len(some)), np.int32))
            self.state = self.call(programs.edit_page_table, self.plan, self.state, edits_X4)

    def admit(self, seat: Admission, held: RowPages) -> None:
        """Gives a request its row."""
        request, params = seat.request, seat.request.params
        seen_V = np.zeros(self.state.seen_BV.shape[1], bool)
        seen_V[request.known] = True
        sampling = make_sampling(1, params.temperature, params.top_k, params.top_p, params.seed, params.min_p)
        penalty, told = params.repetition_penalty, params.logprobs is not None
        rules = RowSampling(sampling, jnp.full(1, penalty, jnp.float32), jnp.full(1, told))
        table_RM = table_of(held, self._entries)
        numbers = (np.int32(x) for x in (seat.cached, len(request.prompt)))
        given = (np.int32(row_of(request)), table_RM, *numbers, seen_V, rules)
        self.state = self.call(programs.admit, self.plan, self.state, *map(self.put, given))

    def _prefill(self, chunk: Chunk, width: int) -> SampleOutput:
        tokens = chunk.request.known[chunk.first : chunk.first + chunk.count]
        tokens_1T = np.zeros((1, width), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        given = (np.int32(row_of(chunk.request)), tokens_1T, np.asarray([chunk.count], np.int32))
        told, self.state = self.call(
            programs.prefill, self.config, self.plan, self._weights, self.state, *map(self.put, given)
        )
        return told

    def _decode(self, requests: list[Request]) -> SampleOutput:
        count_B = np.zeros(len(self.state.token_B), np.int32)
        count_B[[row_of(request) for request in requests]] = 1
        told, self.state = self.call(
            programs.decode, self.config, self.plan, self._weights, self.state, self.put(count_B)
        )
        return told

    def put(self, value: Any) -> Any:
        """Small arrays, on all devices."""
        return put(value, self.plan.mesh, REPLICATED)

    def call(self, program: Callable[..., Any], *given: Any) -> Any:
        """Dispatches it. On a CPU split into devices programs that pile up deadlock: the last one is waited for."""
        if self._device.platform == "cpu":
            jax.block_until_ready(self._under_way)
        output = program(*given)
        self._under_way = output if self._device.platform == "cpu" else None
        return output

    def _pages_that_fit(self, rows: int) -> int:
        wanted = rows * self._entries
        stats = None if self._device.platform == "cpu" else self._device.memory_stats()
        if not stats:
            return wanted
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        pools = jax.eval_shape(lambda: make_pools(self.plan, self.spec, self.plan.layout.ranks, self.page))
        per_page = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pools)) // self.plan.mesh.size
        if self.spec.latent:
            per_page *= self.plan.mesh.shape[TP]
        return min_over_processes(max(1, min(wanted, int(_SHARE_OF_MEMORY * free) // per_page)))

    def _empty_state(self, rows: int, vocab: int) -> DeviceState:
        plan, ranks = self.plan, self.plan.layout.ranks
        cache: KVCache = make_pools(plan, self.spec, ranks * self.pages, self.page)
        table_RBM = np.full((ranks, rows, self._entries), -1, np.int32)
        none_B = np.zeros(rows)
        state_rows = Rows(put(table_RBM, plan.mesh, TABLE_RBM), per_row(plan, none_B), per_row(plan, none_B))
        rules = RowSampling(make_sampling(rows), jnp.ones(rows, jnp.float32), jnp.zeros(rows, bool))
        seen_BV = jnp.zeros((rows, vocab), bool)
        return DeviceState(cache, state_rows, per_row(plan, none_B), *put((seen_BV, rules), plan.mesh, ROWS_B))

