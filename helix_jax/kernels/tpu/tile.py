"""A tile of queries and what it sees: blocks of pages, fetch into the two halves of a ring.

While one half is attended to, the next block is on its way into the other: of this tile, or of the next tile that sees
anything. Scores, maximum and sum are float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.kernels.tpu.work import Shape, Walk
from helix_jax.numerics import einsum

_LOW = -1e30  # the maximum of nothing: below every score, and unlike -inf it can be subtracted


class Refs(NamedTuple):
    """The memory of a tile. `rings` buffer keys and values, or latents; `turn` is the half of them that is next."""

    table: Any
    first_C: Any
    walk: Walk
    q: Any
    spans: Any
    pools: Sequence[Any]
    o: Any
    lse: Any
    rings: Sequence[Any]
    m: Any
    l: Any
    acc: Any
    turn: Any
    arrived: Any


def attend_to_tile(shape: Shape, pools: int, table: Any, first: Any, *memory: Any) -> None:
    """Run the kernel for one tile and block of heads. `memory` is scalars, queries, `pools` pools, results, scratch."""
    scalars, memory = memory[: len(Walk._fields)], memory[len(Walk._fields) :]
    (q, spans), memory = memory[:2], memory[2:]
    refs = Refs(table, first, Walk(*scalars), q, spans, memory[:pools], *memory[pools:])
    walk = refs.walk
    x, m, l, acc = pl.program_id(1), refs.m, refs.l, refs.acc

    @pl.when(x == 0)
    def _() -> None:
        refs.turn[0] = 0
        _start(shape, refs, walk.live_Y[0], 0, 0)

    m[...], l[...], acc[...] = jnp.full_like(m, _LOW), jnp.zeros_like(l), jnp.zeros_like(acc)
    turn, blocks = refs.turn[0], lax.div(walk.end_X[x] - walk.first_X[x] + shape.pages - 1, shape.pages)
    lax.fori_loop(0, blocks, partial(_block, shape, refs, x, blocks, turn), None)
    refs.turn[0] = lax.rem(turn + blocks, 2)
    # Selected instead of multiplied by 0, because a query that sees nothing may be NaN.
    some = spans[:, :, :1] < spans[:, :, 1:]
    total = jnp.where(some, l[...], 1.0)
    refs.o[0] = jnp.where(some, acc[...] / total, 0.0)
    refs.lse[0] = jnp.where(some, m[...] + jnp.log(total), -jnp.inf)


def _block(shape: Shape, refs: Refs, x: Array, blocks: Array, turn: Array, index: Array, _: None) -> None:
    """Start the copies of the next block, wait for those of this one, and attend to it."""
    walk, half, last = refs.walk, lax.rem(turn + index, 2), index + 1 == blocks
    _start(shape, refs, jnp.where(last, walk.live_Y[x + 1], x), jnp.where(last, 0, index + 1), 1 - half)
    _each_page(shape, refs, x, index, half, lambda copy: copy.wait())
    begin = walk.first_X[x] * shape.page + index * shape.slots
    whole = (walk.whole_lo_X[x] <= begin) & (begin + shape.slots <= walk.whole_hi_X[x])
    pl.when(whole)(lambda: _attend_to(shape, refs, half))
    pl.when(jnp.logical_not(whole))(lambda: _attend_to(shape, refs, half, begin, walk.lo_X[x], walk.hi_X[x]))


def _start(shape: Shape, refs: Refs, x: Array, index: Array | int, half: Array | int) -> None:
    pl.when(x < pl.num_programs(1))(lambda: _each_page(shape, refs, x, index, half, lambda copy: copy.start()))


def _each_page(
    shape: Shape, refs: Refs, x: Array, index: Array | int, half: Array | int, do: Callable[[Any], None]
) -> None:
    """Call `do(copy)` for each page of a block that the tile sees, which copies all heads of the block."""
    first = refs.walk.first_X[x] + index * shape.pages
    heads, row = pl.ds(pl.program_id(0) * shape.heads, shape.heads), lax.div(x, shape.tiles) * shape.entries

    def page(nth: Array, _: None) -> None:
        slots = pl.ds(pl.multiple_of(nth * shape.page, shape.page), shape.page)
        for part, (pool, ring) in enumerate(zip(refs.pools, refs.rings, strict=True)):
            # A page between those that the queries see may be anything, and a copy from outside the pool is fatal.
            entry = refs.first_C[part] + refs.table[row + lax.rem(first + nth, shape.entries)]
            entry = jnp.clip(entry, 0, pool.shape[0] - 1)
            do(pltpu.make_async_copy(pool.at[entry, heads], ring.at[half, :, slots], refs.arrived.at[half]))

    lax.fori_loop(0, jnp.minimum(refs.walk.end_X[x] - first, shape.pages), page, None)


def _attend_to(
    shape: Shape, refs: Refs, half: Array, begin: Array | None = None, lo: Any = None, hi: Any = None
) -> None:
    """Add a block to maximum, sum and weighted values. `begin` is its first slot if some queries see a part of it."""
    k, v, m = refs.rings[0][half], refs.rings[-1][half, :, :, : shape.v_width], refs.m[...]
    s = shape.scale * einsum("kqh,ksh->kqs", refs.q[0], k, out=jnp.float32)
    if begin is not None:
        slot = begin + lax.broadcasted_iota(jnp.int32, s.shape, 2)
        s = jnp.where((refs.spans[:, :, :1] <= slot) & (slot < refs.spans[:, :, 1:]), s, -jnp.inf)
        slot = begin + lax.broadcasted_iota(jnp.int32, v.shape, 1)
        v = jnp.where((lo <= slot) & (slot < hi), v, jnp.zeros_like(v))  # 0 * NaN is NaN: unseen values must go
    top = jnp.maximum(m, s.max(-1, keepdims=True))
    p, alpha = jnp.exp(s - top), jnp.exp(m - top)
    refs.m[...] = top
    refs.l[...] = refs.l[...] * alpha + p.sum(-1, keepdims=True)
    refs.acc[...] = refs.acc[...] * alpha + einsum("kqs,ksh->kqh", p.astype(v.dtype), v, out=jnp.float32)
