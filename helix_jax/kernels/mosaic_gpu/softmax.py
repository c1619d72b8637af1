"""The softmax over tiles of scores in all attention kernels: mask, exponentials, running maximum and sum.

Scores are [queries, slots]. `layout` is that of the registers that hold them, in which a row lies within one warp, so
that its maximum needs no shared memory.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.kernels.mosaic_gpu.work import ROWS, Segment

TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)

_LOG2E = math.log2(math.e)
_PIECE = 64  # a warpgroup changes 64 rows and 64 columns at once
_LEAST_SCALE = 1e-18  # its logarithm is finite, and numbers of this size do not matter beside others


class ValueScales(NamedTuple):
    """The scale of the value in each slot of a tile.

    Attributes:
        log: Its logarithm (base 2).
        inverse: 1 / scale, computed from the logarithm, so that the errors of both cancel.
    """

    log: Array
    inverse: Array

    @classmethod
    def of(cls, scales: Array) -> "ValueScales":
        """Return these for scales. Those of values that do not matter beside others are larger than given."""
        log = jnp.log(jnp.maximum(scales, _LEAST_SCALE)) * _LOG2E
        return cls(log, jnp.exp2(-log))


def repeat_along_rows(per_query: Array, columns: int) -> Array:
    """Repeat the number of each query along its row."""
    return lax.broadcast_in_dim(per_query, (per_query.shape[0], columns), [0])


def repeat_along_columns(per_slot: Array, rows: int) -> Array:
    """Repeat the number of each slot along its column."""
    return lax.broadcast_in_dim(per_slot, (rows, per_slot.shape[0]), [1])


def mask_unseen(masked: bool | Array, s: Array, spans_staged: Any, first_slot: Array, layout: Any = TILE) -> Array:
    """Return the scores with -inf, also in place of NaN, for slots that a query does not see, if the tile has any."""

    def mask(s: Array) -> Array:
        lo, hi = (plgpu.layout_cast(spans_staged[i, pl.ds(0, s.shape[0])], layout.reduce(1)) for i in range(2))
        slot = first_slot + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=layout)
        seen = (repeat_along_rows(lo, s.shape[1]) <= slot) & (slot < repeat_along_rows(hi, s.shape[1]))
        return jnp.where(seen, s, -jnp.inf)

    return _change_if(masked, mask, s)


def weigh(
    s: Array, m: Array, l: Array, scale: float, value_scales: ValueScales | None = None
) -> tuple[Array, Array, Array, Array]:
    """Compute the weights of a tile of scores.

    Args:
        s: The scores.
        m: The running maximum (base 2) of each query.
        l: The running sum of its weights, or the sum for each slot of a tile, as `start` returned it.
        scale: The factor on the logits.
        value_scales: The scales of the values, which the weights are to contain. None: there are none.

    Returns:
        The weights relative to the new maximum, the factor on earlier weights, the new maximum and the new sum.
    """
    if value_scales is None:
        p, alpha, m = _compute_weights(s, m, scale)
        return p, alpha, m, _add_to_sums(l, alpha, p)
    # With the scales in it, the maximum is that of the products, so that none exceeds 1.
    s = s * (scale * _LOG2E) + repeat_along_columns(value_scales.log, s.shape[0])
    p, alpha, m = _compute_weights(s, m, 1 / _LOG2E)
    unscaled = p * repeat_along_columns(value_scales.inverse, s.shape[0])
    return p, alpha, m, _add_to_sums(l, alpha, unscaled)


def _add_to_sums(l: Array, alpha: Array, weights: Array) -> Array:
    if l.ndim == 1:
        return l * alpha + weights.sum(axis=1)
    return l * repeat_along_rows(alpha, l.shape[1]) + weights


def _compute_weights(s: Array, m: Array, scale: float) -> tuple[Array, Array, Array]:
    """Return exp(scale s - maximum), the factor on earlier weights, and the new running maximum (base 2)."""
    m_new = jnp.maximum(m, s.max(axis=1) * (scale * _LOG2E))
    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    return jnp.exp2(s * (scale * _LOG2E) - repeat_along_rows(shift, s.shape[1])), jnp.exp2(m - shift), m_new


def start(queries: int = ROWS, layout: Any = TILE, slots: int | None = None) -> tuple[Array, Array]:
    """Return the running maximum and sum before the first tile.

    If the slots of a tile are given, there is a sum for each of them, so that threads add theirs only at the end.
    """
    per_query = layout.reduce(1)
    shape, sum_layout = ((queries,), per_query) if slots is None else ((queries, slots), layout)
    m, l = jnp.full((queries,), -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
    return plgpu.layout_cast(m, per_query), plgpu.layout_cast(l, sum_layout)


def finish(m: Array, l: Array) -> tuple[Array, Array]:
    """Return 1 / sum and the log-sum-exp (base e), or 0 and -inf for a query that sees nothing."""
    l = l if l.ndim == 1 else l.sum(axis=1)
    seen = l > 0
    l = jnp.where(seen, l, 1.0)
    return jnp.where(seen, 1 / l, 0.0), jnp.where(seen, m / _LOG2E + jnp.log(l), -jnp.inf)


def clear_unseen_scales(masked: bool | Array, scales: Array, segment: Segment, first_slot: Array, layout: Any) -> Array:
    """Return the scales of a tile, with 0 for values that no query sees, because a weight of 0 times NaN is NaN."""

    def clear(scales: Array) -> Array:
        slot = first_slot + plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=layout)
        return jnp.where((segment.lo <= slot) & (slot < segment.hi), scales, jnp.zeros_like(scales))

    return _change_if(masked, clear, scales)


def _change_if(condition: bool | Array, change: Callable[[Array], Array], x: Array) -> Array:
    if isinstance(condition, bool):
        return change(x) if condition else x
    return lax.cond(condition, change, lambda x: x, x)


def clear_unseen(
    values: Any, segment: Segment, first_slot: Array, *, shape: tuple[int, int], sharers: int = 1, me: Array | int = 0
) -> None:
    """Set values that no query sees to 0, because a weight of 0 times NaN is NaN.

    Args:
        values: The tile [slots, columns] in shared memory.
        segment: The segment that the tile belongs to.
        first_slot: The first slot of the tile.
        shape: The shape of the tile.
        sharers: The number of warpgroups that share this work. The caller synchronises them afterwards.
        me: The index of this warpgroup among them. Their number divides that of the pieces of 64 by 64.
    """
    rows, columns = (size // _PIECE for size in shape)
    for first in range(0, rows * columns, sharers):
        row, column = (x * _PIECE for x in divmod(first + me, columns))
        piece = values.at[pl.ds(row, _PIECE), pl.ds(column, _PIECE)]
        slot = first_slot + row + plgpu.broadcasted_iota(jnp.int32, (_PIECE, _PIECE), 0, layout=TILE)
        value = piece[...]
        piece[...] = jnp.where((segment.lo <= slot) & (slot < segment.hi), value, jnp.zeros_like(value))
    plgpu.commit_smem()
