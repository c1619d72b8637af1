"""The jitted programs of an engine: admit a request, edit page tables, prefill a chunk, decode a token per row."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from helix_jax.cache import KVCache, Rows
from helix_jax.config import ModelConfig
from helix_jax.mesh import TABLE_RBM, sharding
from helix_jax.models.transformer import Weights
from helix_jax.plan import Plan
from helix_jax.sampling import Logprobs, Sampling, apply_repetition_penalty, compute_logprobs, sample
from helix_jax.step import advance, constrain_rows


class RowSampling(NamedTuple):
    """How each row chooses its next token.

    Attributes:
        sampling: The sampling settings.
        penalty_B: The repetition penalty.
        logprobs_B: Whether log-probabilities are requested.
    """

    sampling: Sampling
    penalty_B: Float[Array, "B"]
    logprobs_B: Bool[Array, "B"]


class DeviceState(NamedTuple):
    """What the devices keep of the requests.

    Attributes:
        cache: The pages.
        rows: The page tables and lengths.
        token_B: The last token of each row. It is not in the cache yet.
        seen_BV: The tokens that each row contains.
        row_sampling: How each row chooses its next token.
    """

    cache: KVCache
    rows: Rows
    token_B: Int[Array, "B"]
    seen_BV: Bool[Array, "B V"]
    row_sampling: RowSampling


class SampleOutput(NamedTuple):
    """The tokens that a program chose.

    Attributes:
        token_B: The token of each row.
        logprobs: Their log-probabilities, 0 if no row requests any. None from a greedy program.
    """

    token_B: Int[Array, "B"]
    logprobs: Logprobs | None


def _admit(
    plan: Plan,
    state: DeviceState,
    row: Int[Array, ""],
    table_RM: Int[Array, "R M"],
    length: Int[Array, ""],
    prompt_len: Int[Array, ""],
    seen_V: Bool[Array, "V"],
    row_sampling: RowSampling,
) -> DeviceState:
    """Assign a row to a request.

    Args:
        plan: How the mesh decodes.
        state: Donated: continue with the one that is returned.
        row: The row.
        table_RM: Its page tables.
        length: How many of its tokens are cached already.
        prompt_len: The length of its prompt.
        seen_V: The tokens that it contains.
        row_sampling: How it chooses its next token, as arrays for one row.
    """
    rows = Rows(
        lax.with_sharding_constraint(state.rows.table_RBM.at[:, row].set(table_RM), sharding(plan.mesh, TABLE_RBM)),
        constrain_rows(plan, state.rows.length_B.at[row].set(length)),
        constrain_rows(plan, state.rows.prompt_len_B.at[row].set(prompt_len)),
    )

    def set_row(all_B: Array, one_B: Array) -> Array:
        return constrain_rows(plan, all_B.at[row].set(one_B[0]))

    return state._replace(
        rows=rows,
        seen_BV=constrain_rows(plan, state.seen_BV.at[row].set(seen_V)),
        row_sampling=jax.tree.map(set_row, state.row_sampling, row_sampling),
    )


def _edit_page_table(plan: Plan, state: DeviceState, edits_X4: Int[Array, "X 4"]) -> DeviceState:
    """Write pages into the page tables: (rank, row, entry, page). An edit with a rank out of range is dropped."""
    rank_X, row_X, entry_X, page_X = edits_X4.T
    table_RBM = state.rows.table_RBM.at[rank_X, row_X, entry_X].set(page_X, mode="drop")
    table_RBM = lax.with_sharding_constraint(table_RBM, sharding(plan.mesh, TABLE_RBM))
    return state._replace(rows=state.rows._replace(table_RBM=table_RBM))


def _decode(
    config: ModelConfig, plan: Plan, weights: Weights, state: DeviceState, count_B: Int[Array, "B"], greedy: bool
) -> tuple[SampleOutput, DeviceState]:
    """Append the last token of each row whose count is 1, and choose the next.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        state: Donated: continue with the one that is returned.
        count_B: 1 for each row that decodes, else 0.
        greedy: Whether no row that decodes uses the sampler, a penalty or log-probabilities. The program then contains
            none of them, which shortens its compilation by a third to a half.
    """
    row_B = jnp.arange(len(count_B))
    seen_BV = state.seen_BV.at[row_B, state.token_B].max(count_B > 0)
    logits_BV, cache, rows = advance(config, plan, weights, state.cache, state.rows, state.token_B[:, None], count_B)
    row_sampling = None if greedy else state.row_sampling
    output = _choose(plan, logits_BV, seen_BV, rows.length_B, row_sampling, count_B > 0)
    token_B = constrain_rows(plan, jnp.where(count_B > 0, output.token_B, state.token_B))
    return output, DeviceState(cache, rows, token_B, constrain_rows(plan, seen_BV), state.row_sampling)


def _prefill(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    state: DeviceState,
    row: Int[Array, ""],
    tokens_1T: Int[Array, "1 T"],
    count_1: Int[Array, "1"],
    greedy: bool,
) -> tuple[SampleOutput, DeviceState]:
    """Append a chunk to one row, and choose the token that follows. It counts only after the last chunk.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        state: Donated: continue with the one that is returned.
        row: The row.
        tokens_1T: The chunk.
        count_1: How many of its tokens count. The others are padding.
        greedy: As in `decode`.
    """

    def of_row(x_B: Array, axis: int = 0) -> Array:
        return lax.dynamic_slice_in_dim(x_B, row, 1, axis)

    rows = Rows(of_row(state.rows.table_RBM, 1), of_row(state.rows.length_B), of_row(state.rows.prompt_len_B))
    logits_1V, cache, after = advance(config, plan, weights, state.cache, rows, tokens_1T, count_1)
    row_sampling = None if greedy else jax.tree.map(of_row, state.row_sampling)
    output = _choose(plan, logits_1V, of_row(state.seen_BV), after.length_B, row_sampling, count_1 > 0)
    length_B = constrain_rows(plan, state.rows.length_B.at[row].set(after.length_B[0]))
    token_B = constrain_rows(plan, state.token_B.at[row].set(output.token_B[0]))
    return output, state._replace(cache=cache, rows=state.rows._replace(length_B=length_B), token_B=token_B)


def _choose(
    plan: Plan,
    logits_BV: Array,
    seen_BV: Array,
    position_B: Array,
    row_sampling: RowSampling | None,
    live_B: Array,
) -> SampleOutput:
    """Choose the token of each row at its position. Without `row_sampling`, choose the most probable one."""
    if row_sampling is None:
        return SampleOutput(constrain_rows(plan, sample(logits_BV, None, position_B)), None)
    # The settings of a row outlast its request. Those of an idle row must not make the step slower for all.
    temperature_B = jnp.where(live_B, row_sampling.sampling.temperature_B, 0)
    sampling = row_sampling.sampling._replace(temperature_B=temperature_B)
    penalised_BV = apply_repetition_penalty(logits_BV, seen_BV, row_sampling.penalty_B)
    token_B = sample(penalised_BV, sampling, position_B)
    compute = partial(compute_logprobs, logits_BV, token_B)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    logprobs = lax.cond((row_sampling.logprobs_B & live_B).any(), compute, lambda: zeros)
    return SampleOutput(constrain_rows(plan, token_B), logprobs)


_donate_state = {"donate_argnames": "state"}
admit = partial(jax.jit, static_argnames="plan", **_donate_state)(_admit)
edit_page_table = partial(jax.jit, static_argnames="plan", **_donate_state)(_edit_page_table)
decode = partial(jax.jit, static_argnames=("config", "plan", "greedy"), **_donate_state)(_decode)
prefill = partial(jax.jit, static_argnames=("config", "plan", "greedy"), **_donate_state)(_prefill)
