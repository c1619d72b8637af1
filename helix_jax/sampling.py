"""Sampling: from logits to tokens, each row with its own settings."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, UInt32

from helix_jax.validation import check_int, check_number

MAX_LOGPROBS = 20  # of the most probable tokens, that can be reported per token
SEEDS = 2**64
_LARGEST = 1e30  # a setting must be finite in float32


class Sampling(NamedTuple):
    """The sampling settings of each row of a batch.

    They are arrays, so that one compiled step serves all settings.

    Attributes:
        temperature_B: Divides the logits. 0 is greedy.
        top_k_B: Only the k most probable tokens are kept. 0 keeps all.
        top_p_B: Only the smallest set of most probable tokens with total probability at least p is kept. 1 keeps all.
        min_p_B: Only tokens with at least this fraction of the largest probability are kept. 0 keeps all.
        seed_B2: The seed, as its high and its low 32 bits. A draw depends on the seed and the position, and on nothing
            else besides the logits and the settings of the row.
    """

    temperature_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    top_p_B: Float[Array, "B"]
    min_p_B: Float[Array, "B"]
    seed_B2: UInt32[Array, "B 2"]


def make_sampling(
    rows: int,
    temperature: int | float = 0.0,
    top_k: int = 0,
    top_p: int | float = 1.0,
    seed: int = 0,
    min_p: int | float = 0.0,
) -> Sampling:
    """Create sampling settings that are the same for every row, except that row b draws with the seed `seed + b`.

    Args:
        rows: The number of rows.
        temperature: Divides the logits. 0 is greedy.
        top_k: Keep only the k most probable tokens. 0 keeps all.
        top_p: Keep only the smallest set of most probable tokens with total probability at least p. 1 keeps all.
        seed: The seed of the first row, from 0 to 2^64 - 1.
        min_p: Keep only tokens with at least this fraction of the largest probability. 0 keeps all.

    Raises:
        TypeError: A setting is not a number, or `top_k` or `seed` is not an int.
        ValueError: A setting is out of range. The message names the range.
    """
    check_sampling(temperature, top_k, top_p, min_p)
    check_seed(seed)
    return jax.tree.map(jnp.asarray, make_host_sampling(rows, temperature, top_k, top_p, seed, min_p))


def make_host_sampling(
    rows: int, temperature: int | float, top_k: int, top_p: int | float, seed: int, min_p: int | float
) -> Sampling:
    """Create the settings of `make_sampling` as NumPy arrays, without a check."""
    seed_B = [(seed + row) % SEEDS for row in range(rows)]
    arrays: list[Any] = [
        np.full(rows, temperature, np.float32),
        np.full(rows, min(top_k, 2**31 - 1), np.int32),
        np.full(rows, top_p, np.float32),
        np.full(rows, min_p, np.float32),
        np.asarray([divmod(seed, 2**32) for seed in seed_B], np.uint32).reshape(rows, 2),
    ]
    return Sampling(*arrays)


def check_sampling(temperature: int | float, top_k: int, top_p: int | float, min_p: int | float) -> None:
    """Check the sampling settings of a row.

    Raises:
        TypeError: A setting is not a number, or `top_k` is not an int.
        ValueError: A setting is out of range. The message names the range.
    """
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        check_number(name, value)
    check_int("top_k", top_k)
    if not 0 <= temperature < _LARGEST:
        raise ValueError(f"temperature is {temperature}: give 0 (greedy) or a positive number")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: give 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: give a probability above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}: give a number from 0 to 1")


def check_seed(seed: int) -> None:
    """Check a seed.

    Raises:
        TypeError: It is not an int.
        ValueError: It is not between 0 and 2^64 - 1.
    """
    check_int("seed", seed)
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed}: give a whole number from 0 to 2^64 - 1")


def sample(logits_BV: Float[Array, "B V"], sampling: Sampling | None, position_B: Int[Array, "B"]) -> Int[Array, "B"]:
    """Choose the token of each row at its position.

    The token depends on the row's logits, settings and position, not on the mesh or on other rows.

    Args:
        logits_BV: The logits of each row.
        sampling: The settings. None is greedy for all rows, without the sampler in the compiled program.
        position_B: The position of the token that is chosen.
    """
    greedy_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if sampling is None:
        return greedy_B

    def draw() -> Array:
        drawn_B = jax.vmap(_draw)(logits_BV, sampling, position_B).astype(jnp.int32)
        return jnp.where(sampling.temperature_B > 0, drawn_B, greedy_B)

    # Sorting the vocabulary for each token is expensive. It is skipped at run time when every row is greedy.
    return lax.cond((sampling.temperature_B > 0).any(), draw, lambda: greedy_B)


def _draw(logits_V: Array, row: Sampling, position: Array) -> Array:
    # Below 2^32 this is the key that jax.random.key makes of a seed; above, that would drop the high word.
    key = jax.random.fold_in(jax.random.wrap_key_data(row.seed_B2, impl="threefry2x32"), position)
    # Relative to the largest, so that a low temperature does not make any of them infinite.
    scaled_V = (logits_V - logits_V.max()) / jnp.where(row.temperature_B > 0, row.temperature_B, 1)
    kept_V = _in_top_k_and_p(scaled_V, row.top_k_B, row.top_p_B) & _above_min_p(scaled_V, row.min_p_B)
    return jax.random.categorical(key, jnp.where(kept_V, scaled_V, -jnp.inf))


def _above_min_p(logits_V: Array, min_p: Array) -> Array:
    """Return which tokens satisfy p >= min_p * max(p), computed in logarithms. The most probable one always does."""
    return (min_p <= 0) | (logits_V - logits_V.max() >= jnp.log(min_p))


def _in_top_k_and_p(logits_V: Array, top_k: Array, top_p: Array) -> Array:
    """Return which tokens both filters keep, top-p among those that top-k keeps.

    The most probable token is always kept. Ties are ordered by token id.
    """
    order_V = jnp.argsort(-logits_V, stable=True)
    rank_V = jnp.arange(logits_V.size)
    in_k_V = (top_k == 0) | (rank_V < top_k)
    p_V = jax.nn.softmax(jnp.where(in_k_V, logits_V[order_V], -jnp.inf))
    before_V = jnp.cumsum(p_V) - p_V
    # top_p 1 is a case of its own, because the sum of the preceding probabilities may be rounded to 1.
    in_p_V = (top_p >= 1) | (before_V < top_p) | (rank_V == 0)
    return jnp.zeros(logits_V.size, bool).at[order_V].set(in_k_V & in_p_V)


def apply_repetition_penalty(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty_B: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Return logits in which tokens that occurred before are less probable.

    Args:
        logits_BV: The logits of each row.
        seen_BV: Which tokens the prompt or the output of the row contains.
        penalty_B: Positive logits of these tokens are divided by it, negative ones multiplied. 1 changes nothing.

    Source:
        arXiv 1909.05858, section 4.1; for negative logits, transformers.
    """
    penalty_B1 = penalty_B[:, None]
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV & (penalty_B1 != 1), penalised_BV, logits_BV)


class Logprobs(NamedTuple):
    """Log-probabilities of the chosen token of each row, and of its C most probable tokens in descending order."""

    chosen_B: Float[Array, "*B"]
    top_BC: Float[Array, "*B C"]
    top_ids_BC: Int[Array, "*B C"]


def compute_logprobs(
    logits_BV: Float[Array, "*B V"], token_B: Int[Array, "*B"], num_top: int = MAX_LOGPROBS
) -> Logprobs:
    """Return the log-probabilities of `token_B` and of the most probable tokens, at most `num_top`.

    They are those of the model: before temperature, penalties and filters.
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV)
    chosen_B = jnp.take_along_axis(logprobs_BV, token_B[..., None], axis=-1)[..., 0]
    top_BC, ids_BC = lax.top_k(logprobs_BV, min(num_top, logits_BV.shape[-1]))
    return Logprobs(chosen_B, top_BC, ids_BC)


class RowSampling(NamedTuple):
    """How each row chooses its next token.

    Attributes:
        sampling: The sampling settings.
        penalty_B: The repetition penalty.
        logprobs_B: Whether log-probabilities are requested.
        seen_BV: The tokens that each row contains.
    """

    sampling: Sampling
    penalty_B: Float[Array, "B"]
    logprobs_B: Bool[Array, "B"]
    seen_BV: Bool[Array, "B V"]


def token_masks(tokens_BT: Int[Array, "B T"], count_B: Int[Array, "B"], vocab: int) -> Bool[Array, "B T V"]:
    """Return the first `count_B` tokens of each row as masks of the vocabulary. The others are empty."""
    counts_BT = jnp.arange(tokens_BT.shape[1]) < count_B[:, None]
    return (tokens_BT[..., None] == jnp.arange(vocab)) & counts_BT[..., None]


def mark_seen(rows: RowSampling, tokens_BT: Int[Array, "B T"], count_B: Int[Array, "B"]) -> RowSampling:
    """Add the first `count_B` tokens of each row to those that it contains."""
    new_BV = token_masks(tokens_BT, count_B, rows.seen_BV.shape[1]).any(1)
    return rows._replace(seen_BV=rows.seen_BV | new_BV)


def choose(
    logits_BV: Float[Array, "B V"], rows: RowSampling | None, position_B: Int[Array, "B"], live_B: Bool[Array, "B"]
) -> tuple[Int[Array, "B"], Logprobs | None]:
    """Choose the token of each row at its position, with a repetition penalty, and compute log-probabilities.

    Args:
        logits_BV: The logits of each row.
        rows: How each row chooses. None is greedy for all rows, without the sampler in the compiled program.
        position_B: The position of the token that is chosen.
        live_B: Whether the token of a row is used. The others are undefined.

    Returns:
        The tokens and their log-probabilities, which are 0 if no live row requests any, and None without `rows`.
    """
    if rows is None:
        return sample(logits_BV, None, position_B), None
    # The settings of a row outlast its request. Those of an idle row must not make the step slower for all.
    sampling = rows.sampling._replace(temperature_B=jnp.where(live_B, rows.sampling.temperature_B, 0))
    penalised_BV = apply_repetition_penalty(logits_BV, rows.seen_BV, rows.penalty_B)
    token_B = sample(penalised_BV, sampling, position_B)
    compute = partial(compute_logprobs, logits_BV, token_B)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return token_B, lax.cond((rows.logprobs_B & live_B).any(), compute, lambda: zeros)
