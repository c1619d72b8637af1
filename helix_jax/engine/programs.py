"""The jitted programs of an engine besides `decode`, which admit requests, edit page tables and prefill prompts."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from helix_jax.cache import Rows
from helix_jax.config import ModelConfig
from helix_jax.decoding import DecodeOutput, DecodeState, is_stop
from helix_jax.drafting import DraftCache, Drafter, Drafts, append_to_cache
from helix_jax.helix import copy_pages_of_ranks
from helix_jax.mesh import DP, TABLE_RBM, sharding
from helix_jax.models.transformer import Weights
from helix_jax.plan import Plan
from helix_jax.sampling import Logprobs, RowSampling, choose, compute_logprobs
from helix_jax.step import append_tokens, constrain_rows, last_logits, logits_of


class RowUpdates(NamedTuple):
    """The state of X rows that are assigned to requests.

    Attributes:
        row_X: The rows. One that does not exist is dropped.
        table_XRM: Their page tables in the first cache group.
        length_X: How many tokens of each are cached already.
        token_X: The token that follows these. A row that is not prefilled begins to decode with it.
        prompt_len_X: The length of each prompt.
        stop_XV: Their stop tokens.
        sampling: How each chooses its next token.
        tokens_XS: Their tokens, from which drafts are made. None: there are no drafts.
    """

    row_X: Int[Array, "X"]
    table_XRM: Int[Array, "X R M"]
    length_X: Int[Array, "X"]
    token_X: Int[Array, "X"]
    prompt_len_X: Int[Array, "X"]
    stop_XV: Bool[Array, "X V"]
    sampling: RowSampling
    tokens_XS: Int[Array, "X S"] | None


class Chunks(NamedTuple):
    """Chunks of the prompts of X rows. Padding has a row that does not exist, and a count of 0.

    Attributes:
        row_X: The row of each chunk.
        tokens_XT: Its tokens.
        count_X: How many of them count.
        is_last_X: Whether the chunk ends the prompt, so that the token that follows is the first of the output.
    """

    row_X: Int[Array, "X"]
    tokens_XT: Int[Array, "X T"]
    count_X: Int[Array, "X"]
    is_last_X: Bool[Array, "X"]


SCORED_AT_ONCE = 128  # tokens of each dp group whose logits are in memory at once


def _admit(plan: Plan, state: DecodeState, updates: RowUpdates) -> DecodeState:
    """Assign rows to requests.

    Args:
        plan: How the mesh decodes.
        state: Donated: continue with the one that is returned.
        updates: The rows, and their new state.
    """

    def set_rows(all_B: Array, new_X: Array) -> Array:
        return constrain_rows(plan, all_B.at[updates.row_X].set(new_X, mode="drop"))

    tables_RBM, new_RXM = state.rows.tables_RBM, updates.table_XRM.swapaxes(0, 1)
    rows = Rows(
        _with_table(plan, tables_RBM, tables_RBM[0].at[:, updates.row_X].set(new_RXM, mode="drop")),
        set_rows(state.rows.length_B, updates.length_X),
        set_rows(state.rows.prompt_len_B, updates.prompt_len_X),
    )
    return state._replace(
        rows=rows,
        token_B=set_rows(state.token_B, updates.token_X),
        finished_B=set_rows(state.finished_B, jnp.zeros_like(updates.row_X, bool)),
        stop_BV=jax.tree.map(set_rows, state.stop_BV, updates.stop_XV),
        sampling=jax.tree.map(set_rows, state.sampling, updates.sampling),
        drafts=None if state.drafts is None else _admit_drafts(state.drafts, set_rows, updates),
    )


def _admit_drafts(drafts: Drafts, set_rows: Callable[[Array, Array], Array], updates: RowUpdates) -> Drafts:
    """Set what is known of rows for their drafts. The cache of a draft model has what the cache of the model has."""
    assert updates.tokens_XS is not None
    cached = drafts.cached
    if cached is not None:
        cached = cached._replace(length_B=set_rows(cached.length_B, updates.length_X))
    success_B = set_rows(drafts.success_B, jnp.zeros_like(updates.row_X))
    return Drafts(set_rows(drafts.tokens_BS, updates.tokens_XS), success_B, cached)


def _copy_pages(plan: Plan, state: DecodeState, copies: tuple[Int[Array, "Z 2 X"], ...]) -> DecodeState:
    """Copy pages of each cache group within each rank, those of the first one in the cache of a draft model too.

    Args:
        plan: How the mesh decodes.
        state: Donated: continue with the one that is returned.
        copies: For each cache group, the copies as `copy_pages_of_ranks` takes them.
    """
    caches = (copy_pages_of_ranks(plan, cache, own) for cache, own in zip(state.caches, copies, strict=True))
    drafts = state.drafts
    if drafts is not None and drafts.cached is not None:
        cache = copy_pages_of_ranks(plan, drafts.cached.cache, copies[0])
        drafts = drafts._replace(cached=drafts.cached._replace(cache=cache))
    return state._replace(caches=tuple(caches), drafts=drafts)


def _edit_page_table(plan: Plan, state: DecodeState, edits_X4: Int[Array, "X 4"]) -> DecodeState:
    """Write pages into the page tables of the first cache group, as (rank, row, entry, page).

    An edit with a rank out of range is dropped.
    """
    rank_X, row_X, entry_X, page_X = edits_X4.T
    tables_RBM = state.rows.tables_RBM
    table_RBM = tables_RBM[0].at[rank_X, row_X, entry_X].set(page_X, mode="drop")
    return state._replace(rows=state.rows._replace(tables_RBM=_with_table(plan, tables_RBM, table_RBM)))


def _with_table(plan: Plan, tables_RBM: tuple[Array, ...], table_RBM: Array) -> tuple[Array, ...]:
    """Replace the table of the first cache group. Those of the others, which are rings, never change."""
    return (lax.with_sharding_constraint(table_RBM, sharding(plan.mesh, TABLE_RBM)), *tables_RBM[1:])


def _prefill(
    config: ModelConfig, plan: Plan, weights: Weights, state: DecodeState, chunks: Chunks
) -> tuple[DecodeOutput, Float[Array, "X V"], DecodeState]:
    """Append chunks of prompts to their rows, and choose the most probable token after each.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        state: Donated: continue with the one that is returned.
        chunks: The chunks. Those of one call belong to different rows.

    Returns:
        The tokens, of which those after the last chunks of a prompt count; the logits that they were chosen from, for
        `choose_first`; and the state.
    """
    output, logits_XV, _, state = _prefill_to_score(config, plan, weights, state, chunks)
    return output, logits_XV, state


def _prefill_to_score(
    config: ModelConfig, plan: Plan, weights: Weights, state: DecodeState, chunks: Chunks
) -> tuple[DecodeOutput, Float[Array, "X V"], Float[Array, "X T D"], DecodeState]:
    """Append chunks like `prefill`, and also return the hidden states of their tokens, for `score_tokens`."""
    rows = _rows_of_chunks(plan, state.rows, chunks)
    new = chunks.tokens_XT, chunks.count_X
    x_XTD, caches, after = append_tokens(config, plan, weights, state.caches, rows, *new)
    logits_XV = last_logits(config, plan, weights, x_XTD, chunks.count_X)
    length_B = state.rows.length_B.at[chunks.row_X].set(after.length_B, mode="drop")
    state = state._replace(caches=caches, rows=state.rows._replace(length_B=constrain_rows(plan, length_B)))
    token_X, _ = choose(logits_XV, None, after.length_B, chunks.is_last_X)
    output, state = _set_tokens(plan, state, chunks, DecodeOutput(token_X[:, None], chunks.is_last_X, None))
    return output, logits_XV, constrain_rows(plan, x_XTD[:, : chunks.tokens_XT.shape[1]]), state


def _rows_of_chunks(plan: Plan, rows: Rows, chunks: Chunks) -> Rows:
    """Return the row of each chunk. One that does not exist has no pages."""
    of_chunk = partial(_take, plan, chunks.row_X)

    def tables_of_chunks(table_RBM: Array) -> Array:
        table_RXM = table_RBM.at[:, chunks.row_X].get(mode="fill", fill_value=-1)
        return lax.with_sharding_constraint(table_RXM, sharding(plan.mesh, TABLE_RBM))

    tables_RXM = jax.tree.map(tables_of_chunks, rows.tables_RBM)
    return Rows(tables_RXM, of_chunk(rows.length_B), of_chunk(rows.prompt_len_B))


def _prefill_drafts(
    plan: Plan, drafter: Drafter, state: DecodeState, chunks: Chunks, first_X: Int[Array, "X"]
) -> DecodeState:
    """Append chunks of prompts to the cache of a draft model.

    It is a program of its own, which runs after `prefill`, so that the first tokens do not wait for it.

    Args:
        plan: How the mesh decodes.
        drafter: The draft model.
        state: Donated: continue with the one that is returned.
        chunks: The chunks.
        first_X: The positions of their first tokens.
    """
    drafts = state.drafts
    assert drafts is not None
    assert drafts.cached is not None
    of_chunks, rows = drafts.cached._replace(length_B=first_X), _rows_of_chunks(plan, state.rows, chunks)
    _, after = append_to_cache(plan, drafter, of_chunks, rows, chunks.tokens_XT, chunks.count_X)
    length_B = drafts.cached.length_B.at[chunks.row_X].set(after.length_B, mode="drop")
    cached = DraftCache(after.cache, constrain_rows(plan, length_B))
    return state._replace(drafts=drafts._replace(cached=cached))


def _score_tokens(
    config: ModelConfig,
    plan: Plan,
    weights: Weights,
    x_XTD: Float[Array, "X T D"],
    next_XT: Int[Array, "X T"],
    num_top: int,
) -> Logprobs:
    """Return the log-probability of the token that follows each token of some chunks, and the most probable tokens.

    The logits of a few tokens are computed at a time, `SCORED_AT_ONCE` of each dp group, because those of a whole chunk
    may be larger than the weights.

    Args:
        config: `model.config`.
        plan: How the mesh decodes.
        weights: `model.weights()`.
        x_XTD: The hidden states of the chunks, from `prefill_to_score`.
        next_XT: The tokens that follow. The results of padding are undefined.
        num_top: How many of the most probable tokens to return.

    Returns:
        The log-probabilities, each array with the dimensions X and T first.
    """
    X, T = next_XT.shape
    size = min(T, max(1, SCORED_AT_ONCE * plan.mesh.shape[DP] // X))
    groups = -(-T // size)

    def group(x_XT: Array) -> Array:
        """Divide the tokens of all chunks into groups of `size`, on a new first axis."""
        padded_XT = jnp.pad(x_XT, ((0, 0), (0, groups * size - T), *((0, 0),) * (x_XT.ndim - 2)))
        return jnp.moveaxis(padded_XT.reshape(X, groups, size, *x_XT.shape[2:]), 1, 0)

    def score(tokens: tuple[Array, Array]) -> Logprobs:
        x_XTD, next_XT = tokens
        return compute_logprobs(logits_of(config, plan, weights, x_XTD), next_XT, num_top)

    def ungroup(scores: Array) -> Array:
        return constrain_rows(plan, jnp.moveaxis(scores, 0, 1).reshape(X, groups * size, *scores.shape[3:])[:, :T])

    return jax.tree.map(ungroup, lax.map(score, (group(x_XTD), group(next_XT))))


def _choose_first(
    plan: Plan, state: DecodeState, chunks: Chunks, logits_XV: Float[Array, "X V"]
) -> tuple[DecodeOutput, DecodeState]:
    """Choose the first tokens of requests that use the sampler, a penalty or log-probabilities.

    It is a program of its own, so that the prefill programs, which are large, contain no sampler.
    """
    sampling = jax.tree.map(partial(_take, plan, chunks.row_X), state.sampling)
    position_X = _take(plan, chunks.row_X, state.rows.length_B)
    token_X, logprobs = choose(logits_XV, sampling, position_X, chunks.is_last_X)
    logprobs = jax.tree.map(lambda x: x[:, None], logprobs)
    return _set_tokens(plan, state, chunks, DecodeOutput(token_X[:, None], chunks.is_last_X, logprobs))


def _take(plan: Plan, row_X: Array, x_B: Array) -> Array:
    """Return the values of some rows, 0 for rows that do not exist."""
    return constrain_rows(plan, x_B.at[row_X].get(mode="fill", fill_value=0))


def _set_tokens(
    plan: Plan, state: DecodeState, chunks: Chunks, output: DecodeOutput
) -> tuple[DecodeOutput, DecodeState]:
    """Store the first tokens of rows whose prompt is complete."""
    token_X = output.tokens_BS[:, 0]
    row_X = jnp.where(chunks.is_last_X, chunks.row_X, len(state.token_B))
    finished_X = is_stop(jax.tree.map(partial(_take, plan, chunks.row_X), state.stop_BV), token_X[:, None])[:, 0]

    def set_rows(all_B: Array, x_X: Array) -> Array:
        return constrain_rows(plan, all_B.at[row_X].set(x_X, mode="drop"))

    output = output._replace(count_B=output.count_B.astype(jnp.int32))
    return output, state._replace(
        token_B=set_rows(state.token_B, token_X), finished_B=set_rows(state.finished_B, finished_X)
    )


_donate_state = {"donate_argnames": "state"}
admit = partial(jax.jit, static_argnames="plan", **_donate_state)(_admit)
copy_pages = partial(jax.jit, static_argnames="plan", **_donate_state)(_copy_pages)
edit_page_table = partial(jax.jit, static_argnames="plan", **_donate_state)(_edit_page_table)
prefill = partial(jax.jit, static_argnames=("config", "plan"), **_donate_state)(_prefill)
prefill_to_score = partial(jax.jit, static_argnames=("config", "plan"), **_donate_state)(_prefill_to_score)
prefill_drafts = partial(jax.jit, static_argnames="plan", **_donate_state)(_prefill_drafts)
score_tokens = partial(jax.jit, static_argnames=("config", "plan", "num_top"))(_score_tokens)
choose_first = partial(jax.jit, static_argnames="plan", **_donate_state)(_choose_first)
