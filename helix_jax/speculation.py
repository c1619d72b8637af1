"""Speculative decoding: draft tokens that are verified together, and that only save time.

A step appends the last token of a row and some draft tokens, computes the logits after each, and chooses a token from
each as if the drafts before it had been decoded. As long as the chosen token equals the next draft, the next logits
count too. A draw depends on the seed and the position alone, so the output is that of decoding token by token, sampled
or not. For a draft that is not random this accepts as often as rejection sampling: with the probability of the draft.

Drafts are looked up in the row itself: the tokens that followed the last occurrence of its most recent tokens. Or a
smaller model draws them, see `helix_jax.drafting`.

Source: arXiv 2211.17192 (verification); prompt lookup decoding, as in vLLM's `ngram`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from helix_jax.validation import check_int

SPECULATIONS = ("ngram",)
MAX_DRAFT_TOKENS = 7
_LONGEST_MATCH = 8  # recent tokens that are looked up
_SHORTEST_MATCH = 2
_TRUSTED = 3  # drafts that have to be right in a row, before those after a shorter match are verified
_GAIN = 2  # confidence in a model's drafts after a step in which all were right; after any other it is one less
_LEAST_CONFIDENCE = -2
_PAUSE = 32  # steps without drafts after those with the least confidence


def check_draft_tokens(name: str, draft_tokens: Any, option: str, *, speculates: bool) -> None:
    """Check how many tokens are drafted.

    Args:
        name: The number, as error messages name it.
        draft_tokens: The number, None if it has its default.
        option: The option that says how tokens are drafted, as error messages name it.
        speculates: Whether tokens are drafted.

    Raises:
        TypeError: It is not an int.
        ValueError: It is out of range, or useless because nothing is drafted.
    """
    if draft_tokens is None:
        return
    check_int(name, draft_tokens, least=1)
    if draft_tokens > MAX_DRAFT_TOKENS:
        raise ValueError(f"{name} is {draft_tokens}: give at most {MAX_DRAFT_TOKENS}")
    if not speculates:
        raise ValueError(f"{name} is {draft_tokens}, but nothing is drafted without {option}: give both, or neither")


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


def count_to_draft(confidence_B: Int[Array, "B"], most: int) -> Int[Array, "B"]:
    """Return how many tokens a model drafts for each row: as many as its confidence, at least one, or none in a pause.

    Args:
        confidence_B: The confidence of each row.
        most: The most tokens to draft.
    """
    return jnp.where(confidence_B >= _LEAST_CONFIDENCE, jnp.clip(confidence_B, 1, most), 0)


def update_confidence(
    confidence_B: Int[Array, "B"], count_B: Int[Array, "B"], accepted_B: Int[Array, "B"], most: int
) -> Int[Array, "B"]:
    """Return the confidence of each row in its drafts after a step. It begins at 0.

    It rises by two if all drafts were right, and falls by one otherwise. It therefore settles where all are right in
    one of three steps: at 5 drafts that are right with probability 0.8, at 1 to 2 if it is 0.5. Below a third, it falls
    to a pause, and each pause ends with one more draft. For a model whose step takes 0.15 of the time of the model that
    verifies, these numbers are close to the fastest.

    Args:
        confidence_B: The confidence before. Below the least, it counts the steps of a pause.
        count_B: How many drafts were verified.
        accepted_B: How many of them were right.
        most: The most tokens to draft.
    """
    raised_B = jnp.minimum(jnp.maximum(confidence_B, 0) + _GAIN, most)
    lowered_B = jnp.minimum(confidence_B, most) - 1
    lowered_B = jnp.where(lowered_B < _LEAST_CONFIDENCE, _LEAST_CONFIDENCE - _PAUSE, lowered_B)
    drafted_B = jnp.where(accepted_B == count_B, raised_B, lowered_B)
    return jnp.where(count_B > 0, drafted_B, confidence_B + (confidence_B < _LEAST_CONFIDENCE))
