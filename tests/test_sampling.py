"""Tests that each row draws with its own settings, and that nothing else changes its token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.sampling import Sampling, make_sampling, sample

V, PADDED = 12, 16
DRAWS = 20_000

sample_rows = jax.jit(sample)


@jax.jit
def sample_positions(logits_V: jax.Array, sampling: Sampling, position_X: jax.Array) -> jax.Array:
    return jax.vmap(lambda position: sample(logits_V[None], sampling, position[None])[0])(position_X)


def draws(logits_V: np.ndarray, **settings) -> np.ndarray:
    """Return the tokens at many positions. The vocabulary is padded with -inf, as that of a sharded model is."""
    padded_V = np.pad(logits_V, (0, PADDED - V), constant_values=-np.inf)
    return np.asarray(sample_positions(padded_V, make_sampling(1, **settings), jnp.arange(DRAWS)))


@pytest.fixture(scope="module")
def logits_V() -> np.ndarray:
    return np.random.default_rng(0).normal(size=V).astype(np.float32) * 2


def test_temperature_0_chooses_the_most_probable_token(logits_V):
    assert set(draws(logits_V)) == {logits_V.argmax()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(logits_V, temperature: float):
    p = np.exp(logits_V / temperature)
    p /= p.sum()
    frequencies = np.bincount(draws(logits_V, temperature=temperature), minlength=V) / DRAWS
    np.testing.assert_allclose(frequencies, p, atol=0.015)


@pytest.mark.parametrize("k", [1, 3, V, 100, 2**31, 2**32 + 1])
def test_top_k_keeps_the_k_most_probable_tokens(logits_V, k: int):
    kept = set(np.argsort(-logits_V)[:k])
    assert set(draws(logits_V, temperature=3.0, top_k=k)) == kept


@pytest.mark.parametrize(("k", "p"), [(0, 0.5), (0, 0.9), (0, 1e-6), (0, 1e-46), (0, 1.0), (4, 0.8)])
def test_top_p_keeps_the_smallest_set_that_reaches_p_among_what_top_k_keeps(logits_V, k: int, p: float):
    order = np.argsort(-logits_V)[: k or V]
    share = np.exp(logits_V[order] / 2)
    share /= share.sum()
    kept = order[: int(np.searchsorted(np.cumsum(share), p)) + 1] if p < 1 else order
    assert set(draws(logits_V, temperature=2.0, top_k=k, top_p=p)) == set(kept)


def test_min_p_keeps_tokens_with_that_fraction_of_the_largest_probability(logits_V):
    kept = np.flatnonzero(np.exp((logits_V - logits_V.max()) / 2) >= 0.2)
    assert 1 < len(kept) < V
    assert set(draws(logits_V, temperature=2.0, min_p=0.2)) == set(kept)


def test_a_row_draws_the_same_in_any_batch():
    logits_BV = jnp.asarray(np.random.default_rng(1).normal(size=(3, V)), jnp.float32)
    sampling = Sampling(
        temperature_B=jnp.asarray([0.0, 1.0, 2.0]),
        top_k_B=jnp.asarray([0, 5, 0]),
        top_p_B=jnp.asarray([1.0, 1.0, 0.7]),
        min_p_B=jnp.asarray([0.0, 0.1, 0.0]),
        seed_B2=jnp.asarray([[0, 1], [0, 2], [7, 3]], jnp.uint32),
    )
    for position in range(20):
        batch_B = sample_rows(logits_BV, sampling, jnp.full(3, position))
        for row in range(3):
            own = jax.tree.map(lambda x, row=row: x[row][None], sampling)
            [alone] = sample_rows(logits_BV[row][None], own, jnp.full(1, position))
            assert batch_B[row] == alone


def test_without_settings_every_row_is_greedy():
    logits_BV = jnp.asarray(np.random.default_rng(2).normal(size=(3, V)), jnp.float32)
    token_B = sample(logits_BV, None, jnp.arange(3))
    assert token_B.dtype == jnp.int32
    np.testing.assert_array_equal(token_B, np.asarray(logits_BV).argmax(-1))


def test_the_seed_determines_the_draws(logits_V):
    seeds = (1, 1, 2, 2**32 + 1, 2**40 + 1, 2**64 - 1)
    tokens = [draws(logits_V, temperature=1.0, seed=seed)[:50].tolist() for seed in seeds]
    assert tokens[0] == tokens[1]
    assert len(set(map(tuple, tokens))) == 5  # also those of seeds that differ by 2^32


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 - 1])
def test_a_seed_below_2_to_the_32_draws_with_the_key_that_jax_makes_of_it(logits_V, seed: int):
    key = jax.random.key(np.uint32(seed))
    np.testing.assert_array_equal(make_sampling(1, seed=seed).seed_B2[0], jax.random.key_data(key))
    scaled_V = jnp.asarray(logits_V - logits_V.max())
    expected = [int(jax.random.categorical(jax.random.fold_in(key, n), scaled_V)) for n in range(5)]
    unpadded = sample_rows(jnp.tile(logits_V, (5, 1)), _same_seed(5, seed), jnp.arange(5))
    assert unpadded.tolist() == expected


def _same_seed(rows: int, seed: int) -> Sampling:
    return jax.tree.map(lambda x: jnp.repeat(x, rows, 0), make_sampling(1, 1.0, seed=seed))


def test_rows_have_consecutive_seeds_of_two_words():
    seed_B2 = make_sampling(3, seed=2**32 - 2).seed_B2
    assert seed_B2.dtype == jnp.uint32
    assert seed_B2.tolist() == [[0, 2**32 - 2], [0, 2**32 - 1], [1, 0]]
    assert make_sampling(2, seed=2**64 - 1).seed_B2.tolist() == [[2**32 - 1, 2**32 - 1], [0, 0]]


def test_padding_is_never_drawn(logits_V):
    assert max(draws(logits_V, temperature=50.0)) < V


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: give 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1: give 0"),
        ({"top_p": 0.0}, "top_p is 0.0: give a probability"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"seed": -1}, r"seed is -1: give .* 0 to 2\^64 - 1"),
        ({"seed": 2**64}, f"seed is {2**64}: give"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, named: str):
    with pytest.raises(ValueError, match=named):
        make_sampling(1, **settings)


@pytest.mark.parametrize("settings", [{"temperature": "1"}, {"top_k": 1.5}, {"seed": 1.0}])
def test_settings_of_a_wrong_type_are_refused(settings: dict):
    with pytest.raises(TypeError):
        make_sampling(1, **settings)
