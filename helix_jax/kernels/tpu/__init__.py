"""The attention backend for TPUs, in Pallas' Mosaic. Pages are read in place, one block ahead of their use.

work    splits queries, heads and pages into tiles and blocks, and computes what each tile sees
tile    attends to a block of pages while the next one is fetched
"""

from functools import partial
from typing import Any, NoReturn

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import ManualAxisType
from jaxtyping import Float, Int

from helix_jax.attention import PageTable, Partial
from helix_jax.kernels import check_arrays
from helix_jax.kernels.tpu.tile import attend_to_tile
from helix_jax.kernels.tpu.work import Shape, make_shape, make_walk

_VMEM_BYTES = 2**24  # all that there is before v5
_TABLE = 2**17  # entries: half of the memory for scalars


# Traced and lowered once for all layers that call it alike.
@partial(jax.jit, static_argnames=("scale", "v_width"))
def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_AKWH: Float[Array, "A K W H"],
    v_AKWH: Float[Array, "A K W H"] | None,
    table_BM: Int[Array, "B M"] | PageTable,
    lo_BT: Int[Array, "B T"],
    hi_BT: Int[Array, "B T"],
    *,
    v_width: int | None = None,
    scale: float,
) -> Partial:
    """Attend like `helix_jax.attend`, with queries and weights rounded to the type of the pages.

    Slots below the least `lo` of a tile, and from its greatest `hi` on, may contain anything. The slots between must be
    finite.

    Raises:
        ValueError: The kernel cannot read the pages, keys and values have different shapes, the query heads are not a
            multiple of the key/value heads, or a derivative is taken.
    """
    check_arrays("tpu", q_BTNH, k_AKWH, v_AKWH, v_width)
    (B, T, N, H), (_, K, W, _) = q_BTNH.shape, k_AKWH.shape
    table, hi_BT = PageTable.of(table_BM, hi_BT, W)
    q_BKTGH = q_BTNH.astype(k_AKWH.dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4)
    run = partial(_attend, scale, H if v_AKWH is not None else v_width or H)
    o_BKQH, lse_BKQ = run(q_BKTGH.reshape(B, K, -1, H), k_AKWH, v_AKWH, table, lo_BT, hi_BT)
    o_BTKGH = o_BKQH.reshape(B, K, T, N // K, -1).transpose(0, 2, 1, 3, 4)
    lse_BTKG = lse_BKQ.reshape(B, K, T, N // K).transpose(0, 2, 1, 3)
    return Partial(o_BTKGH.reshape(B, T, N, -1), lse_BTKG.reshape(B, T, N))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(
    scale: float,
    v_width: int,
    q_BKQH: Array,
    k_AKWH: Array,
    v_AKWH: Array | None,
    table: PageTable,
    lo_BT: Array,
    hi_BT: Array,
) -> tuple[Array, Array]:
    """Return outputs [B, K, T G, Hv] and log-sum-exps [B, K, T G]. Q is new token and head of a group."""
    (B, K, Q, _), M = q_BKQH.shape, table.entries_BM.shape[1]
    if B > 1 and B * M > _TABLE:
        halves = (slice(B // 2), slice(B // 2, B))
        tables = [table._replace(entries_BM=table.entries_BM[b]) for b in halves]
        rows = [(q_BKQH[b], k_AKWH, v_AKWH, half, lo_BT[b], hi_BT[b]) for b, half in zip(halves, tables, strict=True)]
        o, lse = zip(*(_attend(scale, v_width, *arguments) for arguments in rows), strict=True)
        return jnp.concat(o), jnp.concat(lse)
    pools = (k_AKWH,) if v_AKWH is None else (k_AKWH, v_AKWH)
    shape = make_shape(K, Q, M, pools, v_width, scale)
    rest = -Q % (shape.tiles * shape.queries)
    q_BKQH = jnp.pad(q_BKQH, ((0, 0), (0, 0), (0, rest), (0, 0)))
    spans_BQ2 = jnp.repeat(jnp.stack([lo_BT, hi_BT], -1), Q // lo_BT.shape[1], axis=1)
    spans_BQ2 = jnp.pad(spans_BQ2, ((0, 0), (0, rest), (0, 0))).astype(jnp.int32)
    o_BKQH, lse_BKQ1 = _call(shape, q_BKQH, spans_BQ2, pools, table)
    return o_BKQH[:, :, :Q], lse_BKQ1[:, :, :Q, 0]


@_attend.defjvp
def _refuse_derivative(scale: float, v_width: int, primals: Any, tangents: Any) -> NoReturn:
    raise ValueError("kernel tpu has no derivative: choose kernel xla")


def _call(
    shape: Shape, q_BKQH: Array, spans_BQ2: Array, pools: tuple[Array, ...], table: PageTable
) -> tuple[Array, Array]:
    (B, K, Q, H), tiles, widths = q_BKQH.shape, shape.tiles, (shape.v_width, 1)
    walk, block = make_walk(shape, spans_BQ2), (shape.heads, shape.queries)
    # Else XLA copies a pool that fits into the vector memory whole, to have it near.
    pools = tuple(pltpu.with_memory_space_constraint(pool, pltpu.HBM) for pool in pools)
    entries_X = table.entries_BM.reshape(-1).astype(jnp.int32)
    arguments = entries_X, table.first_C, *walk, q_BKQH, spans_BQ2, *pools
    varying = ManualAxisType(varying=frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arguments)))

    def tile(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *block, width), lambda h, x, *_: (lax.div(x, tiles), h, lax.rem(x, tiles), 0))

    spans = pl.BlockSpec((1, shape.queries, 2), lambda h, x, *_: (lax.div(x, tiles), lax.rem(x, tiles), 0))
    return pl.pallas_call(
        partial(attend_to_tile, shape, len(pools)),
        out_shape=[jax.ShapeDtypeStruct((B, K, Q, width), jnp.float32, manual_axis_type=varying) for width in widths],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 + len(walk),
            grid=(K // shape.heads, B * tiles),
            in_specs=[tile(H), spans, *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in pools)],
            out_specs=[tile(width) for width in widths],
            scratch_shapes=[
                [pltpu.VMEM((2, shape.heads, shape.slots, H), pool.dtype) for pool in pools],
                *(pltpu.VMEM((*block, width), jnp.float32) for width in (1, 1, shape.v_width)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        name="attend",
    )(*arguments)
