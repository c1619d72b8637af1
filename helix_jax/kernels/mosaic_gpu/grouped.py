"""Computes the parts of attention over grouped heads. Keys and values are read once, in place.

Each processor runs one or two streams. In a stream, one warpgroup copies tiles into a ring buffer, and one computes (or
two, with 64 queries each, if a row has more than 64). The ring hides the latency of the memory: key and value tiles
alternate in its stages, and 100 KB of copies are in flight. While the results of a segment are stored, the queries and
tiles of the next segment are already copied.
"""

from collections.abc import Callable
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
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, Work, loop_over_tiles, walk_segments

_LEAST_TILE_BYTES = 16 * 1024
_COLUMNS = 128  # columns of an accumulator
_STAGED_COLUMNS = 64  # columns of a result that are staged in shared memory at once
_LEAST_STAGES = 3


@dataclass(frozen=True)
class GroupedShape:
    """The static shape of the kernel for grouped heads.

    Args:
        work: The static shape of the work.
        width: The width of a head.
        page: Tokens per page.
        processors: Multiprocessors of the GPU.
        scale: The factor on the logits.
    """

    work: Work
    width: int
    page: int
    processors: int
    scale: float

    @property
    def streams_per_processor(self) -> int:
        """The streams that one processor runs."""
        return self.work.streams // self.processors

    @property
    def computing_warpgroups(self) -> int:
        """The warpgroups of one processor that compute. The others copy."""
        return self.streams_per_processor * self.work.members

    @property
    def columns(self) -> int:
        """The columns of one accumulator."""
        return min(self.width, _COLUMNS)

    @property
    def q_stages(self) -> int:
        """The segments whose queries are in shared memory at once: two, or one if there is too little memory."""
        return 2 if self._ring_stages(q_stages=2) >= _LEAST_STAGES else 1

    @property
    def stages(self) -> int:
        """The tiles in the ring of a stream."""
        return self._ring_stages(self.q_stages)

    def _ring_stages(self, q_stages: int) -> int:
        """Return the number of tiles that fit into the memory beside queries and results."""
        staged = ROWS * (2 * self.width * q_stages + 4 * _STAGED_COLUMNS) * self.computing_warpgroups
        left = memory.BYTES - staged - 4 * memory.ALIGNMENT  # for spans, log-sum-exps and barriers
        return left // (2 * self.work.tile * self.width) // self.streams_per_processor


def choose_shape(
    rows: int, queries: int, heads: int, width: int, page: int, processors: int, scale: float
) -> GroupedShape:
    """Choose the shape of the kernel.

    Args:
        rows: Sequences.
        queries: Queries of a row and key/value head: new tokens times heads in a group.
        heads: Key/value heads.
        width: The width of a head.
        page: Tokens per page.
        processors: Multiprocessors of the GPU.
        scale: The factor on the logits.
    """
    members = 1 if queries <= ROWS else 2
    streams = 2 if members == 1 and width <= _COLUMNS else 1
    tile = max(ROWS, _LEAST_TILE_BYTES // (2 * width))
    return GroupedShape(Work(rows, heads, queries, members, tile, streams * processors), width, page, processors, scale)


class Shared(NamedTuple):
    """The shared memory and the barriers of the streams of one processor.

    Attributes:
        ring: The tiles of each stream and stage.
        q: The queries of each computing warpgroup.
        o: The outputs of each computing warpgroup, until they are copied to global memory.
        spans: The slots that each query sees.
        lse: The log-sum-exps of each computing warpgroup, until they are copied to global memory.
        q_filled: The copies of queries and spans arrive here.
        q_freed: Computing warpgroups arrive here when they no longer need the queries of a segment.
        filled: The copies of a tile arrive here.
        freed: Computing warpgroups arrive here when they no longer need a tile.
        cleared: Computing warpgroups arrive here when they have set their share of unseen values to 0.
    """

    ring: Any
    q: Any
    o: Any
    spans: Any
    lse: Any
    q_filled: Any
    q_freed: Any
    filled: Any
    freed: Any
    cleared: Any


def compute_parts(
    shape: GroupedShape, q_XQH: Array, k_XH: Array, v_XH: Array, table: PageTable, schedule: Schedule
) -> tuple[Array, Array]:
    """Compute the outputs [parts, queries, width] and log-sum-exps [parts, queries] of all parts."""
    work, tile = shape.work, shape.work.tile
    per_stage, per_q_stage = (shape.streams_per_processor, shape.stages), (shape.computing_warpgroups, shape.q_stages)
    shared = Shared(
        ring=memory.allocate_tiled((*per_stage, tile, shape.width), jnp.bfloat16),
        q=memory.allocate_tiled((*per_q_stage, ROWS, shape.width), jnp.bfloat16),
        o=memory.allocate_tiled((shape.computing_warpgroups, ROWS, _STAGED_COLUMNS), jnp.float32),
        spans=plgpu.SMEM((*per_q_stage, 2, ROWS), jnp.int32),
        lse=plgpu.SMEM((shape.computing_warpgroups, ROWS), jnp.float32),
        q_filled=plgpu.Barrier(num_arrivals=2, num_barriers=per_q_stage),
        q_freed=plgpu.Barrier(num_arrivals=work.members, num_barriers=(shape.streams_per_processor, shape.q_stages)),
        filled=plgpu.Barrier(num_arrivals=memory.copies_per_tile(tile, shape.page), num_barriers=per_stage),
        freed=plgpu.Barrier(num_arrivals=work.members, num_barriers=per_stage),
        cleared=plgpu.Barrier(num_arrivals=work.members, num_barriers=shape.streams_per_processor),
    )

    def body(*refs: Any) -> None:
        pl.run_scoped(partial(_body, shape, *refs), shared, collective_axes="warpgroup")

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((work.parts, work.part_queries, shape.width), jnp.float32),
            jax.ShapeDtypeStruct((work.parts, work.job_queries), jnp.float32),
        ),
        grid=(shape.processors,),
        grid_names=("processor",),
        num_threads=shape.computing_warpgroups + shape.streams_per_processor,
        thread_name="warpgroup",
        compiler_params=memory.COMPILER,
    )(q_XQH, k_XH, v_XH, *table, *schedule)


def _body(shape: GroupedShape, q, k, v, entries, first, starts, jobs, spans, o, lse, shared: Shared) -> None:
    table, schedule = PageTable(entries, first), Schedule(starts, jobs, spans)

    def walk(stream: int, body: Callable[[Segment, Array], Array]) -> None:
        walk_segments(shape.work, schedule, lax.axis_index("processor") * shape.streams_per_processor + stream, body)

    def compute(me: int) -> None:
        plgpu.set_max_registers(200, action="increase")
        stream, member = divmod(me, shape.work.members)
        walk(stream, partial(_compute, shape, stream, member, o, lse, shared))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def copy(stream: int) -> None:
        plgpu.set_max_registers(56, action="decrease")
        walk(stream, partial(_copy, shape, stream, q, spans, k, v, table, shared))

    roles = [partial(compute, me) for me in range(shape.computing_warpgroups)]
    roles += [partial(copy, stream) for stream in range(shape.streams_per_processor)]
    lax.switch(lax.axis_index("warpgroup"), roles)


def _copy(
    shape: GroupedShape, stream: int, q, spans, k, v, table, shared: Shared, segment: Segment, ring_step: Array
) -> Array:
    work, turn = shape.work, lax.rem(segment.nth, shape.q_stages)
    pl.when(segment.nth >= shape.q_stages)(partial(plgpu.barrier_wait, shared.q_freed.at[stream, turn]))
    for member in range(work.members):
        place = stream * work.members + member, turn
        targets = shared.q.at[*place], shared.spans.at[*place], shared.q_filled.at[*place]
        memory.fetch_queries(work, segment, member, q, spans, *targets)
    locate = partial(memory.locate_tile, work, shape.page, k, table, segment)
    rows_to_values = (table.first_C[1] - table.first_C[0]) * work.heads * shape.page

    def tile(index: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        starts, ring_step = carry
        next_starts = locate(index + 1)  # these loads overlap with the wait for a free stage
        v_starts = [start + rows_to_values for start in starts]
        for pool, pool_starts in ((k, starts), (v, v_starts)):
            stage = lax.rem(ring_step, shape.stages)
            freed = shared.freed.at[stream, stage]
            pl.when(ring_step >= shape.stages)(partial(plgpu.barrier_wait, freed))  # the ring starts empty
            memory.fetch(pool, pool_starts, shared.ring.at[stream, stage], shared.filled.at[stream, stage])
            ring_step = ring_step + 1
        return next_starts, ring_step

    _, ring_step = lax.fori_loop(segment.begin, segment.end, tile, (locate(segment.begin), ring_step))
    return ring_step


def _compute(
    shape: GroupedShape, stream: int, member: int, o, lse, shared: Shared, segment: Segment, ring_step: Array
) -> Array:
    work, ring = shape.work, shared.ring
    me, turn = stream * work.members + member, lax.rem(segment.nth, shape.q_stages)
    blocks = range(0, shape.width, shape.columns)
    plgpu.barrier_wait(shared.q_filled.at[me, turn])

    def tile(masked: bool, index: Array, carry):
        accs, m, l, ring_step = carry
        stage = lax.rem(ring_step, shape.stages)
        plgpu.barrier_wait(shared.filled.at[stream, stage])

        def scores(acc):
            plgpu.wgmma(acc, shared.q.at[me, turn], ring.at[stream, stage].transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(scores, memory.Accumulator((ROWS, work.tile), jnp.float32))
        plgpu.barrier_arrive(shared.freed.at[stream, stage])
        if masked:
            s = softmax.mask_unseen(s, shared.spans.at[me, turn], index * work.tile)
        p, alpha, m = softmax.compute_weights(s, m, shape.scale)
        l = l * alpha + p.sum(axis=1)
        accs = [acc * repeat_along_rows(alpha, shape.columns) for acc in accs]

        stage = lax.rem(ring_step + 1, shape.stages)
        plgpu.barrier_wait(shared.filled.at[stream, stage])
        if masked:
            staged_value, size = ring.at[stream, stage], (work.tile, shape.width)
            softmax.clear_unseen(staged_value, segment, index * work.tile, shape=size, sharers=work.members, me=member)
            if work.members > 1:
                plgpu.barrier_arrive(shared.cleared.at[stream])
                plgpu.barrier_wait(shared.cleared.at[stream])
        p = p.astype(jnp.bfloat16)

        def values(refs):
            for acc, column in zip(refs, blocks, strict=True):
                plgpu.wgmma(acc, p, ring.at[stream, stage, :, pl.ds(column, shape.columns)])

        accs = pl.run_state(values)([memory.Accumulator.init(acc) for acc in accs])
        plgpu.barrier_arrive(shared.freed.at[stream, stage])
        return accs, m, l, ring_step + 2

    zero = plgpu.layout_cast(jnp.zeros((ROWS, shape.columns), jnp.float32), softmax.TILE)
    carry = ([zero for _ in blocks], *softmax.start(), ring_step)
    accs, m, l, ring_step = loop_over_tiles(segment, tile, carry)
    plgpu.barrier_arrive(shared.q_freed.at[stream, turn])

    inverse, log = softmax.finish(m, l)
    queries = min(ROWS, work.part_queries)
    for column in range(0, shape.width, _STAGED_COLUMNS):
        acc, first = accs[column // shape.columns], column % shape.columns
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # earlier copies still read the staging memory
        shared.o[me] = acc[:, first : first + _STAGED_COLUMNS] * repeat_along_rows(inverse, _STAGED_COLUMNS)
        if column == 0:
            shared.lse[me] = log
        plgpu.commit_smem()
        target = o.at[segment.part, pl.ds(member * ROWS, queries), pl.ds(column, _STAGED_COLUMNS)]
        plgpu.copy_smem_to_gmem(shared.o.at[me, pl.ds(0, queries)], target)
        if column == 0:
            plgpu.copy_smem_to_gmem(shared.lse.at[me], lse.at[segment.part, pl.ds(member * ROWS, ROWS)])
    return ring_step
