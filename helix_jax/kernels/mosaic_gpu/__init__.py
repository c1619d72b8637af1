"""The attention backend for Hopper GPUs, in Pallas' Mosaic GPU. Grouped heads run at the speed of the memory.

    schedule    distributes the key tiles that the rows see evenly over the processors
    parts       each processor attends to its share, and reads each page of the cache once, in place
    merged      the parts of a row and head are merged into one partial

NOTES.md records what was tried, and what was measured.
"""

from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from helix_jax.attention import Partial
from helix_jax.kernels import check_arrays
from helix_jax.kernels.mosaic_gpu import grouped as _grouped
from helix_jax.kernels.mosaic_gpu import latent as _latent
from helix_jax.kernels.mosaic_gpu.merging import merged
from helix_jax.kernels.mosaic_gpu.work import schedule

_PROCESSORS = 132  # of an H100 or H200


# Traced and lowered once for all layers with the same shapes: each time takes a second.
@partial(jax.jit, static_argnames=["scale", "v_width"])
def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_AKWH: Float[Array, "A K W H"],
    v_AKWH: Float[Array, "A K W H"] | None,
    table_BM: Int[Array, "B M"],
    lo_BT: Int[Array, "B T"],
    hi_BT: Int[Array, "B T"],
    *,
    scale: float,
    v_width: int | None = None,
) -> Partial:
    """Attend like `helix_jax.attend`, over bfloat16 pages. Queries and weights are rounded to bfloat16 too.

    Slots below the least `lo` of a row, and from its greatest `hi` on, may contain anything. The slots between must be
    finite. The same batch gives the same bits every time. In another batch, the tiles of a row are split differently.

    Raises:
        ValueError: The kernel cannot read the pages, keys and values have different shapes, the query heads are not a
            multiple of the key/value heads, or a derivative is taken.
    """
    latent = v_AKWH is None
    check_arrays("mosaic_gpu", q_BTNH, k_AKWH, v_AKWH, v_width)
    (B, T, N, H), K = q_BTNH.shape, k_AKWH.shape[1]
    hi_BT = jnp.minimum(hi_BT, table_BM.shape[1] * k_AKWH.shape[2])
    q_BKTGH = q_BTNH.astype(k_AKWH.dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4)
    run = partial(_attend, scale, v_width if latent else None)
    o_BKQH, lse_BKQ = run(q_BKTGH.reshape(B * K, -1, H), k_AKWH, v_AKWH, table_BM, lo_BT, hi_BT)
    o_BTKGH = o_BKQH.reshape(B, K, T, N // K, -1).transpose(0, 2, 1, 3, 4)
    lse_BTKG = lse_BKQ.reshape(B, K, T, N // K).transpose(0, 2, 1, 3)
    return Partial(o_BTKGH.reshape(B, T, N, -1), lse_BTKG.reshape(B, T, N))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(
    scale: float,
    v_width: int | None,
    q_XQH: Array,
    k_AKWH: Array,
    v_AKWH: Array | None,
    table_BM: Array,
    lo_BT: Array,
    hi_BT: Array,
) -> tuple[Array, Array]:
    """Return outputs [B, K, T G, Hv] and log-sum-exps [B, K, T G]. X is row and head, Q token and head of a group."""
    (_, K, W, H), (B, _), (_, Q, _) = k_AKWH.shape, lo_BT.shape, q_XQH.shape
    q_XQH, k_XH = _whole_tiles(q_XQH), k_AKWH.reshape(-1, H)
    if v_AKWH is None:
        latent = _latent.latent(B, Q, H, v_width or H, W, processors(), scale)
        work, plan = latent.work, schedule(latent.work, lo_BT, hi_BT)
        parts = _latent.parts(latent, q_XQH, k_XH, table_BM, plan)
    else:
        grouped = _grouped.grouped(B, Q, K, H, W, processors(), scale)
        work, plan = grouped.work, schedule(grouped.work, lo_BT, hi_BT)
        parts = _grouped.parts(grouped, q_XQH, k_XH, v_AKWH.reshape(-1, H), table_BM, plan)
    return merged(work, *parts, plan)


@_attend.defjvp
def _refuse_derivative(scale: float, v_width: int | None, primals: Any, tangents: Any) -> NoReturn:
    raise ValueError("kernel mosaic_gpu has no derivative: choose kernel xla")


def processors() -> int:
    """Return the number of multiprocessors of the GPUs. Without GPUs, that of an H200, to lower kernels for it."""
    devices = jax.devices()
    return devices[0].core_count if devices[0].platform == "gpu" else _PROCESSORS


def _whole_tiles(q_XQH: Array) -> Array:
    """Pad the queries to a multiple of eight, the number that is copied at a time, unless there are fewer."""
    queries = q_XQH.shape[1]
    return q_XQH if queries <= 8 else jnp.pad(q_XQH, ((0, 0), (0, -queries % 8), (0, 0)))
