"""Attention for training: whole sequences lie positions_by_rank over the cp ranks, and no device ever holds more than its share.

Queries stay where they are; keys and values travel around the ranks, and each rank attends to the share that passes by.
The partials meet by their log-sum-exp. Backward it is the same ring: the gradients of keys and values travel with them.

What a query sees of a share is what it sees of a rank in decoding, the slots `[filled(first), filled(position + 1))`.
Tiles of which nobody sees anything are not visited; under `striped` that is the same half of them on every rank.

Source: arXiv 2310.01889 (ring), 2311.09431 (striped), 2307.08691 (the gradients from the log-sum-exp).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from helix_jax.attention import Partial, finite_or_zero, merge, normalise, merge_sink
from helix_jax.combine import ring_shift, mark_varying
from helix_jax.layout import BlockLayout, positions_by_rank
from helix_jax.mesh import CP, SEQ_BS, SEQ_BSKH, SEQ_LATENT_BSKH, SEQ_S, SEQ_SINK_N, TP, AnyMesh
from helix_jax.numerics import einsum

_LARGEST_TILE = 512
_TILES = 16  # of a share at least: half of the tiles on the diagonal are seen in vain


def ring_attention(mesh: AnyMesh, layout: BlockLayout, document_start_BS: Int[Array, "B S"]) -> Callable[..., tuple[Array, Any]]:
    """Causal attention within whole sequences, in the form that a Transformer takes; its state is None.

    Along S stand the positions in the order of `positions_by_rank(layout, S)`: rank after rank, each its own. document_start_BS: where the
    document of each position starts; nothing before it is seen.

    Raises, when it is called:
        ValueError: sequences that the ranks' blocks do not divide, heads that tp does not divide.
    """

    def attention(
        q_BSNH: Float[Array, "B S N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K Hv"] | None,
        state: None,
        *,
        scale: float,
        window: int | None = None,
        sink_N: Float[Array, "N"] | None = None,
        v_width: int | None = None,
    ) -> tuple[Float[Array, "B S N Hv"], None]:
        S, latent = q_BSNH.shape[1], v_BSKH is None
        check_length(layout, S)
        keys = SEQ_LATENT_BSKH if latent else SEQ_BSKH
        sharded = jax.shard_map(
            partial(_attention_shard, _How(layout, scale, window, tile_for(S // layout.ranks)), v_width),
            mesh=mesh,
            in_specs=(SEQ_BSKH, keys, keys, SEQ_BS, SEQ_S, SEQ_SINK_N),
            out_specs=SEQ_BSKH,
        )
        position_S = jnp.asarray(positions_by_rank(layout, S))
        return sharded(q_BSNH, k_BSKH, v_BSKH, document_start_BS, position_S, sink_N), state

    return attention


def check_length(layout: BlockLayout, length: int) -> None:
    """Raises ValueError if the ranks' shares of so many positions are not equal."""
    turn = layout.ranks * layout.block
    if length % turn:
        near = " or ".join(str(n) for n in (length // turn * turn, -(-length // turn) * turn) if n)
        raise ValueError(
            f"{length} positions are not a whole number of turns of {layout.ranks} ranks with blocks of "
            f"{layout.block}: give {near}"
        )


def tile_for(slots: int) -> int:
    """The side of the tiles in which shares of so many slots are worked off: a divisor."""
    most = max(1, min(_LARGEST_TILE, slots // _TILES))
    return next(tile for tile in range(most, 0, -1) if slots % tile == 0)


class _How(NamedTuple):
    layout: BlockLayout
    scale: float
    window: int | None
    tile: int


class _Seen(NamedTuple):
    """By each of this rank's queries: positions [first, position]."""

    document_start_BT: Array
    position_T: Array


def _attention_shard(
    how: _How,
    v_width: int | None,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array | None,
    document_start_BT: Array,
    position_T: Array,
    sink_N: Array | None,
) -> Array:
    B, T, N, H = q_BTNH.shape
    if v_BTKH is None:
        k_BTKH = mark_varying(k_BTKH, TP)  # each device of tp has its own gradient of the latents; here they are summed
        v_BTKH = k_BTKH[..., :v_width]
    q_BTKGH = q_BTNH.reshape(B, T, k_BTKH.shape[2], -1, H)
    found: Any = _around(how, q_BTKGH, k_BTKH, v_BTKH, _Seen(document_start_BT, position_T))
    whole = Partial(found.o_BTNH.reshape(B, T, N, -1), found.lse_BTN.reshape(B, T, N))
    if sink_N is not None:
        whole = merge_sink(whole, sink_N)
    return whole.o_BTNH.astype(q_BTNH.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _around(how: _How, q_BTKGH: Array, k_BTKH: Array, v_BTKH: Array, seen: _Seen) -> Partial:
    """This rank's queries over the keys of all ranks."""

    def attend(found: Partial, shares: tuple[Array, Array], lo_BT: Array, hi_BT: Array) -> tuple[Partial, Any]:
        part = _attend(how, q_BTKGH, *shares, lo_BT, hi_BT)
        return merge(Partial(*(jnp.stack(both) for both in zip(found, part, strict=True)))), shares

    nothing = _empty(q_BTKGH, k_BTKH, v_BTKH)
    return _ring(how, seen, attend, nothing, (k_BTKH, v_BTKH))[0]


def _around_forward(how: _How, q_BTKGH: Array, k_BTKH: Array, v_BTKH: Array, seen: _Seen) -> tuple[Partial, Any]:
    found: Any = _around(how, q_BTKGH, k_BTKH, v_BTKH, seen)
    return found, (q_BTKGH, k_BTKH, v_BTKH, seen, found)


def _around_backward(how: _How, kept: Any, given: Partial) -> tuple[Array, Array, Array, None]:
    """ds = p (do . v - do . o + dlse), of which follow the gradients of q and k; p from the scores and the lse."""
    q_BTKGH, k_BTKH, v_BTKH, seen, (o_BTKGH, lse_BTKG) = kept
    do_BTKGH, dlse_BTKG = given
    shift_BTKG = dlse_BTKG - (do_BTKGH * o_BTKGH).sum(-1)
    lse_BTKG = finite_or_zero(lse_BTKG)

    def differentiate(dq_BTKGH: Array, shares: tuple[Array, ...], lo_BT: Array, hi_BT: Array) -> tuple[Array, Any]:
        rows = (q_BTKGH, do_BTKGH, lse_BTKG, shift_BTKG, lo_BT, hi_BT, dq_BTKGH)
        dq_BTKGH, *gradients = _differentiate(how, rows, *shares)
        return dq_BTKGH, (*shares[:2], *gradients)

    zeros = (jnp.zeros_like(x, jnp.float32) for x in (k_BTKH, v_BTKH))
    nothing = jnp.zeros_like(q_BTKGH, jnp.float32)
    dq_BTKGH, (_, _, dk_BTKH, dv_BTKH) = _ring(how, seen, differentiate, nothing, (k_BTKH, v_BTKH, *zeros))
    return dq_BTKGH.astype(q_BTKGH.dtype), dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None


_around.defvjp(_around_forward, _around_backward)


def _ring(how: _How, seen: _Seen, work: Callable[..., tuple[Any, Any]], mine: Any, shares: Any) -> tuple[Any, Any]:
    """`work`(mine, shares, lo, hi) -> (mine, shares) on every rank's in turn. The shares end where they began."""
    layout, rank = how.layout, lax.axis_index(CP)
    document_start_BT, past_T = seen.document_start_BT, seen.position_T + 1
    if how.window is not None:
        document_start_BT = jnp.maximum(document_start_BT, past_T - how.window)

    def visit(carry: tuple[Any, Any], step: Array) -> tuple[tuple[Any, Any], None]:
        mine, shares = carry
        source, length = (rank - step) % layout.ranks, seen.position_T.shape[0] * layout.ranks
        lo_BT, hi_T = (layout.filled(n, length, source) for n in (document_start_BT, past_T))
        mine, shares = work(mine, shares, lo_BT, jnp.broadcast_to(hi_T, lo_BT.shape))
        return (mine, ring_shift(shares, CP)), None

    return lax.scan(visit, (mine, shares), jnp.arange(layout.ranks))[0]


def _attend(how: _How, q_BTKGH: Array, k_BSKH: Array, v_BSKH: Array, lo_BT: Array, hi_BT: Array) -> Partial:
    """Each query over the slots [lo, hi) of a share: a row of tiles at a time, and of those the tiles that it sees."""

    def one_row(_: None, row: tuple[Array, ...]) -> tuple[None, Partial]:
        q, lo_Bt, hi_Bt = row

        def join(index: Array, sofar: tuple[Array, ...]) -> tuple[Array, ...]:
            sum_BtKGH, weight_BtKG, top_BtKG = sofar
            k, v = (_tile(x, index, how.tile) for x in (k_BSKH, v_BSKH))
            s = _scores(how, q, k, index, lo_Bt, hi_Bt)
            new_BtKG = jnp.maximum(top_BtKG, s.max(-1))
            old_BtKG = jnp.exp(top_BtKG - finite_or_zero(new_BtKG))
            p = jnp.exp(s - finite_or_zero(new_BtKG)[..., None])
            added = einsum("btkgs,bskh->btkgh", p.astype(v.dtype), v, out=jnp.float32)
            return old_BtKG[..., None] * sum_BtKGH + added, old_BtKG * weight_BtKG + p.sum(-1), new_BtKG

        nothing = _empty(q, k_BSKH, v_BSKH)
        start = nothing.o_BTNH, jnp.zeros_like(nothing.lse_BTN), nothing.lse_BTN
        sum_BtKGH, weight_BtKG, top_BtKG = lax.fori_loop(*_span(how, lo_Bt, hi_Bt), join, start)
        return None, normalise(sum_BtKGH, weight_BtKG, finite_or_zero(top_BtKG))

    _, found = lax.scan(one_row, None, tuple(_in_rows(x, how.tile) for x in (q_BTKGH, lo_BT, hi_BT)))
    return Partial(*map(_end_to_end, found))


def _differentiate(
    how: _How, rows: tuple[Array, ...], k_BSKH: Array, v_BSKH: Array, dk_BSKH: Array, dv_BSKH: Array
) -> tuple[Array, Array, Array]:
    """Adds a share's part to the gradients of q, k and v, row by row of tiles as `_attend`."""

    def one_row(carry: tuple[Array, Array], row: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        q, do, lse, shift, lo_Bt, hi_Bt, dq = row
        dk_BSKH, dv_BSKH = carry

        def join(index: Array, sofar: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, dk_BSKH, dv_BSKH = sofar
            k, v = (_tile(x, index, how.tile) for x in (k_BSKH, v_BSKH))
            p = jnp.exp(_scores(how, q, k, index, lo_Bt, hi_Bt) - lse[..., None])
            dp = einsum("btkgh,bskh->btkgs", do.astype(v.dtype), v, out=jnp.float32)
            ds = (how.scale * p * (dp + shift[..., None])).astype(q.dtype)
            dq = dq + einsum("btkgs,bskh->btkgh", ds, k, out=jnp.float32)
            dk = einsum("btkgs,btkgh->bskh", ds, q, out=jnp.float32)
            dv = einsum("btkgs,btkgh->bskh", p.astype(v.dtype), do.astype(v.dtype), out=jnp.float32)
            return dq, _add_tile(dk_BSKH, index, dk), _add_tile(dv_BSKH, index, dv)

        dq, dk_BSKH, dv_BSKH = lax.fori_loop(*_span(how, lo_Bt, hi_Bt), join, (dq, dk_BSKH, dv_BSKH))
        return (dk_BSKH, dv_BSKH), dq

    (dk_BSKH, dv_BSKH), dq = lax.scan(one_row, (dk_BSKH, dv_BSKH), tuple(_in_rows(x, how.tile) for x in rows))
    return _end_to_end(dq), dk_BSKH, dv_BSKH


def _scores(how: _How, q: Array, k: Array, index: Array, lo_Bt: Array, hi_Bt: Array) -> Array:
    """Of a tile, in float32; -inf where a query does not see the slot."""
    slot_s = index * how.tile + jnp.arange(how.tile)
    seen_Bts = (lo_Bt[..., None] <= slot_s) & (slot_s < hi_Bt[..., None])
    s = how.scale * einsum("btkgh,bskh->btkgs", q, k, out=jnp.float32)
    return jnp.where(seen_Bts[:, :, None, None], s, -jnp.inf)


def _span(how: _How, lo_Bt: Array, hi_Bt: Array) -> tuple[Array, Array]:
    """The first tile that any of these queries sees, and the one past the last."""
    some_Bt = lo_Bt < hi_Bt
    return jnp.where(some_Bt, lo_Bt, np.iinfo(np.int32).max).min() // how.tile, -(-hi_Bt.max() // how.tile)


def _empty(q_BTKGH: Array, k_BSKH: Array, v_BSKH: Array) -> Partial:
    # Made from a product, which is never computed, for its type: what it varies over inside shard_map.
    o = einsum("btkgh,bskx->btkgx", q_BTKGH[..., :1], v_BSKH[:, :1] + k_BSKH[:, :1, :, :1], out=jnp.float32)
    return Partial(jnp.zeros_like(o), jnp.full_like(o[..., 0], -jnp.inf))


def _tile(x_BSKH: Array, index: Array, tile: int) -> Array:
    return lax.dynamic_slice_in_dim(x_BSKH, index * tile, tile, axis=1)


def _add_tile(x_BSKH: Array, index: Array, added: Array) -> Array:
    at, tile = index * added.shape[1], added.shape[1]
    return lax.dynamic_update_slice_in_dim(x_BSKH, _tile(x_BSKH, index, tile) + added, at, axis=1)


def _in_rows(x_BT: Array, tile: int) -> Array:
    """[B, T, ...] as [T / tile, B, tile, ...]."""
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, tile, *x_BT.shape[2:]), 1, 0)


def _end_to_end(x_XBt: Array) -> Array:
    return jnp.moveaxis(x_XBt, 0, 1).reshape(x_XBt.shape[1], -1, *x_XBt.shape[3:])
