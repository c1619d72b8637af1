"""Drafts the next tokens of each row, which `decode` verifies: looks them up in the row, or draws them with a model.

A draft model is smaller than the model that it drafts for, and has the same vocabulary. It draws with the seeds and
settings of the requests: the same noise on similar logits, so that it often draws the same token.

It has a cache of its own, with the pages of the model's first cache group: a position of a row is on the same rank, in
the page of the same number. Page tables, shared prefixes, copied pages and preemption therefore serve both models.
Layers of a draft model with a window are in these pages too, although some of their positions are never read.

This cache may lack the last tokens of a row: the last of several drafts that were all right, and those of steps without
drafts. They are appended before the next draft. Drafts that were wrong are undone with the tokens of the model.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from helix_jax.cache import CacheSpec, KVCache, Rows, cache_specs
from helix_jax.config import ModelConfig
from helix_jax.models.transformer import Weights
from helix_jax.plan import Plan
from helix_jax.sampling import RowSampling, choose, mark_seen
from helix_jax.speculation import count_right, count_to_draft, is_trusted, propose, update_confidence
from helix_jax.step import advance, constrain_rows

CATCH_UP = 32  # the most tokens of a row that a draft model appends at once, if its cache lacks them
DEFAULT_DRAFT_TOKENS = 5  # of a draft model

_PER_STEP = 2  # tokens that a draft model appends before it draws one: the last one, and one that it may lack


@jax.tree_util.register_static  # a drafter carries its options, which are static in a jitted program
@dataclass(frozen=True)
class DraftOptions:
    """How tokens are drafted.

    Attributes:
        tokens: The most tokens to draft for a row in a step.
        config: The draft model. None: they are looked up in the row.
    """

    tokens: int
    config: ModelConfig | None = None


class Drafter(NamedTuple):
    """What drafts tokens.

    Attributes:
        options: How it drafts.
        weights: The weights of the draft model, if there is one.
    """

    options: DraftOptions
    weights: Weights | None = None


class DraftCache(NamedTuple):
    """The cache of a draft model.

    Attributes:
        cache: Its pages.
        length_B: How many positions of each row it has, which may be fewer than those of the model.
    """

    cache: KVCache
    length_B: Int[Array, "B"]


class Drafts(NamedTuple):
    """What is known of each row for its drafts.

    Attributes:
        tokens_BS: The prompt and the generated tokens.
        success_B: How many drafts in a row were right, if they are looked up. Of a draft model, the confidence in its
            drafts, see `update_confidence`.
        cached: The cache of the draft model, if there is one.
    """

    tokens_BS: Int[Array, "B S"]
    success_B: Int[Array, "B"]
    cached: DraftCache | None = None


_Carry = tuple[DraftCache, Array, RowSampling | None]  # of the loop that draws drafts: with the tokens of each row


class Proposal(NamedTuple):
    """The drafts of a step.

    Attributes:
        tokens_BD: The tokens.
        count_B: How many of them to verify in each row.
        is_draft_B: Whether the first token is a draft, verified or not.
        drafts: What is known of the rows.
    """

    tokens_BD: Int[Array, "B D"]
    count_B: Int[Array, "B"]
    is_draft_B: Bool[Array, "B"]
    drafts: Drafts


def check_draft_model(config: ModelConfig, draft: ModelConfig, max_len: int) -> None:
    """Check that a model can draft for another one.

    Args:
        config: The model.
        draft: The draft model.
        max_len: The most positions of a request.

    Raises:
        ValueError: The vocabularies differ in size, the draft model has too few positions, or it sees positions that a
            model does not keep, all of whose layers have a window.
    """
    if draft.vocab != config.vocab:
        raise ValueError(
            f"the draft model has a vocabulary of {draft.vocab} tokens, and the model one of {config.vocab}: "
            f"give a draft model with the same vocabulary"
        )
    if draft.max_positions < max_len:
        raise ValueError(
            f"the draft model has {draft.max_positions} positions, and a request may have {max_len}: "
            f"allow only shorter ones (max_len), or give another draft model"
        )
    if set(config.windowed_layers) == set(range(config.layers)):
        windows = [draft.window_of(layer) for layer in range(draft.layers)]
        if any(window is None or window > (config.window or 0) for window in windows):
            raise ValueError(
                f"the model keeps only the last {config.window} positions, and the draft model sees more: "
                f"give a draft model whose layers all have a window of at most {config.window}"
            )


def draft_cache_spec(draft: ModelConfig, dtype: DTypeLike, first: CacheSpec) -> CacheSpec:
    """Return what a draft model caches: all its layers in one group, with the pages of the model's first cache group.

    Args:
        draft: The draft model.
        dtype: The type of the cached numbers.
        first: The first cache group of the model.
    """
    return replace(cache_specs(draft, dtype)[0], layers=draft.layers, window=first.window)


def propose_drafts(
    plan: Plan, drafter: Drafter, drafts: Drafts, rows: Rows, sampling: RowSampling | None, most_B: Int[Array, "B"]
) -> Proposal:
    """Draft the tokens that follow the last token of each row.

    Args:
        plan: How the mesh decodes.
        drafter: What drafts.
        drafts: What is known of the rows, the last token included.
        rows: The rows. Their last token is not in the cache yet.
        sampling: How each row chooses its next token. None: every row takes the most probable one.
        most_B: The most drafts of each row that can be verified.
    """
    if drafter.options.config is not None:
        return _draw(plan, drafter, drafts, rows, sampling, most_B)
    tokens_BD, match_B = propose(drafts.tokens_BS, rows.length_B + 1, drafter.options.tokens)
    count_B = constrain_rows(plan, jnp.where(is_trusted(match_B, drafts.success_B), most_B, 0))
    return Proposal(tokens_BD, count_B, match_B > 0, drafts)


def record_result(
    plan: Plan,
    drafter: Drafter,
    proposal: Proposal,
    rows: Rows,
    choice_BT: Int[Array, "B T"],
    accepted_B: Int[Array, "B"],
    live_B: Bool[Array, "B"],
) -> Drafts:
    """Return what is known of each row after its drafts were verified.

    Args:
        plan: How the mesh decodes.
        drafter: What drafted.
        proposal: The drafts.
        rows: The rows, as they were before.
        choice_BT: The tokens that were chosen.
        accepted_B: How many drafts of each row were right.
        live_B: Whether a row took part.
    """
    tokens_BD, count_B, is_draft_B, drafts = proposal
    if drafter.options.config is None:
        first_right_B = is_draft_B & (choice_BT[:, 0] == tokens_BD[:, 0])
        success_B = count_right(drafts.success_B, count_B, accepted_B, first_right_B)
    else:
        success_B = update_confidence(drafts.success_B, count_B, accepted_B, drafter.options.tokens)
    known_B, cached = rows.length_B + 1, drafts.cached
    if cached is not None:  # without the drafts that were wrong
        cached = cached._replace(length_B=constrain_rows(plan, jnp.minimum(cached.length_B, known_B + accepted_B)))
    return Drafts(
        constrain_rows(plan, write_rows(drafts.tokens_BS, known_B, tokens_BD, accepted_B)),
        constrain_rows(plan, jnp.where(live_B, success_B, drafts.success_B)),
        cached,
    )


def append_to_cache(
    plan: Plan, drafter: Drafter, cached: DraftCache, rows: Rows, tokens_BT: Int[Array, "B T"], count_B: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], DraftCache]:
    """Append tokens to the cache of the draft model, and compute its logits of the token that follows.

    Args:
        plan: How the mesh decodes.
        drafter: The draft model.
        cached: Its cache.
        rows: The rows, for their page tables and the lengths of their prompts.
        tokens_BT: The tokens.
        count_B: How many of them count.
    """
    config, weights = drafter.options.config, drafter.weights
    assert config is not None
    assert weights is not None
    rows = rows._replace(tables_RBM=rows.tables_RBM[:1], length_B=cached.length_B)
    logits_BV, [cache], rows = advance(config, plan, weights, (cached.cache,), rows, tokens_BT, count_B)
    return logits_BV, DraftCache(cache, rows.length_B)


def _draw(
    plan: Plan, drafter: Drafter, drafts: Drafts, rows: Rows, sampling: RowSampling | None, most_B: Array
) -> Proposal:
    """Draft with a model: one token of each row in a step, as many as the row that drafts most of them."""
    assert drafts.cached is not None
    known_B, most = rows.length_B + 1, drafter.options.tokens
    count_B = constrain_rows(plan, jnp.minimum(count_to_draft(drafts.success_B, most), most_B))

    def append(cached: DraftCache, tokens_BS: Array, new_B: Array, T: int) -> tuple[Array, DraftCache]:
        return append_to_cache(plan, drafter, cached, rows, _read_rows(tokens_BS, cached.length_B, T), new_B)

    def missing(cached: DraftCache) -> Array:
        return jnp.where(count_B > 0, known_B - cached.length_B, 0)

    def catch_up(cached: DraftCache) -> DraftCache:
        return append(cached, drafts.tokens_BS, jnp.clip(missing(cached) - 1, 0, CATCH_UP), CATCH_UP)[1]

    def draw(index: Array, carry: _Carry) -> _Carry:
        cached, tokens_BS, sampling = carry
        live_B, end_B = index < count_B, known_B + index
        new_B = jnp.where(live_B, end_B - cached.length_B, 0)
        logits_BV, cached = append(cached, tokens_BS, new_B, _PER_STEP)
        token_B, _ = choose(logits_BV, sampling, end_B, live_B)
        tokens_BS = write_rows(tokens_BS, end_B, token_B[:, None], live_B.astype(jnp.int32))
        return cached, constrain_rows(plan, tokens_BS), _see(plan, sampling, token_B, live_B)

    cached = lax.while_loop(lambda cached: (missing(cached) > _PER_STEP).any(), catch_up, drafts.cached)
    if sampling is not None:
        sampling = sampling._replace(logprobs_B=jnp.zeros_like(sampling.logprobs_B))
        sampling = _see(plan, sampling, _read_rows(drafts.tokens_BS, rows.length_B, 1)[:, 0], count_B > 0)
    cached, tokens_BS, _ = lax.fori_loop(0, count_B.max(), draw, (cached, drafts.tokens_BS, sampling))
    drafts = drafts._replace(tokens_BS=tokens_BS, cached=cached)
    return Proposal(_read_rows(tokens_BS, known_B, most), count_B, count_B > 0, drafts)


def _see(plan: Plan, sampling: RowSampling | None, token_B: Array, live_B: Array) -> RowSampling | None:
    """Add a token of each live row to those that it contains."""
    if sampling is None:
        return None
    seen = mark_seen(sampling, token_B[:, None], live_B.astype(jnp.int32))
    return jax.tree.map(partial(constrain_rows, plan), seen)


def _read_rows(x_BS: Array, first_B: Array, count: int) -> Array:
    """Read `count` numbers of each row from index `first_B` on. Those past the end are undefined."""
    index_BT = first_B[:, None] + jnp.arange(count)
    return jnp.take_along_axis(x_BS, jnp.minimum(index_BT, x_BS.shape[1] - 1), axis=1)


def write_rows(x_BS: Array, first_B: Array, new_BT: Array, count_B: Array) -> Array:
    """Write the first `count_B` new numbers of each row from index `first_B` on. Those past the end are dropped."""

    def write(x_S: Array, first: Array, new_T: Array, count: Array) -> Array:
        index_T = jnp.arange(new_T.shape[0])
        return x_S.at[jnp.where(index_T < count, first + index_T, x_S.shape[0])].set(new_T, mode="drop")

    return jax.vmap(write)(x_BS, first_B, new_BT, count_B)
