"""Computes the parts of attention over quantised latents: float8 numbers in groups of 128 with a scale each.

All heads share one latent per slot, whose quantised numbers are also the values. The queries are the columns of the
matrix products, as in `grouped_few`. Each processor has one stream with three warpgroups: two copy pieces of 64 slots
by one group and convert them to float16, and one computes. The products of a group are multiplied by its scales before
they are added. The weights of its values contain them, too, relative to the largest scale of the slot.
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
from helix_jax.kernels.mosaic_gpu.few import FEW, PRODUCT, spread_over_product, store_transposed, transpose_scores
from helix_jax.kernels.mosaic_gpu.softmax import repeat_along_columns, repeat_along_rows
from helix_jax.kernels.mosaic_gpu.work import ROWS, Schedule, Segment, Work, loop_over_tiles, walk_segments
from helix_jax.quantisation import FLOAT8, QuantisedPages

_GROUP = 128  # numbers that share a scale
_CONVERTERS = 2
_MOST_QUERIES = 32  # their results fill half of the registers
_STAGES = 2  # tiles whose scales and exact numbers are in shared memory
_CONVERTED = 6  # pieces that are converted and in use: those of a tile, and two of the next

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
    def copied_tiles(self) -> int:
        """The tiles whose pieces are copied at once: two, or one if the queries take more memory."""
        return 2 if self.work.member_queries <= _MOST_QUERIES // 2 else 1

    def place(self, tiles: Array, group: int) -> Array:
        """Return the place of a converted piece, after so many tiles."""
        return lax.rem(tiles * self.groups + group, _CONVERTED)

    @property
    def groups_per_converter(self) -> int:
        """The groups that one warpgroup copies and converts."""
        return self.groups // _CONVERTERS


class Shared(NamedTuple):
    """The shared memory and the barriers of one processor.

    Attributes:
        numbers: The copied pieces of each converter.
        scales: The scales of a tile.
        exact: The numbers of a tile that are not quantised.
        converted: Pieces as float16, which represents float8 exactly.
        q: The quantised part of the queries, float16, and the other part, bfloat16.
        spans: The slots that each query sees.
        scores: The scores of a tile, by query.
        weights: The weights of a tile for the values of each group.
        scales_by_group: The scales of a tile, transposed.
        per_query: A factor for each query.
        o: The results of a group, until they are copied to global memory.
        lse: The log-sum-exps, until they are copied to global memory.
        numbers_filled: The copies of a piece arrive here.
        converted_filled: A converter arrives here when it has converted a piece.
        converted_freed: The computing warpgroup arrives here when it no longer needs a piece.
        tile_filled: The copies of scales and exact numbers arrive here.
        tile_freed: The computing warpgroup arrives here when it no longer needs them.
        q_filled: The copies of queries and spans arrive here.
        q_freed: The computing warpgroup arrives here when it no longer needs the queries of a segment.
    """

    numbers: Any
    scales: Any
    exact: Any
    converted: Any
    q: tuple[Any, Any]
    spans: Any
    scores: Any
    weights: Any
    scales_by_group: Any
    per_query: Any
    o: Any
    lse: Any
    numbers_filled: Any
    converted_filled: Any
    converted_freed: Any
    tile_filled: Any
    tile_freed: Any
    q_filled: Any
    q_freed: Any


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

    def body(*refs: Any) -> None:
        pl.run_scoped(partial(_body, shape, *refs), _describe_shared(shape), collective_axes="warpgroup")

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((work.parts, work.part_queries, values), jnp.float32),
            jax.ShapeDtypeStruct((work.parts, work.job_queries), jnp.float32),
        ),
        grid=(work.streams,),
        grid_names=("stream",),
        num_threads=1 + _CONVERTERS,
        thread_name="warpgroup",
        compiler_params=memory.COMPILER,
    )(queries, [x.reshape(-1, x.shape[-1]) for x in k_AKWH if x is not None], *table, *schedule)


def _describe_shared(shape: QuantisedLatentShape) -> Shared:
    tile, queries, piece = shape.work.tile, shape.work.member_queries, (shape.work.tile, _GROUP)
    copies = memory.copies_per_tile(tile, shape.page)
    copied = _CONVERTERS, shape.copied_tiles * shape.groups_per_converter
    return Shared(
        numbers=memory.allocate_tiled((*copied, *piece), FLOAT8),
        scales=plgpu.SMEM((_STAGES, tile, shape.groups), jnp.float32),
        exact=memory.allocate_tiled((_STAGES, tile, shape.exact), jnp.bfloat16),
        converted=memory.allocate_tiled((_CONVERTED, *piece), jnp.float16),
        q=(
            memory.allocate_tiled((queries, shape.groups * _GROUP), jnp.float16),
            memory.allocate_tiled((queries, shape.exact), jnp.bfloat16),
        ),
        spans=memory.allocate_per_query((2, queries), jnp.int32),
        scores=plgpu.SMEM((queries, tile), jnp.float32),
        weights=memory.allocate_tiled((shape.groups, queries, tile), jnp.float16),
        scales_by_group=plgpu.SMEM((shape.groups, tile), jnp.float32),
        per_query=plgpu.SMEM((queries,), jnp.float32),
        o=plgpu.SMEM((queries, _GROUP), jnp.float32),
        lse=memory.allocate_per_query((queries,), jnp.float32),
        numbers_filled=plgpu.Barrier(num_arrivals=copies, num_barriers=copied),
        converted_filled=plgpu.Barrier(num_barriers=_CONVERTED),
        converted_freed=plgpu.Barrier(num_barriers=_CONVERTED),
        tile_filled=plgpu.Barrier(num_arrivals=2 * copies, num_barriers=_STAGES),
        tile_freed=plgpu.Barrier(num_barriers=_STAGES),
        q_filled=plgpu.Barrier(num_arrivals=memory.QUERY_COPIES + 1),
        q_freed=plgpu.Barrier(),
    )


def _body(shape: QuantisedLatentShape, q, pools, entries, first, starts, jobs, spans, o, lse, shared: Shared) -> None:
    table = PageTable(entries, first)
    walk = partial(walk_segments, shape.work, Schedule(starts, jobs, spans), lax.axis_index("stream"))

    def compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        walk(partial(_compute, shape, o, lse, shared))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def copy(converter: int) -> None:
        plgpu.set_max_registers(128, action="decrease")
        walk(partial(_copy_and_convert, shape, converter, q, spans, pools, table, shared))

    roles = [compute, *(partial(copy, converter) for converter in range(_CONVERTERS))]
    lax.switch(lax.axis_index("warpgroup"), roles)


def _copy_and_convert(
    shape: QuantisedLatentShape,
    converter: int,
    q,
    spans,
    pools,
    table,
    shared: Shared,
    segment: Segment,
    tiles: Array,
) -> Array:
    """Copy the pieces of every second group some tiles ahead, and convert them. The first converter copies the rest."""
    own, ahead = range(converter, shape.groups, _CONVERTERS), shape.copied_tiles
    numbers, scales, exact = pools
    locate = partial(memory.locate_tile, shape.work, shape.page, numbers, table, segment)

    def fetch_pieces(starts: list[Array], tiles: Array) -> None:
        for nth, group in enumerate(own):
            place = converter, lax.rem(tiles, ahead) * len(own) + nth
            target, arrived = shared.numbers.at[*place], shared.numbers_filled.at[*place]
            memory.fetch(numbers, starts, target, arrived, columns=pl.ds(group * _GROUP, _GROUP))

    def fetch_rest(starts: list[Array], tiles: Array) -> None:
        stage = lax.rem(tiles, _STAGES)
        pl.when(tiles >= _STAGES)(partial(plgpu.barrier_wait, shared.tile_freed.at[stage]))
        for pool, target in ((scales, shared.scales), (exact, shared.exact)):
            memory.fetch(pool, starts, target.at[stage], shared.tile_filled.at[stage])

    def convert_tile(index: Array, carry: tuple[list[Array], list[Array], Array]):
        here, starts, tiles = carry
        next_starts = locate(index + ahead + 1)  # these loads overlap with the conversion
        if converter == 0:
            fetch_rest(here, tiles)
        for nth, group in enumerate(own):
            place, piece = (converter, lax.rem(tiles, ahead) * len(own) + nth), tiles * shape.groups + group
            target = shape.place(tiles, group)
            plgpu.barrier_wait(shared.numbers_filled.at[*place])
            pl.when(piece >= _CONVERTED)(partial(plgpu.barrier_wait, shared.converted_freed.at[target]))
            convert(shared.numbers.at[*place], shared.converted.at[target])
            plgpu.commit_smem()  # by now all threads have read the quantised piece, so its place is free
            plgpu.barrier_arrive(shared.converted_filled.at[target])
        pl.when(index + ahead < segment.end)(partial(fetch_pieces, starts, tiles + ahead))
        return locate(index + 1), next_starts, tiles + 1

    if converter == 0:
        _copy_queries(shape, q, spans, shared, segment)
    for tile in range(ahead):

        @pl.when(segment.begin + tile < segment.end)
        def _(tile: int = tile) -> None:
            fetch_pieces(locate(segment.begin + tile), tiles + tile)

    carry = locate(segment.begin), locate(segment.begin + ahead), tiles
    return lax.fori_loop(segment.begin, segment.end, convert_tile, carry)[-1]


def _copy_queries(shape: QuantisedLatentShape, q, spans, shared: Shared, segment: Segment) -> None:
    pl.when(segment.nth > 0)(partial(plgpu.barrier_wait, shared.q_freed))
    memory.fetch_queries(shape.work, segment, 0, q[0], spans, shared.q[0], shared.spans, shared.q_filled)
    memory.fetch_query_numbers(shape.work, segment, 0, q[1], shared.q[1], shared.q_filled)


def _compute(shape: QuantisedLatentShape, o, lse, shared: Shared, segment: Segment, tiles: Array) -> Array:
    """Compute the tiles of a segment. Return the number of tiles used so far."""
    work, queries, groups = shape.work, shape.work.member_queries, range(shape.groups)
    plgpu.barrier_wait(shared.q_filled)

    def tile(masked: bool, index: Array, carry):
        accs, m, l, tiles = carry
        first_slot = index * work.tile
        s = _score(shape, shared, tiles)
        scales = [plgpu.layout_cast(shared.scales_by_group[group], FEW.reduce(0)) for group in groups]
        if masked:
            s = softmax.mask_unseen(s, shared.spans, first_slot, FEW)
            scales = [softmax.clear_unseen_scales(scale, segment, first_slot, FEW) for scale in scales]
            for group in groups:
                piece = shared.converted.at[shape.place(tiles, group)]
                softmax.clear_unseen(piece, segment, first_slot, shape=(work.tile, _GROUP))
        largest = reduce(jnp.maximum, scales)
        p, alpha, m, l = softmax.weigh(s, m, l, shape.scale, largest)
        inverse = 1 / jnp.where(largest > 0, largest, 1.0)
        for group, scale in zip(groups, scales, strict=True):
            shared.weights[group] = (p * repeat_along_columns(scale * inverse, queries)).astype(jnp.float16)
        alpha = spread_over_product(shared.per_query, alpha)  # this synchronises the weights, too
        accs = _add_values(shape, shared, tiles, [acc * repeat_along_columns(alpha, _GROUP) for acc in accs])
        return accs, m, l, tiles + 1

    zero = plgpu.layout_cast(jnp.zeros((_GROUP, queries), jnp.float32), PRODUCT)
    carry = ([zero for _ in groups], *softmax.start(queries, FEW), tiles)
    accs, m, l, tiles = loop_over_tiles(segment, tile, carry)
    plgpu.barrier_arrive(shared.q_freed)
    _store(shape, o, lse, shared, segment, accs, *softmax.finish(m, l))
    return tiles


def _score(shape: QuantisedLatentShape, shared: Shared, tiles: Array) -> Array:
    """Return the scores [queries, slots] of a tile, without the factor on the logits. Also transpose its scales."""
    size, stage, groups = (shape.work.tile, shape.work.member_queries), lax.rem(tiles, _STAGES), range(shape.groups)

    def multiply(accs):
        *of_groups, of_exact = accs
        for group, acc in zip(groups, of_groups, strict=True):
            piece = shape.place(tiles, group)
            plgpu.barrier_wait(shared.converted_filled.at[piece])
            q = shared.q[0].at[:, pl.ds(group * _GROUP, _GROUP)]
            plgpu.wgmma(acc, shared.converted.at[piece], q.transpose((1, 0)))
        plgpu.barrier_wait(shared.tile_filled.at[stage])
        plgpu.wgmma(of_exact, shared.exact.at[stage], shared.q[1].transpose((1, 0)))
        return [acc[...] for acc in accs]

    *products, s = pl.run_scoped(multiply, [memory.Accumulator(size, jnp.float32) for _ in range(shape.groups + 1)])
    scales = plgpu.layout_cast(shared.scales[stage], _SCALES)
    number = plgpu.broadcasted_iota(jnp.int32, scales.shape, 1, layout=_SCALES)
    plgpu.barrier_arrive(shared.tile_freed.at[stage])
    for group, product in zip(groups, products, strict=True):
        scale = plgpu.layout_cast(jnp.where(number == group, scales, 0.0).sum(axis=1), PRODUCT.reduce(1))
        shared.scales_by_group[group] = scale
        s = s + product * repeat_along_rows(scale, size[1])
    return transpose_scores(shared.scores, s)


def _add_values(shape: QuantisedLatentShape, shared: Shared, tiles: Array, accs: list[Any]) -> list[Any]:
    """Add the weighted values of each group [numbers, queries], and free their pieces, two groups at once."""
    for first in range(0, shape.groups, _CONVERTERS):
        groups = range(first, first + _CONVERTERS)

        def add(refs, groups: range = groups):
            for group, ref in zip(groups, refs, strict=True):
                values = shared.converted.at[shape.place(tiles, group)]
                plgpu.wgmma(ref, values.transpose((1, 0)), shared.weights.at[group].transpose((1, 0)))

        own = slice(first, first + _CONVERTERS)
        accs[own] = pl.run_state(add)([memory.Accumulator.init(acc) for acc in accs[own]])
        for group in groups:
            plgpu.barrier_arrive(shared.converted_freed.at[shape.place(tiles, group)])
    return accs


def _store(
    shape: QuantisedLatentShape, o, lse, shared: Shared, segment: Segment, accs, inverse: Array, log: Array
) -> None:
    """Copy the results of a segment to global memory, group by group."""
    queries = pl.ds(0, shape.work.member_queries)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    shared.lse[queries] = log
    inverse = spread_over_product(shared.per_query, inverse)
    plgpu.copy_smem_to_gmem(shared.lse.at[queries], lse.at[segment.part])
    for group, acc in enumerate(accs):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy of the previous group still reads the memory
        store_transposed(shared.o, acc * repeat_along_columns(inverse, _GROUP))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.o, o.at[segment.part, queries, pl.ds(group * _GROUP, _GROUP)])
