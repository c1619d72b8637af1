"""One step of the model: append new tokens to each row, and choose the token that follows."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding
from jaxtyping import Float, Int

from helix_jax.cache import KVCache, Rows, layer_groups
from helix_jax.config import ModelConfig
from helix_jax.helix import helix_attention
from helix_jax.mesh import DP, EXPERT_WEIGHTS, ROWS_B, sharding, weight_sharding
from helix_jax.models import moe
from helix_jax.models.transformer import Transformer, Weights, assemble
from helix_jax.plan import Plan
from helix_jax.sampling import Sampling, sample
from helix_jax.validation import check_array, check_choice

CachesAndLayer = tuple[tuple[KVCache, ...], int]  # what attention passes on from layer to layer


class StepOutput(NamedTuple):
    """The result of `step`.

    Attributes:
        token_B: The next token of each row. Undefined for a row whose count was 0.
        logits_BV: The logits that it was chosen from.
        caches: The cache of each cache group, updated in place.
        rows: The rows, with their new lengths.
    """

    token_B: Int[Array, "B"]
    logits_BV: Float[Array, "B V"]
    caches: tuple[KVCache, ...]
    rows: Rows


def _advance(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    caches: tuple[KVCache, ...],
    rows: Rows,
    tokens_BT: Int[Array, "B T"],
    count_B: Int[Array, "B"],
    logits: str = "last",
) -> tuple[Float[Array, "B *T V"], tuple[KVCache, ...], Rows]:
    """Run the model over new tokens of each row, and return the logits of the tokens that follow.

    T = 1 is decoding, a larger T a chunk of a prompt. A row whose count is 0 writes nothing. Nothing here depends on
    the values of the lengths, so one compilation for each T serves them all. To undo tokens, for example drafts that
    were rejected, continue with a smaller `rows.length_B`.

    A row that has no pages for its new tokens gets NaN, as in `helix_attention`. On a CPU that is split into devices,
    wait for each call before the next one, because programs that queue up deadlock.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        caches: The cache of each cache group. They are donated: continue with those that are returned.
        rows: The state of each row.
        tokens_BT: The new tokens.
        count_B: How many of them count in each row, 0 to T. The others are padding.
        logits: "last" returns the logits that follow the last new token of each row, [B, V], undefined for a row
            whose count is 0. "all" returns those that follow each new token, [B, T, V], undefined for padding.

    Returns:
        The logits in float32 (-inf for the padding of the vocabulary), the caches, and the rows with their new lengths.

    Raises:
        ValueError: `logits` is neither "last" nor "all", or a shape does not fit, see `helix_attention`.
    """
    check_choice("logits", logits, ("last", "all"))
    x_BTD, caches, rows = append_tokens(config, plan, weights, caches, rows, tokens_BT, count_B)
    if logits == "all":
        return logits_of(config, plan, weights, x_BTD[:, : tokens_BT.shape[1]]), caches, rows
    return last_logits(config, plan, weights, x_BTD, count_B), caches, rows


def append_tokens(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    caches: tuple[KVCache, ...],
    rows: Rows,
    tokens_BT: Int[Array, "B T"],
    count_B: Int[Array, "B"],
) -> tuple[Float[Array, "B X D"], tuple[KVCache, ...], Rows]:
    """Append new tokens to each row like `advance`, and return their hidden states after the last norm, not logits.

    Those of padding are undefined. A single token may be padded, so that there are X > T of them.
    """
    check_array("tokens_BT", tokens_BT, jnp.integer)
    model, groups = assemble(config, weights), layer_groups(config, len(caches))
    T = tokens_BT.shape[1]
    padded_BT = _pad_single_token(plan, tokens_BT)

    def attention(
        q_BTNH: Array, k_BTKH: Array, v_BTKH: Array | None, state: CachesAndLayer, **options: Any
    ) -> tuple[Array, CachesAndLayer]:
        caches, layer = state
        group, index = groups[layer]
        q_BTNH, k_BTKH, v_BTKH = jax.tree.map(lambda x: x[:, :T], (q_BTNH, k_BTKH, v_BTKH))  # without the padding
        new = q_BTNH, k_BTKH, v_BTKH, rows, count_B
        o_BTNH, cache = helix_attention(plan, caches[group], *new, layer=index, group=group, **options)
        caches = (*caches[:group], cache, *caches[group + 1 :])
        return _pad_tokens(o_BTNH, padded_BT.shape[1]), (caches, layer + 1)

    step_T = jnp.arange(padded_BT.shape[1])
    position_BT = rows.length_B[:, None] + step_T
    run_experts = moe.make_run_experts(plan.mesh, plan.experts, step_T < count_B[:, None])
    x_BTD, (caches, _) = model(padded_BT, position_BT, attention, (caches, 0), run_experts)
    return x_BTD, caches, rows._replace(length_B=constrain_rows(plan, rows.length_B + count_B))


def last_logits(
    config: ModelConfig, plan: Plan, weights: Weights, x_BTD: Float[Array, "B T D"], count_B: Int[Array, "B"]
) -> Float[Array, "B V"]:
    """Return the logits that follow the last token of each row, from the hidden states of its new tokens."""
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    return logits_of(config, plan, weights, jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0])


def logits_of(
    config: ModelConfig, plan: Plan, weights: Weights, x_BD: Float[Array, "B *T D"]
) -> Float[Array, "B *T V"]:
    """Return the logits that follow some tokens of each row, from their hidden states."""
    # This is the one gather of the logits in a step: every device then has all of them, and samples the same token.
    return constrain_rows(plan, assemble(config, weights).logits(x_BD))


def _pad_single_token(plan: Plan, tokens_BT: Array) -> Array:
    """Pad the new tokens if there is only one per device. No count includes the padding.

    For a single token XLA generates slower programs on a GPU: it gathers the whole embedding from all devices to look
    the token up, and multiplies a layer's weights by a vector in a loop, which took 2.9 times as long as a matrix
    product.
    """
    return _pad_tokens(tokens_BT, 2) if tokens_BT.size == plan.mesh.shape[DP] else tokens_BT


def _pad_tokens(x_BT: Array, tokens: int) -> Array:
    """Pad with zeros to `tokens` new tokens per row."""
    missing = tokens - x_BT.shape[1]
    return jnp.pad(x_BT, ((0, 0), (0, missing), *((0, 0),) * (x_BT.ndim - 2))) if missing else x_BT


def constrain_rows(plan: Plan, x_B: Array) -> Array:
    """Constrain per-row values to one sharding, so that the next step accepts them without a new compilation."""
    return lax.with_sharding_constraint(x_B, sharding(plan.mesh, ROWS_B))


def _step(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    caches: tuple[KVCache, ...],
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
        caches: The cache of each cache group. Donated: continue with those that are returned.
        rows: The state of each row.
        tokens_BT: The new tokens.
        count_B: How many of them count in each row, 0 to T.
        sampling: The sampling settings of each row. None is greedy, without the sampler in the compiled program.
    """
    logits_BV, caches, rows = _advance(config, plan, weights, caches, rows, tokens_BT, count_B)
    return StepOutput(constrain_rows(plan, sample(logits_BV, sampling, rows.length_B)), logits_BV, caches, rows)


advance = partial(jax.jit, static_argnames=("config", "plan", "logits"), donate_argnames="caches")(_advance)
step = partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="caches")(_step)


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
