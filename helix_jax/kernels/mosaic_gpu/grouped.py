"""Computes the parts of attention over grouped heads. Keys and values are read once, in place.

Each processor runs streams. In a stream, one warpgroup copies tiles into a ring buffer, and one computes (or two, with
64 queries each, if a row has more than 64). The ring hides the latency of the memory: keys and values alternate in it,
with 100 KB in flight. Copies continue into the next segment, its queries included, while the results of the last
segment are stored.
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

from helix_jax.kernels.mosaic_gpu import memory, softmax
from helix_jax.kernels.mosaic_gpu.softmax import across
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, Work, each_segment, each_tile

_LEAST_TILE_BYTES = 16 * 1024
_COLUMNS = 128  # of an accumulator
_STAGED_COLUMNS = 64  # of a result, at once
_LEAST_SLOTS = 3


@dataclass(frozen=True)
class Grouped:
    work: Work
    width: int
    page: int
    processors: int
    scale: float

    @property
    def streams_here(self) -> int:
        """The streams of one processor."""
        return self.work.streams // self.processors

    @property
    def computing(self) -> int:
        return self.streams_here * self.work.members

    @property
    def columns(self) -> int:
        return min(self.width, _COLUMNS)

    @property
    def ahead(self) -> int:
        """The segments whose queries are in shared memory at once: two, or one if there is too little memory."""
        return 2 if self._slots(ahead=2) >= _LEAST_SLOTS else 1

    @property
    def slots(self) -> int:
        """The tiles in the ring of a stream."""
        return self._slots(self.ahead)

    def _slots(self, ahead: int) -> int:
        """Return the tiles that fit into the memory that queries and results leave."""
        staged = ROWS * (2 * self.width * ahead + 4 * _STAGED_COLUMNS) * self.computing
        left = memory.BYTES - staged - 4 * memory.ALIGNMENT  # spans, log-sum-exps and barriers
        return left // (2 * self.work.tile * self.width) // self.streams_here


def grouped(rows: int, queries: int, heads: int, width: int, page: int, processors: int, scale: float) -> Grouped:
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
    return Grouped(Work(rows, heads, queries, members, tile, streams * processors), width, page, processors, scale)


class Shared(NamedTuple):
    """Shared memory of the streams, and their barriers with what arrives at them."""

    ring: Any  # tiles of each stream
    q: Any  # queries of each computing warpgroup
    o: Any  # results on their way out
    spans: Any  # the slots that the queries see
    lse: Any
    asked: Any  # the copies of queries and spans
    answered: Any  # those who compute: the queries of a segment are needed no more
    filled: Any  # the copies of a tile
    freed: Any  # those who compute: the tile is needed no more
    cleared: Any  # they: unseen values are 0, for all


def parts(
    shape: Grouped, q_XQH: Array, k_XH: Array, v_XH: Array, table_BM: Array, plan: Schedule
) -> tuple[Array, Array]:
    """Return the outputs [parts, queries, width] and log-sum-exps [parts, queries] of every part."""
    work, tile = shape.work, shape.work.tile
    ring, asked = (shape.streams_here, shape.slots), (shape.computing, shape.ahead)
    shared = Shared(
        ring=memory.tiled((*ring, tile, shape.width), jnp.bfloat16),
        q=memory.tiled((*asked, ROWS, shape.width), jnp.bfloat16),
        o=memory.tiled((shape.computing, ROWS, _STAGED_COLUMNS), jnp.float32),
        spans=plgpu.SMEM((*asked, 2, ROWS), jnp.int32),
        lse=plgpu.SMEM((shape.computing, ROWS), jnp.float32),
        asked=plgpu.Barrier(num_arrivals=2, num_barriers=asked),
        answered=plgpu.Barrier(num_arrivals=work.members, num_barriers=(shape.streams_here, shape.ahead)),
        filled=plgpu.Barrier(num_arrivals=memory.copies_per_tile(tile, shape.page), num_barriers=ring),
        freed=plgpu.Barrier(num_arrivals=work.members, num_barriers=ring),
        cleared=plgpu.Barrier(num_arrivals=work.members, num_barriers=shape.streams_here),
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
        num_threads=shape.computing + shape.streams_here,
        thread_name="warpgroup",
        compiler_params=memory.COMPILER,
    )(q_XQH, k_XH, v_XH, table_BM, *plan)


def _body(shape: Grouped, q, k, v, table, starts, jobs, spans, o, lse, shared: Shared) -> None:
    plan = Schedule(starts, jobs, spans)

    def walk(stream: int, body: Callable[[Segment, Array], Array]) -> None:
        each_segment(shape.work, plan, lax.axis_index("processor") * shape.streams_here + stream, body)

    def compute(me: int) -> None:
        plgpu.set_max_registers(200, action="increase")
        stream, member = divmod(me, shape.work.members)
        walk(stream, partial(_compute, shape, stream, member, o, lse, shared))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def copy(stream: int) -> None:
        plgpu.set_max_registers(56, action="decrease")
        walk(stream, partial(_copy, shape, stream, q, spans, k, v, table, shared))

    roles = [partial(compute, me) for me in range(shape.computing)]
    roles += [partial(copy, stream) for stream in range(shape.streams_here)]
    lax.switch(lax.axis_index("warpgroup"), roles)


def _copy(shape: Grouped, stream: int, q, spans, k, v, table, shared: Shared, segment: Segment, walked: Array) -> Array:
    work, turn = shape.work, lax.rem(segment.nth, shape.ahead)
    pl.when(segment.nth >= shape.ahead)(partial(plgpu.barrier_wait, shared.answered.at[stream, turn]))
    for member in range(work.members):
        mine = stream * work.members + member, turn
        targets = shared.q.at[*mine], shared.spans.at[*mine], shared.asked.at[*mine]
        memory.fetch_queries(work, segment, member, q, spans, *targets)
    starts_of = partial(memory.rows_of_tile, work, shape.page, k, table, segment)

    def tile(index: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        starts, walked = carry
        following = starts_of(index + 1)  # under way while this tile waits for its place
        for pool in (k, v):
            slot = lax.rem(walked, shape.slots)
            freed = shared.freed.at[stream, slot]
            pl.when(walked >= shape.slots)(partial(plgpu.barrier_wait, freed))  # the ring starts empty
            memory.fetch(pool, starts, shared.ring.at[stream, slot], shared.filled.at[stream, slot])
            walked = walked + 1
        return following, walked

    _, walked = lax.fori_loop(segment.begin, segment.end, tile, (starts_of(segment.begin), walked))
    return walked


def _compute(
    shape: Grouped, stream: int, member: int, o, lse, shared: Shared, segment: Segment, walked: Array
) -> Array:
    work, ring = shape.work, shared.ring
    me, turn = stream * work.members + member, lax.rem(segment.nth, shape.ahead)
    blocks = range(0, shape.width, shape.columns)
    plgpu.barrier_wait(shared.asked.at[me, turn])

    def tile(masked: bool, index: Array, carry):
        accs, m, l, walked = carry
        slot = lax.rem(walked, shape.slots)
        plgpu.barrier_wait(shared.filled.at[stream, slot])

        def scores(acc):
            plgpu.wgmma(acc, shared.q.at[me, turn], ring.at[stream, slot].transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(scores, memory.Accumulator((ROWS, work.tile), jnp.float32))
        plgpu.barrier_arrive(shared.freed.at[stream, slot])
        if masked:
            s = softmax.hidden(s, shared.spans.at[me, turn], index * work.tile)
        p, alpha, m = softmax.weights(s, m, shape.scale)
        l = l * alpha + p.sum(axis=1)
        accs = [acc * across(alpha, shape.columns) for acc in accs]

        slot = lax.rem(walked + 1, shape.slots)
        plgpu.barrier_wait(shared.filled.at[stream, slot])
        if masked:
            staged_value, size = ring.at[stream, slot], (work.tile, shape.width)
            softmax.clear_unseen(staged_value, segment, index * work.tile, shape=size, sharers=work.members, me=member)
            if work.members > 1:
                plgpu.barrier_arrive(shared.cleared.at[stream])
                plgpu.barrier_wait(shared.cleared.at[stream])
        p = p.astype(jnp.bfloat16)

        def values(refs):
            for acc, column in zip(refs, blocks, strict=True):
                plgpu.wgmma(acc, p, ring.at[stream, slot, :, pl.ds(column, shape.columns)])

        accs = pl.run_state(values)([memory.Accumulator.init(acc) for acc in accs])
        plgpu.barrier_arrive(shared.freed.at[stream, slot])
        return accs, m, l, walked + 2

    zero = plgpu.layout_cast(jnp.zeros((ROWS, shape.columns), jnp.float32), softmax.TILE)
    carry = ([zero for _ in blocks], *softmax.start(), walked)
    accs, m, l, walked = each_tile(segment, tile, carry)
    plgpu.barrier_arrive(shared.answered.at[stream, turn])

    inverse, log = softmax.finish(m, l)
    asking = min(ROWS, work.part_queries)
    for column in range(0, shape.width, _STAGED_COLUMNS):
        acc, first = accs[column // shape.columns], column % shape.columns
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was staged before, in the last segment perhaps
        shared.o[me] = acc[:, first : first + _STAGED_COLUMNS] * across(inverse, _STAGED_COLUMNS)
        if column == 0:
            shared.lse[me] = log
        plgpu.commit_smem()
        target = o.at[segment.part, pl.ds(member * ROWS, asking), pl.ds(column, _STAGED_COLUMNS)]
        plgpu.copy_smem_to_gmem(shared.o.at[me, pl.ds(0, asking)], target)
        if column == 0:
            plgpu.copy_smem_to_gmem(shared.lse.at[me], lse.at[segment.part, pl.ds(member * ROWS, ROWS)])
    return walked
