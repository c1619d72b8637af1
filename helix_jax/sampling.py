"""From logits to tokens, each row by its own rules."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

MAX_LOGPROBS = 20  # of the likeliest tokens, that can be told with each


class Sampling(NamedTuple):
    """How each row chooses. Traced: one compiled step serves every choice.

    temperature_B: 0 is greedy. top_k_B: only the k likeliest tokens (0: all). top_p_B: only the fewest of the likeliest
    whose probability reaches p (1: all). min_p_B: only tokens at least so probable as this share of the likeliest (0:
    all). seed_B: with the position it is all that the draw depends on.
    """

    temperature_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    top_p_B: Float[Array, "B"]
    min_p_B: Float[Array, "B"]
    seed_B: Int[Array, "B"]


def make_sampling(
    rows: int,
    temperature: int | float = 0.0,
    top_k: int = 0,
    top_p: int | float = 1.0,
    seed: int = 0,
    min_p: int | float = 0.0,
) -> Sampling:
    """The same rules for every row, except that row b draws with `seed + b`.

    Raises:
        ValueError: a negative temperature or top_k, a top_p outside of (0, 1] or a min_p outside of [0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: give 0 (greedy) or a positive number")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: give 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: give a probability above 0, at most 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}: give a share from 0 to 1")
    return Sampling(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, min(top_k, 2**31 - 1), jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, min_p, jnp.float32),
        jnp.arange(rows, dtype=jnp.uint32) + jnp.uint32(seed % 2**32),
    )


def sample(logits_BV: Float[Array, "B V"], sampling: Sampling, position_B: Int[Array, "B"]) -> Int[Array, "B"]:
    """The token at `position_B` of each row: a function of its logits, rules and position, not of mesh or batch."""
    greedy_B = jnp.argmax(logits_BV, -1)

    def draw() -> Array:
        drawn_B = jax.vmap(_draw)(logits_BV, sampling, position_B)
        return jnp.where(sampling.temperature_B > 0, drawn_B, greedy_B)

    # A sort of the vocabulary per token is dear: skipped at run time when every row is greedy.
    return lax.cond((sampling.temperature_B > 0).any(), draw, lambda: greedy_B).astype(jnp.int32)


def _draw(logits_V: Array, row: Sampling, position: Array) -> Array:
    key = jax.random.fold_in(jax.random.key(row.seed_B), position)
    # From the largest on, so that a low temperature makes none infinite.
    scaled_V = (logits_V - logits_V.max()) / jnp.where(row.temperature_B > 0, row.temperature_B, 1)
    kept_V = _keep(scaled_V, row.top_k_B, row.top_p_B) & _likely(scaled_V, row.min_p_B)
    return jax.random.categorical(key, jnp.where(kept_V, scaled_V, -jnp.inf))


def _likely(logits_V: Array, min_p: Array) -> Array:
    """p >= min_p * the largest p, in logarithms; the likeliest is one of them, min_p 0 leaves all."""
    return (min_p <= 0) | (logits_V - logits_V.max() >= jnp.log(min_p))


def _keep(logits_V: Array, top_k: Array, top_p: Array) -> Array:
    """Which tokens both filters leave, top-p among what top-k left. The likeliest always stays; ties go by index."""
    order_V = jnp.argsort(-logits_V, stable=True)
    rank_V = jnp.arange(logits_V.size)
    in_k_V = (top_k == 0) | (rank_V < top_k)
    p_V = jax.nn.softmax(jnp.where(in_k_V, logits_V[order_V], -jnp.inf))
    before_V = jnp.cumsum(p_V) - p_V
    # top_p 1 keeps all by name: rounding may bring the sum of what stands before to 1.
    in_p_V = (top_p >= 1) | (before_V < top_p) | (rank_V == 0)
    return jnp.zeros(logits_V.size, bool).at[order_V].set(in_k_V & in_p_V)


def apply_repetition_penalty(logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty_B: Float[Array, "B"]) -> Array:
    """Logits of tokens that were there already, divided by the penalty, or multiplied where they are negative.

    Source: arXiv 1909.05858, section 4.1; for negative ones as transformers does it.
    """
    penalty_B1 = penalty_B[:, None]
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV & (penalty_B1 != 1), less_BV, logits_BV)


class Logprobs(NamedTuple):
    """Log-probabilities of the tokens that were chosen, and of the likeliest C, most likely first."""

    chosen_B: Float[Array, "B"]
    top_BC: Float[Array, "B C"]
    top_ids_BC: Int[Array, "B C"]


def compute_logprobs(logits_BV: Float[Array, "B V"], token_B: Int[Array, "B"]) -> Logprobs:
    """Before temperature, penalties and filters."""
    logprobs_BV = jax.nn.log_softmax(logits_BV)
    chosen_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
    top_BC, ids_BC = lax.top_k(logprobs_BV, min(MAX_LOGPROBS, logits_BV.shape[1]))
    return Logprobs(chosen_B, top_BC, ids_BC)
