"""Checks helix_attention on plain arrays: append, attend and combine on every rank, against float64 attention."""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import helix_jax.cache.pages
from helix_jax.arrays import put
from helix_jax.attention import Partial, merge
from helix_jax.cache import (
    CacheSpec,
    KVCache,
    Rows,
    append,
    fixed_page_table,
    make_cache,
    make_pool,
    per_row,
    ring_pages,
)
from helix_jax.combine import COMBINES, combine
from helix_jax.helix import helix_attention
from helix_jax.layout import PLACEMENTS
from helix_jax.mesh import TABLE_RBM, make_mesh
from helix_jax.plan import Plan
from helix_jax.quantisation import FLOAT8
from tests.reference import quantise_in_numpy, relative_error, softmax_attention

B, H, PAGE, SCALE = 4, 8, 4, 0.4
LAYERS = 2  # of which the second is used
PROMPT_LENS = (1, 30, 0, 17)  # shorter than a block, several blocks and a part of one, empty, another
MAX_LENS = (9, 61, 0, 40)

STATIC = ("group", "scale", "window", "v_width")
run = jax.jit(helix_attention, static_argnums=0, static_argnames=STATIC, donate_argnums=1)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def plan_on(tp: int, cp: int, placement: str = "helix", how: str = "psum", block: int = 3) -> Plan:
    return Plan(make_mesh(tp, cp), block, placement, how)


class Case(NamedTuple):
    """The shapes and options of `decode_all`. With `v_width`, the values are the first numbers of the keys."""

    heads: int = 8
    kv_heads: int = 2
    chunk: int = 7
    dtype: Any = jnp.float32
    fill: float = 0.0
    window: int | None = None
    sink_N: Any = None
    v_width: int | None = None
    ring: int | None = None  # pages per row and rank that are reused; None: no page is

    def make_cache(self, plan: Plan) -> tuple[KVCache, Rows]:
        latent = self.v_width is not None
        exact_width = H - self.v_width if self.v_width else 0
        spec = CacheSpec(LAYERS, self.kv_heads, H, self.dtype, latent, exact_width=exact_width)
        if self.ring is None:
            return make_cache(plan, spec, PROMPT_LENS, MAX_LENS, page=PAGE)
        cache = make_pool(plan, dataclasses.replace(spec, window=self.window), plan.layout.ranks * B * self.ring, PAGE)
        return cache, Rows((fixed_page_table(plan, B, self.ring),), per_row(plan, [0] * B), per_row(plan, PROMPT_LENS))


def decode_all(plan: Plan, case: Case) -> tuple[np.ndarray, np.ndarray, KVCache]:
    """Append whole rows in chunks to the last layer. Return the outputs, those of float64 attention, and the cache."""
    random, fp8 = np.random.default_rng(0), case.dtype == FLOAT8
    q_BSNH, *kv_BSKH = (
        jnp.asarray(random.normal(size=(B, max(MAX_LENS), heads, H)), jnp.float32 if fp8 else case.dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    k_BSKH, v_BSKH = kv_BSKH if case.v_width is None else (kv_BSKH[0], kv_BSKH[0][..., : case.v_width])
    cache, rows = case.make_cache(plan)
    cache = jax.tree.map(lambda pool: jnp.full_like(pool, case.fill), cache)
    options = {"layer": LAYERS - 1, "scale": SCALE}
    options |= {"window": case.window, "sink_N": case.sink_N, "v_width": case.v_width}

    outputs = [[] for _ in range(B)]
    for first in range(0, max(MAX_LENS), case.chunk):
        count_B = np.clip(np.asarray(MAX_LENS) - first, 0, case.chunk)
        q, k, v = (take_chunk(x, first, case.chunk, count_B) for x in (q_BSNH, k_BSKH, v_BSKH))
        o_BTNH, cache = run(
            plan, cache, q, k, v if case.v_width is None else None, rows, per_row(plan, count_B), **options
        )
        rows = rows._replace(length_B=per_row(plan, np.asarray(rows.length_B) + count_B))
        o_BTNH = np.asarray(o_BTNH, np.float64)
        for row, count in enumerate(count_B):
            outputs[row].append(o_BTNH[row, :count])
            assert (o_BTNH[row, count:] == 0).all() or np.isnan(o_BTNH[row]).all()
    if fp8:
        k_BSKH, v_BSKH = (
            quantise_in_numpy(x, exact=0 if case.v_width is None else H - case.v_width) for x in (k_BSKH, v_BSKH)
        )
        v_BSKH = v_BSKH if case.v_width is None else k_BSKH[..., : case.v_width]
    ours = np.concatenate([np.concatenate(row) for row in outputs])
    rows_of = zip(q_BSNH, k_BSKH, v_BSKH, MAX_LENS, strict=True)
    theirs = np.concatenate([expected(q[:n], k[:n], v[:n], case.window, case.sink_N) for q, k, v, n in rows_of])
    return ours, theirs, cache


def take_chunk(x_BSNH, first: int, size: int, count_B: np.ndarray) -> np.ndarray:
    """Return the next tokens. Those past a row's count are NaN: they must not be written, nor affect the others."""
    x_BTNH = np.array(x_BSNH[:, first : first + size])
    x_BTNH = np.pad(x_BTNH, [(0, 0), (0, size - x_BTNH.shape[1]), (0, 0), (0, 0)])
    x_BTNH[np.arange(size) >= count_B[:, None]] = np.nan
    return x_BTNH


def expected(q_TNH, k_TKH, v_TKH, window, sink_N) -> np.ndarray:
    position = np.arange(len(q_TNH))
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance < (window or len(position) + 1))
    o_TNH, lse_TN = softmax_attention(q_TNH, k_TKH, v_TKH, visible, SCALE)
    share_TN = 1 if sink_N is None else 1 / (1 + np.exp(np.asarray(sink_N, np.float64) - lse_TN))
    return o_TNH * np.broadcast_to(share_TN, lse_TN.shape)[..., None]


def assert_exact(plan: Plan, case: Case, bound: float = 2e-6) -> KVCache:
    ours, theirs, cache = decode_all(plan, case)
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= bound
    return cache


@pytest.mark.parametrize("how", COMBINES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_sharded_attention_equals_float64(placement: str, how: str):
    assert_exact(plan_on(2, 4, placement, how), Case())


def placements_and(windows: list[int]) -> list:
    """Return every placement with every window. In the fast tier, each placement has another window."""
    return [
        pytest.param(placement, window, marks=() if i == j else pytest.mark.slow)
        for i, placement in enumerate(PLACEMENTS)
        for j, window in enumerate(windows)
    ]


@pytest.mark.parametrize(("placement", "window"), placements_and([1, 5, 1000]))
def test_windows_equal_float64(placement: str, window: int):
    """Shorter than a block, across several ranks, and longer than any row. Slots that are not written are NaN."""
    assert_exact(plan_on(2, 4, placement), Case(window=window, fill=np.nan))


@pytest.mark.parametrize(("placement", "window"), placements_and([1, 5, 14]))
def test_a_window_needs_only_a_ring_of_pages(placement: str, window: int):
    """The rows are up to five times as long as what the pages of all ranks hold of them."""
    plan = plan_on(2, 4, placement)
    case = Case(window=window, fill=np.nan, chunk=3)
    assert_exact(plan, case._replace(ring=ring_pages(plan.layout, window, case.chunk, PAGE)))


def test_a_ring_that_is_too_small_gives_nan_and_no_wrong_number():
    """Negative control of the test above. A row is NaN from where its window no longer fits."""
    plan = plan_on(2, 4, "last_rank")
    assert ring_pages(plan.layout, 14, 3, PAGE) == 5
    ours, theirs, _ = decode_all(plan, Case(window=14, chunk=3, ring=3))
    exact = ~np.isnan(ours).any((1, 2))
    assert 0 < exact.sum() < len(exact)
    assert relative_error(ours[exact], theirs[exact]) <= 2e-6


def rows_of_every_kind(plan: Plan, window: int | None) -> tuple[Rows, np.ndarray, list[bool]]:
    """Return rows with prompts of 5 tokens and pages for 12 slots on each rank, counts of up to 3, and what is right.

    Their positions are a good row, one that is idle, one beyond its pages, too many new tokens, a negative count, a
    negative length, a negative prompt, and a page that is missing on the rank of the last position.
    """
    table_BM = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
    table_RBM = np.tile(table_BM, (4, 1, 1))
    table_RBM[plan.layout.owner(10, 5), 7, plan.layout.slot(10, 5) // PAGE] = -1
    length_B, count_B = [10, 10, 60, 10, 10, -1, 10, 9], np.asarray([3, 0, 3, 4, -1, 3, 3, 2])
    prompt_len_B = [5, 5, 5, 5, 5, 5, -5, 5]
    if window:  # the pages are a ring, which no length exceeds
        length_B[2], count_B[2] = 0, 3
    rows = Rows((put(table_RBM, plan.mesh, TABLE_RBM),), per_row(plan, length_B), per_row(plan, prompt_len_B))
    return rows, count_B, [True, True, bool(window), *[False] * 5]


@pytest.mark.parametrize(
    ("how", "window"),
    [("psum", None), ("all_to_all", 5), slow("psum_scatter", None), slow("all_to_all", None), slow("psum", 5)],
)
def test_rows_with_impossible_numbers_are_nan_under_jit_and_no_other_row_changes(how: str, window: int | None):
    """Also if the sum of a rank's weights is zero beside a sink."""
    plan = plan_on(2, 4, how=how)
    spec = CacheSpec(LAYERS, 2, H, jnp.float32, window=window)
    rows, count_B, valid_B = rows_of_every_kind(plan, window)
    random = np.random.default_rng(0)
    new = [jnp.asarray(random.normal(size=(8, 3, heads, H)), jnp.float32) for heads in (8, 2, 2)]
    options = {"scale": SCALE, "window": window, "sink_N": jnp.full(8, 40.0)}

    def attend(rows: Rows, count_B: np.ndarray, layer: int, call: Callable[..., Any] = run) -> np.ndarray:
        cache = jax.tree.map(jnp.ones_like, make_pool(plan, spec, 4 * 8 * 3, PAGE))
        return np.asarray(call(plan, cache, *new, rows, per_row(plan, count_B), layer=jnp.int32(layer), **options)[0])

    o_BTNH = attend(rows, count_B, 1)
    for row, valid in enumerate(valid_B):
        assert np.isfinite(o_BTNH[row]).all() if valid else np.isnan(o_BTNH[row]).all(), row
    alone = np.where(valid_B, count_B, 0)
    reset = rows._replace(
        length_B=per_row(plan, np.where(valid_B, rows.length_B, 0)), prompt_len_B=per_row(plan, [5] * 8)
    )
    np.testing.assert_array_equal(attend(reset, alone, 1)[valid_B], o_BTNH[valid_B])
    np.testing.assert_array_equal(attend(reset, alone, 1, helix_attention), attend(reset, alone, 1))
    with pytest.raises(ValueError, match="length_B of row 5 is -1: give 0 or more"):
        attend(rows, count_B, 1, helix_attention)
    for layer in (-1, LAYERS):
        assert np.isnan(attend(reset, alone, layer)).all()


@pytest.mark.parametrize("window", [None, 6])
def test_a_window_beyond_what_the_cache_keeps_is_rejected(window: int | None):
    plan = plan_on(1, 2)
    cache, rows = Case(window=5, ring=2).make_cache(plan)
    q, k = np.ones((B, 1, 8, H), np.float32), np.ones((B, 1, 2, H), np.float32)
    with pytest.raises(ValueError, match=f"the window is {window}, but the cache keeps 5 positions: give at most 5"):
        helix_attention(plan, cache, q, k, k, rows, per_row(plan, [1] * B), scale=1.0, window=window)


@pytest.mark.parametrize(
    ("tp", "cp", "how", "window"),
    [
        (2, 4, "psum", None),
        (2, 4, "psum_scatter", 4),
        (1, 8, "all_to_all", 4),
        (1, 1, "psum", None),
        *[slow(1, 8, "psum", 4), slow(1, 8, "psum_scatter", None), slow(2, 4, "all_to_all", None)],
        slow(1, 1, "all_to_all", 4),
    ],
)
def test_sinks_count_once_in_the_softmax(tp: int, cp: int, how: str, window: int | None):
    """Per head, on any number of ranks, also if a window leaves most ranks empty, and for any size of the sink."""
    sink_N = jnp.asarray([-1e30, -3, 0, 0.5, 1, 2, 5, 40], jnp.float32)
    assert_exact(plan_on(tp, cp, "helix", how), Case(chunk=16, window=window, sink_N=sink_N))


@pytest.mark.parametrize(
    ("tp", "cp", "how"),
    [
        *[(1, 8, "psum"), (1, 8, "all_to_all"), (2, 4, "psum_scatter"), (2, 4, "all_to_all"), (8, 1, "psum")],
        *[slow(1, 8, "psum_scatter"), slow(2, 4, "psum"), slow(8, 1, "psum_scatter"), slow(8, 1, "all_to_all")],
    ],
)
def test_latent_attention_equals_float64(tp: int, cp: int, how: str):
    """One key for all heads, whose first numbers are the value; every device of tp stores it."""
    cache = assert_exact(plan_on(tp, cp, "helix", how), Case(16, 1, v_width=6, fill=np.nan))
    assert cache.spec.latent
    assert cache.pool_XKWH.shape[1] == 1


@pytest.mark.parametrize("v_width", [None, 5])
def test_pages_can_be_wider_than_heads(v_width: int | None, monkeypatch):
    """As on TPUs, where pages store a multiple of 128 numbers per head."""
    monkeypatch.setattr(helix_jax.cache.pages, "stored_width", lambda width, device: -(-width // 128) * 128)
    cache = assert_exact(plan_on(2, 4), Case(kv_heads=1 if v_width else 2, v_width=v_width, fill=np.nan))
    assert cache.pool_XKWH.shape[-1] == 128


def split_pool(cache: KVCache, ranks: int) -> np.ndarray:
    """Return the pool with an axis for each rank, layer and part: [R, L, C, A, K, W, H]."""
    _, *page = cache.pool_XKWH.shape
    return np.asarray(cache.pool_XKWH).reshape(ranks, cache.spec.layers, cache.spec.parts, -1, *page)


def stored_numbers(cache) -> int:
    """Return how many numbers all devices store together, copies included."""
    return sum(shard.data.size for pool in jax.tree.leaves(cache) for shard in pool.addressable_shards)


@pytest.mark.parametrize(("tp", "cp"), [(1, 8), (2, 4), (4, 2), (1, 1)])
def test_a_latent_cache_stores_one_vector_per_slot_on_each_device_of_tp(tp: int, cp: int):
    """With DeepSeek's 512 + 64 numbers, which are not copied per head."""
    plan = plan_on(tp, cp, block=16)
    cache, rows = make_cache(plan, CacheSpec(3, 1, 512 + 64, jnp.bfloat16, latent=True), [100, 7], [200, 150], page=16)
    slots = rows.tables_RBM[0].size * 16
    assert slots >= 350
    assert stored_numbers(cache) == (512 + 64) * 3 * slots * tp


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 8), (2, 4), (4, 2), (8, 1)])
def test_a_cache_of_grouped_heads_is_sharded_over_tp_and_cp(tp: int, cp: int):
    """Each device stores 1 / (tp cp) of the bytes, and no number is stored twice."""
    cache, _ = make_cache(plan_on(tp, cp, block=16), CacheSpec(2, 8, 4, jnp.float32), [1024], [2048], page=16)
    for pool in jax.tree.leaves(cache):
        assert {shard.data.nbytes for shard in pool.addressable_shards} == {2 * 2 * 2048 * 8 * 4 * 4 // (tp * cp)}


@pytest.mark.parametrize("how", ["psum", slow("psum_scatter"), slow("all_to_all")])
def test_a_bfloat16_cache_has_an_error_of_at_most_4e_3(how: str):
    assert_exact(plan_on(1, 8, "helix", how), Case(dtype=jnp.bfloat16), 4e-3)


@pytest.mark.parametrize(
    ("plan", "case"),
    [
        ((2, 4, "helix", "psum"), Case()),
        ((1, 8, "striped", "all_to_all"), Case(window=5)),
        slow((2, 4, "last_rank", "psum_scatter"), Case()),
        ((2, 4, "helix", "psum"), Case(8, 1, v_width=6)),
        slow((1, 1, "helix", "psum"), Case(8, 1, v_width=6)),
    ],
)
def test_an_fp8_cache_stores_what_numpy_quantises(plan, case: Case):
    """The only error is that of the quantisation. Slots that are not written are NaN, and so are their scales."""
    cache = assert_exact(plan_on(*plan), case._replace(dtype=FLOAT8, fill=np.nan))
    numbers, scales, *exact = jax.tree.leaves(cache)
    assert [x.dtype for x in (numbers, scales, *exact)] == [FLOAT8, jnp.float32, jnp.bfloat16][: 2 + len(exact)]
    assert len({x.shape[:3] for x in (numbers, scales, *exact)}) == 1
    assert [x.shape[3] for x in exact] == ([2] if case.v_width else [])


def test_a_latent_that_scales_cannot_share_is_rejected():
    with pytest.raises(ValueError, match="cannot divide the 257 numbers of a latent among 3 scales: choose another"):
        CacheSpec(1, 1, 257 + 64, FLOAT8, latent=True, exact_width=64)


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 3), (2, 3), slow(1, 5), slow(3, 2), (1, 7), slow(8, 1)])
def test_meshes_need_not_be_powers_of_two(tp: int, cp: int):
    assert_exact(plan_on(tp, cp), Case(tp * cp * 2, tp, chunk=16))


def test_rows_can_be_sharded_over_dp():
    assert_exact(Plan(make_mesh(tp=2, cp=2, dp=2), 3), Case())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nan_in_every_unused_slot_changes_nothing(placement: str):
    """If all pages start as NaN, the slots that are not written stay NaN, on empty ranks and in idle rows too."""
    clean, _, _ = decode_all(plan_on(2, 4, placement), Case())
    poisoned, _, cache = decode_all(plan_on(2, 4, placement), Case(fill=np.nan))
    np.testing.assert_array_equal(poisoned, clean)
    written = ~np.isnan(split_pool(cache, 4)).any((4, 6))
    # Each position once, on one rank, as a key and as a value, and none in the other layer.
    assert written.sum((0, 3, 4)).tolist() == [[0, 0], [sum(MAX_LENS)] * 2]


def test_nan_in_a_used_slot_changes_the_result():
    """The negative control of the test above."""
    plan = plan_on(2, 4)
    cache, rows = make_cache(plan, CacheSpec(1, 2, H, jnp.float32), [5], [8], page=PAGE)
    q, k, v = (np.ones((1, 5, heads, H), np.float32) for heads in (8, 2, 2))
    count = per_row(plan, [5])
    _, cache = run(plan, cache, q, k, v, rows, count, scale=SCALE)
    # Slot 0 of rank 0 stores position 0, and its values follow the pages of keys.
    cache = cache._replace(pool_XKWH=cache.pool_XKWH.at[cache.pages // 4, :, 0].set(jnp.nan))
    rows = rows._replace(length_B=count)
    o_BTNH, _ = run(plan, cache, q, k, v, rows, per_row(plan, [1]), scale=SCALE)
    assert np.isnan(o_BTNH[:, 0]).all()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_position_is_stored_where_the_layout_says(placement: str):
    """The keys are the positions themselves, and are read back from the pools, rank by rank, slot by slot."""
    plan = plan_on(1, 4, placement)
    cache, rows = make_cache(plan, CacheSpec(1, 4, 2, jnp.float32), [11, 2], [40, 30], page=PAGE)
    for position in range(40):
        k = np.full((2, 1, 4, 2), position, np.float32)
        count_B = np.asarray([1, position < 30])
        _, cache = run(plan, cache, k, k, k, rows, per_row(plan, count_B), scale=SCALE)
        rows = rows._replace(length_B=per_row(plan, np.asarray(rows.length_B) + count_B))
    k_RAW = split_pool(cache, 4)[:, 0, 0, :, 0, :, 0]
    table_RBM = np.asarray(rows.tables_RBM[0])
    for row, (prompt_len, length) in enumerate([(11, 40), (2, 30)]):
        for position in range(length):
            rank, slot = plan.layout.owner(position, prompt_len), plan.layout.slot(position, prompt_len)
            page = table_RBM[rank, row, slot // PAGE]
            assert k_RAW[rank, page, slot % PAGE] == position


@pytest.mark.parametrize(("table", "slots"), [([[0, 1], [2, 3]], [4, 3]), ([[0, -1], [2, 3]], [2, 3])])
def test_a_token_without_a_page_is_dropped(table, slots):
    """Past the table, or at an entry that an allocator marked as free. It does not overwrite another slot."""
    cache = KVCache(jnp.zeros((3 * 2 * 4, 1, 2, 3)), CacheSpec(3, 1, 3, jnp.float32))
    new = jnp.ones((2, 1, 1, 3))
    owned = jnp.asarray([[True], [True]])
    after = append(cache, jnp.int32(1), new, 2 * new, jnp.asarray(table), jnp.asarray(slots)[:, None], owned)
    [written_LCAKWH] = split_pool(after, 1)
    keys, values = written_LCAKWH[1].sum(-1).reshape(2, -1).tolist()
    assert (keys, values) == ([0, 0, 0, 0, 0, 0, 0, 3], [0, 0, 0, 0, 0, 0, 0, 6])
    assert not written_LCAKWH[[0, 2]].any()


def test_the_three_combines_agree_and_ignore_empty_ranks():
    mesh = make_mesh(1, 8)
    random = np.random.default_rng(0)
    lse = random.normal(size=(8, 2, 3, 16)) * 10
    lse[random.random(lse.shape) < 0.4] = -np.inf
    lse[:, 0, 0] = -np.inf  # empty on all ranks
    o = np.where(np.isneginf(lse)[..., None], 0, random.normal(size=(*lse.shape, 4)))
    o, lse = jnp.asarray(o, jnp.float32), jnp.asarray(lse, jnp.float32)

    def combine_shard(how, o_RBTNH, lse_RBTN):
        return combine(Partial(o_RBTNH[0], lse_RBTN[0]), how)

    P = jax.sharding.PartitionSpec
    merged = merge(Partial(o, lse))
    for how in COMBINES:
        sharded = jax.shard_map(
            functools.partial(combine_shard, how),
            mesh=mesh,
            in_specs=(P("cp"), P("cp")),
            out_specs=Partial(P(None, None, "cp"), P(None, None, "cp")),
        )
        combined = jax.jit(sharded)(o, lse)
        np.testing.assert_allclose(combined.lse_BTN, merged.lse_BTN, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(combined.o_BTNH, merged.o_BTNH, rtol=1e-5, atol=1e-6)
        assert not np.isnan(combined.o_BTNH).any()


@pytest.mark.parametrize("how", ["psum", slow("psum_scatter"), "all_to_all"])
@pytest.mark.parametrize(("tp", "cp", "heads", "kv_heads"), [slow(1, 4, 9, 3), (2, 4, 6, 2), slow(1, 8, 9, 1)])
def test_cp_need_not_divide_the_heads(how: str, tp: int, cp: int, heads: int, kv_heads: int):
    """Zeros follow the heads of each tp rank, so that there are as many for each of its cp ranks."""
    plan, case = plan_on(tp, cp, how=how), Case(heads, kv_heads, chunk=16)
    ours, theirs, _ = decode_all(plan, case)
    missing = -(heads // tp) % cp
    ours = ours.reshape(len(ours), tp, heads // tp + missing, H)
    assert (ours[:, :, heads // tp :] == 0).all()
    assert relative_error(ours[:, :, : heads // tp].reshape(theirs.shape), theirs) <= 2e-6


def test_an_unknown_combine_is_rejected():
    partial = Partial(np.zeros((1, 1, 8, 2), np.float32), np.zeros((1, 1, 8), np.float32))
    P = jax.sharding.PartitionSpec
    combine_shard = jax.shard_map(
        functools.partial(combine, how="ring"), mesh=make_mesh(1, 4), in_specs=(Partial(P(), P()),), out_specs=P("cp")
    )
    with pytest.raises(ValueError, match="choose one of psum, ps"):
        jax.eval_shape(combine_shard, partial)


@pytest.mark.parametrize(
    ("prompt_lens", "max_lens", "change", "error", "message"),
    [
        ([3], [4], {"page": 0}, ValueError, "page is 0: give at least 1"),
        ([3], [4], {"page": True}, TypeError, "page is True: give a whole number"),
        ([3, 9], [4, 8], {}, ValueError, "row 1: a prompt of 9 tokens exceeds its max_len 8"),
        ([1, 1, 1], [1, 1, 1], {}, ValueError, "dp 2 does not divide 3 rows: give a positive multiple of 2"),
        ([], [], {}, ValueError, "dp 2 does not divide 0 rows: give a positive multiple of 2"),
        ([1, 1], [4], {}, ValueError, "2 prompt_lens, but 1 max_lens: give one of each per row"),
        ([1, 1], [4, 4], {"kv_heads": 3}, ValueError, "tp 2 neither divides the 3 key/value heads nor is a"),
    ],
)
def test_an_invalid_cache_is_rejected(prompt_lens, max_lens, change, error, message):
    dp = 1 if len(prompt_lens) == 1 or max_lens == [4, 8] else 2
    plan = Plan(make_mesh(2, 2, dp))
    options = {"page": 4, "kv_heads": 2} | change
    spec = CacheSpec(1, options["kv_heads"], 8, jnp.float32)
    with pytest.raises(error, match=message):
        make_cache(plan, spec, prompt_lens, max_lens, page=options["page"])


def test_heads_that_tp_does_not_divide_are_rejected():
    q, k = np.ones((1, 1, 12, H), np.float32), np.ones((1, 1, 6, H), np.float32)
    cache = KVCache(jnp.ones((2 * 8, 6, PAGE, H)), CacheSpec(1, 6, H, jnp.float32))
    rows = Rows((jnp.zeros((8, 1, 1), jnp.int32),), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    count = jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="tp 5 does not divide the 12 query heads: choose a tp that does"):
        helix_attention(plan_on(5, 1), cache, q, k, k, rows, count, scale=1.0)
    with pytest.raises(ValueError, match="there are 3 key/value heads, but with tp 2 the cache stores 6: give 6"):
        helix_attention(plan_on(2, 2), cache, q, k[:, :, :3], k[:, :, :3], rows, count, scale=1.0)
    with pytest.raises(ValueError, match="window is 0: give at least 1"):
        helix_attention(plan_on(1, 2), cache, q, k, k, rows, count, scale=1.0, window=0)


def test_a_mesh_over_several_tpu_slices_is_rejected():
    chips = [SimpleNamespace(platform="tpu", slice_index=number // 2) for number in range(4)]
    with pytest.raises(ValueError, match="the devices belong to 2 TPU slices: pass the devices of one slice"):
        make_mesh(1, 4, devices=chips)


def test_a_mesh_without_sizes_puts_all_devices_on_cp():
    assert dict(make_mesh().shape) == {"dp": 1, "tp": 1, "cp": 8}
    assert dict(make_mesh(tp=2).shape) == {"dp": 1, "tp": 2, "cp": 4}
    assert dict(make_mesh(tp=2, dp=2).shape) == {"dp": 2, "tp": 2, "cp": 2}


def test_an_invalid_mesh_is_rejected():
    with pytest.raises(ValueError, match="tp 4 x cp 4 needs 16 devices, but there are 8 of platform 'cpu'"):
        make_mesh(4, 4)
    with pytest.raises(ValueError, match="cp is 0: give at least 1"):
        make_mesh(1, 0)
    with pytest.raises(ValueError, match="tp is 0: give at least 1"):
        make_mesh(0)
    with pytest.raises(TypeError, match="dp is True: give a whole number"):
        make_mesh(1, 1, True)


def test_an_invalid_plan_is_rejected():
    mesh = make_mesh(2, 4)
    with pytest.raises(ValueError, match="block is 0: give at least 1"):
        Plan(mesh, 0)
    with pytest.raises(ValueError, match="placement is 'spiral': choose one of helix, striped, last_rank"):
        Plan(mesh, placement="spiral")
    with pytest.raises(ValueError, match="combine is 'ring': choose one of psum, psum_scatter, all_to_all"):
        Plan(mesh, combine="ring")
    with pytest.raises(ValueError, match="kernel is 'triton': choose one of auto, xla"):
        Plan(mesh, kernel="triton")
    with pytest.raises(ValueError, match="experts is 'tp': choose one of flat, cp"):
        Plan(mesh, experts="tp")
    for other in (
        jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
        jax.make_mesh((1, 4, 2), ("dp", "cp", "tp"), axis_types=(AxisType.Auto,) * 3),
        jax.make_mesh((1, 2, 4), ("dp", "tp", "cp"), axis_types=(AxisType.Explicit,) * 3),
    ):
        with pytest.raises(ValueError, match="create the mesh with helix_jax.make_mesh"):
            Plan(other)
