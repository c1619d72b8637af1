"""Rows of text in one cache, read and continued at will: what the evaluations do with a model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helix_jax.arrays import put
from helix_jax.cache import CacheSpec, KVCache, make_cache, per_row
from helix_jax.generation import DEFAULT_PAGE, check_placed
from helix_jax.mesh import CP, REPLICATED, ROWS_B
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.sampling import make_sampling
from helix_jax.step import many_steps, step

CHUNK, WIDTH = 512, 64  # tokens of a call: of a long text, of a question


class Reader:
    """Greedy. The first text that is read is each row's prompt; whatever comes later counts as decoded.

    most: positions that each row has room for. Every call waits for what it began: on a CPU nothing may pile up.
    """

    def __init__(self, model: Transformer, plan: Plan, prompts: Sequence[Sequence[int]], most: int):
        check_placed(model, plan)
        self.model, self.plan, self._weights = model, plan, model.weights()
        lens = [len(prompt) for prompt in prompts]
        self.cache, self.rows = make_cache(plan, CacheSpec.from_config(model.config, model.dtype), lens, [most] * len(lens), page=DEFAULT_PAGE)
        self._sampling = put(make_sampling(len(prompts)), plan.mesh, ROWS_B)
        self._next_B = np.zeros(len(prompts), np.int32)
        self.read(prompts, CHUNK)

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.rows.length_B)

    def read(self, texts: Sequence[Sequence[int]], width: int = WIDTH) -> None:
        """Appends a text to each row."""
        count_B = np.asarray([len(text) for text in texts])
        tokens_BS = np.zeros((len(texts), -(-int(count_B.max()) // width) * width), np.int32)
        for row, text in enumerate(texts):
            tokens_BS[row, : len(text)] = list(text)
        for first in range(0, tokens_BS.shape[1], width):
            here_B = np.clip(count_B - first, 0, width)
            out = self._step(tokens_BS[:, first : first + width], here_B)
            ended_B = (here_B > 0) & (first + here_B == count_B)
            self._next_B = np.where(ended_B, np.asarray(out.token_B), self._next_B)

    def read_one(self, token_B: np.ndarray) -> np.ndarray:
        """Appends a token to each row. Returns the logits of what follows [B, V]."""
        out = self._step(token_B[:, None], np.ones(len(token_B), np.int32))
        self._next_B = np.asarray(out.token_B)
        return np.asarray(out.logits_BV)

    def say(self, count: int) -> np.ndarray:
        """The next tokens of each row [B, count], all of which are appended."""
        first_B = self._next_B
        given = per_row(self.plan, first_B), per_row(self.plan, np.full(len(first_B), 2**31 - 1))
        none = put(np.zeros(0, np.int32), self.plan.mesh, REPLICATED)
        shape = (self.model.config, self.plan, count, self._weights, self.cache, self.rows)
        out = jax.block_until_ready(many_steps(*shape, *given, none, self._sampling))
        self.cache, self.rows = out.cache, out.rows
        tokens_BS = np.asarray(out.tokens_BS)
        self._next_B = tokens_BS[:, -1]
        return np.concatenate([first_B[:, None], tokens_BS[:, :-1]], 1)

    def answer(self, questions: Sequence[Sequence[int]], count: int) -> np.ndarray:
        """What each row says to a question [B, count]; then all is as if it had not been asked."""
        before, next_B = self.rows, self._next_B
        lengths = self.lengths
        self.read(questions)
        said_BS = self.say(count)
        self.rows = before._replace(length_B=per_row(self.plan, lengths))  # two numbers say where everything is
        self._next_B = next_B
        return said_BS

    def lose(self, rank: int) -> None:
        """Zeroes all that a rank of cp has cached."""
        self.cache = _without(self.cache, rank, self.plan.mesh.shape[CP])

    def _step(self, tokens_BT: np.ndarray, count_B: np.ndarray) -> Any:
        new = per_row(self.plan, tokens_BT), per_row(self.plan, count_B)
        given = (self.model.config, self.plan, self._weights, self.cache, self.rows)
        out = jax.block_until_ready(step(*given, *new, self._sampling))
        self.cache, self.rows = out.cache, out.rows
        return out


def forced_nats(model: Transformer, plan: Plan, text: bytes, position: int, span: int, windows: int, most: int) -> Any:
    """The token_loss of each byte of a span that follows `position` bytes, read one by one, as if it had been decoded.

    [windows, span]: at so many places of the text. most: positions that each row has room for.
    """
    starts = np.linspace(0, len(text) - position - span, windows).astype(int)
    rows = np.stack([np.frombuffer(text[start : start + position + span], np.uint8) for start in starts])
    rows = rows.astype(np.int32)
    reader, nats = Reader(model, plan, rows[:, : position - 1].tolist(), most), []
    for at in range(position - 1, position + span - 1):
        logits_BV = reader.read_one(rows[:, at]).astype(np.float64)
        top_B1 = logits_BV.max(-1, keepdims=True)
        lse_B = np.log(np.exp(logits_BV - top_B1).sum(-1)) + top_B1[:, 0]
        nats.append(lse_B - np.take_along_axis(logits_BV, rows[:, at + 1, None], 1)[:, 0])
    return np.stack(nats, 1)


def _without(cache: KVCache, rank: int, ranks: int) -> KVCache:
    def lost(pool_AKWH: jax.Array) -> jax.Array:
        pages = pool_AKWH.shape[0] // ranks
        return pool_AKWH.at[rank * pages : (rank + 1) * pages].set(jnp.zeros((), pool_AKWH.dtype))

    return jax.block_until_ready(jax.jit(lambda cache: jax.tree.map(lost, cache), donate_argnums=0)(cache))
