"""Computes the parts of attention over quantised latents: float8 numbers in groups of 128 with a scale each.

All heads share one latent per slot, whose quantised numbers are also the values. The queries are the columns of the
matrix products, as in `grouped_few`. Each processor has one stream with three warpgroups. One computes the scores and
weights of a tile. Meanwhile the two others, with half of the groups each, multiply the weights of the previous tile by
its values, and copy and convert the next tile.

The products of a group are multiplied by its scales before they are added. The weights of its values contain them, too,
relative to the largest scale of the slot.
"""

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling

from helix_jax.attention import PageTable
from helix_jax.kernels.mosaic_gpu import memory, softmax
from helix_jax.kernels.mosaic_gpu.conversion import clip_to_float16, convert
from helix_jax.kernels.mosaic_gpu.few import FEW, PRODUCT, store_transposed, transpose_scores
from helix_jax.kernels.mosaic_gpu.softmax import repeat_along_columns, repeat_along_rows
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, Work, loop_over_tiles, walk_segments
from helix_jax.quantisation import FLOAT8, QuantisedPages

_GROUP = 128  # numbers that share a scale
_HALVES = 2
_MOST_QUERIES = 32  # those of a stream, which fill the shared memory
_STAGES = 2  # converted tiles: the one whose values are added, and the next one

# 64 slots by their four scales: a thread has one scale of two slots, and a sum over the scales is laid out like the
# rows of a product.
_SCALES = plgpu.Layout.TILED(Tiling(((64, 4), (16, 4), (8, 1))), (-6,), (-2, -3), -1)


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
    def _few_queries(self) -> bool:
        return self.work.member_queries <= _MOST_QUERIES // 2

    @property
    def pieces_ahead(self) -> int:
        """The pieces, of 64 slots by one group, that each half copies at once. More queries leave less memory."""
        return 3 if self._few_queries else 2

    @property
    def copied_tiles(self) -> int:
        """The tiles whose scales and exact numbers are copied at once."""
        return 2 if self._few_queries else 1

    @property
    def groups_per_half(self) -> int:
        """The groups that one warpgroup copies, converts and multiplies by the weights."""
        return self.groups // _HALVES

    def groups_of(self, half: int) -> range:
        """Return these groups."""
        return range(half, self.groups, _HALVES)


class Shared(NamedTuple):
    """The shared memory and the barriers of one processor. "Half" stands for a warpgroup that computes values.

    Attributes:
        numbers: The copied pieces of each half.
        scales: The scales of a tile, for each half.
        exact: The numbers of a tile that are not quantised.
        converted: The pieces of two tiles as float16, which represents float8 exactly.
        scales_by_group: The scales of these tiles, transposed.
        spans: The slots that each query sees.
        scores_weights: The scores of a tile, by query, and its weights for the values of each group, which overwrite
            them.
        per_query: The factor on earlier weights. After the last tile, 1 / sum and the log-sum-exp.
        numbers_filled: The copies of a piece arrive here.
        scales_filled: The copies of scales arrive here.
        exact_filled: The copies of exact numbers arrive here.
        converted_filled: A half arrives here when it has converted a piece.
        q_filled: The copies of queries and spans arrive here.
        weights_ready: The warpgroup of the scores arrives here when the weights of a tile are written.
        values_used: Both halves arrive here when they have used the weights and values of a tile.
        segment_finished: The warpgroup of the scores arrives here after the last tile of a segment.
        results_stored: Both halves arrive here when their results, which overwrite the queries, are copied out.
    """

    numbers: Any
    scales: Any
    exact: Any
    converted: Any
    scales_by_group: Any
    spans: Any
    scores_weights: Any
    per_query: Any
    numbers_filled: Any
    scales_filled: Any
    exact_filled: Any
    converted_filled: Any
    q_filled: Any
    weights_ready: Any
    values_used: Any
    segment_finished: Any
    results_stored: Any


def choose_shape(
    rows: int, queries: int, latents: QuantisedPages, processors: int, scale: float
) -> QuantisedLatentShape:
    """Choose the shape of the kernel for `queries` queries of a row: new tokens times heads."""
    member_queries = min(-(-queries // 8) * 8, _MOST_QUERIES)
    work = Work(rows, 1, queries, 1, ROWS, processors, member_queries)
    _, _, page, groups = latents.scales_AKWX.shape
    return QuantisedLatentShape(work, groups, latents.exact_width, page, scale)


def compute_parts(
    shape: QuantisedLatentShape, q_BQH: Array, k_AKWH: QuantisedPages, table: PageTable, schedule: Schedule
) -> tuple[Array, Array]:
    """Compute the outputs [parts, queries, values] and log-sum-exps [parts, queries] of all parts."""
    work, values = shape.work, shape.groups * _GROUP
    queries = clip_to_float16(q_BQH[..., :values]), q_BQH[..., values:].astype(jnp.bfloat16)
    q = memory.allocate_tiled((work.member_queries, values), jnp.float16)
    q_exact = memory.allocate_tiled((work.member_queries, shape.exact), jnp.bfloat16)
    o = [plgpu.SMEM((work.member_queries, _GROUP), jnp.float32) for _ in range(_HALVES)]

    def body(*refs: Any) -> None:
        scratch = plgpu.RefUnion(q, o), q_exact, _describe_shared(shape)
        pl.run_scoped(partial(_body, shape, *refs), *scratch, collective_axes="warpgroup")

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((work.parts, work.part_queries, values), jnp.float32),
            jax.ShapeDtypeStruct((work.parts, work.job_queries), jnp.float32),
        ),
        grid=(work.streams,),
        grid_names=("stream",),
        num_threads=_HALVES + 1,
        thread_name="warpgroup",
        compiler_params=memory.COMPILER,
    )(queries, [x.reshape(-1, x.shape[-1]) for x in k_AKWH if x is not None], *table, *schedule)


def _describe_shared(shape: QuantisedLatentShape) -> Shared:
    tile, queries, piece = shape.work.tile, shape.work.member_queries, (shape.work.tile, _GROUP)
    copies = memory.copies_per_tile(tile, shape.page)
    return Shared(
        numbers=memory.allocate_tiled((_HALVES, shape.pieces_ahead, *piece), FLOAT8),
        scales=plgpu.SMEM((_HALVES, shape.copied_tiles, tile, shape.groups), jnp.float32),
        exact=memory.allocate_tiled((shape.copied_tiles, tile, shape.exact), jnp.bfloat16),
        converted=memory.allocate_tiled((_STAGES, shape.groups, *piece), jnp.float16),
        scales_by_group=plgpu.SMEM((_STAGES, shape.groups, tile), jnp.float32),
        spans=memory.allocate_per_query((2, queries), jnp.int32),
        scores_weights=plgpu.RefUnion(
            plgpu.SMEM((queries, tile), jnp.float32),
            memory.allocate_tiled((shape.groups, queries, tile), jnp.float16),
        ),
        per_query=memory.allocate_per_query((2, queries), jnp.float32),
        numbers_filled=plgpu.Barrier(num_arrivals=copies, num_barriers=(_HALVES, shape.pieces_ahead)),
        scales_filled=plgpu.Barrier(num_arrivals=copies, num_barriers=(_HALVES, shape.copied_tiles)),
        exact_filled=plgpu.Barrier(num_arrivals=copies, num_barriers=shape.copied_tiles),
        converted_filled=plgpu.Barrier(num_barriers=(_STAGES, shape.groups)),
        q_filled=plgpu.Barrier(num_arrivals=memory.QUERY_COPIES + 1),
        weights_ready=plgpu.Barrier(),
        values_used=plgpu.Barrier(num_arrivals=_HALVES),
        segment_finished=plgpu.Barrier(),
        results_stored=plgpu.Barrier(num_arrivals=_HALVES),
    )


def _body(
    shape: QuantisedLatentShape,
    q,
    pools,
    entries,
    first,
    starts,
    jobs,
    spans,
    o,
    lse,
    staged,
    q_exact_staged,
    shared: Shared,
) -> None:
    table, (q_staged, o_staged) = PageTable(entries, first), staged
    walk = partial(walk_segments, shape.work, Schedule(starts, jobs, spans), lax.axis_index("stream"))

    def scores() -> None:
        walk(partial(_compute_weights, shape, q, spans, lse, (q_staged, q_exact_staged), shared))

    def values(half: int) -> None:
        walk(partial(_add_values, shape, half, pools, table, o, o_staged[half], shared))

    lax.switch(lax.axis_index("warpgroup"), [scores, *(partial(values, half) for half in range(_HALVES))])


def _compute_weights(
    shape: QuantisedLatentShape, q, spans, lse, q_staged, shared: Shared, segment: Segment, tiles: Array
) -> Array:
    """Compute the weights of the tiles of a segment. Return the number of tiles used so far."""
    work, queries, groups = shape.work, pl.ds(0, shape.work.member_queries), range(shape.groups)
    scores, weights = shared.scores_weights
    pl.when(segment.nth > 0)(lambda: plgpu.barrier_wait(shared.results_stored))
    memory.fetch_queries(work, segment, 0, q[0], spans, q_staged[0], shared.spans, shared.q_filled)
    memory.fetch_query_numbers(work, segment, 0, q[1], q_staged[1], shared.q_filled)
    plgpu.barrier_wait(shared.q_filled)

    def tile(masked: bool, index: Array, carry):
        m, l, tiles = carry
        s = _score(shape, q_staged, shared, tiles)
        pl.when(index > segment.begin)(lambda: plgpu.barrier_wait(shared.values_used))
        s = transpose_scores(scores, s)
        if masked:
            s = softmax.mask_unseen(s, shared.spans, index * work.tile, FEW)
        stage = lax.rem(tiles, _STAGES)
        scales = [plgpu.layout_cast(shared.scales_by_group[stage, group], FEW.reduce(0)) for group in groups]
        largest = reduce(jnp.maximum, scales)
        p, alpha, m, l = softmax.weigh(s, m, l, shape.scale, largest)
        inverse = 1 / jnp.where(largest > 0, largest, 1.0)
        for group, scale in enumerate(scales):
            ratio = repeat_along_columns(scale * inverse, work.member_queries)
            weights[group] = (p * ratio).astype(jnp.float16)
        shared.per_query[0, queries] = alpha
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weights_ready)
        return m, l, tiles + 1

    m, l, tiles = loop_over_tiles(segment, tile, (*softmax.start(work.member_queries, FEW), tiles))
    inverse, log = softmax.finish(m, l)
    plgpu.barrier_wait(shared.values_used)
    shared.per_query[0, queries] = inverse
    shared.per_query[1, queries] = log
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.segment_finished)
    plgpu.copy_smem_to_gmem(shared.per_query.at[1, queries], lse.at[segment.part])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return tiles


def _score(shape: QuantisedLatentShape, q_staged, shared: Shared, tiles: Array) -> Array:
    """Return the scores [queries, slots] of a tile, without the factor on the logits."""
    size, stage = (shape.work.tile, shape.work.member_queries), lax.rem(tiles, _STAGES)
    copied = lax.rem(tiles, shape.copied_tiles)

    def multiply(accs):
        *of_groups, of_exact = accs
        for group, acc in enumerate(of_groups):
            plgpu.barrier_wait(shared.converted_filled.at[stage, group])
            q = q_staged[0].at[:, pl.ds(group * _GROUP, _GROUP)]
            plgpu.wgmma(acc, shared.converted.at[stage, group], q.transpose((1, 0)))
        plgpu.barrier_wait(shared.exact_filled.at[copied])
        plgpu.wgmma(of_exact, shared.exact.at[copied], q_staged[1].transpose((1, 0)))
        return [acc[...] for acc in accs]

    *products, s = pl.run_scoped(multiply, [memory.Accumulator(size, jnp.float32) for _ in range(shape.groups + 1)])
    for group, product in enumerate(products):
        scale = plgpu.layout_cast(shared.scales_by_group[stage, group], PRODUCT.reduce(1))
        s = s + product * repeat_along_rows(scale, size[1])
    return s


@dataclass(frozen=True)
class _Copies:
    """The copies of the pieces and scales of one half, and of the exact numbers, within a segment.

    Each method that fetches takes the index of a tile, the number of tiles before it in the stream, and its first rows
    in the pools. After the last tile of the segment, it does nothing.
    """

    shape: QuantisedLatentShape
    half: int
    pools: Any
    table: PageTable
    shared: Shared
    segment: Segment

    def locate(self, index: Array) -> list[Array]:
        """Return the first row of each part of a tile in the pools."""
        shape = self.shape
        return memory.locate_tile(shape.work, shape.page, self.pools[0], self.table, self.segment, index)

    def piece(self, tiles: Array, nth: int) -> tuple[Any, Any]:
        """Return the memory of a piece, and the barrier at which its copies arrive."""
        place = self.half, lax.rem(tiles * self.shape.groups_per_half + nth, self.shape.pieces_ahead)
        return self.shared.numbers.at[*place], self.shared.numbers_filled.at[*place]

    def fetch_piece(self, index: Array, tiles: Array, starts: list[Array], nth: int) -> None:
        """Start the copy of the `nth` piece of this half."""
        columns = pl.ds(self.shape.groups_of(self.half)[nth] * _GROUP, _GROUP)
        self._fetch(index, self.pools[0], starts, *self.piece(tiles, nth), columns=columns)

    def fetch_scales(self, index: Array, tiles: Array, starts: list[Array]) -> None:
        """Start the copy of the scales of a tile."""
        place = self.half, lax.rem(tiles, self.shape.copied_tiles)
        self._fetch(index, self.pools[1], starts, self.shared.scales.at[*place], self.shared.scales_filled.at[*place])

    def fetch_exact(self, index: Array, tiles: Array, starts: list[Array]) -> None:
        """Start the copy of the exact numbers of a tile."""
        stage = lax.rem(tiles, self.shape.copied_tiles)
        self._fetch(index, self.pools[2], starts, self.shared.exact.at[stage], self.shared.exact_filled.at[stage])

    def _fetch(self, index: Array, pool: Any, starts: list[Array], target: Any, arrived: Any, **options: Any) -> None:
        pl.when(index < self.segment.end)(partial(memory.fetch, pool, starts, target, arrived, **options))


def _add_values(
    shape: QuantisedLatentShape, half: int, pools, table, o, o_staged, shared: Shared, segment: Segment, tiles: Array
) -> Array:
    """Copy and convert the groups of a half, and add their weighted values. Return the number of tiles used so far."""
    copies = _Copies(shape, half, pools, table, shared, segment)

    def tile(index: Array, carry):
        accs, starts, tiles = carry  # the starts are those of the next three tiles
        later = copies.locate(index + 4)  # these loads overlap with the conversion
        pl.when(index + 1 < segment.end)(lambda: _convert_tile(copies, index + 1, tiles + 1, starts[1:]))
        plgpu.barrier_wait(shared.weights_ready)
        if half == 0:  # the scores of this tile are computed, so its exact numbers are no longer needed
            ahead = shape.copied_tiles
            copies.fetch_exact(index + ahead, tiles + ahead, starts[ahead - 1])
        accs = _multiply(shape, half, shared, tiles, accs)
        plgpu.barrier_arrive(shared.values_used)
        return accs, [*starts[1:], later], tiles + 1

    starts = [copies.locate(segment.begin + tile) for tile in range(4)]
    _fetch_first(copies, tiles, starts)
    _convert_tile(copies, segment.begin, tiles, starts[1:3])
    zero = plgpu.layout_cast(jnp.zeros((_GROUP, shape.work.member_queries), jnp.float32), PRODUCT)
    carry = [zero for _ in shape.groups_of(half)], starts[1:], tiles
    accs, _, tiles = lax.fori_loop(segment.begin, segment.end, tile, carry)
    plgpu.barrier_wait(shared.segment_finished)
    _store(shape, half, o, o_staged, shared, segment, accs)
    plgpu.barrier_arrive(shared.results_stored)
    return tiles


def _fetch_first(copies: _Copies, tiles: Array, starts: list[list[Array]]) -> None:
    """Start as many copies as there is memory for. The starts are those of the first tiles of a segment."""
    shape, begin = copies.shape, copies.segment.begin
    for tile in range(shape.copied_tiles):
        copies.fetch_scales(begin + tile, tiles + tile, starts[tile])
    for piece in range(shape.pieces_ahead):
        tile, nth = divmod(piece, shape.groups_per_half)
        copies.fetch_piece(begin + tile, tiles + tile, starts[tile], nth)
    for tile in range(shape.copied_tiles if copies.half == 0 else 0):
        copies.fetch_exact(begin + tile, tiles + tile, starts[tile])


def _convert_tile(copies: _Copies, index: Array, tiles: Array, starts: list[list[Array]]) -> None:
    """Convert the pieces of a tile, and fetch later ones. The starts are those of the next two tiles."""
    shape, shared, half, segment = copies.shape, copies.shared, copies.half, copies.segment
    stage, first_slot = lax.rem(tiles, _STAGES), index * shape.work.tile
    plgpu.barrier_wait(shared.scales_filled.at[half, lax.rem(tiles, shape.copied_tiles)])
    scales = plgpu.layout_cast(shared.scales[half, lax.rem(tiles, shape.copied_tiles)], _SCALES)
    number = plgpu.broadcasted_iota(jnp.int32, scales.shape, 1, layout=_SCALES)
    for nth, group in enumerate(shape.groups_of(half)):
        numbers, arrived = copies.piece(tiles, nth)
        converted = shared.converted.at[stage, group]
        plgpu.barrier_wait(arrived)
        scale = jnp.where(number == group, scales, 0.0).sum(axis=1)
        shared.scales_by_group[stage, group] = softmax.clear_unseen_scales(
            scale, segment, first_slot, _SCALES.reduce(1)
        )
        convert(numbers, converted)

        @pl.when((index < segment.whole_begin) | (index >= segment.whole_end))
        def _(converted: Any = converted) -> None:
            plgpu.commit_smem()
            softmax.clear_unseen(converted, segment, first_slot, shape=(shape.work.tile, _GROUP))

        plgpu.commit_smem()  # by now all threads have read the quantised piece, so its place is free
        plgpu.barrier_arrive(shared.converted_filled.at[stage, group])
        ahead, next_nth = divmod(nth + shape.pieces_ahead, shape.groups_per_half)
        copies.fetch_piece(index + ahead, tiles + ahead, starts[ahead - 1], next_nth)
    ahead = shape.copied_tiles
    copies.fetch_scales(index + ahead, tiles + ahead, starts[ahead - 1])


def _multiply(shape: QuantisedLatentShape, half: int, shared: Shared, tiles: Array, accs: list[Any]) -> list[Any]:
    """Add the weighted values of a tile [numbers, queries] to the sums of each group of a half."""
    _, weights = shared.scores_weights
    stage, alpha = lax.rem(tiles, _STAGES), repeat_along_columns(_load_per_query(shape, shared), _GROUP)

    def add(refs) -> None:
        for group, ref in zip(shape.groups_of(half), refs, strict=True):
            values = shared.converted.at[stage, group].transpose((1, 0))
            plgpu.wgmma(ref, values, weights.at[group].transpose((1, 0)))

    return pl.run_state(add)([memory.Accumulator.init(acc * alpha) for acc in accs])


def _load_per_query(shape: QuantisedLatentShape, shared: Shared) -> Array:
    """Return the factor of each query, laid out like the columns of a product."""
    return plgpu.layout_cast(shared.per_query[0, pl.ds(0, shape.work.member_queries)], PRODUCT.reduce(0))


def _store(shape: QuantisedLatentShape, half: int, o, o_staged, shared: Shared, segment: Segment, accs) -> None:
    """Copy the results of a half to global memory, group by group."""
    inverse = repeat_along_columns(_load_per_query(shape, shared), _GROUP)
    for group, acc in zip(shape.groups_of(half), accs, strict=True):
        store_transposed(o_staged, acc * inverse)
        plgpu.commit_smem()
        target = o.at[segment.part, pl.ds(0, shape.work.member_queries), pl.ds(group * _GROUP, _GROUP)]
        plgpu.copy_smem_to_gmem(o_staged, target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
