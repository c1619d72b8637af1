"""Computes the parts of attention over grouped heads. Keys and values are read once, in place.

Each processor runs one or two streams. In a stream, one warpgroup copies tiles into ring buffers, and one computes (or
two, with 64 queries each, if a row has more than 64). The rings hide the latency of the memory: 100 KB of copies are in
flight. While the results of a segment are stored, the queries and tiles of the next segment are already copied. Tiles
that are quantised are converted by the warpgroup that copies them, without their scales: those of the keys are factors
on the scores, and those of the values on the weights.

The matrix unit multiplies 64 rows. Many queries are the rows. A few queries are the columns, of which there may be
eight, and the rows are slots and numbers of a value (`grouped_few`). Up to eight queries of quantised heads of width
128 have a kernel of their own (`grouped_quantised`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.attention import PageTable
from helix_jax.kernels.mosaic_gpu import grouped_few, memory, softmax
from helix_jax.kernels.mosaic_gpu.conversion import clip_to_float16
from helix_jax.kernels.mosaic_gpu.grouped_copies import copy, copy_and_convert
from helix_jax.kernels.mosaic_gpu.grouped_shape import STAGED_COLUMNS, GroupedShape, Shared, describe_shared
from helix_jax.kernels.mosaic_gpu.softmax import repeat_along_columns, repeat_along_rows
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, loop_over_tiles, walk_segments
from helix_jax.quantisation import QuantisedPages


def compute_parts(
    shape: GroupedShape,
    q_XQH: Array,
    k_AKWH: Array | QuantisedPages,
    v_AKWH: Array | QuantisedPages,
    table: PageTable,
    schedule: Schedule,
) -> tuple[Array, Array]:
    """Compute the outputs [parts, queries, width] and log-sum-exps [parts, queries] of all parts."""
    work = shape.work
    q_XQH = clip_to_float16(q_XQH) if shape.quantised else q_XQH

    def body(*refs: Any) -> None:
        pl.run_scoped(partial(_body, shape, *refs), describe_shared(shape), collective_axes="warpgroup")

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
    )(q_XQH, [_as_rows(pages) for pages in (k_AKWH, v_AKWH)], *table, *schedule)


def _as_rows(pages: Array | QuantisedPages) -> list[Array]:
    """View pages as rows [pages * heads * page, width], followed by their scales if they are quantised."""
    if isinstance(pages, QuantisedPages):
        return [pages.numbers_AKWH.reshape(-1, pages.shape[-1]), pages.scales_AKWX.reshape(-1)]
    return [pages.reshape(-1, pages.shape[-1])]


def _body(shape: GroupedShape, q, pools, entries, first, starts, jobs, spans, o, lse, shared: Shared) -> None:
    arrays, warpgroup = memory.Arrays(q, pools, PageTable(entries, first), spans, o, lse), lax.axis_index("warpgroup")
    schedule = Schedule(starts, jobs, spans)
    copy_registers = 88 if shape.quantised else 56
    compute_registers = 256 - copy_registers if shape.streams_per_processor == 2 else 200

    def walk(stream: Array, body: Callable[[Segment, Array], Array]) -> None:
        walk_segments(shape.work, schedule, lax.axis_index("processor") * shape.streams_per_processor + stream, body)

    def compute() -> None:
        plgpu.set_max_registers(compute_registers, action="increase")
        stream, member = warpgroup // shape.work.members, lax.rem(warpgroup, shape.work.members)
        if shape.few:
            walk(stream, partial(grouped_few.compute, shape, stream, arrays, shared))
        else:
            walk(stream, partial(_compute, shape, stream, member, arrays, shared))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def copy_tiles() -> None:
        plgpu.set_max_registers(copy_registers, action="decrease")
        stream = warpgroup - shape.computing_warpgroups
        copy_segment = copy_and_convert if shape.quantised else copy
        walk(stream, partial(copy_segment, shape, stream, arrays, shared))

    # The index of the warpgroup is not static, so that one program per role is compiled.
    lax.cond(warpgroup < shape.computing_warpgroups, compute, copy_tiles)


def _compute(
    shape: GroupedShape,
    stream: Array,
    member: Array,
    arrays: memory.Arrays,
    shared: Shared,
    segment: Segment,
    ring_step: Array,
) -> Array:
    work = shape.work
    me, q_turn = stream * work.members + member, lax.rem(segment.nth, shape.q_stages)
    blocks = range(0, shape.width, shape.columns)
    plgpu.barrier_wait(shared.q_filled.at[me, q_turn])

    def tile(masked: Array, index: Array, carry):
        accs, m, l, ring_step = carry
        stage, first_slot = lax.rem(ring_step, shape.stages), index * work.tile
        s = _score(shape, stream, shared, shared.q.at[me, q_turn], ring_step)
        plgpu.barrier_arrive(shared.freed.at[stream, stage])
        s = softmax.mask_unseen(masked, s, shared.spans.at[me, q_turn], first_slot)

        stage, value_scales = lax.rem(ring_step + 1, shape.stages), None
        if shape.quantised:
            plgpu.barrier_wait(shared.filled.at[stream, stage])
            scales = shared.scales(stream, lax.rem(ring_step + 1, shape.scale_stages), softmax.TILE)
            scales = softmax.clear_unseen_scales(masked, scales, segment, first_slot, softmax.TILE.reduce(0))
            value_scales = softmax.ValueScales.of(scales)
        p, alpha, m, l = softmax.weigh(s, m, l, shape.scale, value_scales)
        accs = [acc * repeat_along_rows(alpha, shape.columns) for acc in accs]
        p = p.astype(shape.product_dtype)

        if not shape.quantised:
            plgpu.barrier_wait(shared.filled.at[stream, stage])

        @pl.when(masked)
        def _() -> None:
            values, size = shared.tile(stream, stage), (work.tile, shape.width)
            softmax.clear_unseen(values, segment, first_slot, shape=size, sharers=work.members, me=member)
            if work.members > 1:
                plgpu.barrier_arrive(shared.cleared.at[stream])
                plgpu.barrier_wait(shared.cleared.at[stream])

        def add_values(refs):
            values = shared.tile(stream, stage)  # Mosaic does not accept it from outside of this function
            for acc, column in zip(refs, blocks, strict=True):
                plgpu.wgmma(acc, p, values.at[:, pl.ds(column, shape.columns)])

        accs = pl.run_state(add_values)([memory.Accumulator.init(acc) for acc in accs])
        plgpu.barrier_arrive(shared.freed.at[stream, stage])
        return accs, m, l, ring_step + 2

    zero = plgpu.layout_cast(jnp.zeros((ROWS, shape.columns), jnp.float32), softmax.TILE)
    carry = ([zero for _ in blocks], *softmax.start(), ring_step)
    accs, m, l, ring_step = loop_over_tiles(segment, tile, carry)
    plgpu.barrier_arrive(shared.q_freed.at[stream, q_turn])
    _store(shape, member, arrays, shared, segment, me, accs, *softmax.finish(m, l))
    return ring_step


def _score(shape: GroupedShape, stream: Array, shared: Shared, q: Any, ring_step: Array) -> Array:
    """Wait for a tile of keys. Return the scores [queries, slots], without the factor on the logits."""
    stage = lax.rem(ring_step, shape.stages)
    plgpu.barrier_wait(shared.filled.at[stream, stage])
    keys = shared.tile(stream, stage)

    def scores(acc):
        plgpu.wgmma(acc, q, keys.transpose((1, 0)))
        return acc[...]

    s = pl.run_scoped(scores, memory.Accumulator((ROWS, shape.work.tile), jnp.float32))
    if not shape.quantised:
        return s
    scales = shared.scales(stream, lax.rem(ring_step, shape.scale_stages), softmax.TILE)
    return s * repeat_along_columns(scales, ROWS)


def _store(
    shape: GroupedShape,
    member: Array,
    arrays: memory.Arrays,
    shared: Shared,
    segment: Segment,
    me: Array,
    accs,
    inverse,
    log,
) -> None:
    """Copy the results of a segment to global memory."""
    queries = min(ROWS, shape.work.part_queries)
    for column in range(0, shape.width, STAGED_COLUMNS):
        acc, first = accs[column // shape.columns], column % shape.columns
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # earlier copies still read the staging memory
        shared.o[me] = acc[:, first : first + STAGED_COLUMNS] * repeat_along_rows(inverse, STAGED_COLUMNS)
        if column == 0:
            shared.lse[me] = log
        plgpu.commit_smem()
        target = arrays.o.at[segment.part, pl.ds(member * ROWS, queries), pl.ds(column, STAGED_COLUMNS)]
        plgpu.copy_smem_to_gmem(shared.o.at[me, pl.ds(0, queries)], target)
        if column == 0:
            plgpu.copy_smem_to_gmem(shared.lse.at[me], arrays.lse.at[segment.part, pl.ds(member * ROWS, ROWS)])
