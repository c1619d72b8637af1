"""The island on plain arrays: append, attend and combine on every rank, against float64 attention on one."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from helix_jax.attention import Partial, merge
from helix_jax.cache import Pages, Rows, append, make_cache, per_row
from helix_jax.combine import COMBINES, combine
from helix_jax.helix import helix_attention
from helix_jax.layout import PLACEMENTS, BlockLayout
from helix_jax.mesh import make_mesh
from helix_jax.plan import Plan
from tests.reference import relative_error, softmax_attention

B, H, PAGE, SCALE = 4, 8, 4, 0.4
PROMPTS, MOST = (1, 30, 0, 17), (9, 61, 0, 40)  # shorter than a block, not a multiple of one, idle, another

STATIC = ("scale", "window", "v_width")
run = jax.jit(helix_attention, static_argnums=0, static_argnames=STATIC, donate_argnums=1)


def plan_of(tp: int, cp: int, placement: str = "helix", how: str = "psum", block: int = 3) -> Plan:
    return Plan(make_mesh(tp, cp), block, placement, how)


def decode_all(
    plan: Plan,
    heads: int,
    kv_heads: int,
    chunk: int,
    dtype,
    *,
    fill: float = 0.0,
    window: int | None = None,
    sink_N=None,
    v_width: int | None = None,
):
    """Feeds whole rows through the island in chunks; returns outputs beside those of float64 attention.

    v_width: of latent attention, whose values are the first numbers of its keys.
    """
    latent = v_width is not None
    how = {"scale": SCALE, "window": window, "sink_N": sink_N, "v_width": v_width}
    random = np.random.default_rng(0)
    q_BSNH = jnp.asarray(random.normal(size=(B, max(MOST), heads, H)), dtype)
    k_BSKH, v_BSKH = (jnp.asarray(random.normal(size=(B, max(MOST), kv_heads, H)), dtype) for _ in "kv")
    if latent:
        v_BSKH = k_BSKH[..., :v_width]
    shape = {"layers": 1, "kv_heads": kv_heads, "head_width": H, "dtype": dtype, "latent": latent}
    ([pages],), rows = make_cache(plan, PROMPTS, MOST, page=PAGE, **shape)
    pages = jax.tree.map(lambda pool: jnp.full_like(pool, fill), pages)

    outputs = [[] for _ in range(B)]
    for first in range(0, max(MOST), chunk):
        # What lies past a row's count is poison: it must not be written, nor touch the others.
        count_B = np.clip(np.asarray(MOST) - first, 0, chunk)
        new = []
        for x in (q_BSNH, k_BSKH, v_BSKH):
            x = np.array(x[:, first : first + chunk])
            x = np.pad(x, [(0, 0), (0, chunk - x.shape[1]), (0, 0), (0, 0)])
            for row, count in enumerate(count_B):
                x[row, count:] = np.nan
            new.append(jnp.asarray(x))
        new = (*new[:2], None) if latent else new
        o_BTNH, pages = run(plan, pages, *new, rows, per_row(plan, count_B), **how)
        rows = rows._replace(length_B=rows.length_B + per_row(plan, count_B))
        for row, count in enumerate(count_B):
            outputs[row].append(np.asarray(o_BTNH[row, :count], np.float64))
            assert (np.asarray(o_BTNH[row, count:]) == 0).all()
    ours = np.concatenate([np.concatenate(row) for row in outputs])
    theirs = np.concatenate(
        [expected(q[:n], k[:n], v[:n], window, sink_N) for q, k, v, n in zip(q_BSNH, k_BSKH, v_BSKH, MOST, strict=True)]
    )
    return ours, theirs, pages


def expected(q_TNH, k_TKH, v_TKH, window, sink_N) -> np.ndarray:
    position = np.arange(len(q_TNH))
    behind = position[:, None] - position
    seen = (behind >= 0) & (behind < (window or len(position) + 1))
    o_TNH, lse_TN = softmax_attention(q_TNH, k_TKH, v_TKH, seen, SCALE)
    share_TN = 1 if sink_N is None else 1 / (1 + np.exp(np.asarray(sink_N, np.float64) - lse_TN))
    return o_TNH * np.broadcast_to(share_TN, lse_TN.shape)[..., None]


@pytest.mark.parametrize("how", COMBINES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_sharded_attention_equals_float64(placement: str, how: str):
    ours, theirs, _ = decode_all(plan_of(2, 4, placement, how), 8, 2, 7, jnp.float32)
    assert relative_error(ours, theirs) <= 2e-6


@pytest.mark.parametrize("window", [1, 5, 1000])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_windows_see_what_float64_sees_in_them(placement: str, window: int):
    """Shorter than a block, across several ranks, and longer than any row; with a NaN in every slot not written."""
    ours, theirs, _ = decode_all(plan_of(2, 4, placement), 8, 2, 7, jnp.float32, window=window, fill=np.nan)
    assert relative_error(ours, theirs) <= 2e-6


@pytest.mark.parametrize("how", COMBINES)
def test_sinks_take_their_share_once(how: str):
    """Per head, over whichever ranks, also where a window leaves most ranks empty, and however large the sink."""
    sink_N = jnp.asarray([-1e30, -3, 0, 0.5, 1, 2, 5, 40], jnp.float32)
    for tp, cp in ((2, 4), (1, 8), (1, 1)):
        for window in (None, 4):
            plan = plan_of(tp, cp, "helix", how)
            ours, theirs, _ = decode_all(plan, 8, 2, 16, jnp.float32, window=window, sink_N=sink_N)
            assert relative_error(ours, theirs) <= 2e-6


@pytest.mark.parametrize("how", COMBINES)
@pytest.mark.parametrize(("tp", "cp"), [(1, 8), (2, 4), (8, 1)])
def test_latent_attention_equals_float64(tp: int, cp: int, how: str):
    """One key for all heads, whose first numbers are the value; every device of tp holds it."""
    ours, theirs, pages = decode_all(plan_of(tp, cp, "helix", how), 16, 1, 7, jnp.float32, v_width=6, fill=np.nan)
    assert ours.shape[-1] == 6
    assert relative_error(ours, theirs) <= 2e-6
    assert pages.v_AKWH is None


@pytest.mark.parametrize("v_width", [None, 5])
def test_pages_that_are_stored_wider_than_heads_give_the_same(v_width: int | None, monkeypatch):
    """As they are on TPUs, in lanes of 128."""
    monkeypatch.setattr(Plan, "stored_width", lambda self, width: -(-width // 128) * 128)
    kv_heads = 1 if v_width else 2
    ours, theirs, pages = decode_all(plan_of(2, 4), 8, kv_heads, 7, jnp.float32, v_width=v_width, fill=np.nan)
    assert pages.k_AKWH.shape[-1] == 128
    assert relative_error(ours, theirs) <= 2e-6


def numbers_held(cache) -> int:
    """By all devices together, copies included."""
    return sum(shard.data.size for pool in jax.tree.leaves(cache) for shard in pool.addressable_shards)


@pytest.mark.parametrize(("tp", "cp"), [(1, 8), (2, 4), (4, 2), (1, 1)])
def test_the_latent_cache_holds_one_vector_per_slot_for_each_of_tp(tp: int, cp: int):
    """DeepSeek's shape: 512 + 64 numbers, not copied per head. Counted on the devices."""
    plan = plan_of(tp, cp, block=16)
    shape = {"layers": 3, "kv_heads": 1, "head_width": 512 + 64, "dtype": jnp.bfloat16, "latent": True}
    cache, rows = make_cache(plan, [100, 7], [200, 150], page=16, **shape)
    slots = rows.table_RBM.size * 16
    assert slots >= 350
    assert numbers_held(cache) == (512 + 64) * 3 * slots * tp


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 8), (2, 4), (4, 2), (8, 1)])
def test_a_cache_of_grouped_heads_is_shared_by_tp_and_cp(tp: int, cp: int):
    """The same positions: 1 / (tp cp) of the bytes on each device, and no number twice."""
    shape = {"layers": 2, "kv_heads": 8, "head_width": 4, "dtype": jnp.float32}
    cache, _ = make_cache(plan_of(tp, cp, block=16), [1024], [2048], page=16, **shape)
    for pool in jax.tree.leaves(cache):
        assert {shard.data.nbytes for shard in pool.addressable_shards} == {2048 * 8 * 4 * 4 // (tp * cp)}


@pytest.mark.parametrize("how", COMBINES)
def test_a_bfloat16_cache_costs_4e_3(how: str):
    ours, theirs, _ = decode_all(plan_of(1, 8, "helix", how), 8, 2, 7, jnp.bfloat16)
    assert relative_error(ours, theirs) <= 4e-3


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 3), (2, 3), (1, 5), (3, 2), (1, 7), (8, 1)])
def test_meshes_need_not_be_powers_of_two(tp: int, cp: int):
    ours, theirs, _ = decode_all(plan_of(tp, cp), tp * cp * 2, tp, 16, jnp.float32)
    assert relative_error(ours, theirs) <= 2e-6


def test_rows_may_lie_on_dp():
    mesh = make_mesh(tp=2, cp=2, dp=2)
    ours, theirs, _ = decode_all(Plan(mesh, 3), 8, 2, 7, jnp.float32)
    assert relative_error(ours, theirs) <= 2e-6


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nan_in_every_unused_slot_changes_nothing(placement: str):
    """All pages start as NaN: whatever is not written stays NaN, on empty ranks and in idle rows too."""
    clean, _, _ = decode_all(plan_of(2, 4, placement), 8, 2, 7, jnp.float32)
    poisoned, _, pages = decode_all(plan_of(2, 4, placement), 8, 2, 7, jnp.float32, fill=np.nan)
    np.testing.assert_array_equal(poisoned, clean)
    written = ~np.isnan(np.asarray(pages.k_AKWH)).any((1, 3))
    assert written.sum() == sum(MOST)  # each position once, on one rank


def test_a_used_slot_that_is_nan_does_change_the_result():
    """The control of the test above."""
    plan = plan_of(2, 4)
    shape = {"layers": 1, "kv_heads": 2, "head_width": H, "dtype": jnp.float32}
    ([pages],), rows = make_cache(plan, [5], [8], page=PAGE, **shape)
    q, k, v = (jnp.ones((1, 5, heads, H)) for heads in (8, 2, 2))
    count = per_row(plan, [5])
    _, pages = run(plan, pages, q, k, v, rows, count, scale=SCALE)
    rows = rows._replace(length_B=count)
    pages = Pages(pages.k_AKWH, pages.v_AKWH.at[0, :, 0].set(jnp.nan))  # slot 0 of rank 0 holds position 0
    o_BTNH, _ = run(plan, pages, q[:, :1], k[:, :1], v[:, :1], rows, per_row(plan, [1]), scale=SCALE)
    assert np.isnan(o_BTNH).all()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_position_lies_where_the_layout_says(placement: str):
    """The keys are the positions themselves: read the pools back, rank by rank, slot by slot."""
    plan = plan_of(1, 4, placement)
    shape = {"layers": 1, "kv_heads": 4, "head_width": 2, "dtype": jnp.float32}
    ([pages],), rows = make_cache(plan, [11, 2], [40, 30], page=PAGE, **shape)
    for position in range(40):
        k = jnp.full((2, 1, 4, 2), position, jnp.float32)
        count_B = per_row(plan, [1, position < 30])
        _, pages = run(plan, pages, k, k, k, rows, count_B, scale=SCALE)
        rows = rows._replace(length_B=rows.length_B + count_B)
    k_RAW = np.asarray(pages.k_AKWH)[:, 0, :, 0].reshape(4, -1, PAGE)
    for row, (prompt_len, length) in enumerate([(11, 40), (2, 30)]):
        for position in range(length):
            rank, slot = plan.layout.owner(position, prompt_len), plan.layout.slot(position, prompt_len)
            page = np.asarray(rows.table_RBM)[rank, row, slot // PAGE]
            assert k_RAW[rank, page, slot % PAGE] == position


@pytest.mark.parametrize(("table", "slots"), [([[0, 1], [2, 3]], [4, 3]), ([[0, -1], [2, 3]], [2, 3])])
def test_a_token_that_finds_no_page_is_dropped_not_misplaced(table, slots):
    """Past the table, or at an entry that an allocator has marked as free."""
    pages = Pages(jnp.zeros((4, 1, 2, 3)), jnp.zeros((4, 1, 2, 3)))
    new = jnp.ones((2, 1, 1, 3))
    owned = jnp.asarray([[True], [True]])
    after = append(pages, new, new, jnp.asarray(table), jnp.asarray(slots)[:, None], owned)
    assert np.asarray(after.k_AKWH).sum(-1).reshape(-1).tolist() == [0, 0, 0, 0, 0, 0, 0, 3]


def test_the_three_combines_agree_and_empty_ranks_are_nothing():
    mesh = make_mesh(1, 8)
    random = np.random.default_rng(0)
    lse = random.normal(size=(8, 2, 3, 16)) * 10
    lse[random.random(lse.shape) < 0.4] = -np.inf
    lse[:, 0, 0] = -np.inf  # nothing anywhere
    o = np.where(np.isneginf(lse)[..., None], 0, random.normal(size=(*lse.shape, 4)))
    o, lse = jnp.asarray(o, jnp.float32), jnp.asarray(lse, jnp.float32)

    def sharded(how, o_RBTNH, lse_RBTN):
        return combine(Partial(o_RBTNH[0], lse_RBTN[0]), how)

    P = jax.sharding.PartitionSpec
    whole = merge(Partial(o, lse))
    for how in COMBINES:
        met = jax.shard_map(
            functools.partial(island, how),
            mesh=mesh,
            in_specs=(P("cp"), P("cp")),
            out_specs=Partial(P(None, None, "cp"), P(None, None, "cp")),
        )(o, lse)
        np.testing.assert_allclose(met.lse_BTN, whole.lse_BTN, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(met.o_BTNH, whole.o_BTNH, rtol=1e-5, atol=1e-6)
        assert not np.isnan(met.o_BTNH).any()


@pytest.mark.parametrize(
    ("prompt_lens", "max_lens", "change", "message"),
    [
        ([3], [4], {"page": 0}, "page is 0: give at least 1"),
        ([3, 9], [4, 8], {}, "row 1: a prompt of 9 tokens does not fit its room of 8"),
        ([1, 1, 1], [1, 1, 1], {}, "3 rows cannot be shared among dp 2"),
        ([], [], {}, "0 rows cannot be shared"),
        ([1, 1], [4], {}, "2 prompt_lens, but 1 max_lens: give one of each per row"),
        ([1, 1], [4, 4], {"kv_heads": 3}, "tp 2 does not divide the 3 key/value heads: choose tp 1 or 3"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(prompt_lens, max_lens, change, message):
    dp = 1 if len(prompt_lens) == 1 or max_lens == [4, 8] else 2
    plan = Plan(make_mesh(2, 2, dp))
    shape = {"page": 4, "layers": 1, "kv_heads": 2, "head_width": 8, "dtype": jnp.float32} | change
    with pytest.raises(ValueError, match=message):
        make_cache(plan, prompt_lens, max_lens, **shape)


def test_heads_that_do_not_divide_are_refused_with_the_nearest_that_do():
    q, k = jnp.ones((1, 1, 12, H)), jnp.ones((1, 1, 6, H))
    pages = Pages(jnp.ones((8, 6, PAGE, H)), jnp.ones((8, 6, PAGE, H)))
    rows = Rows(jnp.zeros((8, 1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    count = jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="tp 4 does not divide the 6 key/value heads: choose tp 3 or 6"):
        helix_attention(plan_of(4, 2), pages, q, k, k, rows, count, scale=1.0)
    with pytest.raises(ValueError, match="tp 1 x cp 8 = 8 does not divide the 12 query heads: choose cp 6 or 12"):
        helix_attention(plan_of(1, 8), pages, q, k, k, rows, count, scale=1.0)


def test_a_mesh_over_slices_of_tpus_is_refused():
    chips = [SimpleNamespace(platform="tpu", slice_index=number // 2) for number in range(4)]
    with pytest.raises(ValueError, match="the devices are of 2 slices of TPUs: give those of one slice"):
        make_mesh(1, 4, devices=chips)


def test_a_plan_that_cannot_be_is_refused():
    mesh = make_mesh(2, 4)
    with pytest.raises(ValueError, match="deals to 8 ranks, but the mesh has cp 4"):
        Plan(mesh)
    with pytest.raises(ValueError, match="unknown combine 'ring': choose one of psum, psum_scatter, all_to_all"):
        Plan(mesh, combine="ring")
    with pytest.raises(ValueError, match="unknown kernel 'triton': choose one of auto, xla"):
        Plan(mesh, kernel="triton")
    for other in (
        jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
        jax.make_mesh((1, 4, 2), ("dp", "cp", "tp"), axis_types=(AxisType.Auto,) * 3),
        jax.make_mesh((1, 2, 4), ("dp", "tp", "cp"), axis_types=(AxisType.Explicit,) * 3),
    ):
        with pytest.raises(ValueError, match="make it with make_mesh"):
            Plan(other)
    with pytest.raises(ValueError, match="tp 4 x cp 4 needs 16 devices, but there are 8 of platform 'cpu'"):
        make_mesh(4, 4)
    with pytest.raises(ValueError, match="cp is 0: give at least 1"):
        make_mesh(1, 0)
