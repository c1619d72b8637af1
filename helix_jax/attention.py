"""Attention over a part of a sequence, and the monoid in which such parts meet.

A partial is `(o, lse)`: softmax attention over some subset of the slots, and the log of its denominator (float32, base
e). `merge` joins partials of disjoint subsets exactly; it is associative and commutative, and its identity is
`(0, -inf)`, the empty subset. One function joins the chunks of a loop and the ranks of a mesh.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from helix_jax.numerics import einsum

# Bounds on what one pass over the pages holds at once: slots gathered, over all rows, and scores. On a CPU a pass is
# cheap and memory short: a share of the pool, so that a decode step needs but a few per cent of its cache beside it,
# though never fewer slots than pay for a pass; 16 MB of scores. On an accelerator a pass costs launches, on a GPU some
# 30 us whatever it does: 128 MB of pages and 128 MB of scores, which is little beside what is cached there.
_CPU_POOL_SHARE = 32
_CPU_LEAST_SLOTS = 2**10
_CPU_SCORES = 2**22
_PAGES_BYTES = 2**27
_SCORES = 2**25


class Partial(NamedTuple):
    """Attention over a subset of slots: the mean of its values, and the log of its softmax denominator."""

    o_BTNH: Float[Array, "*B T N H"]
    lse_BTN: Float[Array, "*B T N"]


def merge(partials: Partial) -> Partial:
    """Joins partials of disjoint subsets that are stacked on a leading axis.

        lse = log sum_i exp(lse_i)        o = sum_i exp(lse_i - lse) o_i

    Differentiable, also where some or all of the partials are empty (lse = -inf).
    """
    lse_XBTN = partials.lse_BTN
    top_BTN = lax.stop_gradient(finite_or_zero(lse_XBTN.max(0)))
    weight_XBTN = jnp.exp(lse_XBTN - top_BTN)
    o_BTNH = (weight_XBTN[..., None] * partials.o_BTNH).sum(0)
    return normalise(o_BTNH, weight_XBTN.sum(0), top_BTN)


def merge_sink(partial: Partial, sink_N: Float[Array, "N"]) -> Partial:
    """Merges the partial `(0, sink)`: every head has a logit that takes its share of the softmax and has no value."""
    lse_BTN = jnp.broadcast_to(sink_N.astype(jnp.float32), partial.lse_BTN.shape)
    sink = Partial(jnp.zeros_like(partial.o_BTNH), lse_BTN)
    return merge(Partial(*map(_stack, partial, sink)))


def normalise(sum_BTNH: Array, weight_BTN: Array, top_BTN: Array) -> Partial:
    """The partial whose values sum to `sum_BTNH` under weights of total `weight_BTN`, both scaled by exp(-top)."""
    some_BTN = weight_BTN > 0
    weight_BTN = jnp.where(some_BTN, weight_BTN, 1)  # before the log: no NaN in the gradient of the branch not taken
    return Partial(sum_BTNH / weight_BTN[..., None], jnp.where(some_BTN, top_BTN + jnp.log(weight_BTN), -jnp.inf))


def finite_or_zero(lse: Array) -> Array:
    """A maximum that can be subtracted: that of an empty subset is -inf, and -inf - -inf is NaN."""
    return jnp.where(jnp.isfinite(lse), lse, 0)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_AKWH: Float[Array, "A K W H"],
    v_AKWH: Float[Array, "A K W Hv"] | None,
    table_BM: Int[Array, "B M"],
    lo_BT: Int[Array, "B T"],
    hi_BT: Int[Array, "B T"],
    *,
    scale: float,
    v_width: int | None = None,
) -> Partial:
    """Softmax attention of each query over the slots `[lo, hi)` of its row, read from pages, in bounded memory.

    Slot s of row b is word `s % W` of page `table_BM[b, s // W]`. What lies outside of every `[lo, hi)` of a row,
    table entries included, may be anything, NaN too. A query with `lo >= hi` gives the empty partial. `hi` need not
    rise by one per token. `v_AKWH` None: the values are the first `v_width` numbers of the keys.

    A row is read from the page of its least `lo` on, in as many passes as the longest row takes: the time follows what
    is seen, be it a window or all that is filled, not what is allocated. This is the reference; the kernels are its
    twins.
    """
    (B, T, N, H), (A, K, W, _) = q_BTNH.shape, k_AKWH.shape
    bytes_per_slot = k_AKWH.dtype.itemsize * K * (H + (v_width or H))

    def in_passes_of(slots: int, scores: int, *, by_page: bool) -> Callable[..., Partial]:
        pages = max(1, min(slots // B, scores // (B * T * N)) // W)
        return partial(attend_in_passes, scale=scale, v_width=v_width, pages_per_pass=pages, by_page=by_page)

    few = T * (N // K) <= W  # queries per page: the outputs of each page by itself are fewer than its values
    return lax.platform_dependent(
        *(q_BTNH, k_AKWH, v_AKWH, table_BM, lo_BT, hi_BT),
        cpu=in_passes_of(max(_CPU_LEAST_SLOTS, A * W // _CPU_POOL_SHARE), _CPU_SCORES, by_page=False),
        default=in_passes_of(_PAGES_BYTES // bytes_per_slot, _SCORES, by_page=few and K > 1),
    )


def attend_in_passes(
    q_BTNH: Array,
    k_AKWH: Array,
    v_AKWH: Array | None,
    table_BM: Array,
    lo_BT: Array,
    hi_BT: Array,
    *,
    scale: float,
    v_width: int | None,
    pages_per_pass: int,
    by_page: bool,
) -> Partial:
    """As `attend`, so many pages at a time.

    by_page: as they lie, pages are a batch of products. Else each pass is one product, over pages put end to end, which
    moves them if there is more than one head.
    """
    B, T, N, H = q_BTNH.shape
    K, W = k_AKWH.shape[1:3]
    C, M = pages_per_pass, table_BM.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    hi_BT = jnp.minimum(hi_BT, M * W)
    first_page_B, slots = span(lo_BT, hi_BT, W, M * W)

    def one_pass(first: Array | int, pages: int) -> Partial:
        page_BC = first_page_B[:, None] + first + jnp.arange(pages)
        # Past the table: masked below, as slots end there.
        entry_BC = jnp.take_along_axis(table_BM, page_BC, axis=1, mode="clip")
        slot_BCW = page_BC[..., None] * W + jnp.arange(W)
        seen_BCTW = _seen(slot_BCW, lo_BT, hi_BT)
        k_BCKWH = jnp.take(k_AKWH, entry_BC, axis=0, mode="clip")
        v_BCKWH = k_BCKWH if v_AKWH is None else jnp.take(v_AKWH, entry_BC, axis=0, mode="clip")
        used_BC1W1 = seen_BCTW.any(2)[:, :, None, :, None]
        v_BCKWH = jnp.where(used_BC1W1, v_BCKWH, 0)  # 0 * NaN is NaN: unused values must go
        k_BCKWH = v_BCKWH if v_AKWH is None else k_BCKWH
        if not by_page:
            k_BCKWH, v_BCKWH, seen_BCTW = _end_to_end(k_BCKWH), _end_to_end(v_BCKWH), _end_to_end(seen_BCTW)
        found = _attend_slots(q_BTKGH, k_BCKWH, v_BCKWH, seen_BCTW, scale)
        return found._replace(o_BTNH=found.o_BTNH[..., :v_width])

    if C >= M:
        return one_pass(0, M)

    def join(index: Array, sofar: Partial) -> Partial:
        return merge(Partial(*map(_stack, sofar, one_pass(index * C, C))))

    # The carry takes its type, and what it varies over inside shard_map, from a real pass, which is never computed.
    like = one_pass(0, 1)
    empty = Partial(jnp.zeros_like(like.o_BTNH), jnp.full_like(like.lse_BTN, -jnp.inf))
    return lax.fori_loop(0, -(-slots // (C * W)), join, empty)


def span(
    lo_BT: Int[Array, "B T"], hi_BT: Int[Array, "B T"], page: int, room: int
) -> tuple[Int[Array, "B"], Int[Array, ""]]:
    """The first page of each row that holds a slot that is seen, and how many slots from there on the longest row has.

    room: slots that a table holds; a row in which nothing is seen starts there.
    """
    first_page_B = jnp.where(hi_BT > lo_BT, lo_BT, room).min(1) // page
    return first_page_B, (hi_BT.max(1) - first_page_B * page).max()


def _stack(a: Array, b: Array) -> Array:
    return jnp.stack([a, b])


def _seen(slot_BCW: Array, lo_BT: Array, hi_BT: Array) -> Array:
    """Which slots of each page a query sees [B, C, T, W]."""
    lo_B1T1, hi_B1T1 = (x_BT[:, None, :, None] for x_BT in (lo_BT, hi_BT))
    slot_BC1W = slot_BCW[:, :, None]
    return (lo_B1T1 <= slot_BC1W) & (slot_BC1W < hi_B1T1)


def _end_to_end(x_BCKWX: Array) -> Array:
    B, C, K, W, *rest = x_BCKWX.shape
    return x_BCKWX.swapaxes(1, 2).reshape(B, 1, K, C * W, *rest)


def _attend_slots(q_BTKGH: Array, k_BCKWH: Array, v_BCKWH: Array, seen_BCTW: Array, scale: float) -> Partial:
    B, T, K, G, _ = q_BTKGH.shape
    s_BCTKGW = scale * einsum("btkgh,bckwh->bctkgw", q_BTKGH, k_BCKWH, out=jnp.float32)
    s_BCTKGW = jnp.where(seen_BCTW[:, :, :, None, None], s_BCTKGW, -jnp.inf)
    top_BTKG = finite_or_zero(s_BCTKGW.max((1, -1)))
    p_BCTKGW = jnp.exp(s_BCTKGW - top_BTKG[:, None, ..., None])
    sum_BCTKGH = einsum("bctkgw,bckwh->bctkgh", p_BCTKGW.astype(v_BCKWH.dtype), v_BCKWH, out=jnp.float32)

    heads = (B, T, K * G)
    total_BTN, top_BTN = p_BCTKGW.sum((1, -1)).reshape(heads), top_BTKG.reshape(heads)
    return normalise(sum_BCTKGH.sum(1).reshape(*heads, -1), total_BTN, top_BTN)
