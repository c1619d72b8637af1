"""The arrays of an engine: how many pages fit into memory, and the state in which no row is used."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from helix_jax.arrays import bytes_per_device, put
from helix_jax.cache import CacheSpec, KVCache, Rows, abstract_pool, fixed_page_table, make_pool, per_row
from helix_jax.decoding import DecodeState
from helix_jax.drafting import DraftCache, Drafts
from helix_jax.mesh import DP, ROWS_B, TABLE_RBM
from helix_jax.plan import Plan
from helix_jax.processes import min_over_processes
from helix_jax.sampling import RowSampling, make_sampling

_MEMORY_FRACTION = 0.9  # of a device's free memory, for pages
_MEMORY_FILE = Path("/proc/meminfo")  # of Linux


@dataclass(frozen=True, kw_only=True)
class StateShape:
    """The sizes of the arrays of an engine.

    Attributes:
        plan: How the mesh decodes.
        rows: Requests that run at once.
        vocab: The size of the vocabulary, padding included.
        page: Tokens per page.
        specs: What the layers of each cache group cache.
        pages_per_row: The most pages of a row on each rank, in each cache group.
        draft_spec: What a draft model caches, in pages like those of the first cache group. None: there is none.
        drafted_from: The most tokens of a row from which drafts are made. None: there are no drafts.
    """

    plan: Plan
    rows: int
    vocab: int
    page: int
    specs: tuple[CacheSpec, ...]
    pages_per_row: tuple[int, ...]
    draft_spec: CacheSpec | None = None
    drafted_from: int | None = None

    @property
    def _groups(self) -> int:
        return self.plan.mesh.shape[DP]

    def pages_that_fit(self, device: Any) -> int:
        """Return the pages per rank that all rows of a dp group can fill, or as many as fit into free memory.

        Args:
            device: One of the devices.
        """
        rows = self.rows // self._groups
        wanted = rows * self.pages_per_row[0]
        free_bytes = _free_bytes(device)
        if free_bytes is None:
            return wanted
        page_bytes, *other_bytes = map(self._page_bytes, self.specs)
        if self.draft_spec:
            page_bytes += self._page_bytes(self.draft_spec)
        rings = zip(other_bytes, self.pages_per_row[1:], strict=True)
        left_bytes = int(_MEMORY_FRACTION * free_bytes) - rows * sum(size * pages for size, pages in rings)
        return min_over_processes(max(1, min(wanted, left_bytes // page_bytes)))

    def empty_state(self, pages: int) -> DecodeState:
        """Return a state without requests.

        Args:
            pages: The pages per rank of the first cache group. The others are rings, whose pages belong to the rows.
        """
        plan, rows = self.plan, self.rows
        rings = [rows // self._groups * own for own in self.pages_per_row[1:]]
        caches = tuple(self._pool(spec, own) for spec, own in zip(self.specs, [pages, *rings], strict=True))
        table_RBM = np.full((plan.layout.ranks, rows, self.pages_per_row[0]), -1, np.int32)
        tables_RBM = (
            put(table_RBM, plan.mesh, TABLE_RBM),
            *(fixed_page_table(plan, rows, own) for own in self.pages_per_row[1:]),
        )
        put_rows = partial(put, mesh=plan.mesh, spec=ROWS_B)
        zeros_B, no_B, no_BV = np.zeros(rows), np.zeros(rows, bool), np.zeros((rows, self.vocab), bool)
        return DecodeState(
            caches,
            Rows(tables_RBM, per_row(plan, zeros_B), per_row(plan, zeros_B)),
            token_B=per_row(plan, zeros_B),
            finished_B=put_rows(no_B),
            stop_BV=put_rows(no_BV),
            sampling=RowSampling(*map(put_rows, (make_sampling(rows), np.ones(rows, np.float32), no_B, no_BV))),
            drafts=self._empty_drafts(pages),
        )

    def _empty_drafts(self, pages: int) -> Drafts | None:
        if self.drafted_from is None:
            return None
        plan, zeros_B = self.plan, np.zeros(self.rows)
        cached = DraftCache(self._pool(self.draft_spec, pages), per_row(plan, zeros_B)) if self.draft_spec else None
        return Drafts(per_row(plan, np.zeros((self.rows, self.drafted_from))), per_row(plan, zeros_B), cached)

    def _pool(self, spec: CacheSpec, pages: int) -> KVCache:
        """Create a pool with some pages per rank."""
        return make_pool(self.plan, spec, self._groups * self.plan.layout.ranks * pages, self.page)

    def _page_bytes(self, spec: CacheSpec) -> int:
        """Return the bytes of a page of each layer on a device."""
        return bytes_per_device(abstract_pool(self.plan, spec, self._groups * self.plan.layout.ranks, self.page))


def _free_bytes(device: Any) -> int | None:
    """Return the free memory of a device, None if it is not known. Fake devices share that of the machine."""
    if device.platform != "cpu":
        stats = device.memory_stats()
        return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None
    if jax.process_count() > 1 or not _MEMORY_FILE.exists():  # several processes may share a machine
        return None
    [line] = [line for line in _MEMORY_FILE.read_text().splitlines() if line.startswith("MemAvailable:")]
    return 1024 * int(line.split()[1]) // jax.local_device_count()
