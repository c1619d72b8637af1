"""A batch of rows in one sharded cache, which is extended, decoded and questioned step by step."""

from collections.abc import Sequence

import jax
import numpy as np

from helix_jax.arrays import put
from helix_jax.cache import KVCache, cache_specs, make_caches, per_row
from helix_jax.decoding import DEFAULT_STEPS, DecodeState, decode_program
from helix_jax.engine.options import DEFAULT_PAGE
from helix_jax.engine.runner import default_chunk
from helix_jax.mesh import CP, ROWS_B
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.step import StepOutput, check_model_placement, step

APPEND_CHUNK = 64  # tokens per step of texts that are appended to a prompt, such as questions


class CacheSession:
    """A batch of rows in one cache, decoded greedily.

    The first text of a row is its prompt. Everything that is appended later counts as decoded: its blocks go to the
    ranks round-robin. Every method waits for the devices, because programs that pile up on a CPU that is split into
    fake devices deadlock.

    Args:
        model: A model that is sharded as `plan` decodes with it.
        plan: The mesh and the placement.
        prompts: The token ids of each row's prompt, at least one.
        max_len: The positions that each row has pages for.
        chunk: Tokens per step while the prompts are read. None: `default_chunk`.

    Raises:
        ValueError: The model is on another mesh, or a prompt is longer than `max_len`.
    """

    def __init__(
        self,
        model: Transformer,
        plan: Plan,
        prompts: Sequence[Sequence[int]],
        max_len: int,
        chunk: int | None = None,
    ):
        check_model_placement(model, plan)
        specs = cache_specs(model.config, plan.cache_dtype_for(model.dtype))
        lens = [len(prompt) for prompt in prompts]
        self.model, self.plan, self.max_len = model, plan, max_len
        self.caches, self.rows = make_caches(plan, specs, lens, [max_len] * len(lens), page=DEFAULT_PAGE)
        self._weights = model.weights()
        self._length_B = np.zeros(len(lens), np.int32)
        self._next_B = np.zeros(len(lens), np.int32)
        self.append(prompts, default_chunk(plan.mesh) if chunk is None else chunk)

    @property
    def lengths(self) -> np.ndarray:
        """The positions of each row that are in the cache."""
        return self._length_B.copy()

    def append(self, texts: Sequence[Sequence[int]], chunk: int = APPEND_CHUNK) -> None:
        """Append a text to each row, in steps of `chunk` tokens.

        Raises:
            ValueError: A row would exceed `max_len`.
        """
        count_B = np.asarray([len(text) for text in texts], np.int32)
        self._check_fits(count_B)
        tokens_BS = np.zeros((len(texts), -(-int(count_B.max()) // chunk) * chunk), np.int32)
        for row, text in enumerate(texts):
            tokens_BS[row, : len(text)] = list(text)
        for first in range(0, tokens_BS.shape[1], chunk):
            taken_B = np.clip(count_B - first, 0, chunk)
            out = self._step(tokens_BS[:, first : first + chunk], taken_B)
            ended_B = (taken_B > 0) & (first + taken_B == count_B)
            self._next_B = np.where(ended_B, np.asarray(out.token_B), self._next_B)

    def append_one(self, token_B: np.ndarray) -> np.ndarray:
        """Append one token to each row. Returns the logits of the token that follows, [B, V].

        Raises:
            ValueError: A row would exceed `max_len`.
        """
        count_B = np.ones(len(token_B), np.int32)
        self._check_fits(count_B)
        out = self._step(np.asarray(token_B, np.int32)[:, None], count_B)
        self._next_B = np.asarray(out.token_B)
        return np.asarray(out.logits_BV)

    def decode(self, count: int) -> np.ndarray:
        """Append the next `count` greedy tokens to each row. Returns them, [B, count].

        Raises:
            ValueError: A row would exceed `max_len`.
        """
        self._check_fits(np.full_like(self._length_B, count))
        tokens = [self._next_B[:, None]]
        for first in range(0, count, DEFAULT_STEPS):
            tokens.append(self._decode(min(DEFAULT_STEPS, count - first)))
        tokens_BS = np.concatenate(tokens, 1)
        self._next_B = tokens_BS[:, -1]
        return tokens_BS[:, :-1]

    def answer(self, questions: Sequence[Sequence[int]], count: int) -> np.ndarray:
        """Return `count` greedy tokens after a question to each row, [B, count], and leave the rows as they were.

        Raises:
            ValueError: A row would exceed `max_len` with the question and its answer.
        """
        self._check_fits(np.asarray([len(question) + count for question in questions], np.int32))
        length_B, next_B = self._length_B, self._next_B
        self.append(questions)
        answer_BS = self.decode(count)
        # The length and the prompt's length determine what a row sees, so the old length undoes the question.
        self.rows = self.rows._replace(length_B=per_row(self.plan, length_B))
        self._length_B, self._next_B = length_B, next_B
        return answer_BS

    def zero_rank(self, rank: int) -> None:
        """Zero everything that one cp rank has cached.

        Raises:
            ValueError: There is no such rank.
        """
        ranks = self.plan.mesh.shape[CP]
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}, but there are {ranks} cp ranks: choose one from 0 to {ranks - 1}")
        self.caches = _zero_rank(self.caches, rank, ranks)

    def _decode(self, count: int) -> np.ndarray:
        """Append `count` tokens to each row. Returns those that follow."""
        rows = len(self._length_B)
        running_B = put(np.zeros(rows, bool), self.plan.mesh, ROWS_B)
        state = DecodeState(self.caches, self.rows, per_row(self.plan, self._next_B), running_B)
        arguments = self.model.config, self.plan, self._weights, state, per_row(self.plan, np.full(rows, count))
        out, state = jax.block_until_ready(decode_program(self.plan)(*arguments))
        self.caches, self.rows = state.caches, state.rows
        self._length_B = self._length_B + count
        tokens_BS = np.asarray(out.tokens_BS)[:, :count]
        self._next_B = tokens_BS[:, -1]
        return tokens_BS

    def _step(self, tokens_BT: np.ndarray, count_B: np.ndarray) -> StepOutput:
        new = per_row(self.plan, tokens_BT), per_row(self.plan, count_B)
        out = step(self.model.config, self.plan, self._weights, self.caches, self.rows, *new)
        out = jax.block_until_ready(out)
        self.caches, self.rows = out.caches, out.rows
        self._length_B = self._length_B + count_B
        return out

    def _check_fits(self, count_B: np.ndarray) -> None:
        """Tokens without a page would be dropped silently."""
        longest = int((self._length_B + count_B).max())
        if longest > self.max_len:
            raise ValueError(f"a row would have {longest} positions, but max_len is {self.max_len}: give a larger one")


def _zero_rank(caches: tuple[KVCache, ...], rank: int, ranks: int) -> tuple[KVCache, ...]:
    def zero(pool_XKWH: jax.Array) -> jax.Array:
        pages = pool_XKWH.shape[0] // ranks
        return pool_XKWH.at[rank * pages : (rank + 1) * pages].set(0)

    return jax.block_until_ready(jax.jit(lambda caches: jax.tree.map(zero, caches), donate_argnums=0)(caches))
