"""Checks attend and merge against a float64 softmax, and the algebraic properties of merge."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_jax.attention import PageTable, Partial, PassOptions, attend, attend_in_passes, merge, visible_span
from helix_jax.quantisation import dequantise, quantise
from tests.reference import quantise_in_numpy, relative_error, softmax_attention

B, T, N, K, H, W, M, A = 3, 4, 6, 2, 8, 4, 7, 30
S = M * W


def pages_of(random: np.random.Generator, dtype=jnp.float32):
    """Return rows of keys and values [B, S, K, H], the same as pages scattered in a pool of NaN, and the page table."""
    k_BSKH, v_BSKH = random.normal(size=(2, B, S, K, H)).astype(np.float32)
    table_BM = random.permutation(A)[: B * M].reshape(B, M)
    pool = np.full((2, A, K, W, H), np.nan, np.float32)
    for paged, x_BSKH in zip(pool, (k_BSKH, v_BSKH), strict=True):
        paged[table_BM] = x_BSKH.reshape(B, M, W, K, H).transpose(0, 1, 3, 2, 4)
    k_BSKH, v_BSKH, k_AKWH, v_AKWH = (jnp.asarray(x, dtype) for x in (k_BSKH, v_BSKH, *pool))
    return k_BSKH, v_BSKH, k_AKWH, v_AKWH, jnp.asarray(table_BM, jnp.int32)


def expected(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, scale=0.3):
    slot = np.arange(S)
    rows = [
        softmax_attention(q, k, v, (lo[:, None] <= slot) & (slot < hi[:, None]), scale)
        for q, k, v, lo, hi in zip(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, strict=True)
    ]
    return [np.stack(parts) for parts in zip(*rows, strict=True)]


def check(partial: Partial, o, lse, bound: float):
    empty = np.isneginf(lse)
    np.testing.assert_array_equal(np.isneginf(partial.lse_BTN), empty)
    assert (np.asarray(partial.o_BTNH)[empty] == 0).all()
    assert relative_error(partial.o_BTNH, o) <= bound
    np.testing.assert_allclose(np.asarray(partial.lse_BTN)[~empty], lse[~empty], rtol=0, atol=10 * bound)


SCALE = 0.3


def in_passes(pages: int, *, by_page: bool):
    options = PassOptions(SCALE, None, pages, by_page)

    def run(q_BTNH, k_AKWH, v_AKWH, table_BM, lo_BT, hi_BT):
        table, hi_BT = PageTable.of(table_BM, hi_BT, W)
        return attend_in_passes(options, q_BTNH, k_AKWH, v_AKWH, table, lo_BT, hi_BT)

    return jax.jit(run)


@jax.jit
def in_one_pool(q_BTNH, k_AKWH, v_AKWH, table_BM, lo_BT, hi_BT):
    """As in the cache: the pages of other layers come first, then those of the keys, then those of the values."""
    pool_XKWH = jnp.concatenate([jnp.full_like(k_AKWH, jnp.nan), k_AKWH, v_AKWH])
    table = PageTable(table_BM, jnp.asarray([1, 2]) * len(k_AKWH))
    return attend(q_BTNH, pool_XKWH, pool_XKWH, table, lo_BT, hi_BT, scale=SCALE)


def as_fp8(k_AKWH, v_AKWH):
    """Quantise pages. Vectors that are NaN get a scale of NaN."""
    return quantise(k_AKWH, scales=1), quantise(v_AKWH, scales=1)


FORMS = {
    "attend": jax.jit(functools.partial(attend, scale=SCALE)),
    "1 page per pass": in_passes(1, by_page=False),
    "3 pages per pass": in_passes(3, by_page=False),
    "3 pages per pass, by page": in_passes(3, by_page=True),  # the form for few queries on an accelerator
    "one pass, by page": in_passes(M, by_page=True),
    "keys and values in one pool": in_one_pool,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)])
def test_attend_equals_float64_softmax(form, dtype, bound):
    """The bounds lo and hi are random, rising and falling, and some queries are empty."""
    if "by page" in form and dtype == jnp.bfloat16:
        pytest.skip("a CPU has no such product in bfloat16")
    random = np.random.default_rng(0)
    for _ in range(10):
        k_BSKH, v_BSKH, k_AKWH, v_AKWH, table_BM = pages_of(random, dtype)
        q_BTNH = jnp.asarray(random.normal(size=(B, T, N, H)), dtype)
        lo_BT, hi_BT = np.sort(random.integers(0, S + 1, (2, B, T)), axis=0)
        lo_BT[0, 0] = hi_BT[0, 0] = 0
        lo_BT[1] = hi_BT[1] = 0
        partial = FORMS[form](q_BTNH, k_AKWH, v_AKWH, table_BM, lo_BT, hi_BT)
        assert partial.o_BTNH.dtype == partial.lse_BTN.dtype == jnp.float32
        check(partial, *expected(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT), bound)


@pytest.mark.parametrize("form", ["attend", "3 pages per pass", "3 pages per pass, by page"])
def test_attention_over_quantised_pages_equals_that_over_the_quantised_numbers(form):
    """It also equals attention over the numbers before quantisation, up to the error of their rounding."""
    random = np.random.default_rng(0)
    k_BSKH, v_BSKH, k_AKWH, v_AKWH, table_BM = pages_of(random)
    q_BTNH = jnp.asarray(random.normal(size=(B, T, N, H)), jnp.float32)
    lo_BT, hi_BT = np.sort(random.integers(0, S + 1, (2, B, T)), axis=0)
    partial = FORMS[form](q_BTNH, *as_fp8(k_AKWH, v_AKWH), table_BM, lo_BT, hi_BT)
    check(partial, *expected(q_BTNH, *map(quantise_in_numpy, (k_BSKH, v_BSKH)), lo_BT, hi_BT), 2e-6)
    assert relative_error(partial.o_BTNH, expected(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT)[0]) <= 4e-2


def test_attention_over_quantised_latents_equals_that_over_the_quantised_numbers():
    """Their rotary part is bfloat16, and each 128 of their other numbers have a scale."""
    random = np.random.default_rng(0)
    width, v_width, slots = 256 + 8, 256, 12
    k_SH, q_BTNH = random.normal(size=(slots, width)), jnp.asarray(random.normal(size=(1, 2, N, width)), jnp.float32)
    k_SH[:, :128] *= 30  # the scales of the groups differ
    pages = quantise(jnp.asarray(k_SH, jnp.float32).reshape(3, 1, 4, width), scales=2, exact=8)
    hi_BT, table_BM = jnp.asarray([[slots - 1, slots]]), jnp.arange(3)[None]
    partial = attend(q_BTNH, pages, None, table_BM, 0 * hi_BT, hi_BT, scale=0.01, v_width=v_width)
    k_SKH = quantise_in_numpy(k_SH, 2, 8)[:, None]
    visible_TS = np.arange(slots) < hi_BT[0][:, None]
    o_TNH, lse_TN = softmax_attention(q_BTNH[0], k_SKH, k_SKH[..., :v_width], visible_TS, 0.01)
    check(partial, o_TNH[None], lse_TN[None], 2e-6)


def test_vectors_are_quantised_like_in_numpy():
    """Also zeros, which have no largest number, and very large and small numbers."""
    random = np.random.default_rng(0)
    x_BH = random.normal(size=(40, 256)).astype(np.float32) * np.logspace(-30, 30, 40, dtype=np.float32)[:, None]
    x_BH[7], x_BH[8, :128] = 0, 0
    for scales, exact in ((1, 0), (2, 0), (1, 128)):
        pages = jax.jit(quantise, static_argnums=(1, 2))(x_BH, scales, exact)
        assert (pages.numbers_AKWH.dtype, pages.scales_AKWX.dtype) == (jnp.float8_e4m3fn, jnp.float32)
        np.testing.assert_array_equal(dequantise(pages, jnp.float32), quantise_in_numpy(x_BH, scales, exact))
    error_BH = np.abs(quantise_in_numpy(x_BH) - x_BH)
    assert (error_BH <= np.maximum(np.abs(x_BH) / 16, np.abs(x_BH).max(-1, keepdims=True) / 448 / 2**9)).all()


@jax.jit
def over_fp8(q_BTNH, k_AKWH, v_AKWH, table_BM, lo_BT, hi_BT):
    return attend(q_BTNH, *as_fp8(k_AKWH, v_AKWH), table_BM, lo_BT, hi_BT, scale=SCALE)


@pytest.mark.parametrize("form", [*FORMS, "fp8"])
def test_slots_that_no_query_sees_may_be_nan(form):
    """Unused slots, freed pages and invalid table entries change nothing. A used slot that is NaN does."""
    random = np.random.default_rng(1)
    k_BSKH, v_BSKH, k_AKWH, v_AKWH, table_BM = pages_of(random)
    q_BTNH = jnp.asarray(random.normal(size=(B, T, N, H)), jnp.float32)
    lo_BT = np.full((B, T), 5)
    hi_BT = np.asarray([[9, 11, 10, 6]] * B)
    hidden = np.ones(S, bool)
    hidden[5:11] = False

    def poisoned(hidden, table_BM):
        k, v = np.array(k_AKWH), np.array(v_AKWH)
        for row in np.asarray(table_BM):
            for slot in np.flatnonzero(hidden):
                k[row[slot // W], :, slot % W] = v[row[slot // W], :, slot % W] = np.nan
        return jnp.asarray(k), jnp.asarray(v)

    def run(k_AKWH, v_AKWH, table_BM):
        return (FORMS | {"fp8": over_fp8})[form](q_BTNH, k_AKWH, v_AKWH, table_BM, lo_BT, hi_BT)

    invalid_BM = np.array(table_BM)
    invalid_BM[:, 3:] = [[-1, 10**6, 3, 29]] * B
    partial = run(*poisoned(hidden, table_BM), jnp.asarray(invalid_BM))
    if form == "fp8":
        k_BSKH, v_BSKH = map(quantise_in_numpy, (k_BSKH, v_BSKH))
    check(partial, *expected(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT), 2e-6)

    hidden[7] = True
    assert np.isnan(run(*poisoned(hidden, table_BM), table_BM).o_BTNH).any()


def test_values_can_be_the_first_numbers_of_the_keys():
    random = np.random.default_rng(2)
    k_BSKH, _, k_AKWH, _, table_BM = pages_of(random)
    q_BTNH = jnp.asarray(random.normal(size=(B, T, N, H)), jnp.float32)
    lo_BT, hi_BT = jnp.zeros((B, T), int), jnp.full((B, T), 17)
    run = jax.jit(functools.partial(attend, scale=SCALE, v_width=5))
    partial = run(q_BTNH, k_AKWH, None, table_BM, lo_BT, hi_BT)
    check(partial, *expected(q_BTNH, k_BSKH, k_BSKH[..., :5], lo_BT, hi_BT), 2e-6)


def partials(random: np.random.Generator, count: int) -> Partial:
    lse = random.normal(size=(count, 2, 3, 4)) * 20
    lse = np.where(random.random(lse.shape) < 0.3, -np.inf, lse)
    o = np.where(np.isneginf(lse)[..., None], 0, random.normal(size=(*lse.shape, 5)))
    return Partial(jnp.asarray(o, jnp.float32), jnp.asarray(lse, jnp.float32))


def close(a: Partial, b: Partial):
    np.testing.assert_allclose(a.lse_BTN, b.lse_BTN, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(a.o_BTNH, b.o_BTNH, rtol=1e-5, atol=1e-5)


merge_stacked = jax.jit(merge)


def merge_two(a: Partial, b: Partial) -> Partial:
    return merge_stacked(Partial(*(np.stack(pair) for pair in zip(a, b, strict=True))))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_merge_is_a_commutative_monoid(seed: int):
    stack = partials(np.random.default_rng(seed), 3)
    a, b, c = (Partial(*(x[i] for x in stack)) for i in range(3))
    empty = Partial(jnp.zeros_like(a.o_BTNH), jnp.full_like(a.lse_BTN, -jnp.inf))
    close(merge_two(a, b), merge_two(b, a))
    close(merge_two(merge_two(a, b), c), merge_two(a, merge_two(b, c)))
    close(merge_stacked(stack), merge_two(merge_two(a, b), c))
    for one in (merge_two(a, empty), merge_two(empty, a)):
        np.testing.assert_array_equal(one.lse_BTN, a.lse_BTN)
        np.testing.assert_array_equal(one.o_BTNH, a.o_BTNH)


def test_only_visible_pages_are_read():
    """Each row is read from the page of its smallest `lo` on, so that distant rows do not need more passes."""
    lo_BT, hi_BT = jnp.asarray([[990, 995], [3, 0], [0, 0]]), jnp.asarray([[1000, 1004], [10, 0], [0, 0]])
    first_page_B, slots = visible_span(lo_BT, hi_BT, page=8)
    np.testing.assert_array_equal(first_page_B, [123, 0, 2**27])
    assert slots == 1004 - 123 * 8


def test_merge_of_parts_is_attention_over_the_whole():
    random = np.random.default_rng(3)
    k_BSKH, v_BSKH, k_AKWH, v_AKWH, table_BM = pages_of(random)
    q_BTNH = jnp.asarray(random.normal(size=(B, T, N, H)), jnp.float32)
    cuts = (0, 3, 3, 11, 20)
    parts = [
        FORMS["attend"](q_BTNH, k_AKWH, v_AKWH, table_BM, np.full((B, T), lo), np.full((B, T), hi))
        for lo, hi in itertools.pairwise(cuts)
    ]
    whole = merge(Partial(*(jnp.stack(x) for x in zip(*parts, strict=True))))
    ends = np.zeros((B, T), int), np.full((B, T), 20)
    check(whole, *expected(q_BTNH, k_BSKH, v_BSKH, *ends), 2e-6)


def test_merge_has_finite_gradients_also_at_minus_infinity():
    """The derivative is that of the formula where a partial is not empty, and zero, not NaN, where it is."""
    stack = partials(np.random.default_rng(4), 3)
    stack = stack._replace(lse_BTN=stack.lse_BTN.at[:, 0, 0].set(-jnp.inf))

    @jax.jit
    def total(stack: Partial):
        whole = merge(stack)
        return jnp.sum(jnp.sin(whole.o_BTNH)) + jnp.sum(jnp.where(jnp.isfinite(whole.lse_BTN), whole.lse_BTN, 0))

    grad = jax.jit(jax.grad(total))(stack)
    assert all(np.isfinite(x).all() for x in grad)
    np.testing.assert_array_equal(grad.lse_BTN[:, 0, 0], 0)
    finite = np.argwhere(np.isfinite(np.asarray(stack.lse_BTN)))
    for at in map(tuple, finite[:: len(finite) // 5]):
        moved = [total(stack._replace(lse_BTN=stack.lse_BTN.at[at].add(d))) for d in (1e-2, -1e-2)]
        np.testing.assert_allclose(grad.lse_BTN[at], (moved[0] - moved[1]) / 2e-2, rtol=2e-2, atol=2e-3)
