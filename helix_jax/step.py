"""The jitted step: T new tokens per row, a count per row, one token out. The cache is donated and written in place."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from helix_jax.cache import KVCache, Pages, Rows
from helix_jax.config import ModelConfig
from helix_jax.helix import helix_attention
from helix_jax.mesh import DP, ROWS_B, sharding
from helix_jax.models import moe
from helix_jax.models.transformer import Weights, assemble
from helix_jax.plan import Plan
from helix_jax.sampling import Sampling, sample


class StepOutput(NamedTuple):
    """token_B: what each row says next; without meaning where the count was 0. logits_BV: what it was chosen from."""

    token_B: Int[Array, "B"]
    logits_BV: Float[Array, "B V"]
    cache: KVCache
    rows: Rows


class MultiStepOutput(NamedTuple):
    """tokens_BS: what each row said at each of S steps. live_BS: whether it was still running then."""

    tokens_BS: Int[Array, "B S"]
    live_BS: Bool[Array, "B S"]
    cache: KVCache
    rows: Rows


def advance(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    cache: KVCache,
    rows: Rows,
    tokens_BT: Int[Array, "B T"],
    count_B: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], KVCache, Rows]:
    """Appends the first `count_B` (0 to T) of `tokens_BT` to each row; gives the logits of what follows the last one.

    config and weights: `model.config` and `model.weights()`. cache: taken over, use the one that comes back.
    T = 1 is decoding, a larger T a chunk of a prompt. A row of count 0 writes nothing and moves nothing. Nothing here
    depends on the lengths' values: one compilation serves them all. Room is the caller's to check: tokens that find no
    page are not written. On a CPU split into devices, wait for a step before the next: steps that pile up deadlock.
    """
    model = assemble(config, weights)
    tokens_BT = _no_token_alone(plan, tokens_BT)

    def attention(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array | None, state: Pages, **how: Any) -> tuple[Array, Pages]:
        return helix_attention(plan, state, q_BTNH, k_BTKH, v_BTKH, rows, count_B, **how)

    step_T = jnp.arange(tokens_BT.shape[1])
    position_BT = rows.length_B[:, None] + step_T
    run_experts = moe.on_mesh(plan.mesh, plan.experts, step_T < count_B[:, None])
    x_BTD, layers = model(tokens_BT, position_BT, attention, cache.layers, run_experts)
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    logits_BV = model.logits(jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0])
    # For the logits this is the step's one gather: they leave their vocabulary shards, and every device samples the
    # same token.
    logits_BV = constrain_rows(plan, logits_BV)
    return logits_BV, KVCache(layers), rows._replace(length_B=constrain_rows(plan, rows.length_B + count_B))


def _no_token_alone(plan: Plan, tokens_BT: Array) -> Array:
    """A token that would be the only one of its devices gets another at its side, which no count ever covers.

    Of one alone XLA makes other programs on a GPU: it gathers the whole embedding from all devices to look the token
    up, and reads the weights of a layer in a loop for vectors instead of a matrix product, which took 2.9 times
    as long.
    """
    rows, T = tokens_BT.shape
    alone = rows * T == plan.mesh.shape[DP]
    return jnp.pad(tokens_BT, ((0, 0), (0, 1))) if alone else tokens_BT


def constrain_rows(plan: Plan, x_B: Array) -> Array:
    """One sharding for all that is per row: what a step gives, the next one takes without another compilation."""
    return lax.with_sharding_constraint(x_B, sharding(plan.mesh, ROWS_B))


def _step(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    cache: KVCache,
    rows: Rows,
    tokens_BT: Int[Array, "B T"],
    count_B: Int[Array, "B"],
    sampling: Sampling,
) -> StepOutput:
    """As `advance`, and chooses the token that follows."""
    logits_BV, cache, rows = advance(config, plan, weights, cache, rows, tokens_BT, count_B)
    return StepOutput(constrain_rows(plan, sample(logits_BV, sampling, rows.length_B)), logits_BV, cache, rows)


def _many_steps(
    config: ModelConfig,
    plan: Plan,
    steps: int,
    weights: Weights,
    cache: KVCache,
    rows: Rows,
    token_B: Int[Array, "B"],
    limit_B: Int[Array, "B"],
    stop_token_ids: Int[Array, "X"],
    sampling: Sampling,
) -> MultiStepOutput:
    """Decodes up to `steps` tokens per row on the device, starting by appending `token_B`.

    A row runs while its length, prompt included, is below its limit, which is at most the room that it was made with (0
    for an idle row), and ends after any of `stop_token_ids` (which may be empty).
    """

    def one(carry: tuple[KVCache, Rows, Array, Array], _: None):
        cache, rows, token_B, limit_B = carry
        live_B = rows.length_B < limit_B
        out = _step(config, plan, weights, cache, rows, token_B[:, None], live_B.astype(jnp.int32), sampling)
        limit_B = jnp.where(jnp.isin(out.token_B, stop_token_ids), 0, limit_B)
        return (out.cache, out.rows, out.token_B, limit_B), (out.token_B, live_B)

    (cache, rows, _, _), (tokens_SB, live_SB) = lax.scan(one, (cache, rows, token_B, limit_B), length=steps)
    return MultiStepOutput(tokens_SB.T, live_SB.T, cache, rows)


step = partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="cache")(_step)
many_steps = partial(jax.jit, static_argnames=("config", "plan", "steps"), donate_argnames="cache")(_many_steps)
