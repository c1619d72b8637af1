"""Multiplies numbers of a tile as left operands in registers: quantised ones, which are converted, and exact ones."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array

from helix_jax.kernels.mosaic_gpu import instructions, memory
from helix_jax.kernels.mosaic_gpu.conversion import clip_to_float16
from helix_jax.kernels.mosaic_gpu.few import PRODUCT
from helix_jax.kernels.mosaic_gpu.instructions import EXACT_NUMBERS, NUMBERS, OPERANDS
from helix_jax.kernels.mosaic_gpu.softmax import repeat_along_rows
from helix_jax.kernels.mosaic_gpu.work import ROWS, Segment


def split_queries(q_XQH: Array) -> Array:
    """Arrange queries as right operands [X, operands, queries, 64] for operands that have slots as rows."""
    X, Q, _ = q_XQH.shape
    pairs = q_XQH.reshape(X, Q, -1, NUMBERS // 4, OPERANDS, 2).transpose(0, 2, 4, 1, 3, 5)
    return clip_to_float16(pairs.reshape(X, -1, Q, ROWS))


def split_exact_queries(q_XQH: Array) -> Array:
    """Arrange queries as right operands [X, operands, queries, 16] for numbers that are not quantised."""
    X, Q, _ = q_XQH.shape
    return q_XQH.reshape(X, Q, -1, EXACT_NUMBERS).swapaxes(1, 2)


def restore_order(o: Array) -> Array:
    """Return results whose numbers are in the order of transposed operands with their numbers in the usual order."""
    return o.reshape(*o.shape[:-1], -1, OPERANDS, ROWS).swapaxes(-2, -1).reshape(o.shape)


def load_values(tile: Any, group: Array | int = 0, *, few_registers: bool = False) -> list[Array]:
    """Load 128 numbers of a tile [64 slots, groups of 128] as two operands [64 numbers, 64 slots].

    Args:
        tile: The tile.
        group: Which 128 numbers of each slot.
        few_registers: As in `instructions.load_numbers`.
    """
    return instructions.load_numbers(tile, group, transposed=True, few_registers=few_registers)


def make_zeros(queries: int) -> Array:
    """Return zeros [64, queries], to which products are added."""
    return plgpu.layout_cast(jnp.zeros((ROWS, queries), jnp.float32), PRODUCT)


def multiply_slots(tile: Any, queries: Any, group: Array | int = 0, *, few_registers: bool = False) -> Array:
    """Return the products [64 slots, queries] of 128 numbers of a tile and queries.

    Args:
        tile: The tile [64 slots, groups of 128].
        queries: Right operands [operands, queries, 64] of `split_queries`, in shared memory.
        group: Which 128 numbers of the slots and of the queries.
        few_registers: Whether to save registers: addresses are computed from one another, and each product is awaited
            before the next one.
    """

    def multiply(refs) -> None:
        operands = instructions.load_numbers(tile, group, transposed=False, few_registers=few_registers)
        for i, operand in enumerate(operands):
            _add_product(refs[0], operand, queries.at[OPERANDS * group + i], few_registers)

    products: Any = pl.run_state(multiply)([memory.Accumulator.init(make_zeros(queries.shape[-2]))])
    return products[0]


def add_exact(products: Array, scales: Array, tile: Any, queries: Any, group: Array) -> Array:
    """Return products [64 slots, queries] times the scale of each slot, plus those of 16 exact numbers.

    Args:
        products: The products of quantised numbers.
        scales: The scales of the slots.
        tile: The exact numbers [64 slots, 64].
        queries: Right operands [operands, queries, 16] of `split_exact_queries`, in shared memory.
        group: Which 16 numbers of the slots and of the queries.
    """

    def add(refs) -> None:
        plgpu.wgmma(refs[0], instructions.load_exact(tile, group), queries.at[group].transpose((1, 0)))

    products = products * repeat_along_rows(scales, products.shape[1])
    scores: Any = pl.run_state(add)([memory.Accumulator.init(products)])
    return scores[0]


def add_weighted(sums: list[Array], values: list[Array], weights: Any, *, few_registers: bool = False) -> list[Any]:
    """Add the weighted values [64 numbers, queries] of a tile to sums, one for each operand.

    Args:
        sums: The sums.
        values: The operands of `load_values`.
        weights: The weights [queries, 64 slots], in shared memory.
        few_registers: Whether to await each product before the next one, which saves registers.
    """

    def add(refs) -> None:
        for ref, operand in zip(refs, values, strict=True):
            _add_product(ref, operand, weights, few_registers)

    return pl.run_state(add)([memory.Accumulator.init(x) for x in sums])


def clear_unseen(tile: Any, segment: Segment, index: Array, group: Array | int = 0) -> None:
    """Set 128 numbers of slots that no query sees to 0, because a weight of 0 times NaN is NaN."""

    @pl.when(segment.needs_mask(index))
    def _() -> None:
        instructions.clear(tile, group, segment.lo - index * ROWS, segment.hi - index * ROWS)
        plgpu.commit_smem()


def _add_product(accumulator: Any, left: Array, right: Any, few_registers: bool) -> None:
    plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
    if few_registers:
        plgpu.wgmma_wait(0)  # the registers of this operand are needed for the next one
