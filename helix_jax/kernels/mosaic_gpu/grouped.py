"""Parts of attention over grouped heads: a group's queries against its keys and values, read once, in place.

Each processor runs streams: a warpgroup that copies tiles into a ring, and one that computes (or two, of 64 queries
each, where a row brings more than 64). The ring hides the memory's latency: keys and values alternate in it, some
160 KB of heads of width 128 in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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


@dataclass(frozen=True)
class Grouped:
    work: Work
    width: int
    page: int
    processors: int
    scale: float

    @property
    def streams_here(self) -> int:
        """Of one processor."""
        return self.work.streams // self.processors

    @property
    def computing(self) -> int:
        return self.streams_here * self.work.members

    @property
    def columns(self) -> int:
        return min(self.width, _COLUMNS)

    @property
    def staged_columns(self) -> int:
        """Of a result, at once: float32 in the room of the queries."""
        return self.width // 2

    @property
    def slots(self) -> int:
        """Tiles in a stream's ring: what queries, or results, leave."""
        staged = 2 * ROWS * self.width * self.computing
        left = memory.BYTES - staged - 3 * memory.ALIGNMENT
        return left // (2 * self.work.tile * self.width) // self.streams_here


def grouped(rows: int, queries: int, heads: int, width: int, page: int, processors: int, scale: float) -> Grouped:
    """queries: of a row and key/value head, new tokens times heads in a group."""
    streams, members = (2, 1) if queries <= ROWS else (1, 2)
    tile = max(ROWS, _LEAST_TILE_BYTES // (2 * width))
    return Grouped(Work(rows, heads, queries, members, tile, streams * processors), width, page, processors, scale)


def parts(
    shape: Grouped, q_XQH: Array, k_XH: Array, v_XH: Array, table_BM: Array, plan: Schedule
) -> tuple[Array, Array]:
    """Outputs [parts, queries, width] and log-sum-exps [parts, queries] of every part."""
    work, tile = shape.work, shape.work.tile
    staged = plgpu.RefUnion(
        memory.tiled((ROWS, shape.width), jnp.bfloat16), memory.tiled((ROWS, shape.staged_columns), jnp.float32)
    )
    ring = (shape.streams_here, shape.slots)

    def body(*refs: Any) -> None:
        pl.run_scoped(
            partial(_body, shape, *refs),
            [staged] * shape.computing,
            plgpu.SMEM((shape.computing, ROWS), jnp.float32),
            plgpu.SMEM((shape.computing, 2, ROWS), jnp.int32),
            memory.tiled((*ring, tile, shape.width), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=memory.copies_per_tile(tile, shape.page), num_barriers=ring),
            plgpu.Barrier(num_arrivals=work.members, num_barriers=ring),
            plgpu.Barrier(num_arrivals=work.members, num_barriers=shape.streams_here),
            plgpu.Barrier(num_arrivals=2, num_barriers=(shape.computing,)),
            collective_axes="warpgroup",
        )

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


def _body(shape: Grouped, q, k, v, table, starts, jobs, spans, o, lse, staged, lse_staged, spans_staged, *shared):
    plan = Schedule(starts, jobs, spans)
    ring, filled, freed, cleared, asked = shared

    def walk(stream: int, body: Callable[..., Array]) -> None:
        index = lax.axis_index("processor") * shape.streams_here + stream
        each_segment(shape.work, plan, index, partial(body, (stream, ring, filled, freed, cleared)))

    def compute(me: int) -> None:
        plgpu.set_max_registers(200, action="increase")
        stream, member = divmod(me, shape.work.members)
        mine = (*staged[me], lse_staged.at[me], spans_staged.at[me], asked.at[me])
        walk(stream, partial(_compute, shape, member, q, spans, o, lse, mine))

    def copy(stream: int) -> None:
        plgpu.set_max_registers(56, action="decrease")
        walk(stream, partial(_copy, shape, k, v, table))

    roles = [partial(compute, me) for me in range(shape.computing)]
    roles += [partial(copy, stream) for stream in range(shape.streams_here)]
    lax.switch(lax.axis_index("warpgroup"), roles)


def _copy(shape: Grouped, k, v, table, stream_memory, segment: Segment, walked: Array) -> Array:
    stream, ring, filled, freed, _ = stream_memory
    starts_of = partial(memory.rows_of_tile, shape.work, shape.page, k, table, segment)

    def tile(index: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        starts, walked = carry
        following = starts_of(index + 1)  # under way while this tile waits for its place
        for pool in (k, v):
            slot = lax.rem(walked, shape.slots)
            pl.when(walked >= shape.slots)(partial(plgpu.barrier_wait, freed.at[stream, slot]))  # the ring starts empty
            memory.fetch(pool, starts, ring.at[stream, slot], filled.at[stream, slot])
            walked = walked + 1
        return following, walked

    _, walked = lax.fori_loop(segment.begin, segment.end, tile, (starts_of(segment.begin), walked))
    return walked


def _compute(
    shape: Grouped, member: int, q, spans, o, lse, mine, stream_memory, segment: Segment, walked: Array
) -> Array:
    stream, ring, filled, freed, cleared = stream_memory
    q_staged, o_staged, lse_staged, spans_staged, asked = mine
    work = shape.work
    memory.fetch_queries(work, segment, member, q, spans, q_staged, spans_staged, asked)
    blocks = range(0, shape.width, shape.columns)

    def tile(masked: bool, index: Array, carry):
        accs, m, l, walked = carry
        slot = lax.rem(walked, shape.slots)
        plgpu.barrier_wait(filled.at[stream, slot])

        def scores(acc):
            plgpu.wgmma(acc, q_staged, ring.at[stream, slot].transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(scores, memory.Accumulator((ROWS, work.tile), jnp.float32))
        plgpu.barrier_arrive(freed.at[stream, slot])
        if masked:
            s = softmax.hidden(s, spans_staged, index * work.tile)
        p, alpha, m = softmax.weights(s, m, shape.scale)
        l = l * alpha + p.sum(axis=1)
        accs = [acc * across(alpha, shape.columns) for acc in accs]

        slot = lax.rem(walked + 1, shape.slots)
        plgpu.barrier_wait(filled.at[stream, slot])
        if masked:
            held, size = ring.at[stream, slot], (work.tile, shape.width)
            softmax.clear_unseen(held, segment, index * work.tile, shape=size, sharers=work.members, me=member)
            if work.members > 1:
                plgpu.barrier_arrive(cleared.at[stream])
                plgpu.barrier_wait(cleared.at[stream])
        p = p.astype(jnp.bfloat16)

        def values(refs):
            for acc, column in zip(refs, blocks, strict=True):
                plgpu.wgmma(acc, p, ring.at[stream, slot, :, pl.ds(column, shape.columns)])

        accs = pl.run_state(values)([memory.Accumulator.init(acc) for acc in accs])
        plgpu.barrier_arrive(freed.at[stream, slot])
        return accs, m, l, walked + 2

    zero = plgpu.layout_cast(jnp.zeros((ROWS, shape.columns), jnp.float32), softmax.TILE)
    carry = ([zero for _ in blocks], *softmax.start(), walked)
    accs, m, l, walked = each_tile(segment, tile, carry)

    inverse, lse_staged[...] = softmax.finish(m, l)
    plgpu.commit_smem()
    asking, columns = min(ROWS, work.part_queries), shape.staged_columns
    plgpu.copy_smem_to_gmem(lse_staged, lse.at[segment.part, pl.ds(member * ROWS, ROWS)])
    for column in range(0, shape.width, columns):
        acc, first = accs[column // shape.columns], column % shape.columns
        o_staged[...] = acc[:, first : first + columns] * across(inverse, columns)
        plgpu.commit_smem()
        target = o.at[segment.part, pl.ds(member * ROWS, asking), pl.ds(column, columns)]
        plgpu.copy_smem_to_gmem(o_staged.at[pl.ds(0, asking)], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return walked
