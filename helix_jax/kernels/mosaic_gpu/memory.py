"""Shared memory: how tiles lie in it, and how the pages of a tile come into it."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

Accumulator = plgpu.WGMMAAccumulatorRef  # of a warpgroup's matrix product, in registers
BYTES = 227 * 1024  # of one block on Hopper
ALIGNMENT = 1024
# Layouts of registers are inferred, and no memory is set aside for reductions across warps: rows lie within one.
COMPILER = plgpu.CompilerParams(
    approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
)
_SWIZZLE = 128


def tiled(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Memory in the order that the matrix unit reads: rows of 128 bytes, swizzled in groups of eight."""
    row = _SWIZZLE // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(_SWIZZLE)))


def copies_per_tile(tile: int, page: int) -> int:
    return max(1, tile // page)


def rows_of_tile(table_BM: Any, row: Array, head: Array, index: Array, *, tile: int, page: int, heads: int, pages: int):
    """Where the pieces of a tile begin, in a pool seen as rows [pages * heads * page, width].

    What a table holds past the slots in use may be anything; it is clamped here and hidden later.
    """
    piece = min(tile, page)
    starts = []
    for i in range(copies_per_tile(tile, page)):
        slot = index * tile + i * piece
        entry = jnp.clip(table_BM[row, jnp.clip(slot // page, 0, table_BM.shape[1] - 1)], 0, pages - 1)
        starts.append((entry * heads + head) * page + lax.rem(slot, page))
    return starts


def fetch_queries(queries: Any, seen_by: Any, queries_staged: Any, seen_staged: Any, arrived: Any) -> None:
    """Copies 64 queries, and from where to where each of them sees [2, 64]; waits for both."""
    plgpu.copy_gmem_to_smem(queries, queries_staged, arrived)
    plgpu.copy_gmem_to_smem(seen_by, seen_staged, arrived)
    plgpu.barrier_wait(arrived)


def fetch(pool: Any, starts: list[Array], target: Any, arrived: Any) -> None:
    """Starts the copies of one tile, a piece from each page."""
    piece = target.shape[0] // len(starts)
    for i, start in enumerate(starts):
        start = pl.multiple_of(start, piece)
        plgpu.copy_gmem_to_smem(pool.at[pl.ds(start, piece)], target.at[pl.ds(i * piece, piece)], arrived)
