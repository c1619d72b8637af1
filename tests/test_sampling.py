"""Each row draws by its own rules, and by nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.sampling import Sampling, make_sampling, sample

V = 12


def draws(logits_V, rules: dict, count: int = 2000) -> np.ndarray:
    """Tokens drawn at `count` positions."""
    one = make_sampling(1, **rules)
    run = jax.jit(jax.vmap(lambda position: sample(jnp.asarray(logits_V)[None], one, position[None])[0]))
    return np.asarray(run(jnp.arange(count)))


@pytest.fixture(scope="module")
def logits_V() -> np.ndarray:
    return np.random.default_rng(0).normal(size=V).astype(np.float32) * 2


def test_temperature_0_is_the_best(logits_V):
    assert set(draws(logits_V, {})) == {logits_V.argmax()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(logits_V, temperature: float):
    p = np.exp(logits_V / temperature)
    p /= p.sum()
    found = np.bincount(draws(logits_V, {"temperature": temperature}, 20_000), minlength=V) / 20_000
    np.testing.assert_allclose(found, p, atol=0.015)


@pytest.mark.parametrize("k", [1, 3, V, 100, 2**31, 2**32 + 1])
def test_top_k_leaves_the_k_likeliest(logits_V, k: int):
    kept = set(np.argsort(-logits_V)[:k])
    assert set(draws(logits_V, {"temperature": 3.0, "top_k": k})) == kept


@pytest.mark.parametrize(("k", "p"), [(0, 0.5), (0, 0.9), (0, 1e-6), (0, 1e-46), (0, 1.0), (4, 0.8)])
def test_top_p_leaves_the_fewest_that_reach_p_among_what_top_k_left(logits_V, k: int, p: float):
    order = np.argsort(-logits_V)[: k or V]
    share = np.exp(logits_V[order] / 2)
    share /= share.sum()
    kept = order[: int(np.searchsorted(np.cumsum(share), p)) + 1] if p < 1 else order
    assert set(draws(logits_V, {"temperature": 2.0, "top_k": k, "top_p": p}, 20_000)) == set(kept)


def test_a_row_draws_the_same_whatever_stands_beside_it():
    logits_BV = jnp.asarray(np.random.default_rng(1).normal(size=(3, V)), jnp.float32)
    rules = Sampling(
        temperature_B=jnp.asarray([0.0, 1.0, 2.0]),
        top_k_B=jnp.asarray([0, 5, 0]),
        top_p_B=jnp.asarray([1.0, 1.0, 0.7]),
        min_p_B=jnp.asarray([0.0, 0.1, 0.0]),
        seed_B=jnp.asarray([1, 2, 3]),
    )
    for position in range(20):
        crowd = sample(logits_BV, rules, jnp.full(3, position))
        for row in range(3):
            alone = sample(
                logits_BV[row][None], jax.tree.map(lambda x, r=row: x[r][None], rules), jnp.full(1, position)
            )
            assert crowd[row] == alone[0]


def test_the_seed_decides(logits_V):
    same = [draws(logits_V, {"temperature": 1.0, "seed": seed}, 50).tolist() for seed in (1, 1, 2, 2**40 + 1, -1)]
    assert same[0] == same[1]
    assert same[0] != same[2]


def test_padding_is_never_drawn(logits_V):
    padded = np.concatenate([logits_V, np.full(4, -np.inf, np.float32)])
    assert max(draws(padded, {"temperature": 50.0}, 5000)) < V


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: give 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1: give 0"),
        ({"top_p": 0.0}, "top_p is 0.0: give a probability above 0, at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        make_sampling(1, **rules)
