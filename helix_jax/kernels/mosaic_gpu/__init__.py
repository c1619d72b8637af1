"""The attention backend for Hopper GPUs, written in Pallas with Mosaic GPU. Grouped heads reach the memory bandwidth.

    make_schedule    distributes the key tiles that the rows see evenly over the processors
    compute_parts    attends with each processor to its share; each page of the cache is read once, in place
    merge_parts      merges the parts of a row and head into one partial

NOTES.md records the versions that were tried and their measurements.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from helix_jax.attention import PageTable, Partial
from helix_jax.kernels import check_arrays
from helix_jax.kernels.mosaic_gpu import grouped, grouped_quantised, grouped_shape, latent, latent_quantised
from helix_jax.kernels.mosaic_gpu.merging import merge_parts
from helix_jax.kernels.mosaic_gpu.operands import restore_order
from helix_jax.kernels.mosaic_gpu.work import Work, make_schedule
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
    check_arrays("mosaic_gpu", q_BTNH, k_AKWH, v_AKWH, v_width)
    (B, T, N, H), K = q_BTNH.shape, k_AKWH.shape[1]
    table, hi_BT = PageTable.of(table_BM, hi_BT, k_AKWH.shape[2])
    q_BKTGH = q_BTNH.astype(jnp.bfloat16).reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4)
    run = partial(_attend, scale, v_width if v_AKWH is None else None)
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
    kernel = _choose_kernel(scale, v_width, lo_BT.shape[0], q_XQH.shape[1], k_AKWH, v_AKWH)
    schedule = make_schedule(kernel.work, lo_BT, hi_BT)
    pages = [k_AKWH] if v_AKWH is None else [k_AKWH, v_AKWH]
    parts = kernel.compute_parts(_pad_queries(q_XQH), *pages, table, schedule)
    o_BKQH, lse_BKQ = merge_parts(kernel.work, *parts, schedule)
    return restore_order(o_BKQH) if kernel.reorders else o_BKQH, lse_BKQ


class _Kernel(NamedTuple):
    """A kernel for some shapes of pages and queries.

    Attributes:
        work: The static shape of its work.
        compute_parts: Computes the parts of the work, from queries, pages, their table and the schedule.
        reorders: Whether the numbers of its outputs are in the order that `operands.restore_order` expects.
    """

    work: Work
    compute_parts: Callable[..., tuple[Array, Array]]
    reorders: bool = False


def _choose_kernel(
    scale: float,
    v_width: int | None,
    rows: int,
    queries: int,
    k_AKWH: Array | QuantisedPages,
    v_AKWH: Array | QuantisedPages | None,
) -> _Kernel:
    """Choose the kernel and its shape for `queries` queries of a row and key/value head."""
    (_, K, W, H), processors = k_AKWH.shape, count_processors()
    if v_AKWH is None and isinstance(k_AKWH, QuantisedPages):
        shape = latent_quantised.choose_shape(rows, queries, k_AKWH, processors, scale)
        return _Kernel(shape.work, partial(latent_quantised.compute_parts, shape), reorders=True)
    if v_AKWH is None:
        shape = latent.choose_shape(rows, queries, H, v_width or H, W, processors, scale)
        return _Kernel(shape.work, partial(latent.compute_parts, shape))
    if isinstance(k_AKWH, QuantisedPages) and grouped_quantised.supports(H, queries):
        shape = grouped_quantised.choose_shape(rows, queries, K, W, processors, scale)
        return _Kernel(shape.work, partial(grouped_quantised.compute_parts, shape), reorders=True)
    shape = grouped_shape.choose_shape(rows, queries, K, PageFormat(H, W, k_AKWH.dtype), processors, scale)
    return _Kernel(shape.work, partial(grouped.compute_parts, shape))


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
