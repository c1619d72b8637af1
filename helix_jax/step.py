"""The jitted device programs: append new tokens to the cache and choose the next token, once or several times."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Int

from helix_jax.cache import KVCache, Pages, Rows
from helix_jax.config import ModelConfig
from helix_jax.helix import helix_attention
from helix_jax.mesh import DP, EXPERT_WEIGHTS, ROWS_B, sharding, weight_sharding
from helix_jax.models import moe
from helix_jax.models.transformer import Transformer, Weights, assemble
from helix_jax.plan import Plan
from helix_jax.sampling import Sampling, sample


class StepOutput(NamedTuple):
    """The result of `step`.

    Attributes:
        token_B: The next token of each row. Undefined for a row whose count was 0.
        logits_BV: The logits that it was chosen from.
        cache: The cache, updated in place.
        rows: The rows, with their new lengths.
    """

    token_B: Int[Array, "B"]
    logits_BV: Float[Array, "B V"]
    cache: KVCache
    rows: Rows


class DecodeInput(NamedTuple):
    """Where `many_steps` starts, and where each row ends.

    Attributes:
        token_B: The last token of each row. It is not in the cache yet.
        limit_B: The length, prompt included, at which a row ends. It must not exceed the length that the row has pages
            for. 0 for an idle row.
        stop_token_ids: A row ends after any of these. May be empty.
    """

    token_B: Int[Array, "B"]
    limit_B: Int[Array, "B"]
    stop_token_ids: Int[Array, "X"]


class MultiStepOutput(NamedTuple):
    """The result of `many_steps`.

    Attributes:
        tokens_BS: The token that each row chose at each of S steps.
        live_BS: Whether the row was still running at that step. Where it was not, its token is undefined.
        cache: The cache, updated in place.
        rows: The rows, with their new lengths.
    """

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
    """Append new tokens to each row, and compute the logits of the token that follows.

    T = 1 is decoding, a larger T a chunk of a prompt. A row whose count is 0 writes nothing. Nothing here depends on
    the values of the lengths, so one compilation serves them all.

    The caller checks that the rows have pages for their new tokens: a token without a page is not written. On a CPU
    that is split into devices, wait for each call before the next one, because programs that queue up deadlock.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        cache: The cache. It is donated by the jitted programs: continue with the one that is returned.
        rows: The state of each row.
        tokens_BT: The new tokens.
        count_B: How many of them count in each row, 0 to T. The others are padding.

    Returns:
        The logits that follow the last token of each row, the cache, and the rows.
    """
    model = assemble(config, weights)
    tokens_BT = _pad_single_token(plan, tokens_BT)

    def attention(
        q_BTNH: Array, k_BTKH: Array, v_BTKH: Array | None, state: Pages, **options: Any
    ) -> tuple[Array, Pages]:
        return helix_attention(plan, state, q_BTNH, k_BTKH, v_BTKH, rows, count_B, **options)

    step_T = jnp.arange(tokens_BT.shape[1])
    position_BT = rows.length_B[:, None] + step_T
    run_experts = moe.make_run_experts(plan.mesh, plan.experts, step_T < count_B[:, None])
    x_BTD, layers = model(tokens_BT, position_BT, attention, cache.layers, run_experts)
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    logits_BV = model.logits(jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0])
    # This is the one gather of the logits in a step: every device then has all of them, and samples the same token.
    logits_BV = constrain_rows(plan, logits_BV)
    return logits_BV, KVCache(layers), rows._replace(length_B=constrain_rows(plan, rows.length_B + count_B))


def _pad_single_token(plan: Plan, tokens_BT: Array) -> Array:
    """Pad the new tokens if there is only one per device. No count includes the padding.

    For a single token XLA generates slower programs on a GPU: it gathers the whole embedding from all devices to look
    the token up, and multiplies a layer's weights by a vector in a loop, which took 2.9 times as long as a matrix
    product.
    """
    rows, T = tokens_BT.shape
    return jnp.pad(tokens_BT, ((0, 0), (0, 1))) if rows * T == plan.mesh.shape[DP] else tokens_BT


def constrain_rows(plan: Plan, x_B: Array) -> Array:
    """Constrain per-row values to one sharding, so that the next step accepts them without a new compilation."""
    return lax.with_sharding_constraint(x_B, sharding(plan.mesh, ROWS_B))


def _step(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    cache: KVCache,
    rows: Rows,
    tokens_BT: Int[Array, "B T"],
    count_B: Int[Array, "B"],
    sampling: Sampling | None = None,
) -> StepOutput:
    """Append new tokens to each row like `advance`, and choose the token that follows.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        cache: The cache. It is donated: continue with the one that is returned.
        rows: The state of each row.
        tokens_BT: The new tokens.
        count_B: How many of them count in each row, 0 to T.
        sampling: The sampling settings of each row. None is greedy, without the sampler in the compiled program.
    """
    logits_BV, cache, rows = advance(config, plan, weights, cache, rows, tokens_BT, count_B)
    return StepOutput(constrain_rows(plan, sample(logits_BV, sampling, rows.length_B)), logits_BV, cache, rows)


def _many_steps(
    config: ModelConfig,
    plan: Plan,
    steps: int,
    weights: Weights,
    cache: KVCache,
    rows: Rows,
    inputs: DecodeInput,
    sampling: Sampling | None = None,
) -> MultiStepOutput:
    """Decode up to `steps` tokens per row in one call. The first step appends `inputs.token_B`.

    A row runs while its length is below its limit, and ends after a stop token.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        steps: The number of steps.
        weights: `model.weights()`.
        cache: The cache. It is donated: continue with the one that is returned.
        rows: The state of each row.
        inputs: The last token of each row, and where it ends.
        sampling: The sampling settings of each row. None is greedy, without the sampler in the compiled program.
    """

    def one_step(carry: tuple[KVCache, Rows, Array, Array], _: None) -> tuple[Any, tuple[Array, Array]]:
        cache, rows, token_B, limit_B = carry
        live_B = rows.length_B < limit_B
        out = _step(config, plan, weights, cache, rows, token_B[:, None], live_B.astype(jnp.int32), sampling)
        limit_B = jnp.where(jnp.isin(out.token_B, inputs.stop_token_ids), 0, limit_B)
        return (out.cache, out.rows, out.token_B, limit_B), (out.token_B, live_B)

    carry = (cache, rows, inputs.token_B, inputs.limit_B)
    (cache, rows, _, _), (tokens_SB, live_SB) = lax.scan(one_step, carry, length=steps)
    return MultiStepOutput(tokens_SB.T, live_SB.T, cache, rows)


step = partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="cache")(_step)
many_steps = partial(jax.jit, static_argnames=("config", "plan", "steps"), donate_argnames="cache")(_many_steps)


def check_model_placement(model: Transformer, plan: Plan) -> None:
    """Check that a model's weights are sharded as `plan` decodes with them, and that the mesh divides its heads.

    Raises:
        ValueError: They are not, or it does not.
    """
    placed = model.embed_VD[...].sharding
    if not isinstance(placed, NamedSharding) or placed.mesh != plan.mesh:
        raise ValueError("the model's weights are on another mesh than the plan's: use load or shard with this plan")
    plan.check_model(model.config)
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = str(path[-1])
        if name in EXPERT_WEIGHTS[plan.experts]:
            expected = weight_sharding(plan.mesh, name, plan.experts)
            if not parameter[...].sharding.is_equivalent_to(expected, parameter.ndim):  # each step would move them
                raise ValueError(
                    f"the model's experts are not sharded as experts='{plan.experts}' of the plan: "
                    f"use load or shard with this plan"
                )
