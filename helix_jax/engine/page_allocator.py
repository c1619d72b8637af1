"""Who holds which page of which rank: decided on the host, ahead of the devices, from lengths alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from helix_jax.cache import pages_needed
from helix_jax.layout import BlockLayout


@dataclass(eq=False)  # a run is itself: two of the same content are two
class PrefixBlock:
    """A stretch of a prefix, as long as a turn of the ranks in whole pages, and its pages on each rank.

    key: the run before it, and its tokens. users: rows that begin with it.
    """

    key: tuple[int, bytes]
    pages: list[list[int]]
    users: int = 0


@dataclass
class RowPages:
    """The pages of one row, per rank and in the order of slots.

    length: positions that they are enough for. runs: those of its first tokens. Where it was there first, or came when
    they were cached, their pages are its own.
    """

    pages: list[list[int]]
    length: int = 0
    runs: list[PrefixBlock] = field(default_factory=list)


class PageAllocator:
    """Pages of all ranks: free, held by rows, or kept with a prefix for whoever comes with it again.

    A rank hands out pages for the blocks that it will own and for no other. Runs of prefixes are known by their tokens
    and by the run that they follow; those that no row reads are kept until pages run out: the first let go is the first
    forgotten.
    """

    def __init__(self, layout: BlockLayout, pages: int, page: int, *, share: bool):
        self.layout, self.pages, self.page = layout, pages, page
        self.prefix_block_len = prefix_block_len(layout, page) if share else None
        self._free = [list(range(pages - 1, -1, -1)) for _ in range(layout.ranks)]
        self._runs: dict[tuple[int, bytes], PrefixBlock] = {}
        self._idle: dict[PrefixBlock, None] = {}  # those that no row reads, in the order in which they were let go
        self.releases = 0

    def needed(self, length: int, prompt_len: int) -> np.ndarray:
        """Pages on each rank for the first `length` positions."""
        filled_R = self.layout.filled(length, prompt_len, np.arange(self.layout.ranks))
        return pages_needed(filled_R, self.page)

    def nothing(self) -> RowPages:
        """Of a row that holds no page yet."""
        return RowPages([[] for _ in range(self.layout.ranks)])

    def start(self, tokens: Sequence[int]) -> tuple[RowPages, int]:
        """The longest known prefix of these tokens, now held, and its length: at least one token is left to compute."""
        held = self.nothing()
        if self.prefix_block_len is None:
            return held, 0
        for index in range((len(tokens) - 1) // self.prefix_block_len):
            run = self._runs.get(self._key(held, tokens, index))
            if run is None:
                break
            self._read(held, run)
            for mine, theirs in zip(held.pages, run.pages, strict=True):
                mine.extend(theirs)
        return held, len(held.runs) * self.prefix_block_len

    def grow(self, held: RowPages, length: int, prompt_len: int) -> list[tuple[int, int, int]] | None:
        """Hands out what `length` positions still need, as (rank, entry, page); None, and nothing, if there is less."""
        if length <= held.length:
            return []
        missing_R = [int(n) - len(mine) for n, mine in zip(self.needed(length, prompt_len), held.pages, strict=True)]
        if not self._free_up(missing_R):
            return None
        given = []
        for rank, missing in enumerate(missing_R):
            for _ in range(missing):
                page = self._free[rank].pop()
                given.append((rank, len(held.pages[rank]), page))
                held.pages[rank].append(page)
        held.length = length
        return given

    def register_prefix(self, held: RowPages, tokens: Sequence[int], length: int) -> None:
        """The first `length` of these tokens are cached in this row: whoever starts with them may read them now."""
        if self.prefix_block_len is None:
            return
        for index in range(len(held.runs), length // self.prefix_block_len):
            key = self._key(held, tokens, index)
            if key not in self._runs:
                span = slice(index * self._pages_per_run, (index + 1) * self._pages_per_run)
                self._runs[key] = PrefixBlock(key, [mine[span] for mine in held.pages])
            self._read(held, self._runs[key])

    def release(self, held: RowPages) -> None:
        """The row lets go of its pages; those of runs stay where they are."""
        self.releases += 1
        kept = [{page for run in held.runs for page in run.pages[rank]} for rank in range(self.layout.ranks)]
        for rank, mine in enumerate(held.pages):
            self._free[rank].extend(page for page in reversed(mine) if page not in kept[rank])
        # The end first: whoever reads a run reads those before it, so no run is forgotten before those that follow it.
        for run in reversed(held.runs):
            run.users -= 1
            if not run.users:
                self._idle[run] = None

    def in_use(self) -> tuple[int, ...]:
        """Pages of each rank that rows hold."""
        return tuple(self.pages - len(free) - self.cached() for free in self._free)

    def cached(self) -> int:
        """Pages of every rank that are kept with prefixes that no row reads."""
        return len(self._idle) * self._pages_per_run

    @property
    def _pages_per_run(self) -> int:
        return 0 if self.prefix_block_len is None else self.prefix_block_len // self.layout.ranks // self.page

    def _key(self, held: RowPages, tokens: Sequence[int], index: int) -> tuple[int, bytes]:
        assert self.prefix_block_len is not None
        mine = tokens[index * self.prefix_block_len : (index + 1) * self.prefix_block_len]
        return id(held.runs[-1]) if held.runs else 0, np.asarray(mine, np.int32).tobytes()

    def _free_up(self, wanted_R: list[int]) -> bool:
        """Forgets prefixes until so many pages are free; none in vain, where all of them would not do."""
        short = max(wanted - len(free) for wanted, free in zip(wanted_R, self._free, strict=True))
        if short > self.cached():
            return False
        for _ in range(-(-short // self._pages_per_run) if short > 0 else 0):
            self._forget(next(iter(self._idle)))
        return True

    def _read(self, held: RowPages, run: PrefixBlock) -> None:
        run.users += 1
        self._idle.pop(run, None)
        held.runs.append(run)

    def _forget(self, run: PrefixBlock) -> None:
        del self._runs[run.key], self._idle[run]
        for free, pages in zip(self._free, run.pages, strict=True):
            free.extend(reversed(pages))


def prefix_block_len(layout: BlockLayout, page: int) -> int | None:
    """Tokens of a stretch that fills whole pages on every rank, wherever it is cached; None if there is none such."""
    block = layout.block
    if not layout.prefix_stable or max(block, page) % min(block, page):
        return None
    return layout.ranks * max(block, page)
