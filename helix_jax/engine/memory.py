"""Who holds which page of which rank: decided on the host, ahead of the devices, from lengths alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from helix_jax.layout import BlockLayout


@dataclass(eq=False)  # a run is itself: two of the same content are two
class Run:
    """A stretch of a prefix, as long as a turn of the ranks in whole pages, and its pages on each rank.

    users: rows that read it. children: runs that go on from it. used: when it was last let go.
    """

    key: tuple[int, bytes]
    parent: "Run | None"
    pages: list[list[int]]
    users: int = 0
    children: int = 0
    used: int = 0


@dataclass
class Held:
    """The pages of one row, per rank and in the order of slots; the first of them are those of shared runs.

    length: positions that they are enough for.
    """

    pages: list[list[int]]
    length: int = 0
    shared: list[Run] = field(default_factory=list)  # runs whose pages are among them
    chain: list[Run] = field(default_factory=list)  # the runs of its first tokens, its own or another's


class Memory:
    """Pages of all ranks: free, held by rows, or kept with a prefix for whoever comes with it again.

    A rank hands out pages for the blocks that it will own and for no other. Runs of prefixes are known by their tokens
    and by the run that they follow; those that no row reads are kept until pages run out, the oldest go first.
    """

    def __init__(self, layout: BlockLayout, pages: int, page: int, *, share: bool):
        self.layout, self.pages, self.page = layout, pages, page
        self.run_tokens = run_length(layout, page) if share else None
        self._free = [list(range(pages - 1, -1, -1)) for _ in range(layout.ranks)]
        self._runs: dict[tuple[int, bytes], Run] = {}
        self._clock = 0

    def needed(self, length: int, prompt_len: int) -> np.ndarray:
        """Pages on each rank for the first `length` positions."""
        filled_R = self.layout.filled(length, prompt_len, np.arange(self.layout.ranks))
        return -(-filled_R // self.page)

    def nothing(self) -> Held:
        """Of a row that holds no page yet."""
        return Held([[] for _ in range(self.layout.ranks)])

    def start(self, tokens: Sequence[int]) -> tuple[Held, int]:
        """The longest known prefix of these tokens, now held, and its length: at least one token is left to compute."""
        held = self.nothing()
        if self.run_tokens is None:
            return held, 0
        for index in range((len(tokens) - 1) // self.run_tokens):
            run = self._runs.get(self._key(held, tokens, index))
            if run is None:
                break
            run.users += 1
            held.shared.append(run)
            held.chain.append(run)
            for mine, theirs in zip(held.pages, run.pages, strict=True):
                mine.extend(theirs)
        return held, len(held.chain) * self.run_tokens

    def grow(self, held: Held, length: int, prompt_len: int) -> list[tuple[int, int, int]] | None:
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

    def learn(self, held: Held, tokens: Sequence[int], length: int) -> None:
        """The first `length` of these tokens are cached in this row: whoever starts with them may read them now."""
        if self.run_tokens is None:
            return
        for index in range(len(held.chain), length // self.run_tokens):
            key = self._key(held, tokens, index)
            run = self._runs.get(key)
            if run is None:
                parent = held.chain[-1] if held.chain else None
                per_run = self.run_tokens // self.layout.ranks // self.page
                pages = [mine[index * per_run : (index + 1) * per_run] for mine in held.pages]
                run = self._runs[key] = Run(key, parent, pages, users=1)
                held.shared.append(run)
                if parent:
                    parent.children += 1
            held.chain.append(run)

    def release(self, held: Held) -> None:
        """The row lets go of its pages; those of runs stay where they are."""
        self._clock += 1
        kept = [{page for run in held.shared for page in run.pages[rank]} for rank in range(self.layout.ranks)]
        for rank, mine in enumerate(held.pages):
            self._free[rank].extend(page for page in reversed(mine) if page not in kept[rank])
        for run in held.shared:
            run.users -= 1
            run.used = self._clock

    def in_use(self) -> tuple[int, ...]:
        """Pages of each rank that rows hold."""
        cached = self.cached()
        return tuple(self.pages - len(free) - kept for free, kept in zip(self._free, cached, strict=True))

    def cached(self) -> tuple[int, ...]:
        """Pages of each rank that are kept with prefixes that no row reads."""
        idle = [run for run in self._runs.values() if not run.users]
        return tuple(sum(len(run.pages[rank]) for run in idle) for rank in range(self.layout.ranks))

    def _key(self, held: Held, tokens: Sequence[int], index: int) -> tuple[int, bytes]:
        assert self.run_tokens is not None
        mine = tokens[index * self.run_tokens : (index + 1) * self.run_tokens]
        return id(held.chain[-1]) if held.chain else 0, np.asarray(mine, np.int32).tobytes()

    def _free_up(self, wanted_R: list[int]) -> bool:
        """Forgets prefixes until so many pages are free; none in vain, where all of them would not do."""

        def short() -> list[int]:
            return [wanted - len(free) for wanted, free in zip(wanted_R, self._free, strict=True)]

        if max(short()) > 0 and any(lack > kept for lack, kept in zip(short(), self.cached(), strict=True)):
            return False
        while max(short()) > 0:
            if not self._forget_one():
                return False
        return True

    def _forget_one(self) -> bool:
        idle = [run for run in self._runs.values() if not run.users and not run.children]
        if not idle:
            return False
        run = min(idle, key=lambda run: run.used)
        del self._runs[run.key]
        if run.parent:
            run.parent.children -= 1
        for free, pages in zip(self._free, run.pages, strict=True):
            free.extend(reversed(pages))
        return True


def run_length(layout: BlockLayout, page: int) -> int | None:
    """Tokens of a stretch that fills whole pages on every rank, wherever it is cached; None if there is none such."""
    block = layout.block
    if layout.placement != "striped" or max(block, page) % min(block, page):
        return None
    return layout.ranks * max(block, page)
