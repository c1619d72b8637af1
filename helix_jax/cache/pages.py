"""Defines the pool of the key/value cache, sharded over cp, and the integers per row that determine its use."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from helix_jax.arrays import put
from helix_jax.cache.paging import pages_needed, split_slot
from helix_jax.cache.spec import CacheSpec
from helix_jax.heads import check_heads, stored_kv_heads
from helix_jax.kernels.page_format import stored_width
from helix_jax.layout import Integer
from helix_jax.mesh import CP, DP, POOL_LATENT_XKWH, POOL_XKWH, ROWS_B, TABLE_RBM, TP, first_device, sharding
from helix_jax.numerics import index_as_bits
from helix_jax.plan import Plan
from helix_jax.quantisation import EXACT, QuantisedPages, quantise
from helix_jax.validation import check_int, check_type


class KVCache(NamedTuple):
    """The pages of all layers. A step takes the cache as a donated argument and returns it, updated in place.

    All layers share one pool and the page tables. Each rank stores first the pages of keys of the first layer, then as
    many pages of its values, then those of the next layer. For latent attention there are no values: one vector per
    token stands for the keys and values of all heads.

    Attributes:
        pool_XKWH: The pages, quantised if the spec says so. X counts those of all ranks, layers and parts; under
            `shard_map`, those of this rank.
        spec: What is cached.
    """

    pool_XKWH: Float[Array, "X K W H"] | QuantisedPages
    spec: CacheSpec

    @property
    def pages(self) -> int:
        """The pages of each layer, over all ranks; under `shard_map`, those of this rank."""
        return self.pool_XKWH.shape[0] // (self.spec.layers * self.spec.parts)


class Rows(NamedTuple):
    """The state of each sequence of the batch. `prompt_len_B` and `length_B` determine every slot on every rank.

    Attributes:
        tables_RBM: For each cache group a page table for every rank. Entry m is the page of slots [m W, (m + 1) W). In
            a group with a window, the table is a ring: entry m is also the page of the slots M W, 2 M W, ... later.
        length_B: How many positions are written so far.
        prompt_len_B: The length of the whole prompt, known before it is written.
    """

    tables_RBM: tuple[Int[Array, "R B _"], ...]
    length_B: Int[Array, "B"]
    prompt_len_B: Int[Array, "B"]


def make_cache(
    plan: Plan, spec: CacheSpec, prompt_lens: Sequence[int], max_lens: Sequence[int], *, page: int = 64
) -> tuple[KVCache, Rows]:
    """Create an empty cache for layers of one kind, and rows that each have their own pages.

    Args:
        plan: The mesh and the placement.
        spec: What the layers cache.
        prompt_lens: The length of each row's prompt.
        max_lens: The positions that each row can store, prompt included.
        page: Tokens per page.

    Returns:
        The cache, created sharded over (dp, cp) and tp, with as many pages on every rank as the fullest rank can need;
        and the rows.

    Raises:
        TypeError: `plan`, `spec`, a length or `page` has the wrong type.
        ValueError: `page` is below 1, dp does not divide the batch, a prompt exceeds its `max_lens`, or tp neither
            divides the key/value heads nor is a multiple of them.
    """
    [cache], rows = make_caches(plan, (spec,), prompt_lens, max_lens, page=page)
    return cache, rows


def make_caches(
    plan: Plan, specs: Sequence[CacheSpec], prompt_lens: Sequence[int], max_lens: Sequence[int], *, page: int = 64
) -> tuple[tuple[KVCache, ...], Rows]:
    """Create the empty caches of a model, one for each of its `cache_specs`, and rows like `make_cache`."""
    _check_lens(plan, prompt_lens, max_lens, page)
    for spec in specs:
        check_type("spec", spec, CacheSpec, "a helix_jax.CacheSpec")
        if not spec.latent:
            check_heads(plan.mesh, stored_kv_heads(spec.kv_heads, plan.mesh.shape[TP]), spec.kv_heads)
    slots_B = plan.layout.max_filled(np.asarray(max_lens), np.asarray(prompt_lens))
    pages_per_row, B = max(1, pages_needed(int(slots_B.max()), page)), len(prompt_lens)
    table_RBM = fixed_page_table(plan, B, pages_per_row)
    caches = tuple(make_pool(plan, spec, plan.mesh.shape[CP] * B * pages_per_row, page) for spec in specs)
    return caches, Rows((table_RBM,) * len(specs), per_row(plan, np.zeros(B)), per_row(plan, prompt_lens))


def make_pool(plan: Plan, spec: CacheSpec, pages: int, page: int) -> KVCache:
    """Create a cache of empty pages.

    Args:
        plan: The mesh.
        spec: What the model caches.
        pages: The number of pages of each layer, over all ranks.
        page: Tokens per page.
    """
    return jax.tree.map(
        lambda like: jnp.zeros(like.shape, like.dtype, device=like.sharding), abstract_pool(plan, spec, pages, page)
    )


def abstract_pool(plan: Plan, spec: CacheSpec, pages: int, page: int) -> KVCache:
    """Return the cache of `make_pool` with `jax.ShapeDtypeStruct` in place of its arrays."""
    placed = sharding(plan.mesh, POOL_LATENT_XKWH if spec.latent else POOL_XKWH)
    kv_heads = spec.kv_heads if spec.latent else stored_kv_heads(spec.kv_heads, plan.mesh.shape[TP])

    def like(width: int, dtype: DTypeLike) -> Any:
        shape = (spec.layers * spec.parts * pages, kv_heads, page, width)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    width = stored_width(spec.head_width, first_device(plan.mesh))
    if not spec.quantised:
        return KVCache(like(width, spec.dtype), spec)
    quantised = (width if spec.exact_width == 0 else spec.head_width) - spec.exact_width
    exact = like(width - quantised, EXACT) if width > quantised else None
    pool = QuantisedPages(like(quantised, spec.dtype), like(spec.scales, jnp.float32), exact)
    return KVCache(pool, spec)


def fixed_page_table(plan: Plan, rows: int, pages_per_row: int) -> Array:
    """Return page tables [R, B, M] in which each row has pages of its own, the same on every rank."""
    table_BM = fixed_pages(plan, rows, pages_per_row)
    return put(np.broadcast_to(table_BM, (plan.layout.ranks, *table_BM.shape)), plan.mesh, TABLE_RBM)


def fixed_pages(plan: Plan, rows: int, pages_per_row: int) -> np.ndarray:
    """Return the pages of `fixed_page_table` on every rank, [B, M]."""
    rows_per_group = rows // plan.mesh.shape[DP]
    table_BM = (np.arange(rows) % rows_per_group)[:, None] * pages_per_row + np.arange(pages_per_row)
    return table_BM.astype(np.int32)


def _check_lens(plan: Plan, prompt_lens: Any, max_lens: Any, page: int) -> None:
    check_type("plan", plan, Plan, "a helix_jax.Plan")
    check_int("page", page, least=1)
    for name, lens in (("prompt_lens", prompt_lens), ("max_lens", max_lens)):
        if np.ndim(lens) != 1 or (len(lens) and not np.issubdtype(np.asarray(lens).dtype, np.integer)):
            raise TypeError(f"{name} is {lens!r}: give a list of whole numbers, one per row")
    dp, rows = plan.mesh.shape[DP], len(prompt_lens)
    if rows == 0 or rows % dp:
        raise ValueError(f"dp {dp} does not divide {rows} rows: give a positive multiple of {dp}")
    if len(max_lens) != rows:
        raise ValueError(f"there are {rows} prompt_lens, but {len(max_lens)} max_lens: give one of each per row")
    for row, (prompt, most) in enumerate(zip(prompt_lens, max_lens, strict=True)):
        if not 0 <= prompt <= most:
            raise ValueError(f"row {row}: a prompt of {prompt} tokens exceeds its max_len {most}: give more")


def per_row(plan: Plan, values: ArrayLike | Sequence[Any]) -> Array:
    """Return integers per row as an array of int32, sharded as a step expects it."""
    return put(np.asarray(values, np.int32), plan.mesh, ROWS_B)


def append(
    cache: KVCache,
    layer: Int[Array, ""],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"] | None,
    table_BM: Int[Array, "B M"],
    slot_BT: Int[Array, "B T"],
    owned_BT: Bool[Array, "B T"],
) -> KVCache:
    """Write the tokens that this rank owns to their slots. Call it inside `shard_map`.

    The write is in place if `cache` is donated. A token whose slot is past the table, or whose table entry is negative,
    is dropped: its slot is never clamped onto another page. With a window, the table is a ring, and slots wrap around.

    Args:
        cache: The pages of this rank.
        layer: The layer.
        k_BTKH: The keys, padded if they are narrower than the pages.
        v_BTKH: The values. None for latent attention.
        table_BM: The page table of this rank.
        slot_BT: The slot of each token on its owner.
        owned_BT: Whether this rank owns each token.
    """
    pool_XKWH, pages, parts = cache.pool_XKWH, cache.pages, cache.spec.parts
    X, K, W, H = pool_XKWH.shape
    entry_BT, offset_BT = split_slot(slot_BT.astype(jnp.uint32), W)  # simpler than signed divisions
    entry_BT = entry_BT % table_BM.shape[1] if cache.spec.window else entry_BT
    page_BT = jnp.take_along_axis(table_BM, entry_BT, axis=1, mode="fill", fill_value=-1)
    page_BTC = page_BT[..., None] + (layer * parts + jnp.arange(parts)) * pages
    page_BTC = jnp.where((owned_BT & (page_BT >= 0))[..., None], page_BTC, X).astype(jnp.uint32)
    new_BTCKH = jnp.stack([x for x in (k_BTKH, v_BTKH) if x is not None], axis=2)
    new_BTCKH = pad_width(new_BTCKH, H)
    if isinstance(pool_XKWH, QuantisedPages):
        new_BTCKH = quantise(new_BTCKH, cache.spec.scales, pool_XKWH.exact_width)

    # The heads are indexed too: as a slice between page and offset, they make XLA transpose the whole pool. Keys and
    # values are one scatter, because each scatter is a kernel.
    index = (page_BTC[..., None], jnp.arange(K, dtype=jnp.uint32), offset_BT[..., None, None])

    def write(pool_XKWH: Array, new_BTCKH: Array) -> Array:
        def scatter(pool_XKWH: Array, new_BTCKH: Array) -> Array:
            return pool_XKWH.at[index].set(new_BTCKH, mode="drop")

        return index_as_bits(scatter, pool_XKWH, new_BTCKH.astype(pool_XKWH.dtype))

    return cache._replace(pool_XKWH=jax.tree.map(write, pool_XKWH, new_BTCKH))


def copy_pages(cache: KVCache, source_X: Int[Array, "X"], page_X: Int[Array, "X"]) -> KVCache:
    """Copy pages to others of this rank, in all layers. Call it inside `shard_map`.

    The write is in place if `cache` is donated.

    Args:
        cache: The pages of this rank.
        source_X: The pages to copy.
        page_X: Where they are copied to. A copy to a negative page is dropped.
    """
    first_Y1 = jnp.arange(cache.spec.layers * cache.spec.parts)[:, None] * cache.pages
    to_YX = jnp.where(page_X >= 0, first_Y1 + page_X, cache.pool_XKWH.shape[0])
    from_YX = first_Y1 + source_X

    def copy(pool_XKWH: Array) -> Array:
        return pool_XKWH.at[to_YX].set(pool_XKWH.at[from_YX].get(mode="clip"), mode="drop")

    return cache._replace(pool_XKWH=jax.tree.map(partial(index_as_bits, copy), cache.pool_XKWH))


def pad_width(x: Array, width: int) -> Array:
    """Pad vectors with zeros to the width that the pages store."""
    missing = width - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x


def tokens_per_rank(plan: Plan, length: Integer, prompt_len: Integer) -> list[int]:
    """Return how many positions each rank stores, summed over the rows."""
    return [int(np.sum(plan.layout.filled(length, prompt_len, rank))) for rank in range(plan.layout.ranks)]
