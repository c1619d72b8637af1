"""Parts of latent attention: one vector of keys per slot for all heads, whose first numbers are the values.

Its arithmetic weighs as much as its memory, so that a processor works on 64 queries in two roles at once: one warpgroup
copies tiles into a ring and computes scores and weights, two hold one half of the values' columns each.
"""

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
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, Work, each_segment

_COLUMNS = 128  # of a result that is staged at once
_HALVES = 2
_SLOTS = 2  # all that fits beside the queries: 216 KB of 227


@dataclass(frozen=True)
class Latent:
    work: Work
    width: int
    v_width: int
    page: int
    processors: int
    scale: float

    @property
    def half(self) -> int:
        return self.v_width // _HALVES


def latent(rows: int, queries: int, width: int, v_width: int, page: int, processors: int, scale: float) -> Latent:
    """queries: of a row, new tokens times heads."""
    members = 1 if queries <= ROWS else 2
    return Latent(Work(rows, 1, queries, members, ROWS, processors // members), width, v_width, page, processors, scale)


def parts(shape: Latent, q_BQH: Array, k_XH: Array, table_BM: Array, plan: Schedule) -> tuple[Array, Array]:
    """Outputs [parts, queries, v_width] and log-sum-exps [parts, queries] of every part."""
    work, tile = shape.work, shape.work.tile
    o_staged = [memory.tiled((ROWS, _COLUMNS), jnp.float32) for _ in range(_HALVES)]

    def body(*refs: Any) -> None:
        pl.run_scoped(
            partial(_body, shape, *refs),
            plgpu.RefUnion(memory.tiled((ROWS, shape.width), jnp.bfloat16), o_staged),
            memory.tiled((_SLOTS, tile, shape.width), jnp.bfloat16),
            memory.tiled((ROWS, tile), jnp.bfloat16),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=memory.copies_per_tile(tile, shape.page), num_barriers=_SLOTS),
            [plgpu.Barrier(num_arrivals=n) for n in (2, 1, _HALVES, 1, _HALVES)],
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


def _body(
    shape: Latent, q, k, table, ends, jobs, spans, o, lse, staged, ring, p_staged, per_query, spans_staged, *barriers
):
    warpgroup, stream = lax.axis_index("warpgroup"), lax.axis_index("stream")
    q_staged, o_staged = staged
    walk = partial(each_segment, shape.work, Schedule(ends, jobs, spans), stream)
    shared = (ring, p_staged, per_query, *barriers)

    def values(half: int) -> None:
        plgpu.set_max_registers(200, action="increase")
        walk(partial(_values, shape, half, o, o_staged[half], shared))

    def scores() -> None:
        plgpu.set_max_registers(104, action="decrease")
        walk(partial(_scores, shape, q, k, table, spans, lse, q_staged, spans_staged, shared))

    lax.switch(warpgroup, [partial(values, half) for half in range(_HALVES)] + [scores])


def _scores(
    shape: Latent, q, k, table, spans, lse, q_staged, spans_staged, shared, segment: Segment, seen: Array
) -> Array:
    ring, p_staged, per_query, filled, (asked, p_ready, p_freed, finished, stored) = shared
    work = shape.work
    row, job = segment.job // work.jobs_per_row, lax.rem(segment.job, work.jobs_per_row)
    member = lax.axis_index("member")
    pages = k.shape[0] // shape.page

    def starts_of(index: Array) -> list[Array]:
        return memory.rows_of_tile(
            table, row, segment.head, index, tile=work.tile, page=shape.page, heads=1, pages=pages
        )

    def fetch(starts: list[Array], seen: Array) -> None:
        slot = lax.rem(seen, _SLOTS)
        memory.fetch(k, starts, ring.at[slot], filled.at[slot])

    fetch(starts_of(segment.begin), seen)
    pl.when(segment.begin + 1 < segment.end)(lambda: fetch(starts_of(segment.begin + 1), seen + 1))
    pl.when(seen > 0)(lambda: plgpu.barrier_wait(stored))  # results lie where the queries did
    queries = q.at[row, pl.ds(job * work.job_queries + member * ROWS, ROWS)]
    seen_by = spans.at[pl.ds(0, 2), segment.job, pl.ds(member * ROWS, ROWS)]
    memory.fetch_queries(queries, seen_by, q_staged, spans_staged, asked)

    def tile(masked: bool, index: Array, carry):
        m, l, seen = carry
        slot = lax.rem(seen, _SLOTS)
        starts = starts_of(index + 1)  # under way while the values before are weighed

        @pl.when(index > segment.begin)
        def _():
            plgpu.barrier_wait(p_freed)  # by the tile before: its place in the ring is free as well
            pl.when(index + 1 < segment.end)(lambda: fetch(starts, seen + 1))

        plgpu.barrier_wait(filled.at[slot])

        def scores(acc):
            plgpu.wgmma(acc, q_staged, plgpu.transpose_ref(ring.at[slot], (1, 0)))
            return acc[...]

        s = pl.run_scoped(scores, memory.Accumulator((ROWS, work.tile), jnp.float32))
        if masked:
            s = softmax.hidden(s, spans_staged, index * work.tile)
            for column in range(0, shape.v_width, 64):
                piece = ring.at[slot, :, pl.ds(column, 64)]
                softmax.clear_unseen(piece, index * work.tile, segment.lo, segment.hi)
        p, alpha, m = softmax.weights(s, m, shape.scale)
        l = l * alpha + p.sum(axis=1)
        p_staged[...] = p.astype(jnp.bfloat16)
        per_query[0] = alpha
        plgpu.commit_smem()
        plgpu.barrier_arrive(p_ready)
        return m, l, seen + 1

    carry = (*softmax.start(), seen)
    carry = lax.fori_loop(segment.begin, segment.whole_begin, partial(tile, True), carry)
    carry = lax.fori_loop(segment.whole_begin, segment.whole_end, partial(tile, False), carry)
    m, l, seen = lax.fori_loop(segment.whole_end, segment.end, partial(tile, True), carry)
    inverse, log = softmax.finish(m, l)
    plgpu.barrier_wait(p_freed)
    per_query[0] = inverse
    per_query[1] = log
    plgpu.commit_smem()
    plgpu.barrier_arrive(finished)
    plgpu.copy_smem_to_gmem(per_query.at[1], lse.at[segment.part, pl.ds(member * ROWS, ROWS)])
    plgpu.wait_smem_to_gmem(0)
    return seen


def _values(shape: Latent, half: int, o, o_staged, shared, segment: Segment, seen: Array) -> Array:
    ring, p_staged, per_query, _, (_, p_ready, p_freed, finished, stored) = shared
    work = shape.work
    member = lax.axis_index("member")
    columns = pl.ds(half * shape.half, shape.half)

    def tile(index: Array, carry):
        acc, seen = carry
        slot = lax.rem(seen, _SLOTS)
        plgpu.barrier_wait(p_ready)
        acc = acc * across(plgpu.layout_cast(per_query[0], softmax.ROW), shape.half)
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p_staged, ring.at[slot, :, columns]))(
            memory.Accumulator.init(acc)
        )
        plgpu.barrier_arrive(p_freed)
        return acc, seen + 1

    acc = plgpu.layout_cast(jnp.zeros((ROWS, shape.half), jnp.float32), softmax.TILE)
    acc, seen = lax.fori_loop(segment.begin, segment.end, tile, (acc, seen))
    plgpu.barrier_wait(finished)
    acc = acc * across(plgpu.layout_cast(per_query[0], softmax.ROW), shape.half)
    queries = min(ROWS, work.part_queries)
    for column in range(0, shape.half, _COLUMNS):
        o_staged[...] = acc[:, column : column + _COLUMNS]
        plgpu.commit_smem()
        target = o.at[segment.part, pl.ds(member * ROWS, queries), pl.ds(half * shape.half + column, _COLUMNS)]
        plgpu.copy_smem_to_gmem(o_staged.at[pl.ds(0, queries)], target)
        plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(stored)
    return seen
