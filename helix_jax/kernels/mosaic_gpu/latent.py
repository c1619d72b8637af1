"""Computes the parts of latent attention: all heads share one vector of keys per slot, whose first numbers are values.

The arithmetic takes as long as the memory, so a processor works on 64 queries in three roles. One warpgroup computes
the scores and weights of a tile. Meanwhile two others multiply the weights of the previous tile with its values, half
of the columns each. The first of these copies a new tile into the place of each finished one. Queries and two tiles
fill the shared memory.
"""

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

_COLUMNS = 128  # of a result that is staged at once
_HALVES = 2
_SLOTS = 2  # all that fits beside the queries: 216 KB of 227


@dataclass(frozen=True)
class Latent:
    work: Work
    width: int
    v_width: int
    page: int
    scale: float

    @property
    def half(self) -> int:
        return self.v_width // _HALVES


def latent(rows: int, queries: int, width: int, v_width: int, page: int, processors: int, scale: float) -> Latent:
    """Choose the shape of the kernel. `queries` counts those of a row: new tokens times heads."""
    members = 1 if queries <= ROWS else 2
    return Latent(Work(rows, 1, queries, members, ROWS, processors // members), width, v_width, page, scale)


class Shared(NamedTuple):
    """Shared memory of the three roles, and their barriers with what arrives at them."""

    ring: Any  # tiles
    weights: Any  # of the current tile
    per_query: Any  # the factor on earlier weights; at the end 1 / sum, and the log-sum-exp
    filled: Any  # the copies of a tile
    asked: Any  # the copies of queries and of what they see
    weighed: Any  # by the scores: the weights are ready
    through: Any  # by the first half: both halves have used the values
    other_half: Any  # by the second half: it has used its values
    finished: Any  # scores: the segment is at its end
    stored: Any  # both halves: so are the results, which lie where the queries did


def parts(shape: Latent, q_BQH: Array, k_XH: Array, table_BM: Array, plan: Schedule) -> tuple[Array, Array]:
    """Return the outputs [parts, queries, v_width] and log-sum-exps [parts, queries] of every part."""
    work, tile = shape.work, shape.work.tile
    o_staged = [memory.tiled((ROWS, _COLUMNS), jnp.float32) for _ in range(_HALVES)]
    shared = Shared(
        ring=memory.tiled((_SLOTS, tile, shape.width), jnp.bfloat16),
        weights=memory.tiled((ROWS, tile), jnp.bfloat16),
        per_query=plgpu.SMEM((2, ROWS), jnp.float32),
        filled=plgpu.Barrier(num_arrivals=memory.copies_per_tile(tile, shape.page), num_barriers=_SLOTS),
        asked=plgpu.Barrier(num_arrivals=2),
        weighed=plgpu.Barrier(),
        through=plgpu.Barrier(),
        other_half=plgpu.Barrier(),
        finished=plgpu.Barrier(),
        stored=plgpu.Barrier(num_arrivals=_HALVES),
    )

    def body(*refs: Any) -> None:
        pl.run_scoped(
            partial(_body, shape, *refs),
            plgpu.RefUnion(memory.tiled((ROWS, shape.width), jnp.bfloat16), o_staged),
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
    )(q_BQH, k_XH, table_BM, *plan)


def _body(shape: Latent, q, k, table, starts, jobs, spans, o, lse, staged, spans_staged, shared: Shared) -> None:
    q_staged, o_staged = staged
    walk = partial(each_segment, shape.work, Schedule(starts, jobs, spans), lax.axis_index("stream"))

    def values(half: int) -> None:
        plgpu.set_max_registers(200, action="increase")
        walk(partial(_values, shape, half, k, table, o, o_staged[half], shared))

    def scores() -> None:
        plgpu.set_max_registers(104, action="decrease")
        walk(partial(_scores, shape, q, spans, lse, q_staged, spans_staged, shared))

    lax.switch(lax.axis_index("warpgroup"), [partial(values, half) for half in range(_HALVES)] + [scores])


def _scores(
    shape: Latent, q, spans, lse, q_staged, spans_staged, shared: Shared, segment: Segment, walked: Array
) -> Array:
    work = shape.work
    member = lax.axis_index("member")
    mine = pl.ds(member * ROWS, ROWS)
    pl.when(walked > 0)(lambda: plgpu.barrier_wait(shared.stored))
    memory.fetch_queries(work, segment, member, q, spans, q_staged, spans_staged, shared.asked)
    plgpu.barrier_wait(shared.asked)

    def tile(masked: bool, index: Array, carry):
        m, l, walked = carry
        slot = lax.rem(walked, _SLOTS)
        plgpu.barrier_wait(shared.filled.at[slot])

        def scores(acc):
            plgpu.wgmma(acc, q_staged, shared.ring.at[slot].transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(scores, memory.Accumulator((ROWS, work.tile), jnp.float32))
        if masked:
            s = softmax.hidden(s, spans_staged, index * work.tile)
            values = shared.ring.at[slot, :, pl.ds(0, shape.v_width)]
            softmax.clear_unseen(values, segment, index * work.tile, shape=(work.tile, shape.v_width))
        p, alpha, m = softmax.weights(s, m, shape.scale)
        l = l * alpha + p.sum(axis=1)
        pl.when(index > segment.begin)(lambda: plgpu.barrier_wait(shared.through))
        shared.weights[...] = p.astype(jnp.bfloat16)
        shared.per_query[0] = alpha
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weighed)
        return m, l, walked + 1

    m, l, walked = each_tile(segment, tile, (*softmax.start(), walked))
    inverse, log = softmax.finish(m, l)
    plgpu.barrier_wait(shared.through)
    shared.per_query[0] = inverse
    shared.per_query[1] = log
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.finished)
    plgpu.copy_smem_to_gmem(shared.per_query.at[1], lse.at[segment.part, mine])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return walked


def _values(shape: Latent, half: int, k, table, o, o_staged, shared: Shared, segment: Segment, walked: Array) -> Array:
    work = shape.work
    columns = pl.ds(half * shape.half, shape.half)

    starts_of = partial(memory.rows_of_tile, work, shape.page, k, table, segment)

    def fetch(index: Array, walked: Array, starts: list[Array]) -> None:
        @pl.when(index < segment.end)
        def _():
            slot = lax.rem(walked, _SLOTS)
            memory.fetch(k, starts, shared.ring.at[slot], shared.filled.at[slot])

    def tile(index: Array, carry):
        acc, walked = carry
        slot = lax.rem(walked, _SLOTS)
        following = starts_of(index + _SLOTS) if half == 0 else []  # under way while the weights are waited for
        plgpu.barrier_wait(shared.weighed)
        acc = acc * across(plgpu.layout_cast(shared.per_query[0], softmax.ROW), shape.half)
        weigh = pl.run_state(lambda acc: plgpu.wgmma(acc, shared.weights, shared.ring.at[slot, :, columns]))
        acc = weigh(memory.Accumulator.init(acc))
        if half == 0:
            plgpu.barrier_wait(shared.other_half)
            plgpu.barrier_arrive(shared.through)
            fetch(index + _SLOTS, walked + _SLOTS, following)
        else:
            plgpu.barrier_arrive(shared.other_half)
        return acc, walked + 1

    if half == 0:
        for i in range(_SLOTS):
            fetch(segment.begin + i, walked + i, starts_of(segment.begin + i))
    acc = plgpu.layout_cast(jnp.zeros((ROWS, shape.half), jnp.float32), softmax.TILE)
    acc, walked = lax.fori_loop(segment.begin, segment.end, tile, (acc, walked))
    plgpu.barrier_wait(shared.finished)
    acc = acc * across(plgpu.layout_cast(shared.per_query[0], softmax.ROW), shape.half)
    asking = min(ROWS, work.part_queries)
    for column in range(0, shape.half, _COLUMNS):
        o_staged[...] = acc[:, column : column + _COLUMNS]
        plgpu.commit_smem()
        mine = pl.ds(lax.axis_index("member") * ROWS, asking)
        target = o.at[segment.part, mine, pl.ds(half * shape.half + column, _COLUMNS)]
        plgpu.copy_smem_to_gmem(o_staged.at[pl.ds(0, asking)], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(shared.stored)
    return walked
