"""Computes the tiles of a segment for few queries of grouped heads, which are the columns of the matrix products."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.kernels.mosaic_gpu import memory, softmax
from helix_jax.kernels.mosaic_gpu.few import FEW, PRODUCT, spread_over_product, store_transposed, transpose_scores
from helix_jax.kernels.mosaic_gpu.grouped_shape import GroupedShape, Shared
from helix_jax.kernels.mosaic_gpu.softmax import repeat_along_columns
from helix_jax.kernels.mosaic_gpu.work import Segment, loop_over_tiles


def compute(
    shape: GroupedShape, stream: Array, arrays: memory.Arrays, shared: Shared, segment: Segment, ring_step: Array
) -> Array:
    """Compute the tiles of a segment. A stream has one computing warpgroup. Return the number of tiles used so far."""
    work, few, q_turn = shape.work, shared.few, lax.rem(segment.nth, shape.q_stages)
    queries = work.member_queries
    assert few is not None
    plgpu.barrier_wait(shared.q_filled.at[stream, q_turn])

    def tile(masked: Array, index: Array, carry):
        acc, m, l, ring_step = carry
        first_slot = index * work.tile
        s = _score(shape, stream, shared, q_turn, ring_step)
        s = softmax.mask_unseen(masked, s, shared.spans.at[stream, q_turn], first_slot, FEW)
        stage = lax.rem(ring_step + 1, shape.stages)
        plgpu.barrier_wait(shared.filled.at[stream, stage])

        @pl.when(masked)
        def _() -> None:
            softmax.clear_unseen(shared.tile(stream, stage), segment, first_slot, shape=(work.tile, shape.width))

        value_scales = None
        if shape.quantised:
            scales = shared.scales(stream, lax.rem(ring_step + 1, shape.scale_stages), FEW)
            scales = softmax.clear_unseen_scales(masked, scales, segment, first_slot, FEW.reduce(0))
            value_scales = softmax.ValueScales.of(scales)
        p, alpha, m, l = softmax.weigh(s, m, l, shape.scale, value_scales)
        few.weights[stream] = p.astype(shape.product_dtype)
        alpha = spread_over_product(few.per_query.at[stream], alpha)  # this synchronises the weights, too
        acc = acc * repeat_along_columns(alpha, shape.width)

        def add_values(ref):
            values = shared.tile(stream, stage)  # Mosaic does not accept it from outside of this function
            plgpu.wgmma(ref, values.transpose((1, 0)), few.weights.at[stream].transpose((1, 0)))

        acc = pl.run_state(add_values)(memory.Accumulator.init(acc))
        plgpu.barrier_arrive(shared.freed.at[stream, stage])
        return acc, m, l, ring_step + 2

    zero = plgpu.layout_cast(jnp.zeros((shape.width, queries), jnp.float32), PRODUCT)
    carry = (zero, *softmax.start(queries, FEW), ring_step)
    acc, m, l, ring_step = loop_over_tiles(segment, tile, carry)
    plgpu.barrier_arrive(shared.q_freed.at[stream, q_turn])
    _store(shape, stream, arrays, shared, segment, acc, *softmax.finish(m, l))
    return ring_step


def _score(shape: GroupedShape, stream: Array, shared: Shared, q_turn: Array, ring_step: Array) -> Array:
    """Return the scores [queries, slots] of a tile of keys, without the factor on the logits."""
    few, size, stage = shared.few, (shape.work.tile, shape.work.member_queries), lax.rem(ring_step, shape.stages)
    assert few is not None
    plgpu.barrier_wait(shared.filled.at[stream, stage])

    def multiply(acc):
        plgpu.wgmma(acc, shared.tile(stream, stage), shared.q.at[stream, q_turn].transpose((1, 0)))
        return acc[...]

    s = pl.run_scoped(multiply, memory.Accumulator(size, jnp.float32))
    plgpu.barrier_arrive(shared.freed.at[stream, stage])
    s = transpose_scores(few.scores.at[stream], s)
    if not shape.quantised:
        return s
    scales = shared.scales(stream, lax.rem(ring_step, shape.scale_stages), FEW)
    return s * repeat_along_columns(scales, s.shape[0])


def _store(
    shape: GroupedShape,
    stream: Array,
    arrays: memory.Arrays,
    shared: Shared,
    segment: Segment,
    acc: Any,
    inverse: Array,
    log: Array,
) -> None:
    """Copy the results of a segment to global memory."""
    few, queries = shared.few, pl.ds(0, shape.work.member_queries)
    assert few is not None
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # earlier copies still read the staging memory
    inverse = spread_over_product(few.per_query.at[stream], inverse)
    store_transposed(shared.o.at[stream], acc * repeat_along_columns(inverse, shape.width))
    shared.lse[stream, queries] = log
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.o.at[stream], arrays.o.at[segment.part, queries])
    plgpu.copy_smem_to_gmem(shared.lse.at[stream, queries], arrays.lse.at[segment.part])
