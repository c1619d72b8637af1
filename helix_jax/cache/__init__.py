"""Defines the key/value cache: pages that are sharded along the sequence, and the rows that use them."""

from helix_jax.cache.pages import (
    KVCache,
    Rows,
    append,
    make_cache,
    make_pool,
    pad_width,
    per_row,
    pool_shape,
    pool_sharding,
    tokens_per_rank,
)
from helix_jax.cache.paging import max_pages_per_row, pages_needed, split_slot
from helix_jax.cache.spec import CacheSpec

__all__ = [
    "CacheSpec",
    "KVCache",
    "Rows",
    "append",
    "make_cache",
    "make_pool",
    "max_pages_per_row",
    "pad_width",
    "pages_needed",
    "per_row",
    "pool_shape",
    "pool_sharding",
    "split_slot",
    "tokens_per_rank",
]
