"""Copies queries and tiles of grouped heads into shared memory, and converts tiles that are quantised."""

from functools import partial

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import Array, lax

from helix_jax.attention import PageTable
from helix_jax.kernels.mosaic_gpu import memory
from helix_jax.kernels.mosaic_gpu.conversion import convert
from helix_jax.kernels.mosaic_gpu.grouped_shape import GroupedShape, Shared
from helix_jax.kernels.mosaic_gpu.work import Segment


def copy(
    shape: GroupedShape, stream: Array, arrays: memory.Arrays, shared: Shared, segment: Segment, ring_step: Array
) -> Array:
    """Copy the queries and the tiles of a segment. `ring_step` counts the tiles of the stream."""
    _copy_queries(shape, stream, arrays, shared, segment)
    [[k], [v]], table = arrays.pools, arrays.table
    locate = partial(memory.locate_tile, shape.work, shape.page, k, table, segment)

    def copy_pair(index: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        starts, ring_step = carry
        next_starts = locate(index + 1)  # these loads overlap with the wait for a free stage
        for part, pool in enumerate((k, v)):
            stage = lax.rem(ring_step, shape.stages)
            freed, filled = shared.freed.at[stream, stage], shared.filled.at[stream, stage]
            pl.when(ring_step >= shape.stages)(partial(plgpu.barrier_wait, freed))  # the ring starts empty
            memory.fetch(
                pool,
                _starts_of(shape, table, part, starts),
                shared.tile(stream, stage),
                filled,
            )
            ring_step = ring_step + 1
        return next_starts, ring_step

    _, ring_step = lax.fori_loop(segment.begin, segment.end, copy_pair, (locate(segment.begin), ring_step))
    return ring_step


def copy_and_convert(
    shape: GroupedShape, stream: Array, arrays: memory.Arrays, shared: Shared, segment: Segment, ring_step: Array
) -> Array:
    """Copy like `copy`, some tiles ahead, and convert each tile to float16."""
    _copy_queries(shape, stream, arrays, shared, segment)
    pools, table = arrays.pools, arrays.table
    quantised, ahead = shared.quantised, shape.copied_tiles // 2  # in pairs
    assert quantised is not None
    locate = partial(memory.locate_tile, shape.work, shape.page, pools[0][0], table, segment)

    def fetch(ring_step: Array, part: int, starts: list[Array]) -> None:
        place = stream, lax.rem(ring_step, shape.copied_tiles)
        targets = quantised.ring.at[*place], quantised.scales.at[stream, lax.rem(ring_step, shape.scale_stages)]
        for array, target in zip(pools[part], targets, strict=True):
            memory.fetch(
                array,
                _starts_of(shape, table, part, starts),
                target,
                quantised.filled.at[*place],
            )

    def convert_pair(index: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        starts, ring_step = carry
        next_starts = locate(index + ahead + 1)  # these loads overlap with the conversion
        for part in range(2):
            source, target = ((stream, lax.rem(ring_step, n)) for n in (shape.copied_tiles, shape.stages))
            plgpu.barrier_wait(quantised.filled.at[*source])
            pl.when(ring_step >= shape.stages)(partial(plgpu.barrier_wait, shared.freed.at[*target]))
            convert(quantised.ring.at[*source], shared.tile(*target))
            plgpu.commit_smem()  # by now all threads have read the quantised tile, so its stage is free
            plgpu.barrier_arrive(shared.filled.at[*target])
            pl.when(index + ahead < segment.end)(partial(fetch, ring_step + shape.copied_tiles, part, starts))
            ring_step = ring_step + 1
        return next_starts, ring_step

    for pair in range(ahead):

        @pl.when(segment.begin + pair < segment.end)
        def _(pair: int = pair) -> None:
            starts = locate(segment.begin + pair)
            for part in range(2):
                fetch(ring_step + 2 * pair + part, part, starts)

    carry = locate(segment.begin + ahead), ring_step
    _, ring_step = lax.fori_loop(segment.begin, segment.end, convert_pair, carry)
    return ring_step


def _copy_queries(shape: GroupedShape, stream: Array, arrays: memory.Arrays, shared: Shared, segment: Segment) -> None:
    turn = lax.rem(segment.nth, shape.q_stages)
    pl.when(segment.nth >= shape.q_stages)(partial(plgpu.barrier_wait, shared.q_freed.at[stream, turn]))
    for member in range(shape.work.members):
        place = stream * shape.work.members + member, turn
        targets = shared.q.at[*place], shared.spans.at[*place], shared.q_filled.at[*place]
        memory.fetch_queries(shape.work, segment, member, arrays.q, arrays.spans, *targets)


def _starts_of(shape: GroupedShape, table: PageTable, part: int, starts: list[Array]) -> list[Array]:
    """Return the first rows of the pieces of a tile of keys (0) or values (1), given those of the keys."""
    to_values = memory.rows_to_values(shape.work, shape.page, table)
    return [start + to_values for start in starts] if part else starts
