"""What an engine runs on the devices: one program each to seat a request, to hand out pages, to prefill, to decode."""

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
from helix_jax.sampling import Logprobs, Sampling, compute_logprobs, apply_repetition_penalty, sample
from helix_jax.step import advance, constrain_rows


class RowSampling(NamedTuple):
    """How each row chooses its next token."""

    sampling: Sampling
    penalty_B: Float[Array, "B"]
    logprobs_B: Bool[Array, "B"]  # whether they are asked for


class DeviceState(NamedTuple):
    """What the devices keep of the requests. token_B: what each row said last. seen_BV: the tokens that it knows."""

    cache: KVCache
    rows: Rows
    token_B: Int[Array, "B"]
    seen_BV: Bool[Array, "B V"]
    rules: RowSampling


class SampleOutput(NamedTuple):
    """What the rows of a step said, and if any row asked for them, log-probabilities (else 0)."""

    token_B: Int[Array, "B"]
    logprobs: Logprobs | None  # None: not read


def _admit(
    plan: Plan,
    state: DeviceState,
    row: Int[Array, ""],
    table_RM: Int[Array, "R M"],
    length: Int[Array, ""],
    prompt_len: Int[Array, ""],
    seen_V: Bool[Array, "V"],
    rules: RowSampling,
) -> DeviceState:
    """Gives a row to a request: its pages, how much of it is cached already, what it knows, its rules (one row)."""
    rows = Rows(
        lax.with_sharding_constraint(state.rows.table_RBM.at[:, row].set(table_RM), sharding(plan.mesh, TABLE_RBM)),
        constrain_rows(plan, state.rows.length_B.at[row].set(length)),
        constrain_rows(plan, state.rows.prompt_len_B.at[row].set(prompt_len)),
    )
    rules = jax.tree.map(lambda all_B, one_B: constrain_rows(plan, all_B.at[row].set(one_B[0])), state.rules, rules)
    return state._replace(rows=rows, seen_BV=constrain_rows(plan, state.seen_BV.at[row].set(seen_V)), rules=rules)


def _edit_page_table(plan: Plan, state: DeviceState, edits_X4: Int[Array, "X 4"]) -> DeviceState:
    """Writes pages into the table: rank, row, entry, page. A rank that there is not writes nothing."""
    rank_X, row_X, entry_X, page_X = edits_X4.T
    table_RBM = state.rows.table_RBM.at[rank_X, row_X, entry_X].set(page_X, mode="drop")
    table_RBM = lax.with_sharding_constraint(table_RBM, sharding(plan.mesh, TABLE_RBM))
    return state._replace(rows=state.rows._replace(table_RBM=table_RBM))


def _decode(
    config: ModelConfig, plan: Plan, weights: Weights, state: DeviceState, count_B: Int[Array, "B"]
) -> tuple[SampleOutput, DeviceState]:
    """Appends the last token of each row whose count is 1, and chooses the next."""
    row_B = jnp.arange(len(count_B))
    seen_BV = state.seen_BV.at[row_B, state.token_B].max(count_B > 0)
    logits_BV, cache, rows = advance(config, plan, weights, state.cache, state.rows, state.token_B[:, None], count_B)
    told = _choose(plan, logits_BV, seen_BV, rows.length_B, state.rules, count_B > 0)
    token_B = constrain_rows(plan, jnp.where(count_B > 0, told.token_B, state.token_B))
    return told, DeviceState(cache, rows, token_B, constrain_rows(plan, seen_BV), state.rules)


def _prefill(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    state: DeviceState,
    row: Int[Array, ""],
    tokens_1T: Int[Array, "1 T"],
    count_1: Int[Array, "1"],
) -> tuple[SampleOutput, DeviceState]:
    """Appends a chunk to one row. What follows it is chosen too, and has a meaning after the last chunk."""

    def mine(x_B: Array, axis: int = 0) -> Array:
        return lax.dynamic_slice_in_dim(x_B, row, 1, axis)

    rows = Rows(mine(state.rows.table_RBM, 1), mine(state.rows.length_B), mine(state.rows.prompt_len_B))
    logits_1V, cache, after = advance(config, plan, weights, state.cache, rows, tokens_1T, count_1)
    told = _choose(plan, logits_1V, mine(state.seen_BV), after.length_B, jax.tree.map(mine, state.rules), count_1 > 0)
    length_B = constrain_rows(plan, state.rows.length_B.at[row].set(after.length_B[0]))
    token_B = constrain_rows(plan, state.token_B.at[row].set(told.token_B[0]))
    return told, state._replace(cache=cache, rows=state.rows._replace(length_B=length_B), token_B=token_B)


def _choose(plan: Plan, logits_BV: Array, seen_BV: Array, position_B: Array, rules: RowSampling, live_B: Array) -> SampleOutput:
    # The rules of a row outlast its request, and one that draws, or tells, makes the step dear for all.
    sampling = rules.sampling._replace(temperature_B=jnp.where(live_B, rules.sampling.temperature_B, 0))
    token_B = sample(apply_repetition_penalty(logits_BV, seen_BV, rules.penalty_B), sampling, position_B)
    asked = partial(compute_logprobs, logits_BV, token_B)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(asked))
    logprobs = lax.cond((rules.logprobs_B & live_B).any(), asked, lambda: nothing)
    return SampleOutput(constrain_rows(plan, token_B), logprobs)


_given_state = {"donate_argnames": "state"}
admit = partial(jax.jit, static_argnames="plan", **_given_state)(_admit)
edit_page_table = partial(jax.jit, static_argnames="plan", **_given_state)(_edit_page_table)
decode = partial(jax.jit, static_argnames=("config", "plan"), **_given_state)(_decode)
prefill = partial(jax.jit, static_argnames=("config", "plan"), **_given_state)(_prefill)
