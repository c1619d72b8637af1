"""Attention over a part of a sequence, and the exact merge of such parts.

A partial is `(o, lse)`: softmax attention over a subset of the slots, and the logarithm of its denominator (float32,
base e). `merge` joins partials of disjoint subsets exactly. It is associative and commutative, with the identity
`(0, -inf)`, the empty subset. The same function joins the passes of a loop and the ranks of a mesh.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from helix_jax.numerics import einsum, index_as_bits
from helix_jax.quantisation import QuantisedPages, dequantise

# Bounds on what one pass over the pages reads at once: slots, over all rows, and scores. On a CPU a pass is cheap and
# memory is short. It gathers at most a share of the slots, so that a decode step needs a few percent of its cache as
# temporary memory, but at least as many slots as make a pass worthwhile; and 16 MB of scores. On an accelerator a pass
# costs launches (about 30 us on a GPU, whatever its size). It gathers 128 MB of pages and 128 MB of scores, which is
# little compared with the caches there.
_CPU_SHARE = 32
_CPU_MIN_SLOTS = 2**10
_CPU_SCORES = 2**22
_PAGES_BYTES = 2**27
_SCORES = 2**25
_FAR = 2**30  # larger than any slot


class Partial(NamedTuple):
    """Attention over a subset of the slots.

    Attributes:
        o_BTNH: The mean of the values under the softmax weights, 0 if the subset is empty.
        lse_BTN: The logarithm of the softmax denominator, -inf if the subset is empty.
    """

    o_BTNH: Float[Array, "*B T N H"]
    lse_BTN: Float[Array, "*B T N"]


class PageTable(NamedTuple):
    """The places of the slots: slot s of row b is word `s % W` of page `first_C[c] + entries_BM[b, s // W % M]`.

    Unlike a table that is an array, it is a ring: slots from M W on are in the same pages as those before.

    Attributes:
        entries_BM: The pages of each row.
        first_C: The pages from which they count, for keys (c = 0) and for values (c = 1): one pool can have the pages
            of several layers.
    """

    entries_BM: Int[Array, "B M"]
    first_C: Int[Array, "C"]

    @classmethod
    def of(
        cls, table: "Int[Array, 'B M'] | PageTable", hi_BT: Int[Array, "B T"], page: int
    ) -> "tuple[PageTable, Int[Array, 'B T']]":
        """Return a table as a PageTable. If it is an array, its pages count from 0, and `hi_BT` ends with its slots."""
        if isinstance(table, PageTable):
            return table, hi_BT
        return cls(table, jnp.zeros(2, jnp.int32)), jnp.minimum(hi_BT, table.shape[1] * page)


class PassOptions(NamedTuple):
    """The static arguments of `attend_in_passes`.

    Attributes:
        scale: The factor on the logits.
        v_width: The width of the values if there are no pages of values.
        pages: Pages of each row per pass.
        by_page: Multiply each page by itself, as a batch of products. Otherwise a pass is one product over its pages
            concatenated, which copies them if there is more than one head.
    """

    scale: float
    v_width: int | None
    pages: int
    by_page: bool


def merge(partials: Partial) -> Partial:
    """Merge partials of disjoint subsets of slots, stacked on a leading axis.

        lse = log sum_i exp(lse_i)        o = sum_i exp(lse_i - lse) o_i

    The result is differentiable, also if some or all of the partials are empty (lse = -inf).
    """
    lse_XBTN = partials.lse_BTN
    top_BTN = lax.stop_gradient(finite_or_zero(lse_XBTN.max(0)))
    weight_XBTN = jnp.exp(lse_XBTN - top_BTN)
    o_BTNH = (weight_XBTN[..., None] * partials.o_BTNH).sum(0)
    return normalise(o_BTNH, weight_XBTN.sum(0), top_BTN)


def merge_sink(partial: Partial, sink_N: Float[Array, "N"]) -> Partial:
    """Merge the partial `(0, sink)`: a logit per head that takes part in the softmax and has no value."""
    lse_BTN = jnp.broadcast_to(sink_N.astype(jnp.float32), partial.lse_BTN.shape)
    return _merge_two(partial, Partial(jnp.zeros_like(partial.o_BTNH), lse_BTN))


def normalise(sum_BTNH: Array, weight_BTN: Array, top_BTN: Array) -> Partial:
    """Return the partial with this weighted sum of values and this sum of weights, both scaled by exp(-top)."""
    some_BTN = weight_BTN > 0
    weight_BTN = jnp.where(some_BTN, weight_BTN, 1)  # before the log: no NaN in the gradient of the branch not taken
    return Partial(sum_BTNH / weight_BTN[..., None], jnp.where(some_BTN, top_BTN + jnp.log(weight_BTN), -jnp.inf))


def finite_or_zero(lse: Array) -> Array:
    """Replace -inf, the maximum of an empty subset, by 0, so that it can be subtracted: -inf - -inf is NaN."""
    return jnp.where(jnp.isfinite(lse), lse, 0)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_AKWH: Float[Array, "A K W H"] | QuantisedPages,
    v_AKWH: Float[Array, "A K W Hv"] | QuantisedPages | None,
    table_BM: Int[Array, "B M"] | PageTable,
    lo_BT: Int[Array, "B T"],
    hi_BT: Int[Array, "B T"],
    *,
    scale: float,
    v_width: int | None = None,
) -> Partial:
    """Attend from each query to the slots `[lo, hi)` of its row, read from pages, in bounded memory.

    A row is read from the page of its smallest `lo` on, in as many passes as the longest row needs: the time depends on
    the slots that are visible, not on those that are allocated. This is the reference implementation; the kernels
    compute the same.

    Args:
        q_BTNH: The queries.
        k_AKWH: The pages of keys. Quantised pages are dequantised to the type of the queries.
        v_AKWH: The pages of values. None: the values are the first `v_width` numbers of the keys.
        table_BM: Slot s of row b is word `s % W` of page `table_BM[b, s // W]`; or a `PageTable`. Keys, values and
            entries outside of every `[lo, hi)` of a row may be anything, NaN included.
        lo_BT: The first slot that each query sees.
        hi_BT: The end of the slots that each query sees. It need not rise by one per token. A query with `lo >= hi`
            gives the empty partial.
        scale: The factor on the logits.
        v_width: The width of the values if `v_AKWH` is None.
    """
    (B, T, N, H), (_, K, W, _) = q_BTNH.shape, k_AKWH.shape
    table, hi_BT = PageTable.of(table_BM, hi_BT, W)
    bytes_per_slot = _gathered_dtype(q_BTNH, k_AKWH).itemsize * K * (H + (v_width or H))

    def limited_to(slots: int, scores: int, *, by_page: bool) -> Callable[..., Partial]:
        pages = max(1, min(slots // B, scores // (B * T * N)) // W)
        return functools.partial(attend_in_passes, PassOptions(scale, v_width, pages, by_page))

    few = T * (N // K) <= W  # queries per page: the outputs of each page by itself are fewer than its values
    return lax.platform_dependent(
        *(q_BTNH, k_AKWH, v_AKWH, table, lo_BT, hi_BT),
        cpu=limited_to(max(_CPU_MIN_SLOTS, table.entries_BM.size * W // _CPU_SHARE), _CPU_SCORES, by_page=False),
        default=limited_to(_PAGES_BYTES // bytes_per_slot, _SCORES, by_page=few and K > 1),
    )


def attend_in_passes(
    options: PassOptions,
    q_BTNH: Array,
    k_AKWH: Array | QuantisedPages,
    v_AKWH: Array | QuantisedPages | None,
    table: PageTable,
    lo_BT: Array,
    hi_BT: Array,
) -> Partial:
    """Compute `attend` over `options.pages` pages of each row at a time."""
    B, T, N, H = q_BTNH.shape
    K, W = k_AKWH.shape[1:3]
    M = table.entries_BM.shape[1]
    q_BTKGH, dtype = q_BTNH.reshape(B, T, K, N // K, H), _gathered_dtype(q_BTNH, k_AKWH)
    first_page_B, slots = visible_span(lo_BT, hi_BT, W)

    def run_pass(first: Array | int, pages: int) -> Partial:
        page_BC = first_page_B[:, None] + first + jnp.arange(pages)
        entry_BC = jnp.take_along_axis(table.entries_BM, page_BC % M, axis=1)
        visible_BCTW = _visible_slots(page_BC[..., None] * W + jnp.arange(W), lo_BT, hi_BT)
        used_BC1W1 = visible_BCTW.any(2)[:, :, None, :, None]
        pages_BC = [first + entry_BC for first in table.first_C]
        k_BCKWH = _gather_pages(k_AKWH, pages_BC[0], dtype)
        v_BCKWH = k_BCKWH if v_AKWH is None else _gather_pages(v_AKWH, pages_BC[1], dtype)
        v_BCKWH = jnp.where(used_BC1W1, v_BCKWH, 0)  # values that no query sees, because 0 * NaN is NaN
        k_BCKWH = v_BCKWH if v_AKWH is None else k_BCKWH
        if not options.by_page:
            k_BCKWH, v_BCKWH, visible_BCTW = map(_concatenate_pages, (k_BCKWH, v_BCKWH, visible_BCTW))
        partial = _attend_slots(q_BTKGH, k_BCKWH, v_BCKWH, visible_BCTW, options.scale)
        return partial._replace(o_BTNH=partial.o_BTNH[..., : options.v_width])

    if options.pages >= M:
        return run_pass(0, M)

    def add_pass(index: Array, before: Partial) -> Partial:
        return _merge_two(before, run_pass(index * options.pages, options.pages))

    # The carry takes its type, and the axes over which it varies in shard_map, from a pass that is never computed.
    like = run_pass(0, 1)
    empty = Partial(jnp.zeros_like(like.o_BTNH), jnp.full_like(like.lse_BTN, -jnp.inf))
    return lax.fori_loop(0, -(-slots // (options.pages * W)), add_pass, empty)


def visible_span(
    lo_BT: Int[Array, "B T"], hi_BT: Int[Array, "B T"], page: int
) -> tuple[Int[Array, "B"], Int[Array, ""]]:
    """Return the first page of each row with a visible slot, and how many slots from there on the longest row has.

    A row without visible slots starts behind all slots.
    """
    first_page_B = jnp.where(hi_BT > lo_BT, lo_BT, _FAR).min(1) // page
    return first_page_B, (hi_BT.max(1) - first_page_B * page).max()


def _merge_two(a: Partial, b: Partial) -> Partial:
    return merge(Partial(jnp.stack([a.o_BTNH, b.o_BTNH]), jnp.stack([a.lse_BTN, b.lse_BTN])))


def _visible_slots(slot_BCW: Array, lo_BT: Array, hi_BT: Array) -> Array:
    """Return which slots of each page a query sees [B, C, T, W]."""
    lo_B1T1, hi_B1T1 = (x_BT[:, None, :, None] for x_BT in (lo_BT, hi_BT))
    slot_BC1W = slot_BCW[:, :, None]
    return (lo_B1T1 <= slot_BC1W) & (slot_BC1W < hi_B1T1)


def _gather_pages(pages: Array | QuantisedPages, page_BC: Array, dtype: DTypeLike) -> Array:
    """Return some pages [B, C, K, W, H] as an array of `dtype`."""

    def take(x_AKWH: Array) -> Array:
        return jnp.take(x_AKWH, page_BC, axis=0, mode="clip")

    gathered = jax.tree.map(functools.partial(index_as_bits, take), pages)
    return dequantise(gathered, dtype) if isinstance(gathered, QuantisedPages) else gathered.astype(dtype)


def _gathered_dtype(q_BTNH: Array, pages: Array | QuantisedPages) -> jnp.dtype:
    """Return the type that pages have when they are multiplied."""
    quantised = isinstance(pages, QuantisedPages)
    return q_BTNH.dtype if quantised else jnp.promote_types(q_BTNH.dtype, pages.dtype)


def _concatenate_pages(x_BCKWX: Array) -> Array:
    B, C, K, W, *rest = x_BCKWX.shape
    return x_BCKWX.swapaxes(1, 2).reshape(B, 1, K, C * W, *rest)


def _attend_slots(q_BTKGH: Array, k_BCKWH: Array, v_BCKWH: Array, visible_BCTW: Array, scale: float) -> Partial:
    B, T, K, G, _ = q_BTKGH.shape
    s_BCTKGW = scale * einsum("btkgh,bckwh->bctkgw", q_BTKGH, k_BCKWH, out=jnp.float32)
    s_BCTKGW = jnp.where(visible_BCTW[:, :, :, None, None], s_BCTKGW, -jnp.inf)
    top_BTKG = finite_or_zero(s_BCTKGW.max((1, -1)))
    p_BCTKGW = jnp.exp(s_BCTKGW - top_BTKG[:, None, ..., None])
    sum_BCTKGH = einsum("bctkgw,bckwh->bctkgh", p_BCTKGW.astype(v_BCKWH.dtype), v_BCKWH, out=jnp.float32)

    heads = (B, T, K * G)
    total_BTN, top_BTN = p_BCTKGW.sum((1, -1)).reshape(heads), top_BTKG.reshape(heads)
    return normalise(sum_BCTKGH.sum(1).reshape(*heads, -1), total_BTN, top_BTN)
