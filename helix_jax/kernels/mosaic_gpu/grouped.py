"""Computes the parts of attention over grouped heads. Keys and values are read once, in place.

Each processor runs one or two streams. In a stream, one warpgroup copies tiles into a ring buffer, and one computes (or
two, with 64 queries each, if a row has more than 64). If the pages are quantised, the copying warpgroup also converts
each tile to bfloat16. The ring hides the latency of the memory: key and value tiles
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
from helix_jax.kernels.page_format import PageFormat
from helix_jax.quantisation import FLOAT8, QuantisedPages

_LEAST_TILE_BYTES = 16 * 1024
_COLUMNS = 128  # columns of an accumulator
_STAGED_COLUMNS = 64  # columns of a result that are staged in shared memory at once
_LEAST_STAGES = 3
_CONVERTED_STAGES = 2  # tiles in the ring of converted tiles, if the pages are quantised
_SCALE_BYTES = 4
_CONVERSION = plgpu.Layout.WGMMA_UPCAST_2X  # loads four bytes at once, and stores eight
_CONVERSION_ROW = _CONVERSION.reduce(1)


@dataclass(frozen=True)
class GroupedShape:
    """The static shape of the kernel for grouped heads.

    Args:
        work: The static shape of the work.
        width: The width of a head.
        page: Tokens per page.
        processors: Multiprocessors of the GPU.
        scale: The factor on the logits.
        quantised: Whether the pages are float8 with scales.
    """

    work: Work
    width: int
    page: int
    processors: int
    scale: float
    quantised: bool

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
        return 2 if not self.quantised and self._ring_stages(q_stages=2) >= _LEAST_STAGES else 1

    @property
    def stages(self) -> int:
        """The bfloat16 tiles in the ring of a stream."""
        return _CONVERTED_STAGES if self.quantised else self._ring_stages(self.q_stages)

    @property
    def quantised_pairs(self) -> int:
        """The quantised tiles of keys in the ring of a stream, and as many of values."""
        return self._ring_stages(self.q_stages) // 2

    def _ring_stages(self, q_stages: int) -> int:
        """Return the number of tiles, as they are in the pages, that fit into the memory beside everything else."""
        staged = ROWS * (2 * self.width * q_stages + 4 * _STAGED_COLUMNS) * self.computing_warpgroups
        left = memory.BYTES - staged - 4 * memory.ALIGNMENT  # for spans, log-sum-exps and barriers
        left, tile = left // self.streams_per_processor, self.work.tile
        if not self.quantised:
            return left // (2 * tile * self.width)
        return (left - 2 * tile * self.width * _CONVERTED_STAGES) // (tile * (self.width + _SCALE_BYTES))


def choose_shape(rows: int, queries: int, heads: int, pages: PageFormat, processors: int, scale: float) -> GroupedShape:
    """Choose the shape of the kernel.

    Args:
        rows: Sequences.
        queries: Queries of a row and key/value head: new tokens times heads in a group.
        heads: Key/value heads.
        pages: The format of the pages.
        processors: Multiprocessors of the GPU.
        scale: The factor on the logits.
    """
    width, quantised = pages.width, pages.dtype == FLOAT8
    members = 1 if queries <= ROWS else 2
    streams = 2 if members == 1 and width <= _COLUMNS else 1
    tile = max(ROWS, _LEAST_TILE_BYTES // (2 * width))
    work = Work(rows, heads, queries, members, tile, streams * processors)
    return GroupedShape(work, width, pages.page, processors, scale, quantised)


class Quantised(NamedTuple):
    """The shared memory and the barriers of tiles that are not converted yet.

    Attributes:
        ring: The tiles of each stream and stage.
        scales: Their scales.
        filled: The copies of a tile and of its scales arrive here.
        freed: The threads of a warpgroup wait here for each other, when they have read a tile.
    """

    ring: Any
    scales: Any
    filled: Any
    freed: Any


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
        quantised: Tiles that are not converted yet. None: pages are copied into the ring.
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
    quantised: Quantised | None


def compute_parts(
    shape: GroupedShape,
    q_XQH: Array,
    k_AKWH: Array | QuantisedPages,
    v_AKWH: Array | QuantisedPages,
    table: PageTable,
    schedule: Schedule,
) -> tuple[Array, Array]:
    """Compute the outputs [parts, queries, width] and log-sum-exps [parts, queries] of all parts."""
    work, tile = shape.work, shape.work.tile
    copies = memory.copies_per_tile(tile, shape.page)
    per_stage, per_q_stage = (shape.streams_per_processor, shape.stages), (shape.computing_warpgroups, shape.q_stages)
    shared = Shared(
        ring=memory.allocate_tiled((*per_stage, tile, shape.width), jnp.bfloat16),
        q=memory.allocate_tiled((*per_q_stage, ROWS, shape.width), jnp.bfloat16),
        o=memory.allocate_tiled((shape.computing_warpgroups, ROWS, _STAGED_COLUMNS), jnp.float32),
        spans=plgpu.SMEM((*per_q_stage, 2, ROWS), jnp.int32),
        lse=plgpu.SMEM((shape.computing_warpgroups, ROWS), jnp.float32),
        q_filled=plgpu.Barrier(num_arrivals=2, num_barriers=per_q_stage),
        q_freed=plgpu.Barrier(num_arrivals=work.members, num_barriers=(shape.streams_per_processor, shape.q_stages)),
        filled=plgpu.Barrier(num_arrivals=1 if shape.quantised else copies, num_barriers=per_stage),
        freed=plgpu.Barrier(num_arrivals=work.members, num_barriers=per_stage),
        cleared=plgpu.Barrier(num_arrivals=work.members, num_barriers=shape.streams_per_processor),
        quantised=_allocate_quantised(shape, copies) if shape.quantised else None,
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
    )(q_XQH, [_as_rows(pages) for pages in (k_AKWH, v_AKWH)], *table, *schedule)


def _as_rows(pages: Array | QuantisedPages) -> list[Array]:
    """View pages as rows [pages * heads * page, width], followed by their scales if they are quantised."""
    if isinstance(pages, QuantisedPages):
        return [pages.numbers_AKWH.reshape(-1, pages.shape[-1]), pages.scales_AKWX.reshape(-1)]
    return [pages.reshape(-1, pages.shape[-1])]


def _allocate_quantised(shape: GroupedShape, copies: int) -> Quantised:
    tile, per_stage = shape.work.tile, (shape.streams_per_processor, 2 * shape.quantised_pairs)
    return Quantised(
        ring=memory.allocate_tiled((*per_stage, tile, shape.width), FLOAT8),
        scales=plgpu.SMEM((*per_stage, tile), jnp.float32),
        filled=plgpu.Barrier(num_arrivals=2 * copies, num_barriers=per_stage),
        freed=plgpu.Barrier(num_barriers=per_stage),
    )


def _body(shape: GroupedShape, q, pools, entries, first, starts, jobs, spans, o, lse, shared: Shared) -> None:
    table, schedule = PageTable(entries, first), Schedule(starts, jobs, spans)
    # What one stream and its copies have per thread is fixed: two streams fill a processor's registers.
    copy_registers = 96 if shape.quantised else 56
    compute_registers = 256 - copy_registers if shape.streams_per_processor == 2 else 200

    def walk(stream: int, body: Callable[[Segment, Array], Array]) -> None:
        walk_segments(shape.work, schedule, lax.axis_index("processor") * shape.streams_per_processor + stream, body)

    def compute(me: int) -> None:
        plgpu.set_max_registers(compute_registers, action="increase")
        stream, member = divmod(me, shape.work.members)
        walk(stream, partial(_compute, shape, stream, member, o, lse, shared))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def copy(stream: int) -> None:
        plgpu.set_max_registers(copy_registers, action="decrease")
        copy_segment = _copy_and_convert if shape.quantised else _copy
        walk(stream, partial(copy_segment, shape, stream, q, spans, pools, table, shared))

    roles = [partial(compute, me) for me in range(shape.computing_warpgroups)]
    roles += [partial(copy, stream) for stream in range(shape.streams_per_processor)]
    lax.switch(lax.axis_index("warpgroup"), roles)


def _copy(
    shape: GroupedShape, stream: int, q, spans, pools, table, shared: Shared, segment: Segment, ring_step: Array
) -> Array:
    _fetch_queries(shape, stream, q, spans, shared, segment)
    [[k], [v]] = pools
    locate = partial(memory.locate_tile, shape.work, shape.page, k, table, segment)
    rows_to_values = _rows_to_values(shape, table)

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


def _copy_and_convert(
    shape: GroupedShape, stream: int, q, spans, pools, table, shared: Shared, segment: Segment, ring_step: Array
) -> Array:
    """Copy quantised tiles, some tiles ahead, and convert them into the ring from which the stream computes."""
    _fetch_queries(shape, stream, q, spans, shared, segment)
    quantised, pairs = shared.quantised, shape.quantised_pairs
    assert quantised is not None
    locate = partial(memory.locate_tile, shape.work, shape.page, pools[0][0], table, segment)
    rows_to_values = _rows_to_values(shape, table)

    def fetch(pair: Array, part: int, starts: list[Array]) -> None:
        place = stream, 2 * lax.rem(pair, pairs) + part
        starts = [start + part * rows_to_values for start in starts]
        for array, target in zip(pools[part], (quantised.ring, quantised.scales), strict=True):
            memory.fetch(array, starts, target.at[*place], quantised.filled.at[*place])

    def tile(index: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        starts, ring_step = carry
        next_starts = locate(index + pairs + 1)  # these loads overlap with the conversion
        for part in range(2):
            source, target = (stream, 2 * lax.rem(index, pairs) + part), (stream, lax.rem(ring_step, shape.stages))
            plgpu.barrier_wait(quantised.filled.at[*source])
            pl.when(ring_step >= shape.stages)(partial(plgpu.barrier_wait, shared.freed.at[*target]))
            _convert_tile(quantised.ring.at[*source], quantised.scales.at[*source], shared.ring.at[*target])
            plgpu.barrier_arrive(shared.filled.at[*target])

            @pl.when(index + pairs < segment.end)
            def _(part: int = part, freed: Any = quantised.freed.at[*source]) -> None:
                plgpu.barrier_arrive(freed)
                plgpu.barrier_wait(freed)
                fetch(index + pairs, part, starts)

            ring_step = ring_step + 1
        return next_starts, ring_step

    for ahead in range(pairs):
        index = segment.begin + ahead

        @pl.when(index < segment.end)
        def _(index: Array = index) -> None:
            starts = locate(index)
            for part in range(2):
                fetch(index, part, starts)

    _, ring_step = lax.fori_loop(segment.begin, segment.end, tile, (locate(segment.begin + pairs), ring_step))
    return ring_step


def _fetch_queries(shape: GroupedShape, stream: int, q, spans, shared: Shared, segment: Segment) -> None:
    turn = lax.rem(segment.nth, shape.q_stages)
    pl.when(segment.nth >= shape.q_stages)(partial(plgpu.barrier_wait, shared.q_freed.at[stream, turn]))
    for member in range(shape.work.members):
        place = stream * shape.work.members + member, turn
        targets = shared.q.at[*place], shared.spans.at[*place], shared.q_filled.at[*place]
        memory.fetch_queries(shape.work, segment, member, q, spans, *targets)


def _rows_to_values(shape: GroupedShape, table: PageTable) -> Array:
    """Return how many rows of the pools are between a tile of keys and that of its values."""
    return (table.first_C[1] - table.first_C[0]) * shape.work.heads * shape.page


def _convert_tile(numbers: Any, scales: Any, target: Any) -> None:
    """Dequantise a tile in shared memory."""
    (tile, width), piece = target.shape, (ROWS, _STAGED_COLUMNS)
    for row in range(0, tile, ROWS):
        rows = pl.ds(row, ROWS)
        x = plgpu.layout_cast(numbers[rows], _CONVERSION)
        scale = lax.broadcast_in_dim(plgpu.layout_cast(scales[rows], _CONVERSION_ROW), piece, [0])
        for column in range(0, width, _STAGED_COLUMNS):
            x_piece = x[:, column : column + _STAGED_COLUMNS].astype(jnp.float32) * scale
            target[rows, pl.ds(column, _STAGED_COLUMNS)] = x_piece.astype(jnp.bfloat16)
    plgpu.commit_smem()


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
