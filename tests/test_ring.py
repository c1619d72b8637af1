"""Attention of whole sequences over the ranks: as on one device, forward and backward, and half of the work."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from helix_jax import ring
from helix_jax.layout import BlockLayout, positions_by_rank
from helix_jax.mesh import CP, make_mesh
from helix_jax.training.ring import ring_attention, tile_for

B, S, N, K, H = 2, 96, 8, 2, 16
BLOCK = 4
KINDS = ("plain", "documents", "window", "sink", "latent")


def plain_attention(q_BTNH, k_BSKH, v_BSKH, document_start_BT, scale, window, sink_N):
    """Over a matrix of all pairs."""
    position_S = jnp.arange(k_BSKH.shape[1])
    document_start_BT = document_start_BT if window is None else jnp.maximum(document_start_BT, position_S + 1 - window)
    k_BSNH, v_BSNH = (jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], 2) for x in (k_BSKH, v_BSKH))
    s_BNTS = scale * jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, precision="highest")
    seen_BTS = (position_S <= position_S[:, None]) & (position_S >= document_start_BT[..., None])
    s_BNTS = jnp.where(seen_BTS[:, None], s_BNTS, -jnp.inf)
    if sink_N is not None:
        sinks = jnp.broadcast_to(sink_N[:, None, None], (*s_BNTS.shape[:3], 1))
        s_BNTS = jnp.concatenate([s_BNTS, sinks], -1)
    p_BNTS = jax.nn.softmax(s_BNTS, -1)[..., : k_BSKH.shape[1]]
    return jnp.einsum("bnts,bsnh->btnh", p_BNTS, v_BSNH, precision="highest")


def case(kind: str):
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    kv_heads = 1 if kind == "latent" else K
    q, k, v = normal(B, S, N, H), normal(B, S, kv_heads, H), normal(B, S, kv_heads, H)
    first = np.zeros((B, S), np.int32)
    if kind == "documents":
        first[0, 30:], first[0, 77:], first[1, 5:] = 30, 77, 5
    sink = normal(N) if kind == "sink" else None
    arrays = {"q": q, "k": k} | ({} if kind == "latent" else {"v": v}) | ({} if sink is None else {"sink": sink})
    return arrays, first, 9 if kind == "window" else None, 8 if kind == "latent" else None


MESHES = [(1, 1, 1), (1, 4, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tp", "cp", "dp"), MESHES)
def test_outputs_and_gradients_are_those_of_one_device(tp: int, cp: int, dp: int, kind: str):
    placement = ("striped", "helix")[(MESHES.index((tp, cp, dp)) + KINDS.index(kind)) % 2]
    layout, mesh = BlockLayout(cp, BLOCK, placement), make_mesh(tp, cp, dp)
    order = positions_by_rank(layout, S)
    arrays, first, window, v_width = case(kind)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(B, S, N, v_width or H)), jnp.float32)

    def ours(arrays):
        q, k, v = (arrays[name][:, order] if name in arrays else None for name in "qkv")
        attention = ring_attention(mesh, layout, jnp.asarray(first[:, order]))
        how = {"scale": 0.3, "window": window, "sink_N": arrays.get("sink"), "v_width": v_width}
        o = attention(q, k, v, None, **how)[0]
        return (o * weight[:, order]).sum(), o

    def theirs(arrays):
        v = arrays["k"][..., :v_width] if v_width else arrays["v"]
        o = plain_attention(arrays["q"], arrays["k"], v, jnp.asarray(first), 0.3, window, arrays.get("sink"))
        return (o * weight).sum(), o

    (_, found), gradients = jax.block_until_ready(jax.jit(jax.value_and_grad(ours, has_aux=True))(arrays))
    (_, expected), exact = jax.jit(jax.value_and_grad(theirs, has_aux=True))(arrays)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected)[:, order], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        error = np.linalg.norm(gradient - exact[name]) / np.linalg.norm(exact[name])
        assert error < 1e-6, name


def test_half_of_the_tiles_are_visited_and_as_many_on_every_rank(monkeypatch):
    """Counted while it runs, forward and backward."""
    visited, scores = Counter(), ring._scores

    def counted(*arguments):
        jax.debug.callback(lambda rank: visited.update([int(rank)]), lax.axis_index(CP))
        return scores(*arguments)

    monkeypatch.setattr(ring, "_scores", counted)
    length, ranks = 4096, 4
    layout, mesh = BlockLayout(ranks, 16, "striped"), make_mesh(1, ranks)
    q, k = jnp.ones((1, length, 2, 4)), jnp.ones((1, length, 1, 4))
    attention = ring_attention(mesh, layout, jnp.zeros((1, length), jnp.int32))
    tile = tile_for(length // ranks)

    def share() -> float:
        jax.effects_barrier()
        assert max(visited.values()) <= 1.02 * min(visited.values())
        assert len(visited) == ranks
        return sum(visited.values()) * tile**2 / length**2

    jax.block_until_ready(attention(q, k, k, None, scale=1.0)[0])
    assert 0.5 < share() <= 0.55
    visited.clear()
    jax.block_until_ready(jax.grad(lambda q: attention(q, k, k, None, scale=1.0)[0].sum())(q))
    assert 1.0 < share() <= 1.1


def test_a_document_that_is_short_costs_little(monkeypatch):
    """Nobody visits the tiles before it."""
    visited, scores = [], ring._scores

    def counted(*arguments):
        jax.debug.callback(lambda: visited.append(1))
        return scores(*arguments)

    monkeypatch.setattr(ring, "_scores", counted)
    length = 1024
    first = jnp.asarray(np.arange(length) // 64 * 64)[None]
    q = jnp.ones((1, length, 1, 4))
    jax.block_until_ready(ring_attention(make_mesh(1, 1), BlockLayout(1, 16, "striped"), first)(q, q, q, None, scale=1.0))
    jax.effects_barrier()
    assert len(visited) == length // tile_for(length)


@pytest.mark.parametrize(("slots", "tile"), [(32768, 512), (8192, 512), (4096, 256), (96, 6), (24, 1), (7, 1)])
def test_tiles_divide_a_share_and_are_many(slots: int, tile: int):
    assert tile_for(slots) == tile


def test_sequences_that_do_not_divide_are_refused():
    q = jnp.ones((1, 40, 2, 4))
    message = "40 positions are not a whole number of turns of 4 ranks with blocks of 4: give 32 or 48"
    with pytest.raises(ValueError, match=message):
        ring_attention(make_mesh(1, 4), BlockLayout(4, 4), jnp.zeros((1, 40), jnp.int32))(q, q, q, None, scale=1.0)
