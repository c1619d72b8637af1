"""Defines the key/value cache: pages that are sharded along the sequence, and the rows that use them."""

from helix_jax.cache.checks import AttentionOptions, are_valid, check_attention, lack_pages
from helix_jax.cache.pages import (
    KVCache,
    Rows,
    abstract_pool,
    append,
    copy_pages,
    fixed_page_table,
    fixed_pages,
    make_cache,
    make_caches,
    make_pool,
    pad_width,
    per_row,
    tokens_per_rank,
)
from helix_jax.cache.paging import max_pages_per_row, pages_needed, ring_pages, split_slot
from helix_jax.cache.spec import CacheSpec, cache_specs, layer_groups

__all__ = [
    "AttentionOptions",
    "CacheSpec",
    "KVCache",
    "Rows",
    "abstract_pool",
    "append",
    "are_valid",
    "cache_specs",
    "check_attention",
    "copy_pages",
    "fixed_page_table",
    "fixed_pages",
    "lack_pages",
    "layer_groups",
    "make_cache",
    "make_caches",
    "make_pool",
    "max_pages_per_row",
    "pad_width",
    "pages_needed",
    "per_row",
    "ring_pages",
    "split_slot",
    "tokens_per_rank",
]
