"""The island on plain arrays: append, attend and combine on every rank, against float64 attention on one."""

import functools

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

run = jax.jit(helix_attention, static_argnums=0, static_argnames="scale", donate_argnums=1)


def plan_of(tp: int, cp: int, placement: str = "helix", how: str = "psum", block: int = 3) -> Plan:
    return Plan(make_mesh(tp, cp), BlockLayout(cp, block, placement), how)


def decode_all(plan: Plan, heads: int, kv_heads: int, chunk: int, dtype, *, fill: float = 0.0):
    """Feeds whole rows through the island in chunks; returns outputs beside those of float64 attention."""
    random = np.random.default_rng(0)
    q_BSNH = jnp.asarray(random.normal(size=(B, max(MOST), heads, H)), dtype)
    k_BSKH, v_BSKH = (jnp.asarray(random.normal(size=(B, max(MOST), kv_heads, H)), dtype) for _ in "kv")
    shape = {"layers": 1, "kv_heads": kv_heads, "head_width": H, "dtype": dtype}
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
        o_BTNH, pages = run(plan, pages, *new, rows, per_row(plan, count_B), scale=SCALE)
        rows = rows._replace(length_B=rows.length_B + per_row(plan, count_B))
        for row, count in enumerate(count_B):
            outputs[row].append(np.asarray(o_BTNH[row, :count], np.float64))
            assert (np.asarray(o_BTNH[row, count:]) == 0).all()
    ours = np.concatenate([np.concatenate(row) for row in outputs])
    theirs = np.concatenate(
        [
            softmax_attention(q[:n], k[:n], v[:n], np.tri(n, dtype=bool), SCALE)[0]
            for q, k, v, n in zip(q_BSNH, k_BSKH, v_BSKH, MOST, strict=True)
        ]
    )
    return ours, theirs, pages


@pytest.mark.parametrize("how", COMBINES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_sharded_attention_equals_float64(placement: str, how: str):
    ours, theirs, _ = decode_all(plan_of(2, 4, placement, how), 8, 2, 7, jnp.float32)
    assert relative_error(ours, theirs) <= 2e-6


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
    ours, theirs, _ = decode_all(Plan(mesh, BlockLayout(2, 3)), 8, 2, 7, jnp.float32)
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

    def island(how, o_RBTNH, lse_RBTN):
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
    plan = Plan(make_mesh(2, 2, dp), BlockLayout(2))
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


def test_a_plan_that_cannot_be_is_refused():
    mesh = make_mesh(2, 4)
    with pytest.raises(ValueError, match="deals to 8 ranks, but the mesh has cp 4"):
        Plan(mesh, BlockLayout(8))
    with pytest.raises(ValueError, match="unknown combine 'ring': choose one of psum, psum_scatter, all_to_all"):
        Plan(mesh, BlockLayout(4), "ring")
    with pytest.raises(ValueError, match="unknown kernel 'triton': choose one of auto, xla"):
        Plan(mesh, BlockLayout(4), kernel="triton")
    for other in (
        jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
        jax.make_mesh((1, 4, 2), ("dp", "cp", "tp"), axis_types=(AxisType.Auto,) * 3),
        jax.make_mesh((1, 2, 4), ("dp", "tp", "cp"), axis_types=(AxisType.Explicit,) * 3),
    ):
        with pytest.raises(ValueError, match="make it with make_mesh"):
            Plan(other, BlockLayout(4))
    with pytest.raises(ValueError, match="tp 4 x cp 4 needs 16 devices, but there are 8 of platform 'cpu'"):
        make_mesh(4, 4)
    with pytest.raises(ValueError, match="cp is 0: give at least 1"):
        make_mesh(1, 0)
