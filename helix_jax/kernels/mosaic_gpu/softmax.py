"""The softmax of a tile of scores in both attention kernels: mask, exponentials, running maximum and sum."""

import math
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.kernels.mosaic_gpu.work import ROWS, Segment

TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
_LOG2E = math.log2(math.e)
_PIECE = 64  # rows and columns of what a warpgroup changes at once


def across(row: Array, columns: int) -> Array:
    """Repeat one number per query along its row."""
    return lax.broadcast_in_dim(row, (ROWS, columns), [0])


def hidden(s: Array, spans_staged: Any, first_slot: Array) -> Array:
    """Set the scores of slots that a query does not see to -inf, also where they are NaN."""
    lo, hi = (plgpu.layout_cast(spans_staged[i], ROW) for i in range(2))
    slot = first_slot + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=TILE)
    return jnp.where((across(lo, s.shape[1]) <= slot) & (slot < across(hi, s.shape[1])), s, -jnp.inf)


def weights(s: Array, m: Array, scale: float) -> tuple[Array, Array, Array]:
    """Return exp(scale s - max), the factor on earlier weights under the new maximum, and that maximum (base 2)."""
    m_new = jnp.maximum(m, s.max(axis=1) * (scale * _LOG2E))
    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    return jnp.exp2(s * (scale * _LOG2E) - across(shift, s.shape[1])), jnp.exp2(m - shift), m_new


def start() -> tuple[Array, Array]:
    """Return the maximum and the sum over nothing."""
    return tuple(plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW) for value in (-jnp.inf, 0.0))


def finish(m: Array, l: Array) -> tuple[Array, Array]:
    """Return 1 / sum and the log-sum-exp (base e), or 0 and -inf where nothing was seen."""
    some = l > 0
    l = jnp.where(some, l, 1.0)
    return jnp.where(some, 1 / l, 0.0), jnp.where(some, m / _LOG2E + jnp.log(l), -jnp.inf)


def clear_unseen(
    values: Any, segment: Segment, first_slot: Array, *, shape: tuple[int, int], sharers: int = 1, me: int = 0
) -> None:
    """Set values [slots, columns] that no query sees to 0, because a weight of 0 times NaN is NaN.

    Args:
        values: The tile in shared memory.
        segment: The segment that it belongs to.
        first_slot: Its first slot.
        shape: Its shape.
        sharers: Warpgroups that share this work. The caller makes them wait for each other.
        me: The index of this warpgroup among them.
    """
    corners = [(row, column) for row in range(0, shape[0], _PIECE) for column in range(0, shape[1], _PIECE)]
    for row, column in corners[me::sharers]:
        piece = values.at[pl.ds(row, _PIECE), pl.ds(column, _PIECE)]
        slot = first_slot + row + plgpu.broadcasted_iota(jnp.int32, (_PIECE, _PIECE), 0, layout=TILE)
        value = piece[...]
        piece[...] = jnp.where((segment.lo <= slot) & (slot < segment.hi), value, jnp.zeros_like(value))
    plgpu.commit_smem()
