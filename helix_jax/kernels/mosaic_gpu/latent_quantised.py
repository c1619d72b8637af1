"""Computes the parts of attention over quantised latents: float8 numbers in groups of 128 with a scale each.

All heads share one latent per slot, whose quantised numbers are also the values. The queries are the columns of the
matrix products, as in `grouped_few`. Each processor has one stream, with a warpgroup per group of numbers and one for
the weights. The warpgroup of a group copies its numbers of a tile, and multiplies them by the queries. That of the
weights adds these products, times the scales, and those of the numbers that are not quantised, and computes the
weights. Then the warpgroup of a group adds its numbers times these weights, while that of the weights continues with
the next tile.

Quantised numbers are converted in registers, twice: with slots as rows, and with numbers as rows. In shared memory,
converted numbers would take more time to store and load than this. The weights of a group contain the scales of its
values, too, relative to the largest scale of the slot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.attention import PageTable
from helix_jax.kernels.mosaic_gpu import memory, operands, softmax
from helix_jax.kernels.mosaic_gpu.few import FEW, PRODUCT, store_transposed
from helix_jax.kernels.mosaic_gpu.softmax import repeat_along_columns
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, Work, align_streams, loop_by_mask, walk_segments
from helix_jax.quantisation import FLOAT8, QuantisedPages

_GROUP = operands.NUMBERS  # numbers that share a scale
_MOST_QUERIES = 32  # of a stream, which fill the shared memory
_EXACT_TILES = 2  # whose scales and exact numbers are in shared memory at once


@dataclass(frozen=True)
class QuantisedLatentShape:
    """The static shape of the kernel for quantised latents.

    Args:
        work: The static shape of the work.
        groups: The groups of numbers with a scale each. All of them are values.
        exact: The numbers of a latent that are not quantised.
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
        """The tiles whose numbers are in shared memory at once."""
        return 3 if self.many_queries else 4

    @property
    def many_queries(self) -> bool:
        """Whether there are so many queries that less memory is left, and one operand at a time fits in registers."""
        return self.work.member_queries > _MOST_QUERIES // 2


class Shared(NamedTuple):
    """The shared memory and the barriers of one processor.

    Attributes:
        numbers: The copied tiles of each group.
        scales: The copied scales.
        exact: The copied numbers that are not quantised.
        spans: The slots that each query sees.
        products: The products of the numbers of each group and the queries, by query, and last, those of the exact
            numbers. After the last tile of a segment: the results of an operand of each group.
        weights: The weights for the values of each group.
        per_query: The factor on earlier weights. After the last tile, 1 / sum and the log-sum-exp.
        numbers_filled: The copies of a tile of a group arrive here.
        exact_filled: The copies of scales and exact numbers arrive here.
        q_filled: The copies of queries and spans arrive here.
        products_ready: The warpgroup of each group arrives here when it has stored its products of a tile.
        products_used: The warpgroup of the weights arrives here when it has read them.
        weights_ready: It arrives here when the weights of a tile are written.
        weights_used: The warpgroup of each group arrives here when it has used them.
        segment_finished: The warpgroup of the weights arrives here after the last tile of a segment.
        results_stored: The warpgroup of each group arrives here when its results are copied out.
    """

    numbers: Any
    scales: Any
    exact: Any
    spans: Any
    products: Any
    weights: Any
    per_query: Any
    numbers_filled: Any
    exact_filled: Any
    q_filled: Any
    products_ready: Any
    products_used: Any
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
    queries = operands.split_queries(q_BQH[..., :values]), q_BQH[..., values:].astype(jnp.bfloat16)
    q = memory.allocate_tiled((values // ROWS, work.member_queries, ROWS), jnp.float16)
    q_exact = memory.allocate_tiled((work.member_queries, shape.exact), jnp.bfloat16)

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
    )(queries, [x.reshape(-1, x.shape[-1]) for x in k_AKWH if x is not None], *table, *schedule)


def _describe_shared(shape: QuantisedLatentShape) -> Shared:
    groups, tile, queries = shape.groups, shape.work.tile, shape.work.member_queries
    copies = memory.copies_per_tile(tile, shape.page)
    return Shared(
        numbers=memory.allocate_tiled((groups, shape.copied_tiles, tile, _GROUP), FLOAT8),
        scales=plgpu.SMEM((_EXACT_TILES, tile, groups), jnp.float32),
        exact=memory.allocate_tiled((_EXACT_TILES, tile, shape.exact), jnp.bfloat16),
        spans=memory.allocate_per_query((2, queries), jnp.int32),
        products=plgpu.SMEM((groups + 1, queries, tile), jnp.float32),
        weights=memory.allocate_tiled((groups, queries, tile), jnp.float16),
        per_query=memory.allocate_per_query((2, queries), jnp.float32),
        numbers_filled=plgpu.Barrier(num_arrivals=copies, num_barriers=(groups, shape.copied_tiles)),
        exact_filled=plgpu.Barrier(num_arrivals=2 * copies, num_barriers=_EXACT_TILES),
        q_filled=plgpu.Barrier(num_arrivals=memory.QUERY_COPIES + 1),
        products_ready=plgpu.Barrier(num_arrivals=groups),
        products_used=plgpu.Barrier(),
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
        walk(partial(_add_values, shape, warpgroup - 1, arrays, q_staged[0], shared))

    lax.cond(warpgroup == 0, weights, values)


@dataclass(frozen=True)
class _Copies:
    """The copies of a part of the tiles of a segment. After the last tile, `fetch` does nothing.

    Attributes:
        shape: The static shape of the kernel.
        arrays: The arrays of the kernel. Its pools are the numbers, the scales and the exact numbers.
        segment: The segment.
        stages: The tiles that are in shared memory at once.
    """

    shape: QuantisedLatentShape
    arrays: memory.Arrays
    segment: Segment
    stages: int

    def locate(self, index: Array) -> list[Array]:
        """Return the first row of each page of a tile in the pools."""
        shape, arrays = self.shape, self.arrays
        return memory.locate_tile(shape.work, shape.page, arrays.pools[0], arrays.table, self.segment, index)

    def stage(self, tiles: Array) -> Array:
        """Return the place of a tile, which is the `tiles`-th of the stream."""
        return lax.rem(tiles, self.stages)

    def fetch(self, index: Array, *arguments: Any, columns: Any = None) -> None:
        """Start the copy of a tile, if it is in the segment. The arguments are those of `memory.fetch`."""

        @pl.when(index < self.segment.end)
        def _() -> None:
            memory.fetch(*arguments, columns=columns)

    def fetch_first(self, tiles: Array, count: int, fetch: Callable[[Array, Array, list[Array]], None]) -> list[Array]:
        """Call `fetch(index, tiles, starts)` for the first tiles. Return the first rows of the next one."""
        *starts, next_starts = [self.locate(self.segment.begin + nth) for nth in range(count + 1)]
        for nth in range(count):
            fetch(self.segment.begin + nth, tiles + nth, starts[nth])
        return next_starts


def _compute_weights(
    shape: QuantisedLatentShape, arrays: memory.Arrays, q_staged, shared: Shared, segment: Segment, tiles: Array
) -> Array:
    """Compute the weights of the tiles of a segment. Return the number of tiles used so far."""
    work, queries, ahead = shape.work, pl.ds(0, shape.work.member_queries), _EXACT_TILES
    copies = _Copies(shape, arrays, segment, ahead)

    def fetch(index: Array, tiles: Array, starts: list[Array]) -> None:
        place = copies.stage(tiles)
        for pool, target in zip(arrays.pools[1:], (shared.scales, shared.exact), strict=True):
            copies.fetch(index, pool, starts, target.at[place], shared.exact_filled.at[place])

    starts = copies.fetch_first(tiles, ahead, fetch)
    pl.when(segment.nth > 0)(lambda: plgpu.barrier_wait(shared.results_stored))
    (q, q_exact), (q_staged, q_exact_staged) = arrays.q, q_staged
    memory.fetch_queries(work, segment, 0, q, arrays.spans, q_staged, shared.spans, shared.q_filled)
    memory.fetch_query_numbers(work, segment, 0, q_exact, q_exact_staged, shared.q_filled)
    plgpu.barrier_wait(shared.q_filled)

    def tile(masked: bool, index: Array, carry):
        m, l, starts, tiles = carry
        later = copies.locate(index + ahead + 1)
        s, scales = _add_products(shape, shared, q_exact_staged, copies.stage(tiles))
        first, layout = index * work.tile, FEW.reduce(0)
        s = softmax.mask_unseen(masked, s, shared.spans, first, FEW)
        scales = [softmax.clear_unseen_scales(masked, scale, segment, first, layout) for scale in scales]
        largest = softmax.ValueScales.of(reduce(jnp.maximum, scales))
        p, alpha, m, l = softmax.weigh(s, m, l, shape.scale, largest)
        pl.when(index > segment.begin)(lambda: plgpu.barrier_wait(shared.weights_used))
        ratios = [repeat_along_columns(scale * largest.inverse, work.member_queries) for scale in scales]
        operands.store_weights(shared.weights, [(p * ratio).astype(jnp.float16) for ratio in ratios])
        shared.per_query[0, queries] = alpha
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weights_ready)
        fetch(index + ahead, tiles + ahead, starts)  # by now all threads have read the scales
        return m, l, later, tiles + 1

    carry = (*softmax.start(work.member_queries, FEW), starts, tiles)
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


def _add_products(shape: QuantisedLatentShape, shared: Shared, q_exact: Any, stage: Array) -> tuple[Array, list[Array]]:
    """Add the products of all groups of a tile, times their scales, and those of the exact numbers.

    Returns:
        The scores [queries, slots], without the factor on the logits, and the scales of each group.
    """
    plgpu.barrier_wait(shared.exact_filled.at[stage])

    def multiply(acc):
        plgpu.wgmma(acc, shared.exact.at[stage], q_exact.transpose((1, 0)))
        return operands.load_scales(shared.scales.at[stage]), acc[...]  # the first while the product is computed

    size = shape.work.tile, shape.work.member_queries
    scales, exact = pl.run_scoped(multiply, memory.Accumulator(size, jnp.float32))
    store_transposed(shared.products.at[shape.groups], exact)
    s = plgpu.layout_cast(shared.products[shape.groups], FEW)
    plgpu.barrier_wait(shared.products_ready)
    for group, scale in enumerate(scales):
        s = s + plgpu.layout_cast(shared.products[group], FEW) * repeat_along_columns(scale, s.shape[0])
    plgpu.barrier_arrive(shared.products_used)
    return s, scales


def _add_values(
    shape: QuantisedLatentShape,
    group: Array,
    arrays: memory.Arrays,
    q_staged,
    shared: Shared,
    segment: Segment,
    tiles: Array,
) -> Array:
    """Copy the numbers of a group, multiply them by the queries, and add its weighted values.

    Returns:
        The number of tiles used so far.
    """
    stages, columns = shape.copied_tiles, pl.ds(group * _GROUP, _GROUP)
    copies = _Copies(shape, arrays, segment, stages)

    def fetch(index: Array, tiles: Array, starts: list[Array]) -> None:
        place = group, copies.stage(tiles)
        numbers, filled = shared.numbers.at[*place], shared.numbers_filled.at[*place]
        copies.fetch(index, arrays.pools[0], starts, numbers, filled, columns=columns)

    def multiply(index: Array, tiles: Array) -> None:
        """Store the products of a tile and the queries."""
        place = group, copies.stage(tiles)
        numbers = shared.numbers.at[*place]
        plgpu.barrier_wait(shared.numbers_filled.at[*place])
        operands.clear_unseen(numbers, segment, index)
        product = operands.multiply_slots(numbers, q_staged, group, one_at_a_time=shape.many_queries)
        pl.when(tiles > 0)(lambda: plgpu.barrier_wait(shared.products_used))
        store_transposed(shared.products.at[group], product)
        plgpu.barrier_arrive(shared.products_ready)

    def tile(index: Array, carry):
        accs, starts, tiles = carry
        later = copies.locate(index + stages)
        multiply(index + 1, tiles + 1)
        # In the place of the previous tile. All threads have read it: storing the products synchronised them.
        fetch(index + stages - 1, tiles + stages - 1, starts)
        accs = add_weighted(tiles, accs)
        return accs, later, tiles + 1

    def add_weighted(tiles: Array, accs: list[Any]) -> list[Any]:
        return _add_weighted(shape, group, shared, shared.numbers.at[group, copies.stage(tiles)], accs)

    starts = copies.fetch_first(tiles, stages - 1, fetch)
    plgpu.barrier_wait(shared.q_filled)
    multiply(segment.begin, tiles)
    carry = [operands.make_zeros(shape.work.member_queries)] * operands.OPERANDS, starts, tiles
    accs, _, tiles = lax.fori_loop(segment.begin, segment.end - 1, tile, carry)
    accs = add_weighted(tiles, accs)
    plgpu.barrier_wait(shared.segment_finished)
    _store_results(shape, group, arrays.o, shared, segment, accs)
    plgpu.barrier_arrive(shared.results_stored)
    return tiles + 1


def _add_weighted(
    shape: QuantisedLatentShape, group: Array, shared: Shared, numbers: Any, accs: list[Any]
) -> list[Any]:
    """Wait for the weights of a tile, and add its weighted values [numbers, queries] to the sums of a group."""
    values = operands.load_numbers(numbers)
    plgpu.barrier_wait(shared.weights_ready)
    alpha = repeat_along_columns(_load_per_query(shape, shared), ROWS)

    accs = [acc * alpha for acc in accs]
    accs = operands.add_weighted(accs, values, shared.weights.at[group], one_at_a_time=shape.many_queries)
    plgpu.barrier_arrive(shared.weights_used)
    return accs


def _load_per_query(shape: QuantisedLatentShape, shared: Shared) -> Array:
    """Return the factor of each query, laid out like the columns of a product."""
    return plgpu.layout_cast(shared.per_query[0, pl.ds(0, shape.work.member_queries)], PRODUCT.reduce(0))


def _store_results(
    shape: QuantisedLatentShape, group: Array, o, shared: Shared, segment: Segment, accs: list[Array]
) -> None:
    """Copy the results of a group to global memory."""
    staged, factor = shared.products.at[group], repeat_along_columns(_load_per_query(shape, shared), ROWS)
    for i, acc in enumerate(accs):
        store_transposed(staged, acc * factor)
        plgpu.commit_smem()
        target = o.at[segment.part, pl.ds(0, shape.work.member_queries), pl.ds(group * _GROUP + i * ROWS, ROWS)]
        plgpu.copy_smem_to_gmem(staged, target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
