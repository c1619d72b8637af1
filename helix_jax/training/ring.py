"""Exact ring attention for training: sequences are sharded over the cp ranks.

Queries stay on their rank. Keys and values travel around the ring of ranks, and each rank attends to the share that it
receives; the partial results are combined by their log-sum-exp. The backward pass uses the same ring, in which the
gradients of keys and values travel with them.

What a query sees of a share is what it sees of a rank in decoding: the slots `[filled(first), filled(position + 1))`.
Tiles of which no query sees anything are skipped. With the placement "striped", that is the same half of the tiles on
every rank.

Source: arXiv 2310.01889 (ring), 2311.09431 (striped), 2307.08691 (gradients from the log-sum-exp).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from helix_jax.attention import Partial, finite_or_zero, merge, merge_sink, normalise
from helix_jax.combine import mark_varying, ring_shift
from helix_jax.layout import BlockLayout, positions_by_rank
from helix_jax.mesh import CP, SEQ_BS, SEQ_BSKH, SEQ_LATENT_BSKH, SEQ_S, SEQ_SINK_N, TP, AnyMesh
from helix_jax.numerics import einsum

_LARGEST_TILE = 512
_LEAST_TILES = 16  # per share: half of the work in tiles on the diagonal is wasted
_SMALLEST_TILE = 32  # unless a share is smaller: below this the loop over tiles costs more than what it skips


def ring_attention(
    mesh: AnyMesh, layout: BlockLayout, document_start_BS: Int[Array, "B S"]
) -> Callable[..., tuple[Array, Any]]:
    """Return causal attention within whole sequences, in the form that a Transformer takes. Its state is None.

    The positions along S are in the order of `positions_by_rank(layout, S)`.

    Args:
        mesh: The mesh.
        layout: The placement of positions on its cp ranks.
        document_start_BS: The index at which the document of a position starts. Nothing before it is seen.

    Raises:
        ValueError: When it is called: the ranks' blocks do not divide the sequence.
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
            partial(_attention_shard, _Options(layout, scale, window, tile_for(S // layout.ranks)), v_width),
            mesh=mesh,
            in_specs=(SEQ_BSKH, keys, keys, SEQ_BS, SEQ_S, SEQ_SINK_N),
            out_specs=SEQ_BSKH,
        )
        position_S = jnp.asarray(positions_by_rank(layout, S))
        return sharded(q_BSNH, k_BSKH, v_BSKH, document_start_BS, position_S, sink_N), state

    return attention


def check_length(layout: BlockLayout, length: int) -> None:
    """Check that all ranks get the same share of `length` positions.

    Raises:
        ValueError: They do not.
    """
    unit = layout.ranks * layout.block
    if length % unit:
        near = " or ".join(str(n) for n in (length // unit * unit, -(-length // unit) * unit) if n)
        raise ValueError(
            f"{length} positions are not a multiple of {layout.ranks} ranks x blocks of {layout.block}: give {near}"
        )


def tile_for(slots: int) -> int:
    """Return the side of the tiles for shares of `slots` slots: a divisor of it."""
    most = min(slots, max(_SMALLEST_TILE, min(_LARGEST_TILE, slots // _LEAST_TILES)))
    return next(tile for tile in range(most, 0, -1) if slots % tile == 0)


class _Options(NamedTuple):
    """The static arguments."""

    layout: BlockLayout
    scale: float
    window: int | None
    tile: int


class _Seen(NamedTuple):
    """The positions [document_start, position] that each query of this rank sees."""

    document_start_BT: Array
    position_T: Array


def _attention_shard(
    options: _Options,
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
        k_BTKH = mark_varying(k_BTKH, TP)  # sums the gradients of the latents over tp
        v_BTKH = k_BTKH[..., :v_width]
    q_BTKGH = q_BTNH.reshape(B, T, k_BTKH.shape[2], -1, H)
    result: Any = _attend_around(options, q_BTKGH, k_BTKH, v_BTKH, _Seen(document_start_BT, position_T))
    whole = Partial(result.o_BTNH.reshape(B, T, N, -1), result.lse_BTN.reshape(B, T, N))
    if sink_N is not None:
        whole = merge_sink(whole, sink_N)
    return whole.o_BTNH.astype(q_BTNH.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_around(options: _Options, q_BTKGH: Array, k_BTKH: Array, v_BTKH: Array, seen: _Seen) -> Partial:
    """Attend from the queries of this rank to the keys of all ranks."""

    def attend(result: Partial, shares: tuple[Array, Array], lo_BT: Array, hi_BT: Array) -> tuple[Partial, Any]:
        part = _attend(options, q_BTKGH, *shares, lo_BT, hi_BT)
        return merge(Partial(*(jnp.stack(both) for both in zip(result, part, strict=True)))), shares

    empty = _empty(q_BTKGH, k_BTKH, v_BTKH)
    return _ring(options, seen, attend, empty, (k_BTKH, v_BTKH))[0]


def _forward(options: _Options, q_BTKGH: Array, k_BTKH: Array, v_BTKH: Array, seen: _Seen) -> tuple[Partial, Any]:
    result: Any = _attend_around(options, q_BTKGH, k_BTKH, v_BTKH, seen)
    return result, (q_BTKGH, k_BTKH, v_BTKH, seen, result)


def _backward(options: _Options, residuals: Any, cotangent: Partial) -> tuple[Array, Array, Array, None]:
    """Return the gradients of q, k and v: ds = p (do . v - do . o + dlse), with p from the scores and the lse."""
    q_BTKGH, k_BTKH, v_BTKH, seen, (o_BTKGH, lse_BTKG) = residuals
    do_BTKGH, dlse_BTKG = cotangent
    shift_BTKG = dlse_BTKG - (do_BTKGH * o_BTKGH).sum(-1)
    lse_BTKG = finite_or_zero(lse_BTKG)

    def differentiate(dq_BTKGH: Array, shares: tuple[Array, ...], lo_BT: Array, hi_BT: Array) -> tuple[Array, Any]:
        rows = (q_BTKGH, do_BTKGH, lse_BTKG, shift_BTKG, lo_BT, hi_BT, dq_BTKGH)
        dq_BTKGH, *gradients = _differentiate(options, rows, *shares)
        return dq_BTKGH, (*shares[:2], *gradients)

    zeros = (jnp.zeros_like(x, jnp.float32) for x in (k_BTKH, v_BTKH))
    empty = jnp.zeros_like(q_BTKGH, jnp.float32)
    dq_BTKGH, (_, _, dk_BTKH, dv_BTKH) = _ring(options, seen, differentiate, empty, (k_BTKH, v_BTKH, *zeros))
    return dq_BTKGH.astype(q_BTKGH.dtype), dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None


_attend_around.defvjp(_forward, _backward)


def _ring(
    options: _Options, seen: _Seen, visit: Callable[..., tuple[Any, Any]], own: Any, shares: Any
) -> tuple[Any, Any]:
    """Call `visit(own, shares, lo, hi) -> (own, shares)` on the share of every rank. Shares end where they began."""
    layout, rank = options.layout, lax.axis_index(CP)
    document_start_BT, past_T = seen.document_start_BT, seen.position_T + 1
    if options.window is not None:
        document_start_BT = jnp.maximum(document_start_BT, past_T - options.window)

    def one_rank(carry: tuple[Any, Any], step: Array) -> tuple[tuple[Any, Any], None]:
        own, shares = carry
        source, length = (rank - step) % layout.ranks, seen.position_T.shape[0] * layout.ranks
        lo_BT, hi_T = (layout.filled(n, length, source) for n in (document_start_BT, past_T))
        own, shares = visit(own, shares, lo_BT, jnp.broadcast_to(hi_T, lo_BT.shape))
        return (own, ring_shift(shares, CP)), None

    return lax.scan(one_rank, (own, shares), jnp.arange(layout.ranks))[0]


def _attend(options: _Options, q_BTKGH: Array, k_BSKH: Array, v_BSKH: Array, lo_BT: Array, hi_BT: Array) -> Partial:
    """Attend to the slots [lo, hi) of a share, one row of tiles after the other, skipping tiles that are not seen."""

    def one_row(_: None, row: tuple[Array, ...]) -> tuple[None, Partial]:
        q, lo_Bt, hi_Bt = row

        def join(index: Array, total: tuple[Array, ...]) -> tuple[Array, ...]:
            sum_BtKGH, weight_BtKG, top_BtKG = total
            k, v = (_tile(x, index, options.tile) for x in (k_BSKH, v_BSKH))
            s = _scores(options, q, k, index, lo_Bt, hi_Bt)
            new_BtKG = jnp.maximum(top_BtKG, s.max(-1))
            old_BtKG = jnp.exp(top_BtKG - finite_or_zero(new_BtKG))
            p = jnp.exp(s - finite_or_zero(new_BtKG)[..., None])
            added = einsum("btkgs,bskh->btkgh", p.astype(v.dtype), v, out=jnp.float32)
            return old_BtKG[..., None] * sum_BtKGH + added, old_BtKG * weight_BtKG + p.sum(-1), new_BtKG

        empty = _empty(q, k_BSKH, v_BSKH)
        start = empty.o_BTNH, jnp.zeros_like(empty.lse_BTN), empty.lse_BTN
        sum_BtKGH, weight_BtKG, top_BtKG = lax.fori_loop(*_span(options, lo_Bt, hi_Bt), join, start)
        return None, normalise(sum_BtKGH, weight_BtKG, finite_or_zero(top_BtKG))

    _, result = lax.scan(one_row, None, tuple(_in_rows(x, options.tile) for x in (q_BTKGH, lo_BT, hi_BT)))
    return Partial(*map(_end_to_end, result))


def _differentiate(
    options: _Options, rows: tuple[Array, ...], k_BSKH: Array, v_BSKH: Array, dk_BSKH: Array, dv_BSKH: Array
) -> tuple[Array, Array, Array]:
    """Add the contribution of a share to the gradients of q, k and v, in the order of `_attend`."""

    def one_row(carry: tuple[Array, Array], row: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        q, do, lse, shift, lo_Bt, hi_Bt, dq = row
        dk_BSKH, dv_BSKH = carry

        def join(index: Array, total: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, dk_BSKH, dv_BSKH = total
            k, v = (_tile(x, index, options.tile) for x in (k_BSKH, v_BSKH))
            p = jnp.exp(_scores(options, q, k, index, lo_Bt, hi_Bt) - lse[..., None])
            dp = einsum("btkgh,bskh->btkgs", do.astype(v.dtype), v, out=jnp.float32)
            ds = (options.scale * p * (dp + shift[..., None])).astype(q.dtype)
            dq = dq + einsum("btkgs,bskh->btkgh", ds, k, out=jnp.float32)
            dk = einsum("btkgs,btkgh->bskh", ds, q, out=jnp.float32)
            dv = einsum("btkgs,btkgh->bskh", p.astype(v.dtype), do.astype(v.dtype), out=jnp.float32)
            return dq, _add_tile(dk_BSKH, index, dk), _add_tile(dv_BSKH, index, dv)

        dq, dk_BSKH, dv_BSKH = lax.fori_loop(*_span(options, lo_Bt, hi_Bt), join, (dq, dk_BSKH, dv_BSKH))
        return (dk_BSKH, dv_BSKH), dq

    (dk_BSKH, dv_BSKH), dq = lax.scan(one_row, (dk_BSKH, dv_BSKH), tuple(_in_rows(x, options.tile) for x in rows))
    return _end_to_end(dq), dk_BSKH, dv_BSKH


def _scores(options: _Options, q: Array, k: Array, index: Array, lo_Bt: Array, hi_Bt: Array) -> Array:
    """Return the scores of a tile in float32, -inf where a query does not see the slot."""
    slot_s = index * options.tile + jnp.arange(options.tile)
    seen_Bts = (lo_Bt[..., None] <= slot_s) & (slot_s < hi_Bt[..., None])
    s = options.scale * einsum("btkgh,bskh->btkgs", q, k, out=jnp.float32)
    return jnp.where(seen_Bts[:, :, None, None], s, -jnp.inf)


def _span(options: _Options, lo_Bt: Array, hi_Bt: Array) -> tuple[Array, Array]:
    """Return the first tile that any of these queries sees, and the one past the last."""
    some_Bt = lo_Bt < hi_Bt
    return jnp.where(some_Bt, lo_Bt, np.iinfo(np.int32).max).min() // options.tile, -(-hi_Bt.max() // options.tile)


def _empty(q_BTKGH: Array, k_BSKH: Array, v_BSKH: Array) -> Partial:
    # Built from a product, which is never computed: it has the type, and under shard_map the varying axes, of results.
    o = einsum("btkgh,bskx->btkgx", q_BTKGH[..., :1], v_BSKH[:, :1] + k_BSKH[:, :1, :, :1], out=jnp.float32)
    return Partial(jnp.zeros_like(o), jnp.full_like(o[..., 0], -jnp.inf))


def _tile(x_BSKH: Array, index: Array, tile: int) -> Array:
    return lax.dynamic_slice_in_dim(x_BSKH, index * tile, tile, axis=1)


def _add_tile(x_BSKH: Array, index: Array, added: Array) -> Array:
    at, tile = index * added.shape[1], added.shape[1]
    return lax.dynamic_update_slice_in_dim(x_BSKH, _tile(x_BSKH, index, tile) + added, at, axis=1)


def _in_rows(x_BT: Array, tile: int) -> Array:
    """Reshape [B, T, ...] to [T / tile, B, tile, ...]."""
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, tile, *x_BT.shape[2:]), 1, 0)


def _end_to_end(x_XBt: Array) -> Array:
    return jnp.moveaxis(x_XBt, 0, 1).reshape(x_XBt.shape[1], -1, *x_XBt.shape[3:])
