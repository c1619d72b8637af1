"""The attention backend for Hopper GPUs, written in Pallas with Mosaic GPU. Grouped heads reach the memory bandwidth.

    make_schedule    distributes the key tiles that the rows see evenly over the processors
    compute_parts    attends with each processor to its share; each page of the cache is read once, in place
    merge_parts      merges the parts of a row and head into one partial

NOTES.md records the versions that were tried and their measurements.
"""

from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from helix_jax.attention import PageTable, Partial
from helix_jax.kernels import check_arrays
from helix_jax.kernels.mosaic_gpu import grouped as _grouped
from helix_jax.kernels.mosaic_gpu import latent as _latent
from helix_jax.kernels.mosaic_gpu import latent_quantised as _latent_quantised
from helix_jax.kernels.mosaic_gpu.grouped_shape import choose_shape
from helix_jax.kernels.mosaic_gpu.merging import merge_parts
from helix_jax.kernels.mosaic_gpu.operands import restore_order
from helix_jax.kernels.mosaic_gpu.work import make_schedule
from helix_jax.kernels.page_format import PageFormat
from helix_jax.quantisation import QuantisedPages

_HOPPER_PROCESSORS = 132  # the multiprocessors of an H100 or H200


# The jit makes all layers of one shape share a trace and a lowering, which take a second.
@partial(jax.jit, static_argnames=["scale", "v_width"])
def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_AKWH: Float[Array, "A K W H"] | QuantisedPages,
    v_AKWH: Float[Array, "A K W H"] | QuantisedPages | None,
    table_BM: Int[Array, "B M"] | PageTable,
    lo_BT: Int[Array, "B T"],
    hi_BT: Int[Array, "B T"],
    *,
    scale: float,
    v_width: int | None = None,
) -> Partial:
    """Attend over bfloat16 or quantised pages. Arguments and result are those of `helix_jax.attend`.

    Queries and weights are rounded to bfloat16. Slots below the least `lo` of a row, and from its
    greatest `hi` on, may contain anything; the slots between must be finite. A repeated call gives the same bits. The
    result of a row may differ in its last bits from batch to batch, because its tiles are split at other places.

    Raises:
        ValueError: The kernel cannot read the pages, keys and values have different shapes, the query heads are not a
            multiple of the key/value heads, or a derivative is taken.
    """
    latent = v_AKWH is None
    check_arrays("mosaic_gpu", q_BTNH, k_AKWH, v_AKWH, v_width)
    (B, T, N, H), K = q_BTNH.shape, k_AKWH.shape[1]
    table, hi_BT = PageTable.of(table_BM, hi_BT, k_AKWH.shape[2])
    q_BKTGH = q_BTNH.astype(jnp.bfloat16).reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4)
    run = partial(_attend, scale, v_width if latent else None)
    o_BKQH, lse_BKQ = run(q_BKTGH.reshape(B * K, -1, H), k_AKWH, v_AKWH, table, lo_BT, hi_BT)
    o_BTKGH = o_BKQH.reshape(B, K, T, N // K, -1).transpose(0, 2, 1, 3, 4)
    lse_BTKG = lse_BKQ.reshape(B, K, T, N // K).transpose(0, 2, 1, 3)
    return Partial(o_BTKGH.reshape(B, T, N, -1), lse_BTKG.reshape(B, T, N))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(
    scale: float,
    v_width: int | None,
    q_XQH: Array,
    k_AKWH: Array | QuantisedPages,
    v_AKWH: Array | QuantisedPages | None,
    table: PageTable,
    lo_BT: Array,
    hi_BT: Array,
) -> tuple[Array, Array]:
    """Return outputs [B, K, T G, Hv] and log-sum-exps [B, K, T G].

    X counts pairs of row and key/value head, and Q counts pairs of new token and query head of a group.
    """
    (_, K, W, H), (B, _), (_, Q, _) = k_AKWH.shape, lo_BT.shape, q_XQH.shape
    q_XQH = _pad_queries(q_XQH)
    if v_AKWH is None:
        if isinstance(k_AKWH, QuantisedPages):
            latent = _latent_quantised.choose_shape(B, Q, k_AKWH, count_processors(), scale)
            work, schedule = latent.work, make_schedule(latent.work, lo_BT, hi_BT)
            parts = _latent_quantised.compute_parts(latent, q_XQH, k_AKWH, table, schedule)
        else:
            latent = _latent.choose_shape(B, Q, H, v_width or H, W, count_processors(), scale)
            work, schedule = latent.work, make_schedule(latent.work, lo_BT, hi_BT)
            parts = _latent.compute_parts(latent, q_XQH, k_AKWH.reshape(-1, H), table, schedule)
    else:
        grouped = choose_shape(B, Q, K, PageFormat(H, W, k_AKWH.dtype), count_processors(), scale)
        work, schedule = grouped.work, make_schedule(grouped.work, lo_BT, hi_BT)
        parts = _grouped.compute_parts(grouped, q_XQH, k_AKWH, v_AKWH, table, schedule)
    o_BKQH, lse_BKQ = merge_parts(work, *parts, schedule)
    if v_AKWH is None and isinstance(k_AKWH, QuantisedPages):
        o_BKQH = restore_order(o_BKQH)
    return o_BKQH, lse_BKQ


@_attend.defjvp
def _refuse_derivative(scale: float, v_width: int | None, primals: Any, tangents: Any) -> NoReturn:
    raise ValueError("kernel mosaic_gpu has no derivative: choose kernel xla")


def count_processors() -> int:
    """Count the multiprocessors of a GPU. On other platforms, return those of an H200, so that kernels lower for it."""
    devices = jax.devices()
    return devices[0].core_count if devices[0].platform == "gpu" else _HOPPER_PROCESSORS


def _pad_queries(q_XQH: Array) -> Array:
    """Pad more than eight queries to a multiple of eight, because they are copied in tiles of eight."""
    queries = q_XQH.shape[1]
    return q_XQH if queries <= 8 else jnp.pad(q_XQH, ((0, 0), (0, -queries % 8), (0, 0)))
