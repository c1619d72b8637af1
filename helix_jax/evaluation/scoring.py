"""Scores given text over a sharded cache, token by token as in decoding."""

import numpy as np

from helix_jax.evaluation.session import CacheSession
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan


def score_span(
    model: Transformer, plan: Plan, tokens_BS: np.ndarray, span: int, *, max_len: int, chunk: int | None = None
) -> np.ndarray:
    """Return the loss of each of the last `span` tokens of each row, in nats, [B, span].

    The tokens before them, except the last one, are the row's prompt. The others are appended one by one as if they had
    been decoded, so they are stored on the ranks round-robin.

    Args:
        model: A model that is sharded as `plan` decodes with it.
        plan: The mesh and the placement.
        tokens_BS: Token ids, at least `span + 2` per row.
        span: How many tokens are scored.
        max_len: The positions that each row has pages for. Calls with the same one share compiled programs.
        chunk: Tokens per step while the prompts are read.

    Raises:
        ValueError: A row is longer than `max_len`.
    """
    first = tokens_BS.shape[1] - span
    session, nats_B = CacheSession(model, plan, tokens_BS[:, : first - 1].tolist(), max_len, chunk), []
    for position in range(first, first + span):
        logits_BV = session.append_one(tokens_BS[:, position - 1]).astype(np.float64)
        max_B1 = logits_BV.max(-1, keepdims=True)
        lse_B = np.log(np.exp(logits_BV - max_B1).sum(-1)) + max_B1[:, 0]
        nats_B.append(lse_B - np.take_along_axis(logits_BV, tokens_BS[:, position, None], 1)[:, 0])
    return np.stack(nats_B, 1)
