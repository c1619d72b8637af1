"""Decoding attention over the sharded cache: append, attend and combine, on each device, under `shard_map`.

This is all manual parallelism of decoding attention. Experts (models/moe.py) and ring attention for training
(training/ring.py) have a `shard_map` of their own. Everything else is ordinary JAX over sharded arrays.
"""

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from helix_jax.attention import PageTable, Partial, merge_sink
from helix_jax.cache import (
    AttentionOptions,
    KVCache,
    Rows,
    append,
    are_valid,
    check_attention,
    copy_pages,
    lack_pages,
    pad_width,
)
from helix_jax.combine import combine
from helix_jax.kernels import backend_attend
from helix_jax.kernels.page_format import PageFormat
from helix_jax.mesh import (
    ATTENTION_OUT_BTNH,
    COPIES_Z2X,
    CP,
    NEW_KEYS_BTKH,
    NEW_LATENT_BTKH,
    POOL_LATENT_XKWH,
    POOL_XKWH,
    QUERIES_BTNH,
    REPLICATED,
    ROWS_B,
    SINK_N,
    TABLE_RBM,
)
from helix_jax.plan import Plan


@no_type_check  # by beartype in tests: check_attention has messages for users, and is always there
def helix_attention(
    plan: Plan,
    cache: KVCache,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"] | None,
    rows: Rows,
    count_B: Int[Array, "B"],
    *,
    layer: Int[Array, ""] | int = 0,
    group: int = 0,
    scale: float,
    window: int | None = None,
    sink_N: Float[Array, "P"] | None = None,
    v_width: int | None = None,
) -> tuple[Float[Array, "B T P Hv"], KVCache]:
    """Append new tokens to the cache, and compute causal attention of these tokens over the cache of their rows.

    The result is exact: meshes, placements and combines differ only by rounding. `cache` is updated in place if
    donated. The caller adds `count_B` to `rows.length_B` after the last layer. Lowering `length_B` undoes tokens: they
    are no longer seen, and the next ones overwrite them. (A cache with a window has lost what they overwrote.) On a CPU
    that is split into devices, wait for a result before the next call, because queued steps can deadlock.

    Lengths, counts and layers are checked where they are concrete. Under `jit`, a row for which one is out of range, or
    that lacks pages for its tokens, has NaN as its output, without effect on the others.

    Args:
        cache: The pages, created with this plan.
        count_B: How many of the T new tokens each row appends. The others write nothing, and their output is 0.
        layer: The layer whose pages are used, by its index in the cache. It may be traced.
        group: The index of the cache group, whose page table in `rows` is used.
        scale: The scale of the attention scores, usually `head_width**-0.5`.
        window: How many positions a query sees, its own included. None: all.
        sink_N: An attention sink: a score per head of the output that joins the softmax denominator and has no value.
        v_width: For latent attention, with `v_BTKH` None and one head: the values are the first `v_width` numbers of
            the keys, and the pages come from a `CacheSpec` with `latent=True`.

    Returns:
        The output in the type of `q_BTNH`, sharded as `PartitionSpec("dp", None, ("tp", "cp"), None)` with every
        combine: a device has 1 / cp of the heads of its tp rank. With "psum" it receives the sum of all of them and
        keeps its share; with "psum_scatter" and "all_to_all" it receives only that. An output projection sharded as
        `PartitionSpec(("tp", "cp"), None, None)` fits. P is N if cp divides the heads of a tp rank. If not, zeros
        follow the heads of each tp rank, so that it does. And the cache, sharded as before.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A shape does not fit the others, the plan or the cache; the kernel cannot read the pages; or a
            concrete number is out of range, or more than a row has pages for.

    Source: arXiv 2507.07120, section 2; sinks: arXiv 2309.17453; latents: arXiv 2405.04434.
    """
    options, new = AttentionOptions(plan, scale, group, window, v_width), (q_BTNH, k_BTKH, v_BTKH)
    check_attention(options, cache, new, rows, count_B, layer, sink_N)
    return _helix_attention(options, cache, new, rows, count_B, layer, sink_N)


# Jitted, because an eager shard_map compiles again in every call. Under another jit it is inlined.
@functools.partial(jax.jit, static_argnames="options", inline=True)
def _helix_attention(
    options: AttentionOptions,
    cache: KVCache,
    new: tuple[Array, Array, Array | None],
    rows: Rows,
    count_B: Array,
    layer: Array | int,
    sink_N: Array | None,
) -> tuple[Array, KVCache]:
    pool_spec, new_spec = (POOL_LATENT_XKWH, NEW_LATENT_BTKH) if new[2] is None else (POOL_XKWH, NEW_KEYS_BTKH)
    rows_specs = Rows._make(((TABLE_RBM,) * len(rows.tables_RBM), ROWS_B, ROWS_B))
    sharded = jax.shard_map(
        functools.partial(_attention_shard, options),
        mesh=options.plan.mesh,
        in_specs=(pool_spec, REPLICATED, (QUERIES_BTNH, new_spec, new_spec), rows_specs, ROWS_B, SINK_N),
        out_specs=(ATTENTION_OUT_BTNH, pool_spec),
    )
    layer = jnp.asarray(layer, jnp.int32)
    o_BTNH, written = sharded(cache, layer, new, rows, count_B, sink_N)
    valid_B = are_valid(cache, rows, count_B, layer, tokens=new[0].shape[1])
    return jnp.where(valid_B[:, None, None, None], o_BTNH, jnp.nan), written


def copy_pages_of_ranks(plan: Plan, cache: KVCache, copies_Z2X: Int[Array, "Z 2 X"]) -> KVCache:
    """Copy pages within each rank, without communication.

    Args:
        plan: The mesh.
        cache: The cache. It is updated in place if donated.
        copies_Z2X: For each rank of each dp group, the pages to copy and the pages that they are copied to. A copy to a
            negative page is dropped.
    """
    pool_spec = POOL_LATENT_XKWH if cache.spec.latent else POOL_XKWH

    def copy(cache: KVCache, copies_12X: Array) -> KVCache:
        return copy_pages(cache, copies_12X[0, 0], copies_12X[0, 1])

    return jax.shard_map(copy, mesh=plan.mesh, in_specs=(pool_spec, COPIES_Z2X), out_specs=pool_spec)(cache, copies_Z2X)


def _attention_shard(
    options: AttentionOptions,
    cache: KVCache,
    layer: Array,
    new: tuple[Array, Array, Array | None],
    rows: Rows,
    count_B: Array,
    sink_n: Array | None,
) -> tuple[Array, KVCache]:
    """Run `helix_attention` on one device. All arrays are the share of this device."""
    plan, table_BM = options.plan, rows.tables_RBM[options.group][0]
    q_BTNH, k_BTKH, v_BTKH = new
    T = q_BTNH.shape[1]
    length_BU = rows.length_B[:, None] + jnp.arange(T + 1)  # before each new token, and after the last
    is_new_BT = jnp.arange(T) < count_B[:, None]

    def filled(length_BT: Array) -> Array:  # how many of the first `length` positions this rank stores
        return _filled_unsigned(plan, length_BT, rows.prompt_len_B[:, None], lax.axis_index(CP))

    # Append: the owner of a position stores its key and value in the next free slot.
    filled_BU = filled(length_BU)
    slot_BT, end_BT = filled_BU[:, :-1], filled_BU[:, 1:]
    owned_BT = is_new_BT & (end_BT > slot_BT)
    cache = append(cache, layer, k_BTKH, v_BTKH, table_BM, slot_BT, owned_BT)

    # Attend: a query sees the slots [lo, hi) of this rank.
    hi_BT = jnp.where(is_new_BT, end_BT, 0)
    lo_BT = filled(jnp.maximum(length_BU[:, 1:] - options.window, 0)) if options.window else jnp.zeros_like(hi_BT)
    partial = _attend(options, q_BTNH, cache, layer, table_BM, lo_BT, hi_BT)

    # Combine: exchange partial results with the other ranks. Each rank keeps 1 / cp of the heads.
    result = combine(partial, plan.combine)
    if sink_n is not None:
        result = merge_sink(result, sink_n)
    return result.o_BTNH.astype(q_BTNH.dtype), cache


def _filled_unsigned(plan: Plan, length_BT: Array, prompt_len_B1: Array, rank: Array) -> Array:
    """Compute `plan.layout.filled` with unsigned integers.

    A floor division of signed integers is ten operations, and XLA compiles them again for the append of each layer.
    """
    numbers = (x.astype(jnp.uint32) for x in (length_BT, prompt_len_B1, rank))
    return plan.layout.filled(*numbers).astype(jnp.int32)


def _attend(
    options: AttentionOptions, q_BTNH: Array, cache: KVCache, layer: Array, table_BM: Array, lo_BT: Array, hi_BT: Array
) -> Partial:
    """Attend with the kernel of the plan. Pages may store heads padded with zeros (on TPUs).

    The output is NaN in a row that has no pages for what it sees here, and the combine spreads it to all ranks.
    """
    pool_XKWH, pages, parts = cache.pool_XKWH, cache.pages, cache.spec.parts
    _, _, W, H = pool_XKWH.shape
    attend = backend_attend(options.plan.kernel_for(PageFormat(H, W, pool_XKWH.dtype, options.v_width)))
    end_B = hi_BT.max(1)
    if cache.spec.window is None:  # else the table is a ring
        hi_BT = jnp.minimum(hi_BT, table_BM.shape[1] * W)
    # Not added to the table here, because that would be a kernel per layer.
    table = PageTable(table_BM, (layer * parts + jnp.arange(parts)) * pages)
    arguments = pad_width(q_BTNH, H), pool_XKWH, None if cache.spec.latent else pool_XKWH, table, lo_BT, hi_BT
    partial = attend(*arguments, scale=options.scale, v_width=options.v_width)
    lack_B = lack_pages(cache, table_BM, lo_BT[:, 0], end_B)
    o_BTNH = partial.o_BTNH[..., : options.v_width or q_BTNH.shape[-1]]
    return partial._replace(o_BTNH=jnp.where(lack_B[:, None, None, None], jnp.nan, o_BTNH))
