"""Splits queries, heads and pages, and computes what each tile of queries sees.

A *tile* is queries of one row, new tokens times heads in a group, beside each other for some key/value heads. What it
sees it takes in *blocks* of pages.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

_QUERIES = 512  # of a tile: a v6e does 560 operations in the time that it takes to read a byte
_LANES = 128
_LEAST_SLOTS, _MOST_SLOTS = 256, 1024  # of a block
_BLOCK_BYTES = 2**20  # of half a ring: in a microsecond, what a copy takes to begin, a v6e reads 1.6 MB
_SCORES = 2**18  # of a block: 1 MB
_FAR = 2**30  # larger than any slot


class Walk(NamedTuple):
    """What each of X tiles of queries sees.

    Attributes:
        first_X: The first page.
        end_X: The page after the last. Equal to the first page if the tile sees nothing.
        lo_X: The first slot that any query sees.
        hi_X: The slot after the last that any query sees.
        whole_lo_X: The first slot that every query sees.
        whole_hi_X: The slot after the last that every query sees.
        live_Y: The first tile from each index on that sees anything, or X. It has one entry more than there are tiles.
    """

    first_X: Any
    end_X: Any
    lo_X: Any
    hi_X: Any
    whole_lo_X: Any
    whole_hi_X: Any
    live_Y: Any


@dataclass(frozen=True)
class Shape:
    """The static shape of the work.

    Args:
        tiles: Tiles per row.
        queries: Queries per tile.
        heads: Key/value heads per block.
        pages: Pages per block.
        page: Slots per page.
        v_width: The width of the values.
        entries: Table entries per row.
        scale: The factor on the logits.
    """

    tiles: int
    queries: int
    heads: int
    pages: int
    page: int
    v_width: int
    entries: int
    scale: float

    @property
    def slots(self) -> int:
        return self.pages * self.page


def make_shape(K: int, Q: int, M: int, pools: tuple[Array, ...], v_width: int, scale: float) -> Shape:
    *_, W, H = pools[0].shape
    tiles = -(-Q // _QUERIES)
    queries = _round_up(-(-Q // tiles), 8 if tiles == 1 else 16)
    slot_bytes, least = len(pools) * pools[0].dtype.itemsize * _round_up(H, _LANES), math.lcm(W, _LANES)
    fitting = _BLOCK_BYTES // (slot_bytes * _round_up(_LEAST_SLOTS, least))
    # Of an even number at most half: the two cores of a v5p share the blocks of heads.
    most = min(K if K % 2 else K // 2, _QUERIES // queries, fitting)
    heads = max(n for n in range(1, max(most, 1) + 1) if K % n == 0)
    fitting = min(_BLOCK_BYTES // (heads * slot_bytes), _SCORES // (heads * queries))
    slots = min(fitting, _MOST_SLOTS, _round_up(M * W, least))
    slots = max(slots // least, 1) * least
    return Shape(tiles, queries, heads, slots // W, W, v_width, M, scale)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def make_walk(shape: Shape, spans_BQ2: Array) -> Walk:
    """Compute what each tile sees. It is equal in all layers, so XLA computes it once per step."""
    lo_XQ, hi_XQ = jnp.moveaxis(spans_BQ2.reshape(-1, shape.queries, 2), -1, 0)
    live_XQ = hi_XQ > lo_XQ
    lo_X, hi_X = jnp.where(live_XQ, lo_XQ, _FAR).min(1), jnp.where(live_XQ, hi_XQ, 0).max(1)
    whole_lo_X, whole_hi_X = jnp.where(live_XQ, lo_XQ, 0).max(1), jnp.where(live_XQ, hi_XQ, _FAR).min(1)
    end_X = -(-hi_X // shape.page)
    tiles = len(end_X)
    live_X = jnp.where(end_X > 0, jnp.arange(tiles, dtype=jnp.int32), tiles)
    live_Y = jnp.append(lax.cummin(live_X, reverse=True), tiles)
    return Walk(jnp.minimum(lo_X // shape.page, end_X), end_X, lo_X, hi_X, whole_lo_X, whole_hi_X, live_Y)
