"""The jitted program that decodes several tokens per row in one call."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from helix_jax.cache import KVCache, Rows
from helix_jax.config import ModelConfig
from helix_jax.drafting import Drafter, Drafts, Proposal, propose_drafts, record_result, write_rows
from helix_jax.mesh import first_device
from helix_jax.models.transformer import Weights
from helix_jax.plan import Plan
from helix_jax.sampling import MAX_LOGPROBS, Logprobs, RowSampling, choose, mark_seen, token_masks
from helix_jax.speculation import SpeculationCounts, count_accepted
from helix_jax.step import append_tokens, constrain_rows, logits_of

DEFAULT_STEPS = 32  # decode steps per call

# What XLA may record as CUDA graphs. Other platforms ignore these options. On one GPU a graph contains the whole loop
# of `decode`, so that the host does not read its condition in each step, and a call returns before the device begins.
_CUDA_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
_ONE_GPU = {"xla_gpu_enable_command_buffer": f"{_CUDA_GRAPHS},WHILE,CONDITIONAL"}

# On several GPUs a graph contains a step. Its collectives are those of NCCL, because XLA's own all-reduce cannot be
# recorded, and ends a graph before and after it. CUDA does not accept a loop around the events that NCCL may add.
_GRAPH_COLLECTIVES = "ALLREDUCE,ALLGATHER,ALLTOALL,REDUCESCATTER"
_SEVERAL_GPUS = {
    "xla_gpu_enable_command_buffer": f"{_CUDA_GRAPHS},COLLECTIVES",
    "xla_gpu_enable_collectives_command_buffer_filter": _GRAPH_COLLECTIVES,
    "xla_gpu_experimental_use_collective_kernels": "",
    "xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False,
}
_COLLECTIVES_IN_GRAPHS_SINCE = (0, 11)  # the JAX whose XLA has these options


class DecodeState(NamedTuple):
    """Everything that decoding changes.

    Attributes:
        caches: The cache of each cache group.
        rows: The page tables and lengths.
        token_B: The last token of each row. It is not in the cache yet.
        finished_B: Whether a row has produced a stop token. It then decodes nothing.
        stop_BV: The stop tokens of each row. None: there are none.
        sampling: How each row chooses its next token. None: every row takes the most probable one.
        drafts: What drafts are made from. None: one token is decoded per step.
    """

    caches: tuple[KVCache, ...]
    rows: Rows
    token_B: Int[Array, "B"]
    finished_B: Bool[Array, "B"]
    stop_BV: Bool[Array, "B V"] | None = None
    sampling: RowSampling | None = None
    drafts: Drafts | None = None


class DecodeOutput(NamedTuple):
    """The tokens that a call chose.

    Attributes:
        tokens_BS: The tokens of each row, at most S.
        count_B: How many of them each row has. The others are undefined.
        logprobs_BS: Their log-probabilities, each array with the dimensions B and S first, 0 if no row requests any.
            None from a greedy program.
        speculation: The statistics of drafts. None: there were none.
    """

    tokens_BS: Int[Array, "B S"]
    count_B: Int[Array, "B"]
    logprobs_BS: Logprobs | None
    speculation: SpeculationCounts | None = None


Carry = tuple[DecodeState, DecodeOutput]  # of the loop over steps


class Choice(NamedTuple):
    """The result of a step: a token after each of the T tokens that were appended.

    Attributes:
        token_BT: The tokens.
        logprobs_BT: Their log-probabilities, each array with the dimensions B and T first. None from a greedy program.
        caches: The cache of each cache group.
    """

    token_BT: Int[Array, "B T"]
    logprobs_BT: Logprobs | None
    caches: tuple[KVCache, ...]


def _decode(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    state: DecodeState,
    count_B: Int[Array, "B"],
    max_steps: int = DEFAULT_STEPS,
    greedy: bool = True,
    drafter: Drafter | None = None,
) -> tuple[DecodeOutput, DecodeState]:
    """Decode up to `count_B` tokens per row in one call. A row ends early after a stop token.

    The first step appends `state.token_B`. One compiled program serves all counts: it returns as soon as every row has
    its tokens or has ended; on several GPUs, without drafts, after `max_steps` steps (see `decode_steps`). With drafts,
    a step decodes several tokens of a row if they were right.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        state: Donated: continue with the one that is returned.
        count_B: The most tokens of each row, 0 to `max_steps`. The row must have pages for them.
        max_steps: The most steps of a call.
        greedy: Whether the rows that decode take the most probable token, without a penalty or log-probabilities. The
            program then contains no sampler, which shortens its compilation by a third to a half.
        drafter: What drafts tokens, if `state.drafts` is not None.
    """
    choose_tokens = partial(_append_and_choose, config, plan, weights, greedy=greedy)

    def live_rows(state: DecodeState, output: DecodeOutput) -> Array:
        return (output.count_B < count_B) & ~state.finished_B

    def has_live_row(carry: Carry) -> Array:
        return live_rows(*carry).any()

    def one_step(carry: Carry) -> Carry:
        state, output = carry
        live_B = live_rows(state, output)
        if state.drafts is None:
            new = state.token_B[:, None], live_B.astype(jnp.int32)
            return _accept(plan, state, output, choose_tokens(state, *new), *new)
        assert drafter is not None
        remaining_B = jnp.where(live_B, count_B - output.count_B, 0)
        proposal = _propose(plan, drafter, state, remaining_B, greedy=greedy)
        return _verify(plan, drafter, state, output, choose_tokens, proposal, live_B)

    carry = state, _empty_output(plan, state, max_steps, greedy)
    if state.drafts is None and _has_fixed_length(plan):
        state, output = lax.fori_loop(0, max_steps, lambda _, carry: one_step(carry), carry)
    else:
        state, output = lax.while_loop(has_live_row, one_step, carry)
    return output, state


def _append_and_choose(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    state: DecodeState,
    tokens_BT: Array,
    count_B: Array,
    *,
    greedy: bool,
) -> Choice:
    """Append tokens to each row, and choose a token after each. The lengths of the rows are left as they are."""
    (B, T), rows = tokens_BT.shape, state.rows
    x_BTD, caches, _ = append_tokens(config, plan, weights, state.caches, rows, tokens_BT, count_B)
    logits_BTV = logits_of(config, plan, weights, x_BTD[:, :T])
    position_BT = rows.length_B[:, None] + 1 + jnp.arange(T)
    live_BT = jnp.arange(T) < count_B[:, None]

    def flat(x_BT: Array) -> Array:
        return x_BT.reshape(B * T, *x_BT.shape[2:])

    sampling = None
    if state.sampling is not None and not greedy:
        new_BTV = token_masks(tokens_BT, count_B, state.sampling.seen_BV.shape[1])
        seen_BTV = state.sampling.seen_BV[:, None] | lax.associative_scan(jnp.logical_or, new_BTV, axis=1)
        repeated = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), state.sampling._replace(seen_BV=None))
        sampling = repeated._replace(seen_BV=flat(seen_BTV))
    chosen = choose(flat(logits_BTV), sampling, flat(position_BT), flat(live_BT))
    token_BT, logprobs_BT = jax.tree.map(lambda x: constrain_rows(plan, x.reshape(B, T, *x.shape[1:])), chosen)
    return Choice(token_BT, logprobs_BT, caches)


def _propose(plan: Plan, drafter: Drafter, state: DecodeState, remaining_B: Array, *, greedy: bool) -> Proposal:
    """Draft at most one token less than the remaining ones of each row, because one follows the last draft."""
    assert state.drafts is not None
    one_B = (remaining_B > 0).astype(jnp.int32)
    tokens_BS = write_rows(state.drafts.tokens_BS, state.rows.length_B, state.token_B[:, None], one_B)
    drafts = state.drafts._replace(tokens_BS=constrain_rows(plan, tokens_BS))
    most_B = jnp.clip(remaining_B - 1, 0, drafter.options.tokens)
    return propose_drafts(plan, drafter, drafts, state.rows, None if greedy else state.sampling, most_B)


def _verify(
    plan: Plan,
    drafter: Drafter,
    state: DecodeState,
    output: DecodeOutput,
    choose_tokens: Callable[[DecodeState, Array, Array], Choice],
    proposal: Proposal,
    live_B: Array,
) -> tuple[DecodeState, DecodeOutput]:
    """Decode the next token of each live row, and as many after it as were drafted right."""
    count_B = proposal.count_B
    group_BT = jnp.concatenate([state.token_B[:, None], proposal.tokens_BD], axis=1)

    def choose_first(T: int, choice: Choice) -> Choice:
        """Replace the first T tokens of a choice."""
        first_B = jnp.where(live_B, jnp.minimum(1 + count_B, T), 0)
        chosen = choose_tokens(state._replace(caches=choice.caches, drafts=None), group_BT[:, :T], first_B)
        logprobs_BT = jax.tree.map(set_first, choice.logprobs_BT, chosen.logprobs_BT)
        return Choice(set_first(choice.token_BT, chosen.token_BT), logprobs_BT, chosen.caches)

    def set_first(old_BT: Array, new_BT: Array) -> Array:
        return old_BT.at[:, : new_BT.shape[1]].set(new_BT)

    def empty(like_BS: Array) -> Array:
        return jnp.zeros((*group_BT.shape, *like_BS.shape[2:]), like_BS.dtype)

    # Verifying takes longer than decoding one token, so it is done only if a row has a draft.
    choice = Choice(empty(output.tokens_BS), jax.tree.map(empty, output.logprobs_BS), state.caches)
    verify, decode_one = partial(choose_first, group_BT.shape[1]), partial(choose_first, 1)
    has_draft = (count_B > 0).any()
    choice = lax.platform_dependent(
        choice,
        cpu=partial(_cond_in_place, has_draft, verify, decode_one),
        default=partial(lax.cond, has_draft, verify, decode_one),
    )
    accepted_B = count_accepted(choice.token_BT, proposal.tokens_BD, count_B)
    drafts = record_result(plan, drafter, proposal, state.rows, choice.token_BT, accepted_B, live_B)
    new = SpeculationCounts(live_B.astype(jnp.int32), count_B, accepted_B)
    output = output._replace(speculation=jax.tree.map(jnp.add, output.speculation, new))
    state = state._replace(drafts=drafts)
    return _accept(plan, state, output, choice, group_BT, jnp.where(live_B, accepted_B + 1, 0))


def _cond_in_place(
    is_true: Array, on_true: Callable[[Choice], Choice], on_false: Callable[[Choice], Choice], choice: Choice
) -> Choice:
    """Compute `lax.cond`, with loops of at most one iteration.

    XLA's CPU backend copies the caches before and after a branch, but updates them in place in a loop. GPUs use
    `lax.cond`, because loops inside the loop of a CUDA graph read illegal addresses (JAX 0.11.2).
    """
    for wanted, function in ((is_true, on_true), (~is_true, on_false)):
        carry = wanted, choice
        _, choice = lax.while_loop(
            lambda carry: carry[0],
            lambda carry, function=function: (jnp.zeros_like(carry[0]), function(carry[1])),
            carry,
        )
    return choice


def _accept(
    plan: Plan, state: DecodeState, output: DecodeOutput, choice: Choice, group_BT: Array, count_B: Array
) -> tuple[DecodeState, DecodeOutput]:
    """Append the first `count_B` chosen tokens of each row to its output, up to a stop token.

    What was cached after them is undone, because the length of a row determines what is seen.
    """
    token_BT = choice.token_BT
    index_T = jnp.arange(token_BT.shape[1])
    stops_BT = is_stop(state.stop_BV, token_BT) & (index_T < count_B[:, None])
    stopped_B = stops_BT.any(1)
    count_B = constrain_rows(plan, jnp.where(stopped_B, jnp.argmax(stops_BT, 1) + 1, count_B))
    last_B = jnp.take_along_axis(token_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
    sampling = None if state.sampling is None else mark_seen(state.sampling, group_BT, count_B)
    write = partial(write_rows, first_B=output.count_B, count_B=count_B)
    output = output._replace(
        tokens_BS=constrain_rows(plan, write(output.tokens_BS, new_BT=token_BT)),
        count_B=constrain_rows(plan, output.count_B + count_B),
        logprobs_BS=jax.tree.map(
            lambda x_BS, new_BT: constrain_rows(plan, write(x_BS, new_BT=new_BT)),
            output.logprobs_BS,
            choice.logprobs_BT,
        ),
    )
    state = state._replace(
        caches=choice.caches,
        rows=state.rows._replace(length_B=constrain_rows(plan, state.rows.length_B + count_B)),
        token_B=constrain_rows(plan, jnp.where(count_B > 0, last_B, state.token_B)),
        finished_B=constrain_rows(plan, state.finished_B | stopped_B),
        sampling=jax.tree.map(partial(constrain_rows, plan), sampling),
    )
    return state, output


def decode_steps(plan: Plan, max_steps: int, *, rows: int, drafts: bool) -> tuple[int, ...]:
    """Return the values of `max_steps` for which an engine of so many rows compiles `decode`, in ascending order.

    On several GPUs a call without drafts always takes all of its steps. A CUDA graph with collectives cannot contain
    the loop, so the host would read its condition in every step, and each call would return only after its last step:
    1.23 ms per token instead of 1.14 (two H200s, 8 layers of Llama-3.1-8B). There a second program decodes a single
    token, while the prompt of another row is prefilled. With one row there is no other, and it would only serve calls
    for the last token of a request.
    """
    has_single_steps = _has_fixed_length(plan) and rows > 1 and not drafts
    return tuple(sorted({1, max_steps})) if has_single_steps else (max_steps,)


def _has_fixed_length(plan: Plan) -> bool:
    device = first_device(plan.mesh)
    return device is not None and device.platform == "gpu" and plan.mesh.size > 1


def decode_program(plan: Plan) -> Any:
    """Return `decode`, jitted with the compiler options that are fastest on the devices of a plan."""
    recent = jax.__version_info__ >= _COLLECTIVES_IN_GRAPHS_SINCE
    return _decode_on_several_gpus if recent and _has_fixed_length(plan) else decode


def is_stop(stop_BV: Array | None, token_BT: Array) -> Array:
    """Return whether each token is a stop token of its row."""
    if stop_BV is None:
        return jnp.zeros(token_BT.shape, bool)
    return jnp.take_along_axis(stop_BV, token_BT, axis=1)


def _empty_output(plan: Plan, state: DecodeState, max_steps: int, greedy: bool) -> DecodeOutput:
    """Return an output with space for `max_steps` tokens per row."""

    def zeros(*shape: int, dtype: DTypeLike = jnp.int32) -> Array:
        return constrain_rows(plan, jnp.zeros((len(state.token_B), *shape), dtype))

    logprobs = None
    if state.sampling is not None and not greedy:
        num_top = min(MAX_LOGPROBS, state.sampling.seen_BV.shape[1])
        floats = partial(zeros, max_steps, dtype=jnp.float32)
        logprobs = Logprobs(floats(), floats(num_top), zeros(max_steps, num_top))
    counts = None if state.drafts is None else SpeculationCounts(zeros(), zeros(), zeros())
    return DecodeOutput(zeros(max_steps), zeros(), logprobs, counts)


_jit_decode = partial(jax.jit, static_argnames=("config", "plan", "max_steps", "greedy"), donate_argnames="state")
decode = _jit_decode(_decode, compiler_options=_ONE_GPU)
_decode_on_several_gpus = _jit_decode(_decode, compiler_options=_SEVERAL_GPUS)
