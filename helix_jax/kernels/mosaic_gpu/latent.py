"""Computes the parts of latent attention: all heads share one vector of keys per slot, whose first numbers are values.

Arithmetic takes as long as reading the cache, so each processor works on 64 queries with three warpgroups. One computes
the scores and weights of a tile. Meanwhile the two others multiply the weights of the previous tile by its values, with
half of the columns each; the first of these two also copies the next tile into each stage that is free again. Queries
and two tiles fill the shared memory.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.attention import PageTable
from helix_jax.kernels.mosaic_gpu import memory, softmax
from helix_jax.kernels.mosaic_gpu.softmax import repeat_along_rows
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, Work, align_streams, loop_by_mask, walk_segments

_COLUMNS = 128  # columns of a result that are staged in shared memory at once
_HALVES = 2
_STAGES = 2  # tiles in the ring; no more fit beside the queries, with which they take 216 of 227 KB


@dataclass(frozen=True)
class LatentShape:
    """The static shape of the kernel for latents.

    Args:
        work: The static shape of the work.
        width: The width of a latent.
        v_width: The number of its columns that are values.
        page: Tokens per page.
        scale: The factor on the logits.
    """

    work: Work
    width: int
    v_width: int
    page: int
    scale: float

    @property
    def half(self) -> int:
        """The columns of the values that one warpgroup computes."""
        return self.v_width // _HALVES


def choose_shape(
    rows: int, queries: int, width: int, v_width: int, page: int, processors: int, scale: float
) -> LatentShape:
    """Choose the shape of the kernel.

    Args:
        rows: Sequences.
        queries: Queries of a row: new tokens times heads.
        width: The width of a latent.
        v_width: The number of its columns that are values.
        page: Tokens per page.
        processors: Multiprocessors of the GPU.
        scale: The factor on the logits.
    """
    members = 1 if queries <= ROWS else 2
    work = align_streams(Work(rows, 1, queries, members, ROWS, processors // members))
    return LatentShape(work, width, v_width, page, scale)


class Shared(NamedTuple):
    """The shared memory and the barriers of one processor. "Half" stands for a warpgroup that computes values.

    Attributes:
        ring: The tiles of each stage.
        weights: The weights of the current tile.
        per_query: The factor on earlier weights. After the last tile, 1 / sum and the log-sum-exp.
        filled: The copies of a tile arrive here.
        q_filled: The copies of queries and spans arrive here.
        weights_ready: The warpgroup of the scores arrives here when the weights of a tile are written.
        values_used: The first half arrives here when both halves have used the values of a tile.
        second_half_used: The second half arrives here when it has used the values of a tile.
        segment_finished: The warpgroup of the scores arrives here after the last tile of a segment.
        results_stored: Both halves arrive here when their results, which overwrite the queries, are copied out.
    """

    ring: Any
    weights: Any
    per_query: Any
    filled: Any
    q_filled: Any
    weights_ready: Any
    values_used: Any
    second_half_used: Any
    segment_finished: Any
    results_stored: Any


def compute_parts(
    shape: LatentShape, q_BQH: Array, k_AKWH: Array, table: PageTable, schedule: Schedule
) -> tuple[Array, Array]:
    """Compute the outputs [parts, queries, v_width] and log-sum-exps [parts, queries] of all parts."""
    work, tile = shape.work, shape.work.tile
    o_staged = [memory.allocate_tiled((ROWS, _COLUMNS), jnp.float32) for _ in range(_HALVES)]
    shared = Shared(
        ring=memory.allocate_tiled((_STAGES, tile, shape.width), jnp.bfloat16),
        weights=memory.allocate_tiled((ROWS, tile), jnp.bfloat16),
        per_query=plgpu.SMEM((2, ROWS), jnp.float32),
        filled=plgpu.Barrier(num_arrivals=memory.copies_per_tile(tile, shape.page), num_barriers=_STAGES),
        q_filled=plgpu.Barrier(num_arrivals=memory.QUERY_COPIES),
        weights_ready=plgpu.Barrier(),
        values_used=plgpu.Barrier(),
        second_half_used=plgpu.Barrier(),
        segment_finished=plgpu.Barrier(),
        results_stored=plgpu.Barrier(num_arrivals=_HALVES),
    )

    def body(*refs: Any) -> None:
        pl.run_scoped(
            partial(_body, shape, *refs),
            plgpu.RefUnion(memory.allocate_tiled((ROWS, shape.width), jnp.bfloat16), o_staged),
            plgpu.SMEM((2, ROWS), jnp.int32),
            shared,
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((work.parts, work.part_queries, shape.v_width), jnp.float32),
            jax.ShapeDtypeStruct((work.parts, work.job_queries), jnp.float32),
        ),
        grid=(work.streams, work.members),
        grid_names=("stream", "member"),
        num_threads=_HALVES + 1,
        thread_name="warpgroup",
        compiler_params=memory.COMPILER,
    )(q_BQH, k_AKWH.reshape(-1, shape.width), *table, *schedule)


def _body(
    shape: LatentShape, q, k, entries, first, starts, jobs, spans, o, lse, staged, spans_staged, shared: Shared
) -> None:
    arrays, (q_staged, o_staged) = memory.Arrays(q, k, PageTable(entries, first), spans, o, lse), staged
    walk = partial(walk_segments, shape.work, Schedule(starts, jobs, spans), lax.axis_index("stream"))

    def values(half: int) -> None:
        plgpu.set_max_registers(200, action="increase")
        walk(partial(_values, shape, half, arrays, o_staged[half], shared))

    def scores() -> None:
        plgpu.set_max_registers(104, action="decrease")
        walk(partial(_scores, shape, arrays, q_staged, spans_staged, shared))

    lax.switch(lax.axis_index("warpgroup"), [partial(values, half) for half in range(_HALVES)] + [scores])


def _scores(
    shape: LatentShape,
    arrays: memory.Arrays,
    q_staged,
    spans_staged,
    shared: Shared,
    segment: Segment,
    ring_step: Array,
) -> Array:
    work = shape.work
    member = lax.axis_index("member")
    rows = pl.ds(member * ROWS, ROWS)
    pl.when(ring_step > 0)(lambda: plgpu.barrier_wait(shared.results_stored))
    memory.fetch_queries(work, segment, member, arrays.q, arrays.spans, q_staged, spans_staged, shared.q_filled)
    plgpu.barrier_wait(shared.q_filled)

    def tile(masked: bool, index: Array, carry):
        m, l, ring_step = carry
        stage = lax.rem(ring_step, _STAGES)
        plgpu.barrier_wait(shared.filled.at[stage])

        def scores(acc):
            plgpu.wgmma(acc, q_staged, shared.ring.at[stage].transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(scores, memory.Accumulator((ROWS, work.tile), jnp.float32))
        s = softmax.mask_unseen(masked, s, spans_staged, index * work.tile)
        if masked:
            values = shared.ring.at[stage, :, pl.ds(0, shape.v_width)]
            softmax.clear_unseen(values, segment, index * work.tile, shape=(work.tile, shape.v_width))
        p, alpha, m, l = softmax.weigh(s, m, l, shape.scale)
        pl.when(index > segment.begin)(lambda: plgpu.barrier_wait(shared.values_used))
        shared.weights[...] = p.astype(jnp.bfloat16)
        shared.per_query[0] = alpha
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weights_ready)
        return m, l, ring_step + 1

    m, l, ring_step = loop_by_mask(segment, tile, (*softmax.start(), ring_step))
    inverse, log = softmax.finish(m, l)
    plgpu.barrier_wait(shared.values_used)
    shared.per_query[0] = inverse
    shared.per_query[1] = log
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.segment_finished)
    plgpu.copy_smem_to_gmem(shared.per_query.at[1], arrays.lse.at[segment.part, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return ring_step


def _values(
    shape: LatentShape, half: int, arrays: memory.Arrays, o_staged, shared: Shared, segment: Segment, ring_step: Array
) -> Array:
    work = shape.work
    columns = pl.ds(half * shape.half, shape.half)

    locate = partial(memory.locate_tile, work, shape.page, arrays.pools, arrays.table, segment)

    def fetch(index: Array, ring_step: Array, starts: list[Array]) -> None:
        @pl.when(index < segment.end)
        def _():
            stage = lax.rem(ring_step, _STAGES)
            memory.fetch(arrays.pools, starts, shared.ring.at[stage], shared.filled.at[stage])

    def tile(index: Array, carry):
        acc, ring_step = carry
        stage = lax.rem(ring_step, _STAGES)
        next_starts = locate(index + _STAGES) if half == 0 else []  # these loads overlap with the wait for the weights
        plgpu.barrier_wait(shared.weights_ready)
        acc = acc * repeat_along_rows(plgpu.layout_cast(shared.per_query[0], softmax.ROW), shape.half)
        add_values = pl.run_state(lambda acc: plgpu.wgmma(acc, shared.weights, shared.ring.at[stage, :, columns]))
        acc = add_values(memory.Accumulator.init(acc))
        if half == 0:
            plgpu.barrier_wait(shared.second_half_used)
            plgpu.barrier_arrive(shared.values_used)
            fetch(index + _STAGES, ring_step + _STAGES, next_starts)
        else:
            plgpu.barrier_arrive(shared.second_half_used)
        return acc, ring_step + 1

    if half == 0:
        for i in range(_STAGES):
            fetch(segment.begin + i, ring_step + i, locate(segment.begin + i))
    acc = plgpu.layout_cast(jnp.zeros((ROWS, shape.half), jnp.float32), softmax.TILE)
    acc, ring_step = lax.fori_loop(segment.begin, segment.end, tile, (acc, ring_step))
    plgpu.barrier_wait(shared.segment_finished)
    acc = acc * repeat_along_rows(plgpu.layout_cast(shared.per_query[0], softmax.ROW), shape.half)
    queries = min(ROWS, work.part_queries)
    for column in range(0, shape.half, _COLUMNS):
        o_staged[...] = acc[:, column : column + _COLUMNS]
        plgpu.commit_smem()
        rows = pl.ds(lax.axis_index("member") * ROWS, queries)
        target = arrays.o.at[segment.part, rows, pl.ds(half * shape.half + column, _COLUMNS)]
        plgpu.copy_smem_to_gmem(o_staged.at[pl.ds(0, queries)], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(shared.results_stored)
    return ring_step
