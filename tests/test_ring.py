"""Tests ring attention: outputs and gradients against one device, and how much of the score matrix is computed."""

from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from helix_jax.layout import BlockLayout, positions_by_rank
from helix_jax.mesh import CP, make_mesh
from helix_jax.training import ring
from helix_jax.training.ring import ring_attention, tile_for
from tests.reference import relative_error

B, S, N, K, H = 2, 96, 8, 2, 16
BLOCK = 4
KINDS = ("plain", "documents", "window", "sink", "latent")


MESHES = [(1, 1, 1), (1, 4, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Let shares of these short sequences have several tiles."""
    monkeypatch.setattr(ring, "_SMALLEST_TILE", 1)


def plain_attention(q_BTNH, k_BSKH, v_BSKH, document_start_BT, scale, window, sink_N):
    """Attend by the matrix of all pairs."""
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


def make_case(kind: str):
    """Return the arrays, document starts, window and value width of a kind of attention."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    kv_heads = 1 if kind == "latent" else K
    q, k, v = normal(B, S, N, H), normal(B, S, kv_heads, H), normal(B, S, kv_heads, H)
    document_start_BS = np.zeros((B, S), np.int32)
    if kind == "documents":
        document_start_BS[0, 30:], document_start_BS[0, 77:], document_start_BS[1, 5:] = 30, 77, 5
    sink = normal(N) if kind == "sink" else None
    arrays = {"q": q, "k": k} | ({} if kind == "latent" else {"v": v}) | ({} if sink is None else {"sink": sink})
    return arrays, document_start_BS, 9 if kind == "window" else None, 8 if kind == "latent" else None


def cotangent(v_width: int | None):
    return jnp.asarray(np.random.default_rng(1).normal(size=(B, S, N, v_width or H)), jnp.float32)


@cache
def expected(kind: str):
    """Return the outputs and gradients on one device."""
    arrays, document_start_BS, window, v_width = make_case(kind)

    def weighted_sum(arrays):
        v = arrays["k"][..., :v_width] if v_width else arrays["v"]
        starts = jnp.asarray(document_start_BS)
        o = plain_attention(arrays["q"], arrays["k"], v, starts, 0.3, window, arrays.get("sink"))
        return (o * cotangent(v_width)).sum(), o

    (_, o), gradients = jax.jit(jax.value_and_grad(weighted_sum, has_aux=True))(arrays)
    return np.asarray(o), gradients


def cases():
    """Return every mesh with every kind. In the fast tier, each mesh has another kind."""
    for i, mesh in enumerate(MESHES):
        for j, kind in enumerate(KINDS):
            is_fast = (j - 2 * i) % len(KINDS) == 0
            yield pytest.param(*mesh, kind, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(("tp", "cp", "dp", "kind"), list(cases()))
def test_outputs_and_gradients_equal_those_of_one_device(tp: int, cp: int, dp: int, kind: str):
    placement = ("striped", "helix")[(MESHES.index((tp, cp, dp)) + KINDS.index(kind)) % 2]
    layout, mesh = BlockLayout(cp, BLOCK, placement), make_mesh(tp, cp, dp)
    order = positions_by_rank(layout, S)
    arrays, document_start_BS, window, v_width = make_case(kind)

    def weighted_sum(arrays):
        q, k, v = (arrays[name][:, order] if name in arrays else None for name in "qkv")
        attention = ring_attention(mesh, layout, jnp.asarray(document_start_BS[:, order]))
        options = {"scale": 0.3, "window": window, "sink_N": arrays.get("sink"), "v_width": v_width}
        o = attention(q, k, v, None, **options)[0]
        return (o * cotangent(v_width)[:, order]).sum(), o

    (_, o), gradients = jax.block_until_ready(jax.jit(jax.value_and_grad(weighted_sum, has_aux=True))(arrays))
    expected_o, expected_gradients = expected(kind)
    np.testing.assert_allclose(np.asarray(o), expected_o[:, order], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-6, name


@pytest.fixture
def visited(monkeypatch) -> Counter:
    """Count the tiles whose scores are computed, by rank, while a program runs."""
    visited, scores = Counter(), ring._scores

    def counting(*arguments):
        jax.debug.callback(lambda rank: visited.update([int(rank)]), lax.axis_index(CP))
        return scores(*arguments)

    monkeypatch.setattr(ring, "_scores", counting)
    return visited


def test_every_rank_computes_the_same_half_of_the_tiles_forward_and_backward(visited: Counter):
    length, ranks = 1024, 4
    layout, mesh = BlockLayout(ranks, 4, "striped"), make_mesh(1, ranks)
    q, k = jnp.ones((1, length, 2, 4)), jnp.ones((1, length, 1, 4))
    attention = ring_attention(mesh, layout, jnp.zeros((1, length), jnp.int32))
    tile = tile_for(length // ranks)

    def fraction() -> float:
        jax.effects_barrier()
        assert max(visited.values()) <= 1.02 * min(visited.values())
        assert len(visited) == ranks
        return sum(visited.values()) * tile**2 / length**2

    def attend(q):
        return attention(q, k, k, None, scale=1.0)[0].sum()

    jax.block_until_ready(jax.jit(attend)(q))
    assert 0.5 < fraction() <= 0.55
    visited.clear()
    jax.block_until_ready(jax.jit(jax.grad(attend))(q))
    assert 1.0 < fraction() <= 1.1


def test_tiles_before_a_document_are_skipped(visited: Counter):
    length = 256
    document_start_BS = jnp.asarray(np.arange(length) // 16 * 16)[None]
    attention = ring_attention(make_mesh(1, 1), BlockLayout(1, 16, "striped"), document_start_BS)
    q = jnp.ones((1, length, 1, 4))
    jax.block_until_ready(attention(q, q, q, None, scale=1.0))
    jax.effects_barrier()
    assert visited.total() == length // tile_for(length)


@pytest.mark.parametrize(("slots", "tile"), [(32768, 512), (8192, 512), (4096, 256), (96, 6), (24, 1), (7, 1)])
def test_the_tile_divides_a_share_into_at_least_16_tiles(slots: int, tile: int):
    assert tile_for(slots) == tile


@pytest.mark.parametrize(("slots", "tile"), [(2048, 128), (256, 32), (96, 32), (24, 24), (7, 7)])
def test_the_tiles_of_a_short_share_are_not_tiny(monkeypatch, slots: int, tile: int):
    monkeypatch.undo()
    assert tile_for(slots) == tile


def test_a_sequence_that_the_ranks_cannot_share_evenly_is_an_error():
    q = jnp.ones((1, 40, 2, 4))
    attention = ring_attention(make_mesh(1, 4), BlockLayout(4, 4), jnp.zeros((1, 40), jnp.int32))
    with pytest.raises(ValueError, match=r"40 positions .* 4 ranks x blocks of 4: give 32 or 48"):
        attention(q, q, q, None, scale=1.0)
