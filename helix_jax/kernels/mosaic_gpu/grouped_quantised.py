"""Computes the parts of attention over quantised grouped heads of width 128, for few queries.

The queries are the columns of the matrix products, as in `grouped_few`. Each warpgroup is a stream of its own, without
barriers between them: it copies tiles of keys and values, some ahead, and converts them in registers, as left operands
of the products. Four such streams per processor hide the latencies of each other.
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
from helix_jax.kernels.mosaic_gpu import instructions, memory, operands, softmax
from helix_jax.kernels.mosaic_gpu.few import FEW, spread_over_product, store_transposed, transpose_scores
from helix_jax.kernels.mosaic_gpu.softmax import repeat_along_columns
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, Work, align_streams, loop_by_mask, walk_segments
from helix_jax.quantisation import FLOAT8, QuantisedPages

_WIDTH = instructions.NUMBERS
_QUERIES = 8  # of a stream. More were not measured. They leave shared memory for fewer streams
_STREAMS = 4  # of a processor
_PAIR = 2  # a tile of keys and one of values


@dataclass(frozen=True)
class QuantisedGroupedShape:
    """The static shape of the kernel.

    Args:
        work: The static shape of the work.
        page: Tokens per page.
        scale: The factor on the logits.
    """

    work: Work
    page: int
    scale: float

    @property
    def pairs_ahead(self) -> int:
        """The pairs of tiles that are copied while one is used."""
        queries, tile = self.work.member_queries, self.work.tile
        # Queries (float16), outputs (float32) and weights (float16); spans, factors and barriers fit in the rest.
        of_queries = queries * (2 * _WIDTH + 4 * _WIDTH + 2 * tile) + 2 * memory.ALIGNMENT
        left = memory.BYTES // _STREAMS - of_queries - tile * (_WIDTH + 4)
        return left // (_PAIR * tile * (_WIDTH + 4))

    @property
    def stages(self) -> int:
        """The tiles of a stream in shared memory. Keys and values alternate."""
        return _PAIR * self.pairs_ahead + 1


class Shared(NamedTuple):
    """The shared memory and the barriers of the streams of a processor.

    Attributes:
        ring: The copied tiles.
        scales: Their scales.
        q: The queries.
        spans: The slots that each query sees.
        scores_outputs: A tile of scores, by query; and the outputs, until they are copied to global memory.
        weights: A tile of weights.
        per_query: A factor for each query, and the log-sum-exps.
        filled: The copies of a tile and of its scales arrive here.
        q_filled: The copies of queries and spans arrive here.
    """

    ring: Any
    scales: Any
    q: Any
    spans: Any
    scores_outputs: Any
    weights: Any
    per_query: Any
    filled: Any
    q_filled: Any


def supports(width: int, queries: int) -> bool:
    """Return whether this kernel takes heads of some width with `queries` queries of a row and key/value head."""
    return width == _WIDTH and queries <= _QUERIES


def choose_shape(
    rows: int, queries: int, heads: int, page: int, processors: int, scale: float
) -> QuantisedGroupedShape:
    """Choose the shape of the kernel for `queries` queries of a row and key/value head."""
    work = Work(rows, heads, queries, 1, ROWS, _STREAMS * processors, _QUERIES)
    return QuantisedGroupedShape(align_streams(work, _STREAMS), page, scale)


def compute_parts(
    shape: QuantisedGroupedShape,
    q_XQH: Array,
    k_AKWH: QuantisedPages,
    v_AKWH: QuantisedPages,
    table: PageTable,
    schedule: Schedule,
) -> tuple[Array, Array]:
    """Compute the outputs [parts, queries, width] and log-sum-exps [parts, queries] of all parts.

    The numbers of an output are in the order that `operands.restore_order` expects.
    """
    work = shape.work
    pools = [(x.numbers_AKWH.reshape(-1, _WIDTH), x.scales_AKWX.reshape(-1)) for x in (k_AKWH, v_AKWH)]

    def body(*refs: Any) -> None:
        pl.run_scoped(partial(_body, shape, *refs), _describe_shared(shape), collective_axes="warpgroup")

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((work.parts, work.part_queries, _WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((work.parts, work.job_queries), jnp.float32),
        ),
        grid=(work.streams // _STREAMS,),
        grid_names=("processor",),
        num_threads=_STREAMS,
        thread_name="warpgroup",
        compiler_params=memory.COMPILER,
    )(operands.split_queries(q_XQH), pools, *table, *schedule)


def _describe_shared(shape: QuantisedGroupedShape) -> Shared:
    streams, tile, queries = _STREAMS, shape.work.tile, shape.work.member_queries
    copies, stages = memory.copies_per_tile(tile, shape.page), (streams, shape.stages)
    return Shared(
        ring=memory.allocate_tiled((*stages, tile, _WIDTH), FLOAT8),
        scales=plgpu.SMEM((*stages, tile), jnp.float32),
        q=memory.allocate_tiled((streams, instructions.OPERANDS, queries, ROWS), jnp.float16),
        spans=memory.allocate_per_query((streams, 2, queries), jnp.int32),
        scores_outputs=plgpu.SMEM((streams, instructions.OPERANDS, queries, ROWS), jnp.float32),
        weights=memory.allocate_tiled((streams, queries, tile), jnp.float16),
        per_query=memory.allocate_per_query((streams, 2, queries), jnp.float32),
        filled=plgpu.Barrier(num_arrivals=2 * copies, num_barriers=stages),
        q_filled=plgpu.Barrier(num_arrivals=memory.QUERY_COPIES, num_barriers=streams),
    )


def _body(shape: QuantisedGroupedShape, q, pools, entries, first, starts, jobs, spans, o, lse, shared: Shared) -> None:
    mine = lax.axis_index("warpgroup")
    stream = lax.axis_index("processor") * _STREAMS + mine
    arrays = memory.Arrays(q, pools, PageTable(entries, first), spans, o, lse)
    walk_segments(shape.work, Schedule(starts, jobs, spans), stream, partial(_compute, shape, mine, arrays, shared))


def _compute(
    shape: QuantisedGroupedShape,
    mine: Array,
    arrays: memory.Arrays,
    shared: Shared,
    segment: Segment,
    ring_step: Array,
) -> Array:
    """Compute the tiles of a segment. Return the number of tiles used so far."""
    work, queries, ahead = shape.work, shape.work.member_queries, shape.pairs_ahead
    fetch = _make_fetch(shape, mine, arrays, shared, segment)
    for nth in range(ahead):
        fetch(segment.begin + nth, ring_step + _PAIR * nth)
    targets = shared.q.at[mine], shared.spans.at[mine], shared.q_filled.at[mine]
    memory.fetch_queries(work, segment, 0, arrays.q, arrays.spans, *targets)
    plgpu.barrier_wait(shared.q_filled.at[mine])

    def tile(masked: bool, index: Array, carry):
        accs, m, l, ring_step = carry
        stages = [(mine, lax.rem(ring_step + part, shape.stages)) for part in range(_PAIR)]
        plgpu.barrier_wait(shared.filled.at[*stages[0]])
        s = operands.multiply_slots(shared.ring.at[*stages[0]], shared.q.at[mine])
        s = transpose_scores(shared.scores_outputs.at[mine, 0], s)
        s = s * repeat_along_columns(_load_scales(shared, stages[0]), queries)
        fetch(index + ahead, ring_step + _PAIR * ahead)  # in the places of these keys and of the previous values
        plgpu.barrier_wait(shared.filled.at[*stages[1]])
        if masked:
            operands.clear_unseen(shared.ring.at[*stages[1]], segment, index)
        first, scales = index * work.tile, _load_scales(shared, stages[1])
        s = softmax.mask_unseen(masked, s, shared.spans.at[mine], first, FEW)
        scales = softmax.clear_unseen_scales(masked, scales, segment, first, FEW.reduce(0))
        p, alpha, m, l = softmax.weigh(s, m, l, shape.scale, softmax.ValueScales.of(scales))
        shared.weights[mine] = p.astype(jnp.float16)
        alpha = spread_over_product(shared.per_query.at[mine, 0, pl.ds(0, queries)], alpha)  # and the weights
        values = operands.load_values(shared.ring.at[*stages[1]])

        accs = [acc * repeat_along_columns(alpha, ROWS) for acc in accs]
        accs = operands.add_weighted(accs, values, shared.weights.at[mine])
        return accs, m, l, ring_step + _PAIR

    carry = ([operands.make_zeros(queries)] * instructions.OPERANDS, *softmax.start(queries, FEW), ring_step)
    accs, m, l, ring_step = loop_by_mask(segment, tile, carry)
    _store(shape, mine, arrays, shared, segment, accs, *softmax.finish(m, l))
    return ring_step


def _make_fetch(
    shape: QuantisedGroupedShape, mine: Array, arrays: memory.Arrays, shared: Shared, segment: Segment
) -> Callable[[Array, Array], None]:
    """Return a function that starts the copies of a pair of tiles, if they are in the segment."""
    work, page, pools, table = shape.work, shape.page, arrays.pools, arrays.table
    to_values = memory.rows_to_values(work, page, table)

    def fetch(index: Array, ring_step: Array) -> None:
        @pl.when(index < segment.end)
        def _() -> None:
            starts = memory.locate_tile(work, page, pools[0][0], table, segment, index)
            for part, (numbers, scales) in enumerate(pools):
                place = mine, lax.rem(ring_step + part, shape.stages)
                rows = [start + to_values for start in starts] if part else starts
                memory.fetch(numbers, rows, shared.ring.at[*place], shared.filled.at[*place])
                memory.fetch(scales, rows, shared.scales.at[*place], shared.filled.at[*place])

    return fetch


def _load_scales(shared: Shared, place: tuple[Array, Array]) -> Array:
    return plgpu.layout_cast(shared.scales[*place], FEW.reduce(0))


def _store(
    shape: QuantisedGroupedShape,
    mine: Array,
    arrays: memory.Arrays,
    shared: Shared,
    segment: Segment,
    accs,
    inverse,
    log,
) -> None:
    """Copy the results of a segment to global memory."""
    queries = pl.ds(0, shape.work.member_queries)
    inverse = repeat_along_columns(spread_over_product(shared.per_query.at[mine, 0, queries], inverse), ROWS)
    for i, acc in enumerate(accs):
        store_transposed(shared.scores_outputs.at[mine, i], acc * inverse)
    shared.per_query[mine, 1, queries] = log
    plgpu.commit_smem()
    for i in range(instructions.OPERANDS):
        target = arrays.o.at[segment.part, queries, pl.ds(i * ROWS, ROWS)]
        plgpu.copy_smem_to_gmem(shared.scores_outputs.at[mine, i], target)
    plgpu.copy_smem_to_gmem(shared.per_query.at[mine, 1, queries], arrays.lse.at[segment.part])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
