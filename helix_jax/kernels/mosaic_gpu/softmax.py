"""What both attention kernels do to a tile of scores: mask, exponentials, running maximum and sum."""

import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.kernels.mosaic_gpu.work import ROWS

TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
_LOG2E = math.log2(math.e)


def across(row: Array, columns: int) -> Array:
    """One number per query, repeated along its row."""
    return lax.broadcast_in_dim(row, (ROWS, columns), [0])


def hidden(s: Array, spans_staged: Any, first_slot: Array) -> Array:
    """Scores of slots that a query does not see become -inf, be they NaN."""
    lo, hi = (plgpu.layout_cast(spans_staged[i], ROW) for i in range(2))
    slot = first_slot + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=TILE)
    return jnp.where((across(lo, s.shape[1]) <= slot) & (slot < across(hi, s.shape[1])), s, -jnp.inf)


def weights(s: Array, m: Array, scale: float) -> tuple[Array, Array, Array]:
    """exp(scale s - max), what earlier weights are worth under the new maximum, and that maximum (base 2)."""
    m_new = jnp.maximum(m, s.max(axis=1) * (scale * _LOG2E))
    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    return jnp.exp2(s * (scale * _LOG2E) - across(shift, s.shape[1])), jnp.exp2(m - shift), m_new


def start() -> tuple[Array, Array]:
    """Maximum and sum over nothing."""
    return tuple(plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW) for value in (-jnp.inf, 0.0))


def finish(m: Array, l: Array) -> tuple[Array, Array]:
    """1 / sum and the log-sum-exp (base e); 0 and -inf where nothing was seen."""
    some = l > 0
    l = jnp.where(some, l, 1.0)
    return jnp.where(some, 1 / l, 0.0), jnp.where(some, m / _LOG2E + jnp.log(l), -jnp.inf)


def clear_unseen(tile_ref: Any, first_slot: Array, lo: Array, hi: Array) -> None:
    """Values of slots that no query sees become 0: a weight of 0 times NaN would be NaN."""
    values = tile_ref[...]
    slot = first_slot + plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=TILE)
    tile_ref[...] = jnp.where((lo <= slot) & (slot < hi), values, jnp.zeros_like(values))
