"""Which rank holds which position of a sequence, and in which slot.

A placement is one function: `filled(length, prompt_len, rank)`, how many of a sequence's first `length` positions
rank `rank` holds. Slots fill in the order of positions, so owner, slot, visibility, windows and undo all follow from
it; no counter exists that could drift. It is plain integer arithmetic: Python ints, NumPy arrays and JAX tracers go
through the same lines, and broadcast.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

# A Python int, a NumPy or a JAX array of signed integers of 32 bits or more. Arguments broadcast.
Integer = Any

PLACEMENTS = ("helix", "striped", "last_rank")


def _min(a: Integer, b: Integer) -> Integer:
    return a + (b - a) * (b < a)


def _max(a: Integer, b: Integer) -> Integer:
    return a + (b - a) * (b > a)


def _clip(n: Integer, low: Integer, high: Integer) -> Integer:
    return _min(_max(n, low), high)


@dataclass(frozen=True)
class BlockLayout:
    """Deals the positions of a sequence to `ranks` ranks in blocks of `block` positions.

    placement:
        helix      the prompt's blocks in contiguous runs, one run a rank; decode blocks round-robin from rank 0.
                   Ranks differ by at most `3 block - 1` positions.
        striped    every block round-robin. At most `block` apart; a place does not depend on the prompt's length.
        last_rank  the prompt as helix, every decoded position on the last rank: the rule before Helix, a baseline.

    Raises:
        ValueError: fewer than one rank, a block shorter than one position, a turn of all ranks that 32-bit integers do
            not hold, or an unknown placement.

    Source: arXiv 2507.07120; the round-robin of decode blocks is that of TensorRT-LLM PR 9757.
    """

    ranks: int
    block: int = 16
    placement: str = "helix"

    def __post_init__(self) -> None:
        for name in ("ranks", "block"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a whole number")
        if self.ranks < 1:
            raise ValueError(f"cp is {self.ranks}: give at least 1 rank")
        if self.block < 1:
            raise ValueError(f"block is {self.block}: give at least 1 position per block")
        if self.ranks * self.block >= 2**31:
            raise ValueError(f"block {self.block} x cp {self.ranks} passes 32-bit integers: give a smaller block")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"unknown placement '{self.placement}': choose one of {', '.join(PLACEMENTS)}")

    def filled(self, length: Integer, prompt_len: Integer, rank: Integer) -> Integer:
        """How many of the first `length` positions `rank` holds. A negative length counts as 0.

        The whole library leans on this: position p lies in slot `filled(p, L, owner)` of its owner, rank r owns p if
        `filled(p + 1, L, r) > filled(p, L, r)`, and a query at p sees the slots `[0, filled(p + 1, L, r))` of rank r.
        """
        length = _max(length, 0)
        if self.placement == "striped":
            return self._dealt(length, rank)
        start = self._prompt_start(prompt_len, rank)
        stop = self._prompt_start(prompt_len, rank + 1)
        prompt = _clip(length, start, stop) - start
        decoded = _max(length - prompt_len, 0)
        if self.placement == "last_rank":
            return prompt + decoded * (rank == self.ranks - 1)
        return prompt + self._dealt(decoded, rank)

    def owner(self, position: Integer, prompt_len: Integer) -> Integer:
        """The rank that holds `position` (0 or more)."""
        if self.placement == "striped":
            return self._round_robin(position)
        in_prompt = position < prompt_len
        decode_index = _max(position - prompt_len, 0)
        decoded = self.ranks - 1 if self.placement == "last_rank" else self._round_robin(decode_index)
        return decoded + (self._prompt_owner(position, prompt_len) - decoded) * in_prompt

    def slot(self, position: Integer, prompt_len: Integer) -> Integer:
        """The slot that `position` takes on its owner."""
        return self.filled(position, prompt_len, self.owner(position, prompt_len))

    def _round_robin(self, index: Integer) -> Integer:
        return index // self.block % self.ranks

    def _dealt(self, count: Integer, rank: Integer) -> Integer:
        """The share of `rank` when `count` positions are dealt in blocks, in turn, from rank 0."""
        turn = self.block * self.ranks
        return count // turn * self.block + _clip(count % turn - rank * self.block, 0, self.block)

    def _prompt_runs(self, prompt_len: Integer) -> tuple[Integer, Integer]:
        """Blocks in a rank's run of the prompt, and how many ranks (the first ones) take one more."""
        blocks = -(-prompt_len // self.block)
        return blocks // self.ranks, blocks % self.ranks

    def _prompt_start(self, prompt_len: Integer, rank: Integer) -> Integer:
        run, longer = self._prompt_runs(prompt_len)
        return _min((rank * run + _min(rank, longer)) * self.block, prompt_len)

    def _prompt_owner(self, position: Integer, prompt_len: Integer) -> Integer:
        run, longer = self._prompt_runs(prompt_len)
        block = position // self.block
        return _max(block // (run + 1), (block - longer) // _max(run, 1))


def slots_needed(layout: BlockLayout, length: Integer, prompt_len: Integer) -> Integer:
    """Slots that the fullest rank needs for a sequence of `length` positions; broadcasts over sequences."""
    fullest = layout.filled(length, prompt_len, 0)
    for rank in range(1, layout.ranks):
        fullest = _max(fullest, layout.filled(length, prompt_len, rank))
    return fullest


@lru_cache
def dealt(layout: BlockLayout, length: int) -> np.ndarray:
    """The positions of a whole sequence, rank after rank, each rank's in the order of its slots. Read-only."""
    ranges = [both for held in held_ranges(layout, length, length) for both in held]
    order = np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in ranges])
    order.flags.writeable = False
    return order


def held_ranges(layout: BlockLayout, length: int, prompt_len: int) -> list[list[tuple[int, int]]]:
    """For every rank the positions that it holds: maximal half-open ranges, in the order of their slots."""
    held: list[list[tuple[int, int]]] = [[] for _ in range(layout.ranks)]
    block = layout.block
    edges = sorted({*range(0, length, block), *range(min(prompt_len, length), length, block), length})
    for start, stop in pairwise(edges):  # a block, or a part of one: a single owner
        ranges = held[layout.owner(start, prompt_len)]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return held
