"""Defines which rank stores which position of a sequence, and in which slot.

A placement is one function: `filled(length, prompt_len, rank)`, the number of a sequence's first `length` positions
that `rank` stores. Slots fill in the order of positions, so owner, slot, visibility, windows and undo all follow from
it, and there is no counter that could drift. It is plain integer arithmetic without branches: Python ints, NumPy arrays
and JAX tracers use the same code, and broadcast.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from helix_jax.validation import check_choice, check_int

# A Python int, a NumPy or a JAX array of signed integers of 32 bits or more. Arguments broadcast.
Integer = Any

PLACEMENTS = ("helix", "striped", "last_rank")


@dataclass(frozen=True)
class BlockLayout:
    """An assignment of the positions of a sequence to `ranks` ranks, in blocks of `block` positions.

    Args:
        ranks: The number of ranks on cp.
        block: Positions per block.
        placement: How blocks are assigned.

            - "helix": The blocks of the prompt in contiguous runs, one run per rank. The blocks of decoded tokens
              round-robin, from rank 0.
            - "striped": All blocks round-robin. The place of a position does not depend on the prompt's length.
            - "last_rank": The prompt as in "helix", every decoded token on the last rank. This is the rule before
              Helix, kept as a baseline.

    Raises:
        TypeError: `ranks` or `block` is not an int.
        ValueError: `ranks` or `block` is below 1, `ranks * block` exceeds 32-bit integers, or the placement is unknown.

    Source: arXiv 2507.07120; the round-robin of decode blocks is that of TensorRT-LLM PR 9757.
    """

    ranks: int
    block: int = 16
    placement: str = "helix"

    def __post_init__(self) -> None:
        check_int("cp", self.ranks, least=1)
        check_int("block", self.block, least=1)
        check_choice("placement", self.placement, PLACEMENTS)
        if self.ranks * self.block >= 2**31:
            raise ValueError(f"block {self.block} x cp {self.ranks} exceeds 32-bit integers: choose a smaller block")

    @property
    def prefix_stable(self) -> bool:
        """Whether a position's rank and slot are the same for every prompt length, so that prefixes can be shared."""
        return self.placement == "striped"

    @property
    def max_skew(self) -> int | None:
        """The largest difference between the tokens that two ranks store, or None if it grows without bound."""
        return {"helix": 3 * self.block - 1, "striped": self.block, "last_rank": None}[self.placement]

    def decode_start(self, prompt_len: int) -> int:
        """Return the position at which the blocks of decoded tokens begin to count."""
        return 0 if self.prefix_stable else prompt_len

    def filled(self, length: Integer, prompt_len: Integer, rank: Integer) -> Integer:
        """Return how many of the first `length` positions `rank` stores. A negative length counts as 0.

        With a prompt of L tokens, position p is in slot `filled(p, L, owner)` of its owner. Rank r owns p if
        `filled(p + 1, L, r) > filled(p, L, r)`. A query at p sees the slots `[0, filled(p + 1, L, r))` of rank r.
        """
        length = _max(length, 0)
        if self.placement == "striped":
            return self._round_robin_share(length, rank)
        start = self._prompt_start(prompt_len, rank)
        stop = self._prompt_start(prompt_len, rank + 1)
        prompt = _clip(length, start, stop) - start
        decoded = _max(length, prompt_len) - prompt_len
        if self.placement == "last_rank":
            return prompt + decoded * (rank == self.ranks - 1)
        return prompt + self._round_robin_share(decoded, rank)

    def max_filled_in(self, span: int) -> int:
        """Return the most of any `span` consecutive positions that one rank stores."""
        if self.placement != "striped":
            return span  # a part of the prompt, or everything decoded
        rotations, rest = divmod(span, self.block * self.ranks)
        return rotations * self.block + min(rest, self.block)

    def max_filled(self, length: Integer, prompt_len: Integer) -> Integer:
        """Return how many of the first `length` positions the fullest rank stores. Broadcasts over sequences."""
        fullest = self.filled(length, prompt_len, 0)
        for rank in range(1, self.ranks):
            fullest = _max(fullest, self.filled(length, prompt_len, rank))
        return fullest

    def owner(self, position: Integer, prompt_len: Integer) -> Integer:
        """Return the rank that stores `position` (0 or more)."""
        if self.placement == "striped":
            return self._round_robin(position)
        in_prompt = position < prompt_len
        decode_index = _max(position - prompt_len, 0)
        decoded = self.ranks - 1 if self.placement == "last_rank" else self._round_robin(decode_index)
        return decoded + (self._prompt_owner(position, prompt_len) - decoded) * in_prompt

    def slot(self, position: Integer, prompt_len: Integer) -> Integer:
        """Return the slot of `position` on its owner."""
        return self.filled(position, prompt_len, self.owner(position, prompt_len))

    def _round_robin(self, index: Integer) -> Integer:
        return index // self.block % self.ranks

    def _round_robin_share(self, count: Integer, rank: Integer) -> Integer:
        """Return the share of `rank` in `count` positions that are distributed round-robin from rank 0."""
        turn = self.block * self.ranks
        start = rank * self.block
        return count // turn * self.block + _clip(count % turn, start, start + self.block) - start

    def _prompt_runs(self, prompt_len: Integer) -> tuple[Integer, Integer]:
        """Return how many blocks of the prompt every rank stores, and how many of the first ranks store one more."""
        blocks = (prompt_len + self.block - 1) // self.block
        return blocks // self.ranks, blocks % self.ranks

    def _prompt_start(self, prompt_len: Integer, rank: Integer) -> Integer:
        run, longer = self._prompt_runs(prompt_len)
        return _min((rank * run + _min(rank, longer)) * self.block, prompt_len)

    def _prompt_owner(self, position: Integer, prompt_len: Integer) -> Integer:
        run, longer = self._prompt_runs(prompt_len)
        block = position // self.block
        return _max(block // (run + 1), (block - longer) // _max(run, 1))


@lru_cache
def positions_by_rank(layout: BlockLayout, length: int) -> np.ndarray:
    """Return the positions of a prompt of `length` tokens, ordered by rank and then by slot, as a read-only array."""
    ranges = [bounds for by_slot in rank_ranges(layout, length, length) for bounds in by_slot]
    order = np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in ranges])
    order.flags.writeable = False
    return order


def rank_ranges(layout: BlockLayout, length: int, prompt_len: int) -> list[list[tuple[int, int]]]:
    """Return for every rank the positions that it stores: maximal half-open ranges, in slot order."""
    by_rank: list[list[tuple[int, int]]] = [[] for _ in range(layout.ranks)]
    block = layout.block
    edges = sorted({*range(0, length, block), *range(min(prompt_len, length), length, block), length})
    for start, stop in pairwise(edges):  # at most a block, so it has a single owner
        ranges = by_rank[layout.owner(start, prompt_len)]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return by_rank


def _min(a: Integer, b: Integer) -> Integer:
    return a + (b - a) * (b < a)


def _max(a: Integer, b: Integer) -> Integer:
    return a + (b - a) * (b > a)


def _clip(n: Integer, low: Integer, high: Integer) -> Integer:
    return _min(_max(n, low), high)
