"""Speculative decoding: draft tokens that are verified together, and that only save time.

A step appends the last token of a row and some draft tokens, computes the logits after each, and chooses a token from
each as if the drafts before it had been decoded. As long as the chosen token equals the next draft, the next logits
count too. A draw depends on the seed and the position alone, so the output is that of decoding token by token, sampled
or not. For a draft that is not random this accepts as often as rejection sampling: with the probability of the draft.

Drafts are looked up in the row itself: the tokens that followed the last occurrence of its most recent tokens.

Source: arXiv 2211.17192 (verification); prompt lookup decoding, as in vLLM's `ngram`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

SPECULATIONS = ("ngram",)
MAX_DRAFT_TOKENS = 7
_LONGEST_MATCH = 8  # recent tokens that are looked up
_SHORTEST_MATCH = 2
_TRUSTED = 3  # drafts that have to be right in a row, before those after a shorter match are verified


class Drafts(NamedTuple):
    """What is known of each row for its drafts.

    Attributes:
        tokens_BS: The prompt and the generated tokens.
        right_B: How many drafts in a row were right.
    """

    tokens_BS: Int[Array, "B S"]
    right_B: Int[Array, "B"]


class SpeculationCounts(NamedTuple):
    """Statistics of one call of `decode`, by row.

    Attributes:
        steps_B: The steps that the row took part in.
        drafted_B: The draft tokens that were verified.
        accepted_B: Those that were right.
    """

    steps_B: Int[Array, "B"]
    drafted_B: Int[Array, "B"]
    accepted_B: Int[Array, "B"]


def propose(tokens_BS: Int[Array, "B S"], known_B: Int[Array, "B"], drafts: int) -> tuple[Array, Array]:
    """Return the tokens that followed the last occurrence of the most recent tokens, [B, drafts].

    The longest match is preferred, and of those the last one. If fewer tokens follow, they repeat. The second result is
    the length of the match, 0 if there is none.

    Args:
        tokens_BS: The tokens of each row.
        known_B: How many there are.
        drafts: How many tokens to return.
    """
    return jax.vmap(lambda tokens_S, known: _look_up(tokens_S, known, drafts))(tokens_BS, known_B)


def _look_up(tokens_S: Array, known: Array, drafts: int) -> tuple[Array, Array]:
    position_S, last = jnp.arange(tokens_S.size), known - 1
    matches_S = position_S < last  # whether the most recent tokens also end here, one more in each iteration
    length_S = jnp.zeros_like(position_S)
    for back in range(min(_LONGEST_MATCH, tokens_S.size)):
        earlier_S = jnp.roll(tokens_S, back)
        matches_S &= (earlier_S == tokens_S[jnp.maximum(last - back, 0)]) & (position_S >= back)
        length_S += matches_S
    longest = length_S.max()
    end = jnp.where(length_S == longest, position_S, -1).max()
    following = jnp.maximum(last - end, 1)
    draft_D = tokens_S[jnp.clip(end + 1 + jnp.arange(drafts) % following, 0, tokens_S.size - 1)]
    return draft_D, jnp.where(longest >= _SHORTEST_MATCH, longest, 0)


def count_accepted(
    choice_BT: Int[Array, "B T"], draft_BD: Int[Array, "B D"], count_B: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Count the drafts that equal the tokens chosen in their places, up to the first that does not.

    Args:
        choice_BT: The chosen tokens, T >= D.
        draft_BD: The drafts.
        count_B: How many of them were verified.
    """
    D = draft_BD.shape[1]
    right_BD = (choice_BT[:, :D] == draft_BD) & (jnp.arange(D) < count_B[:, None])
    return jnp.cumprod(right_BD.astype(jnp.int32), axis=1).sum(1)


def is_trusted(match_B: Int[Array, "B"], right_B: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Return whether to verify the drafts of each row, which takes longer than to decode a token.

    Others are only compared with the token that is decoded.

    Args:
        match_B: The length of the match that each draft follows.
        right_B: How many drafts in a row were right.
    """
    return (match_B >= _LONGEST_MATCH) | ((match_B > 0) & (right_B >= _TRUSTED))


def count_right(
    right_B: Int[Array, "B"], count_B: Int[Array, "B"], accepted_B: Int[Array, "B"], first_right_B: Bool[Array, "B"]
) -> Int[Array, "B"]:
    """Return how many drafts of each row were right in a row.

    Args:
        right_B: How many there were before.
        count_B: How many were verified.
        accepted_B: How many of them were right.
        first_right_B: Whether the first draft, verified or not, equals the token that was chosen in its place.
    """
    all_right_B = jnp.where(count_B > 0, accepted_B == count_B, first_right_B)
    return jnp.where(all_right_B, jnp.minimum(right_B, _TRUSTED) + 1, 0)
