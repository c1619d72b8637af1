"""Runs scheduled steps: keeps the arrays on the devices, and calls the jitted programs."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helix_jax.arrays import bytes_per_device, put
from helix_jax.cache import CacheSpec, Rows, make_pools, max_pages_per_row, per_row
from helix_jax.engine import programs
from helix_jax.engine.output_text import OutputText
from helix_jax.engine.page_allocator import RowPages
from helix_jax.engine.params import SamplingParams
from helix_jax.engine.programs import DeviceState, RowSampling, SampleOutput
from helix_jax.engine.requests import Request
from helix_jax.engine.scheduler import Admission, Chunk, ScheduledStep, make_page_table
from helix_jax.mesh import REPLICATED, ROWS_B, TABLE_RBM
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.processes import min_over_processes
from helix_jax.sampling import make_sampling

_MEMORY_FRACTION = 0.9  # of a device's free memory, for pages
_EDITS_PER_CALL = 64
_CHUNK_DIVISORS = (4, 16)  # a chunk that is shorter by this factor has a program of its own


class PendingStep(NamedTuple):
    """The output of a program that was dispatched and is not yet read.

    Attributes:
        output: The chosen tokens.
        requests: The requests that get one, each with its index in the output.
    """

    output: SampleOutput
    requests: list[tuple[int, Request]]


class Runner:
    """The device side of an engine: the weights, the pages, and the state of each row.

    Args:
        model: A model of `load` or `shard`.
        plan: How the mesh decodes.
        rows: Requests that run at once.
        pages: Pages per rank. None: as many as all rows can fill, or as the free memory of a device allows.
        page: Tokens per page.
        max_len: The most positions of a request.
        chunk: Tokens to prefill per call.
    """

    def __init__(
        self, model: Transformer, plan: Plan, *, rows: int, pages: int | None, page: int, max_len: int, chunk: int
    ):
        self.config, self.plan = model.config, plan
        self.spec, self.page = CacheSpec.from_config(model.config, model.dtype), page
        self._weights = model.weights()
        self._device = min(model.embed_VD[...].sharding.addressable_devices, key=lambda device: device.id)
        self._pages_per_row = max_pages_per_row(plan.layout, max_len, page)
        self._widths = sorted({chunk, *(max(1, chunk // divisor) for divisor in _CHUNK_DIVISORS)})
        self._last_output: Any = None  # on a CPU, the output of the latest program
        self.pages = self._pages_that_fit(rows) if pages is None else pages
        self.state = self._empty_state(rows, model.embed_VD.shape[0])

    def warm_up(self, *, sampling: bool) -> float:
        """Compile the programs.

        Args:
            sampling: Whether to compile the sampling programs besides the greedy ones.

        Returns:
            The seconds that it took.
        """
        start = time.perf_counter()
        request = Request("", [0], SamplingParams(), frozenset(), -1, OutputText(None, ()), row=0)
        self._edit_page_table([])
        self.admit(Admission(request, 0), RowPages.empty(self.plan.layout.ranks))
        for greedy in (True, False) if sampling else (True,):
            for width in self._widths:
                self._prefill(Chunk(request, 0, 0, False), width, greedy)
            self._decode([], greedy)
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
        if step.table_edits:
            self._edit_page_table(step.table_edits)
        if step.decodes:
            output = self._decode(step.decodes, not any(request.uses_sampler for request in step.decodes))
            pending.append(PendingStep(output, [(request.assigned_row, request) for request in step.decodes]))
        for admission in step.admissions:
            self.admit(admission, row_pages[admission.request.id])
        for chunk in step.chunks:
            width = next(width for width in self._widths if chunk.count <= width)
            output = self._prefill(chunk, width, not chunk.request.uses_sampler)
            if chunk.is_last:
                pending.append(PendingStep(output, [(0, chunk.request)]))
        return pending

    def admit(self, admission: Admission, row_pages: RowPages) -> None:
        """Write the state of a request's row."""
        request, params = admission.request, admission.request.params
        seen_V = np.zeros(self.state.seen_BV.shape[1], bool)
        seen_V[request.all_token_ids] = True
        row_sampling = RowSampling(
            make_sampling(1, params.temperature, params.top_k, params.top_p, params.seed or 0, params.min_p),
            jnp.full(1, params.repetition_penalty, jnp.float32),
            jnp.full(1, params.logprobs is not None),
        )
        table_RM = make_page_table(row_pages, self._pages_per_row)
        row, num_cached, prompt_len = map(np.int32, (request.assigned_row, admission.num_cached, len(request.prompt)))
        values = (row, table_RM, num_cached, prompt_len, seen_V, row_sampling)
        self.state = self.call(programs.admit, self.plan, self.state, *map(self.put, values))

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

    def _edit_page_table(self, edits: list[tuple[int, int, int, int]]) -> None:
        no_edit = (self.plan.layout.ranks, 0, 0, 0)  # a rank that does not exist
        for first in range(0, max(len(edits), 1), _EDITS_PER_CALL):
            batch = edits[first : first + _EDITS_PER_CALL]
            edits_X4 = self.put(np.asarray(batch + [no_edit] * (_EDITS_PER_CALL - len(batch)), np.int32))
            self.state = self.call(programs.edit_page_table, self.plan, self.state, edits_X4)

    def _prefill(self, chunk: Chunk, width: int, greedy: bool) -> SampleOutput:
        tokens = chunk.request.all_token_ids[chunk.first : chunk.first + chunk.count]
        tokens_1T = np.zeros((1, width), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        arrays = (np.int32(chunk.request.assigned_row), tokens_1T, np.asarray([chunk.count], np.int32))
        return self._run_model(programs.prefill, *map(self.put, arrays), greedy)

    def _decode(self, requests: list[Request], greedy: bool) -> SampleOutput:
        count_B = np.zeros(len(self.state.token_B), np.int32)
        count_B[[request.assigned_row for request in requests]] = 1
        return self._run_model(programs.decode, self.put(count_B), greedy)

    def _run_model(self, program: Callable[..., Any], *arguments: Any) -> SampleOutput:
        output, self.state = self.call(program, self.config, self.plan, self._weights, self.state, *arguments)
        return output

    def _pages_that_fit(self, rows: int) -> int:
        """Return the pages per rank that all rows can fill, or fewer if the free memory of a device is too small."""
        wanted = rows * self._pages_per_row
        stats = None if self._device.platform == "cpu" else self._device.memory_stats()
        if not stats:
            return wanted
        free_bytes = stats["bytes_limit"] - stats["bytes_in_use"]
        page_bytes = bytes_per_device(make_pools(self.plan, self.spec, self.plan.layout.ranks, self.page))
        return min_over_processes(max(1, min(wanted, int(_MEMORY_FRACTION * free_bytes) // page_bytes)))

    def _empty_state(self, rows: int, vocab: int) -> DeviceState:
        plan, ranks = self.plan, self.plan.layout.ranks
        cache = make_pools(plan, self.spec, ranks * self.pages, self.page)
        table_RBM = np.full((ranks, rows, self._pages_per_row), -1, np.int32)
        zeros_B = np.zeros(rows)
        device_rows = Rows(put(table_RBM, plan.mesh, TABLE_RBM), per_row(plan, zeros_B), per_row(plan, zeros_B))
        row_sampling = RowSampling(make_sampling(rows), jnp.ones(rows, jnp.float32), jnp.zeros(rows, bool))
        seen_BV = jnp.zeros((rows, vocab), bool)
        return DeviceState(cache, device_rows, per_row(plan, zeros_B), *put((seen_BV, row_sampling), plan.mesh, ROWS_B))
