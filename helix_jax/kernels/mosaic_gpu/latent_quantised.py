"""Computes the parts of attention over quantised latents: float8 numbers in groups of 128 with a scale each.

All heads share one latent per slot, whose quantised numbers are also the values. The queries are the columns of the
matrix products, as in `grouped_few`. Each processor has one stream, with a warpgroup per group of numbers and one for
the weights. The warpgroup of a group multiplies its numbers and its share of those that are not quantised by the
queries, which gives its share of the scores. That of the weights copies whole tiles, adds these scores and computes the
weights. Then the warpgroup of a group adds its numbers times these weights, while that of the weights continues with
the next tile.

Quantised numbers are converted in registers, twice: with slots as rows, and with numbers as rows. In shared memory,
converted numbers would take more time to store and load than this. The weights of a group contain the scales of its
values, too, relative to the largest scale of the slot.
"""

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.attention import PageTable
from helix_jax.kernels.mosaic_gpu import instructions, memory, operands, softmax
from helix_jax.kernels.mosaic_gpu.few import FEW, PRODUCT, store_transposed
from helix_jax.kernels.mosaic_gpu.softmax import repeat_along_columns
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, Work, align_streams, loop_by_mask, walk_segments
from helix_jax.quantisation import FLOAT8, QuantisedPages

_GROUP = instructions.NUMBERS  # numbers that share a scale
_POOLS = 3  # of numbers, of scales and of exact numbers
_MOST_QUERIES = 32  # of a stream, which fill the shared memory


@dataclass(frozen=True)
class QuantisedLatentShape:
    """The static shape of the kernel for quantised latents.

    Args:
        work: The static shape of the work.
        groups: The groups of numbers with a scale each. All of them are values.
        exact: The numbers of a latent that are not quantised: 16 for each group, which multiplies them.
        page: Tokens per page.
        scale: The factor on the logits.
    """

    work: Work
    groups: int
    exact: int
    page: int
    scale: float

    @property
    def copied_tiles(self) -> int:
        """The tiles that are in shared memory at once."""
        return 3 if self.many_queries else 4

    @property
    def many_queries(self) -> bool:
        """Whether there are so many queries that less memory and fewer registers are left."""
        return self.work.member_queries > _MOST_QUERIES // 2


class Shared(NamedTuple):
    """The shared memory and the barriers of one processor.

    Attributes:
        numbers: The quantised numbers of the copied tiles.
        scales: Their scales.
        exact: The numbers that are not quantised.
        spans: The slots that each query sees.
        scores: The share of each group in the scores of a tile, by query. After the last tile of a segment: the results
            of an operand of each group.
        group_scales: The scales of that tile, by group, so that they are loaded without bank conflicts.
        weights: The weights for the values of each group.
        per_query: The factor on earlier weights. After the last tile, 1 / sum and the log-sum-exp.
        filled: The copies of a tile arrive here.
        q_filled: The copies of queries and spans arrive here.
        scores_ready: The warpgroup of each group arrives here when it has stored its share of the scores of a tile.
        scores_used: The warpgroup of the weights arrives here when it has read them.
        weights_ready: It arrives here when the weights of a tile are written.
        weights_used: The warpgroup of each group arrives here when it has used them, and does not read the tile again.
        segment_finished: The warpgroup of the weights arrives here after the last tile of a segment.
        results_stored: The warpgroup of each group arrives here when its results are copied out.
    """

    numbers: Any
    scales: Any
    exact: Any
    spans: Any
    scores: Any
    group_scales: Any
    weights: Any
    per_query: Any
    filled: Any
    q_filled: Any
    scores_ready: Any
    scores_used: Any
    weights_ready: Any
    weights_used: Any
    segment_finished: Any
    results_stored: Any


def choose_shape(
    rows: int, queries: int, latents: QuantisedPages, processors: int, scale: float
) -> QuantisedLatentShape:
    """Choose the shape of the kernel for `queries` queries of a row: new tokens times heads."""
    member_queries = min(-(-queries // 8) * 8, _MOST_QUERIES)
    work = Work(rows, 1, queries, 1, ROWS, processors, member_queries)
    _, _, page, groups = latents.scales_AKWX.shape
    return QuantisedLatentShape(align_streams(work), groups, latents.exact_width, page, scale)


def compute_parts(
    shape: QuantisedLatentShape, q_BQH: Array, k_AKWH: QuantisedPages, table: PageTable, schedule: Schedule
) -> tuple[Array, Array]:
    """Compute the outputs [parts, queries, values] and log-sum-exps [parts, queries] of all parts.

    The numbers of an output are in the order that `operands.restore_order` expects.
    """
    work, values = shape.work, shape.groups * _GROUP
    exact = operands.split_exact_queries(q_BQH[..., values:].astype(jnp.bfloat16))
    queries = operands.split_queries(q_BQH[..., :values]), exact
    q = memory.allocate_tiled((values // ROWS, work.member_queries, ROWS), jnp.float16)
    q_exact = memory.allocate_tiled((shape.groups, work.member_queries, instructions.EXACT_NUMBERS), jnp.bfloat16)

    def body(*refs: Any) -> None:
        pl.run_scoped(partial(_body, shape, *refs), (q, q_exact), _describe_shared(shape), collective_axes="warpgroup")

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((work.parts, work.part_queries, values), jnp.float32),
            jax.ShapeDtypeStruct((work.parts, work.job_queries), jnp.float32),
        ),
        grid=(work.streams,),
        grid_names=("stream",),
        num_threads=shape.groups + 1,
        thread_name="warpgroup",
        compiler_params=memory.COMPILER,
    )(queries, [x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(k_AKWH)], *table, *schedule)


def _describe_shared(shape: QuantisedLatentShape) -> Shared:
    groups, tile, queries = shape.groups, shape.work.tile, shape.work.member_queries
    copies = memory.copies_per_tile(tile, shape.page)
    return Shared(
        numbers=memory.allocate_tiled((shape.copied_tiles, tile, groups * _GROUP), FLOAT8),
        scales=plgpu.SMEM((shape.copied_tiles, tile, groups), jnp.float32),
        exact=memory.allocate_tiled((shape.copied_tiles, tile, shape.exact), jnp.bfloat16),
        spans=memory.allocate_per_query((2, queries), jnp.int32),
        scores=plgpu.SMEM((groups, queries, tile), jnp.float32),
        group_scales=plgpu.SMEM((groups, tile), jnp.float32),
        weights=memory.allocate_tiled((groups, queries, tile), jnp.float16),
        per_query=memory.allocate_per_query((2, queries), jnp.float32),
        filled=plgpu.Barrier(num_arrivals=_POOLS * copies, num_barriers=shape.copied_tiles),
        q_filled=plgpu.Barrier(num_arrivals=memory.QUERY_COPIES + 1),
        scores_ready=plgpu.Barrier(num_arrivals=groups),
        scores_used=plgpu.Barrier(),
        weights_ready=plgpu.Barrier(),
        weights_used=plgpu.Barrier(num_arrivals=groups),
        segment_finished=plgpu.Barrier(),
        results_stored=plgpu.Barrier(num_arrivals=groups),
    )


def _body(
    shape: QuantisedLatentShape, q, pools, entries, first, starts, jobs, spans, o, lse, q_staged, shared: Shared
) -> None:
    arrays, warpgroup = memory.Arrays(q, pools, PageTable(entries, first), spans, o, lse), lax.axis_index("warpgroup")
    walk = partial(walk_segments, shape.work, Schedule(starts, jobs, spans), lax.axis_index("stream"))

    def weights() -> None:
        walk(partial(_compute_weights, shape, arrays, q_staged, shared))

    def values() -> None:
        walk(partial(_add_values, shape, warpgroup - 1, arrays, q_staged, shared))

    lax.cond(warpgroup == 0, weights, values)


def _compute_weights(
    shape: QuantisedLatentShape, arrays: memory.Arrays, q_staged, shared: Shared, segment: Segment, tiles: Array
) -> Array:
    """Copy the tiles of a segment, and compute their weights. Return the number of tiles used so far."""
    work, queries, ahead = shape.work, pl.ds(0, shape.work.member_queries), shape.copied_tiles - 1
    locator = memory.Locator.of(work, shape.page, arrays.pools[0], arrays.table, segment)

    def fetch(index: Array, tiles: Array, entries: list[Array]) -> None:
        """Start the copies of a tile, if it is in the segment."""
        place = lax.rem(tiles, shape.copied_tiles)

        @pl.when(index < segment.end)
        def _() -> None:
            rows = locator.locate(index, entries)
            for pool, target in zip(arrays.pools, (shared.numbers, shared.scales, shared.exact), strict=True):
                memory.fetch(pool, rows, target.at[place], shared.filled.at[place])

    *first_entries, entries = [locator.load(segment.begin + nth) for nth in range(ahead + 1)]
    for nth, tile_entries in enumerate(first_entries):
        fetch(segment.begin + nth, tiles + nth, tile_entries)
    pl.when(segment.nth > 0)(lambda: plgpu.barrier_wait(shared.results_stored))
    (q, q_exact), (q_staged, q_exact_staged) = arrays.q, q_staged
    memory.fetch_queries(work, segment, 0, q, arrays.spans, q_staged, shared.spans, shared.q_filled)
    memory.fetch_query_numbers(work, segment, 0, q_exact, q_exact_staged, shared.q_filled)
    plgpu.barrier_wait(shared.q_filled)

    def tile(masked: bool, index: Array, carry):
        m, l, entries, tiles = carry
        later = locator.load(index + ahead + 1)  # one tile before their use, to hide the latency
        s, scales = _add_scores(shape, shared)
        first, layout = index * work.tile, FEW.reduce(0)
        s = softmax.mask_unseen(masked, s, shared.spans, first, FEW)
        scales = [softmax.clear_unseen_scales(masked, scale, segment, first, layout) for scale in scales]
        largest = softmax.ValueScales.of(reduce(jnp.maximum, scales))
        p, alpha, m, l = softmax.weigh(s, m, l, shape.scale, largest)
        pl.when(index > segment.begin)(lambda: plgpu.barrier_wait(shared.weights_used))
        fetch(index + ahead, tiles + ahead, entries)  # in the place of the previous tile
        ratios = [repeat_along_columns(scale * largest.inverse, work.member_queries) for scale in scales]
        weights = [(p * ratio).astype(jnp.float16) for ratio in ratios]
        instructions.store_weights(shared.weights, weights, shared.per_query.at[0, queries], alpha)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weights_ready)
        return m, l, later, tiles + 1

    carry = (*softmax.start(work.member_queries, FEW, slots=work.tile), entries, tiles)
    m, l, _, tiles = loop_by_mask(segment, tile, carry)
    inverse, log = softmax.finish(m, l)
    plgpu.barrier_wait(shared.weights_used)
    shared.per_query[0, queries] = inverse
    shared.per_query[1, queries] = log
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.segment_finished)
    plgpu.copy_smem_to_gmem(shared.per_query.at[1, queries], arrays.lse.at[segment.part])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return tiles


def _add_scores(shape: QuantisedLatentShape, shared: Shared) -> tuple[Array, list[Array]]:
    """Return the sum of the scores [queries, slots] of all groups, without the factor on the logits, and the scales."""
    groups = range(shape.groups)
    plgpu.barrier_wait(shared.scores_ready)
    scales = [plgpu.layout_cast(shared.group_scales[group], FEW.reduce(0)) for group in groups]
    scores = [plgpu.layout_cast(shared.scores[group], FEW) for group in groups]
    plgpu.barrier_arrive(shared.scores_used)
    return reduce(jnp.add, scores), scales


def _add_values(
    shape: QuantisedLatentShape,
    group: Array,
    arrays: memory.Arrays,
    q_staged,
    shared: Shared,
    segment: Segment,
    tiles: Array,
) -> Array:
    """Compute the share of a group in the scores, and add its weighted values.

    Returns:
        The number of tiles used so far.
    """

    def multiply(index: Array, tiles: Array) -> None:
        """Store the scores of a tile."""
        place = lax.rem(tiles, shape.copied_tiles)
        plgpu.barrier_wait(shared.filled.at[place])
        operands.clear_unseen(shared.numbers.at[place], segment, index, group)
        scores, scales = _multiply_group(shape, group, q_staged, shared, place)
        pl.when(tiles > 0)(lambda: plgpu.barrier_wait(shared.scores_used))
        instructions.store_scales(shared.group_scales.at[group], scales)
        store_transposed(shared.scores.at[group], scores)
        plgpu.barrier_arrive(shared.scores_ready)

    def tile(index: Array, carry):
        accs, tiles = carry
        multiply(index + 1, tiles + 1)
        return _add_weighted(shape, group, shared, tiles, accs), tiles + 1

    plgpu.barrier_wait(shared.q_filled)
    multiply(segment.begin, tiles)
    carry = [operands.make_zeros(shape.work.member_queries)] * instructions.OPERANDS, tiles
    accs, tiles = lax.fori_loop(segment.begin, segment.end - 1, tile, carry)
    accs = _add_weighted(shape, group, shared, tiles, accs)
    plgpu.barrier_wait(shared.segment_finished)
    _store_results(shape, group, arrays.o, shared, segment, accs)
    plgpu.barrier_arrive(shared.results_stored)
    return tiles + 1


def _multiply_group(
    shape: QuantisedLatentShape, group: Array, q_staged, shared: Shared, place: Array
) -> tuple[Array, Array]:
    """Return the share of a group in the scores [slots, queries] of a tile, and its scales."""
    q, q_exact = q_staged
    products = operands.multiply_slots(shared.numbers.at[place], q, group, few_registers=shape.many_queries)
    scales = instructions.load_scales(shared.scales.at[place], group)
    return operands.add_exact(products, scales, shared.exact.at[place], q_exact, group), scales


def _add_weighted(
    shape: QuantisedLatentShape, group: Array, shared: Shared, tiles: Array, accs: list[Any]
) -> list[Any]:
    """Wait for the weights of a tile, and add its weighted values [numbers, queries] to the sums of a group."""
    numbers = shared.numbers.at[lax.rem(tiles, shape.copied_tiles)]
    values = operands.load_values(numbers, group, few_registers=shape.many_queries)
    plgpu.barrier_wait(shared.weights_ready)
    alpha = repeat_along_columns(_load_per_query(shape, shared), ROWS)

    accs = [acc * alpha for acc in accs]
    accs = operands.add_weighted(accs, values, shared.weights.at[group], few_registers=shape.many_queries)
    plgpu.barrier_arrive(shared.weights_used)
    return accs


def _load_per_query(shape: QuantisedLatentShape, shared: Shared) -> Array:
    """Return the factor of each query, laid out like the columns of a product."""
    return plgpu.layout_cast(shared.per_query[0, pl.ds(0, shape.work.member_queries)], PRODUCT.reduce(0))


def _store_results(
    shape: QuantisedLatentShape, group: Array, o, shared: Shared, segment: Segment, accs: list[Array]
) -> None:
    """Copy the results of a group to global memory."""
    staged, factor = shared.scores.at[group], repeat_along_columns(_load_per_query(shape, shared), ROWS)
    for i, acc in enumerate(accs):
        store_transposed(staged, acc * factor)
        plgpu.commit_smem()
        target = o.at[segment.part, pl.ds(0, shape.work.member_queries), pl.ds(group * _GROUP + i * ROWS, ROWS)]
        plgpu.copy_smem_to_gmem(staged, target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
