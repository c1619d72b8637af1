"""The jitted device programs: prefill new tokens of each row, and decode several tokens per row in one call."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from helix_jax.cache import KVCache, Rows, layer_groups
from helix_jax.config import ModelConfig
from helix_jax.helix import helix_attention
from helix_jax.mesh import DP, EXPERT_WEIGHTS, ROWS_B, first_device, sharding, weight_sharding
from helix_jax.models import moe
from helix_jax.models.transformer import Transformer, Weights, assemble
from helix_jax.plan import Plan
from helix_jax.sampling import MAX_LOGPROBS, Logprobs, RowSampling, Sampling, choose, sample

DEFAULT_STEPS = 32  # decode steps per call

# What XLA may record as CUDA graphs. Other platforms ignore these options. On one GPU a graph contains the whole loop
# of `decode`, so that the host does not read its condition in each step, and a call returns before the device begins.
_CUDA_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
_ONE_GPU = {"xla_gpu_enable_command_buffer": f"{_CUDA_GRAPHS},WHILE,CONDITIONAL"}

# On several GPUs a graph contains a step. Its collectives are those of NCCL, because XLA's own all-reduce cannot be
# recorded, and ends a graph before and after it. CUDA does not accept a loop around NCCL's kernels.
_GRAPH_COLLECTIVES = "ALLREDUCE,ALLGATHER,ALLTOALL,REDUCESCATTER"
_SEVERAL_GPUS = {
    "xla_gpu_enable_command_buffer": f"{_CUDA_GRAPHS},COLLECTIVES",
    "xla_gpu_enable_collectives_command_buffer_filter": _GRAPH_COLLECTIVES,
    "xla_gpu_experimental_use_collective_kernels": "",
    "xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False,
}
_COLLECTIVES_IN_GRAPHS_SINCE = (0, 11)  # the JAX whose XLA has these options


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


class DecodeState(NamedTuple):
    """Everything that decoding changes.

    Attributes:
        caches: The cache of each cache group.
        rows: The page tables and lengths.
        token_B: The last token of each row. It is not in the cache yet.
        finished_B: Whether a row has produced a stop token. It then decodes nothing.
        stop_BV: The stop tokens of each row. None: there are none.
        sampling: How each row chooses its next token. None: every row takes the most probable one.
    """

    caches: tuple[KVCache, ...]
    rows: Rows
    token_B: Int[Array, "B"]
    finished_B: Bool[Array, "B"]
    stop_BV: Bool[Array, "B V"] | None = None
    sampling: RowSampling | None = None


class DecodeOutput(NamedTuple):
    """The tokens that a call chose.

    Attributes:
        tokens_BS: The tokens of each row, at most S.
        count_B: How many of them each row has. The others are undefined.
        logprobs_BS: Their log-probabilities, each array with the dimensions B and S first, 0 if no row requests any.
            None from a greedy program.
    """

    tokens_BS: Int[Array, "B S"]
    count_B: Int[Array, "B"]
    logprobs_BS: Logprobs | None


def advance(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    caches: tuple[KVCache, ...],
    rows: Rows,
    tokens_BT: Int[Array, "B T"],
    count_B: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], tuple[KVCache, ...], Rows]:
    """Append new tokens to each row, and compute the logits of the token that follows.

    T = 1 is decoding, a larger T a chunk of a prompt. A row whose count is 0 writes nothing. Nothing here depends on
    the values of the lengths, so one compilation serves them all.

    The caller checks that the rows have pages for their new tokens: a token without a page is not written. On a CPU
    that is split into devices, wait for each call before the next one, because programs that queue up deadlock.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        caches: The cache of each cache group. They are donated by the jitted programs: continue with those that are
            returned.
        rows: The state of each row.
        tokens_BT: The new tokens.
        count_B: How many of them count in each row, 0 to T. The others are padding.

    Returns:
        The logits that follow the last token of each row, the caches, and the rows.
    """
    x_BTD, caches, rows = append_tokens(config, plan, weights, caches, rows, tokens_BT, count_B)
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
    model, groups = assemble(config, weights), layer_groups(config)
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
    logits_BV = assemble(config, weights).logits(jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0])
    # This is the one gather of the logits in a step: every device then has all of them, and samples the same token.
    return constrain_rows(plan, logits_BV)


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
    logits_BV, caches, rows = advance(config, plan, weights, caches, rows, tokens_BT, count_B)
    return StepOutput(constrain_rows(plan, sample(logits_BV, sampling, rows.length_B)), logits_BV, caches, rows)


def _decode(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    state: DecodeState,
    count_B: Int[Array, "B"],
    max_steps: int = DEFAULT_STEPS,
    greedy: bool = True,
) -> tuple[DecodeOutput, DecodeState]:
    """Decode up to `count_B` tokens per row in one call. A row ends early after a stop token.

    The first step appends `state.token_B`. One compiled program serves all counts: it returns as soon as every row has
    its tokens or has ended; on several GPUs, after `max_steps` steps (see `decode_steps`).

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        state: Donated: continue with the one that is returned.
        count_B: The most tokens of each row, 0 to `max_steps`. The row must have pages for them.
        max_steps: The most steps of a call.
        greedy: Whether the rows that decode take the most probable token, without a penalty or log-probabilities. The
            program then contains no sampler, which shortens its compilation by a third to a half.
    """

    def live_rows(step: Array, state: DecodeState) -> Array:
        return (step < count_B) & ~state.finished_B

    def has_live_row(carry: tuple[Array, DecodeState, DecodeOutput]) -> Array:
        step, state, _ = carry
        return live_rows(step, state).any()

    def one_step(carry: tuple[Array, DecodeState, DecodeOutput]) -> tuple[Array, DecodeState, DecodeOutput]:
        step, state, output = carry
        live_B = live_rows(step, state)
        token_B, logprobs, state = _decode_token(config, plan, weights, state, live_B, greedy)
        tokens_BS = output.tokens_BS.at[:, step].set(token_B)
        logprobs_BS = jax.tree.map(lambda all_BS, new_B: all_BS.at[:, step].set(new_B), output.logprobs_BS, logprobs)
        output = DecodeOutput(constrain_rows(plan, tokens_BS), output.count_B + live_B, logprobs_BS)
        return step + 1, state, output

    carry = jnp.zeros((), jnp.int32), state, _empty_output(plan, state, max_steps, greedy)
    if _has_fixed_length(plan):
        _, state, output = lax.fori_loop(0, max_steps, lambda _, carry: one_step(carry), carry)
    else:
        _, state, output = lax.while_loop(has_live_row, one_step, carry)
    return output, state


def decode_steps(plan: Plan, max_steps: int) -> tuple[int, ...]:
    """Return the values of `max_steps` for which an engine compiles `decode`, in ascending order.

    On several GPUs a call always takes all of its steps. A CUDA graph with collectives cannot contain the loop, so the
    host would read its condition in every step, and each call would return only after its last step: 1.23 ms per token
    instead of 1.14 (two H200s, 8 layers of Llama-3.1-8B). There a second program decodes a single token.
    """
    return tuple(sorted({1, max_steps})) if _has_fixed_length(plan) else (max_steps,)


def _has_fixed_length(plan: Plan) -> bool:
    device = first_device(plan.mesh)
    return device is not None and device.platform == "gpu" and plan.mesh.size > 1


def decode_program(plan: Plan) -> Any:
    """Return `decode`, jitted with the compiler options that are fastest on the devices of a plan."""
    recent = jax.__version_info__ >= _COLLECTIVES_IN_GRAPHS_SINCE
    return _decode_on_several_gpus if recent and _has_fixed_length(plan) else decode


def _decode_token(
    config: ModelConfig, plan: Plan, weights: Weights, state: DecodeState, live_B: Array, greedy: bool
) -> tuple[Array, Logprobs | None, DecodeState]:
    """Append the last token of each live row, and choose the next."""
    new = state.token_B[:, None], live_B.astype(jnp.int32)
    logits_BV, caches, rows = advance(config, plan, weights, state.caches, state.rows, *new)
    sampling = state.sampling
    if sampling is not None:
        appended_BV = live_B[:, None] & (jnp.arange(sampling.seen_BV.shape[1]) == state.token_B[:, None])
        sampling = sampling._replace(seen_BV=constrain_rows(plan, sampling.seen_BV | appended_BV))
    token_B, logprobs = choose(logits_BV, None if greedy else sampling, rows.length_B, live_B)
    token_B = constrain_rows(plan, jnp.where(live_B, token_B, state.token_B))
    finished_B = constrain_rows(plan, state.finished_B | (live_B & is_stop(state.stop_BV, token_B)))
    return token_B, logprobs, DecodeState(caches, rows, token_B, finished_B, state.stop_BV, sampling)


def is_stop(stop_BV: Array | None, token_B: Array) -> Array:
    """Return whether each token is a stop token of its row."""
    if stop_BV is None:
        return jnp.zeros(token_B.shape, bool)
    return jnp.take_along_axis(stop_BV, token_B[:, None], axis=1)[:, 0]


def _empty_output(plan: Plan, state: DecodeState, max_steps: int, greedy: bool) -> DecodeOutput:
    """Return an output with space for `max_steps` tokens per row."""

    def zeros(*shape: int, dtype: DTypeLike = jnp.int32) -> Array:
        return constrain_rows(plan, jnp.zeros((len(state.token_B), *shape), dtype))

    logprobs = None
    if state.sampling is not None and not greedy:
        num_top = min(MAX_LOGPROBS, state.sampling.seen_BV.shape[1])
        floats = partial(zeros, max_steps, dtype=jnp.float32)
        logprobs = Logprobs(floats(), floats(num_top), zeros(max_steps, num_top))
    return DecodeOutput(zeros(max_steps), zeros(), logprobs)


step = partial(jax.jit, static_argnames=("config", "plan"), donate_argnames="caches")(_step)
_jit_decode = partial(jax.jit, static_argnames=("config", "plan", "max_steps", "greedy"), donate_argnames="state")
decode = _jit_decode(_decode, compiler_options=_ONE_GPU)
_decode_on_several_gpus = _jit_decode(_decode, compiler_options=_SEVERAL_GPUS)


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
