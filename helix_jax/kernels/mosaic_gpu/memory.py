"""Shared memory: the layout of tiles, and the copies of pages into them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from helix_jax.attention import PageTable
from helix_jax.kernels.mosaic_gpu.work import Segment, Work

Accumulator = plgpu.WGMMAAccumulatorRef  # the result of a warpgroup's matrix product, in registers
BYTES = 227 * 1024  # the shared memory of one block on Hopper
ALIGNMENT = 1024
QUERY_COPIES = 3  # of queries, and of the first and last slots that they see
_COPY_NUMBERS = 32  # a copy begins at a multiple of 128 bytes
# Register layouts are inferred. Each row lies within one warp, so reductions across warps need no scratch memory.
COMPILER = plgpu.CompilerParams(
    approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
)
_SWIZZLE = 128


class Arrays(NamedTuple):
    """What a kernel reads and writes in the memory of the GPU.

    Attributes:
        q: The queries. Those of quantised latents are a pair: of the quantised numbers, and of the exact ones.
        pools: The pages, viewed as rows: lists of the arrays of keys and of values; or the array of latents; or the
            arrays of quantised latents.
        table: The pages of each row.
        spans: The slots that each query sees.
        o: The outputs of the parts.
        lse: The log-sum-exps of the parts.
    """

    q: Any
    pools: Any
    table: PageTable
    spans: Any
    o: Any
    lse: Any


def allocate_tiled(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Describe shared memory in the layout of the matrix unit: rows of 128 bytes, swizzled in groups of eight.

    If the vectors are shorter, the rows are too.
    """
    itemsize = jnp.dtype(dtype).itemsize
    row = min(_SWIZZLE, shape[-1] * itemsize)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, row // itemsize)), plgpu.SwizzleTransform(row))
    )


def allocate_per_query(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Describe shared memory for a number per query. Copies can begin at the first of each row."""
    return plgpu.SMEM((*shape[:-1], max(shape[-1], _COPY_NUMBERS)), dtype)


def copies_per_tile(tile: int, page: int) -> int:
    """Return the number of copies that fetch a tile: one per page."""
    return max(1, tile // page)


@dataclass(frozen=True)
class Locator:
    """Locates the tiles of a segment in a pool viewed as rows [pages * heads * page, width].

    Attributes:
        work: The static shape of the work.
        page: Tokens per page.
        entries: The entries of the page table [rows, pages]. Those past the slots in use may contain anything.
        segment: The segment.
        first: The page in the pool that entry 0 names.
        last: The largest valid entry.
    """

    work: Work
    page: int
    entries: Any
    segment: Segment
    first: Array
    last: Array

    @classmethod
    def of(cls, work: Work, page: int, pool_XH: Any, table: PageTable, segment: Segment) -> "Locator":
        """Return the locator for a pool and its page table."""
        pages = pool_XH.shape[0] // (work.heads * page)
        first, last = table.first_C[0], pages - 1 - table.first_C[table.first_C.shape[0] - 1]
        return cls(work, page, table.entries_BM, segment, first, last)

    def load(self, tile: Array) -> list[Array]:
        """Return the entries of the pieces of a tile: one per page."""
        row, pages = self.segment.job // self.work.jobs_per_row, self.entries.shape[1]
        return [self.entries[row, lax.rem(slot // self.page, pages)] for slot in self._slots(tile)]

    def locate(self, tile: Array, entries: list[Array]) -> list[Array]:
        """Return the first row of each piece of a tile of keys, whose entries have been loaded."""
        # Entries that are out of range belong to slots whose scores are masked later.
        pages = [self.first + jnp.clip(entry, 0, self.last) for entry in entries]
        return [
            (page * self.work.heads + self.segment.head) * self.page + lax.rem(slot, self.page)
            for page, slot in zip(pages, self._slots(tile), strict=True)
        ]

    def _slots(self, tile: Array) -> list[Array]:
        pieces = copies_per_tile(self.work.tile, self.page)
        return [tile * self.work.tile + i * (self.work.tile // pieces) for i in range(pieces)]


def locate_tile(work: Work, page: int, pool_XH: Any, table: PageTable, segment: Segment, tile: Array) -> list[Array]:
    """Return the first row of each piece of a tile of keys, in a pool viewed as rows."""
    locator = Locator.of(work, page, pool_XH, table, segment)
    return locator.locate(tile, locator.load(tile))


def rows_to_values(work: Work, page: int, table: PageTable) -> Array:
    """Return the rows from the keys of a page to its values, in pools viewed as rows."""
    return (table.first_C[1] - table.first_C[0]) * work.heads * page


def fetch_queries(
    work: Work,
    segment: Segment,
    member: Array | int,
    q: Any,
    spans: Any,
    q_staged: Any,
    spans_staged: Any,
    arrived: Any,
) -> None:
    """Start the copies of a member's queries and of the slots that they see, which are `QUERY_COPIES` arrivals."""
    fetch_query_numbers(work, segment, member, q, q_staged, arrived)
    own = pl.ds(member * work.member_queries, work.member_queries)
    for i in range(2):
        copied = spans_staged.at[i, pl.ds(0, work.member_queries)]
        plgpu.copy_gmem_to_smem(spans.at[i, segment.job, own], copied, arrived)


def fetch_query_numbers(work: Work, segment: Segment, member: Array | int, q: Any, q_staged: Any, arrived: Any) -> None:
    """Start the copy of a member's queries, from [rows * heads, ..., queries, width]."""
    row, job = segment.job // work.jobs_per_row, lax.rem(segment.job, work.jobs_per_row)
    own = pl.ds(job * work.job_queries + member * work.member_queries, work.member_queries)
    plgpu.copy_gmem_to_smem(q.at[row * work.heads + segment.head, ..., own, :], q_staged, arrived)


def fetch(pool: Any, starts: list[Array], target: Any, arrived: Any) -> None:
    """Start the copies of one tile, one piece per page."""
    piece = target.shape[0] // len(starts)
    for i, start in enumerate(starts):
        rows = pl.ds(pl.multiple_of(start, piece), piece)
        plgpu.copy_gmem_to_smem(pool.at[rows], target.at[pl.ds(i * piece, piece)], arrived)
