"""Allocates the pages of all ranks on the host, ahead of the devices, from lengths alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from helix_jax.cache import pages_needed
from helix_jax.layout import BlockLayout


@dataclass(eq=False)  # compared by identity: two blocks with the same tokens are two
class PrefixBlock:
    """A part of a cached prefix that fills whole pages on every rank, see `prefix_block_len`.

    Attributes:
        key: The identity of the block before it (0 if there is none), and the tokens of this one.
        pages: Its pages on each rank.
        users: How many rows use it.
    """

    key: tuple[int, bytes]
    pages: list[list[int]]
    users: int = 0


class NewPage(NamedTuple):
    """A page that a row gets.

    Attributes:
        rank: The rank that it is on.
        entry: Its entry in the page table of the row.
        page: The page.
        source: The page that it is a copy of, which it replaces in the table. None: it has no content.
    """

    rank: int
    entry: int
    page: int
    source: int | None = None


@dataclass
class RowPages:
    """The pages of one row.

    Attributes:
        pages: The pages on each rank, in the order of their slots.
        length: How many positions they suffice for.
        prefix_blocks: The prefix blocks of its first tokens. If another row registered a block first, this row has
            pages of its own for the same tokens, and uses the registered block only to extend the prefix.
        is_fork: Whether it began as a fork of another row. It then registers no prefix blocks, because those of the
            other row may end beyond the positions that both have in common.
    """

    pages: list[list[int]]
    length: int = 0
    prefix_blocks: list[PrefixBlock] = field(default_factory=list)
    is_fork: bool = False

    @classmethod
    def empty(cls, ranks: int) -> "RowPages":
        """Return the pages of a row that has none yet."""
        return cls([[] for _ in range(ranks)])


class PageAllocator:
    """The pages of all ranks: free, used by rows, or cached with a prefix for a later request that starts with it.

    A rank provides pages only for the blocks that it will own. A prefix block is identified by its tokens and by the
    block that it follows. Blocks that no row uses stay cached until pages run out. The one that was released first is
    evicted first.

    The users of a page, rows and prefix blocks, are counted. A row that is to write to a page with other users gets a
    copy of it first. Other users never see what a row wrote to a page before: it is beyond the slots that they read.

    Args:
        layout: Which rank owns which position.
        pages: Pages per rank.
        page: Tokens per page.
        share: Whether rows share the pages of equal prefixes.
        ring: The most pages that a row needs on a rank, because it reuses them. None: there is no limit.
    """

    def __init__(self, layout: BlockLayout, pages: int, page: int, *, share: bool, ring: int | None = None):
        self.layout, self.pages, self.page, self.ring = layout, pages, page, ring
        self.prefix_block_len = prefix_block_len(layout, page) if share else None
        self.num_releases = 0
        self._free_pages = [list(range(pages - 1, -1, -1)) for _ in range(layout.ranks)]
        self._users = np.zeros((layout.ranks, pages), np.int32)
        self._prefix_blocks: dict[tuple[int, bytes], PrefixBlock] = {}
        self._unused_blocks: dict[PrefixBlock, None] = {}  # in the order in which they were released

    def count_pages(self, length: int, prompt_len: int) -> np.ndarray:
        """Return how many pages each rank needs for the first `length` positions of a row."""
        filled_R = self.layout.filled(length, prompt_len, np.arange(self.layout.ranks))
        pages_R = pages_needed(filled_R, self.page)
        return pages_R if self.ring is None else np.minimum(pages_R, self.ring)

    def match_prefix(self, tokens: Sequence[int]) -> tuple[RowPages, int]:
        """Allocate the longest cached prefix of `tokens` to a new row.

        Returns:
            The pages of the row, and the length of the prefix. It leaves at least one token to compute.
        """
        row_pages = RowPages.empty(self.layout.ranks)
        if self.prefix_block_len is None:
            return row_pages, 0
        for index in range((len(tokens) - 1) // self.prefix_block_len):
            block = self._prefix_blocks.get(self._key(row_pages, tokens, index))
            if block is None:
                break
            self._use(row_pages, block)
            self._add_user(block.pages)
            for pages, block_pages in zip(row_pages.pages, block.pages, strict=True):
                pages.extend(block_pages)
        row_pages.length = len(row_pages.prefix_blocks) * self.prefix_block_len
        return row_pages, row_pages.length

    def fork(self, source: RowPages, length: int, prompt_len: int) -> RowPages:
        """Return the pages of a new row that begins with the first `length` positions of another row.

        Both rows use the same pages. Of those that the new row is to write to, `grow` makes copies. The other row must
        be prefilled.
        """
        needed_R = self.count_pages(length, prompt_len)
        shared = [pages[:needed] for needed, pages in zip(needed_R, source.pages, strict=True)]
        row_pages = RowPages(shared, length, is_fork=True)
        self._add_user(shared)
        # A row uses every block whose pages it uses, so that a block without users can be evicted.
        blocks = pages_needed(length, self.prefix_block_len) if self.prefix_block_len else 0
        for block in source.prefix_blocks[:blocks]:
            self._use(row_pages, block)
        return row_pages

    def grow(self, row_pages: RowPages, length: int, prompt_len: int) -> list[NewPage] | None:
        """Allocate the pages that a row is missing for `length` positions, evicting cached prefixes if necessary.

        Returns:
            The new pages, some of which are copies, or None if there are too few. Then nothing changed.
        """
        if length <= row_pages.length:
            return []
        needed_R = self.count_pages(length, prompt_len)
        copied = self._entries_to_copy(row_pages, length, prompt_len)
        missing_R = [
            int(needed) - len(pages) + len(entries)
            for needed, pages, entries in zip(needed_R, row_pages.pages, copied, strict=True)
        ]
        if not self._evict_for(missing_R):
            return None
        new_pages = []
        for rank, pages in enumerate(row_pages.pages):
            for entry in copied[rank]:
                new_pages.append(NewPage(rank, entry, self._allocate(rank), source=pages[entry]))
                self._users[rank, pages[entry]] -= 1  # which is still used
                pages[entry] = new_pages[-1].page
            for entry in range(len(pages), needed_R[rank]):
                new_pages.append(NewPage(rank, entry, self._allocate(rank)))
                pages.append(new_pages[-1].page)
        row_pages.length = length
        return new_pages

    def register_prefix(self, row_pages: RowPages, tokens: Sequence[int], length: int) -> None:
        """Register the first `length` of a row's tokens as cached, so that other rows can use them from now on."""
        if self.prefix_block_len is None or row_pages.is_fork:
            return
        for index in range(len(row_pages.prefix_blocks), length // self.prefix_block_len):
            key = self._key(row_pages, tokens, index)
            if key not in self._prefix_blocks:
                span = slice(index * self._pages_per_block, (index + 1) * self._pages_per_block)
                self._prefix_blocks[key] = PrefixBlock(key, [pages[span] for pages in row_pages.pages])
                self._add_user(self._prefix_blocks[key].pages)
            self._use(row_pages, self._prefix_blocks[key])

    def release(self, row_pages: RowPages) -> None:
        """Free the pages of a row that have no other user. Those of prefix blocks stay cached."""
        self.num_releases += 1
        self._remove_user(row_pages.pages)
        # From the end: a row that uses a block also uses those before it, so a block is evicted after those that
        # follow it.
        for block in reversed(row_pages.prefix_blocks):
            block.users -= 1
            if not block.users:
                self._unused_blocks[block] = None

    @property
    def pages_in_use(self) -> tuple[int, ...]:
        """The number of pages on each rank that rows use."""
        return tuple(self.pages - len(free) - self.pages_cached for free in self._free_pages)

    @property
    def pages_cached(self) -> int:
        """The number of pages, the same on every rank, that are cached with prefixes that no row uses."""
        return len(self._unused_blocks) * self._pages_per_block

    @property
    def _pages_per_block(self) -> int:
        if self.prefix_block_len is None:
            return 0
        return pages_needed(self.prefix_block_len // self.layout.ranks, self.page)

    def _key(self, row_pages: RowPages, tokens: Sequence[int], index: int) -> tuple[int, bytes]:
        assert self.prefix_block_len is not None
        block_tokens = tokens[index * self.prefix_block_len : (index + 1) * self.prefix_block_len]
        previous = id(row_pages.prefix_blocks[-1]) if row_pages.prefix_blocks else 0
        return previous, np.asarray(block_tokens, np.int32).tobytes()

    def _use(self, row_pages: RowPages, block: PrefixBlock) -> None:
        block.users += 1
        self._unused_blocks.pop(block, None)
        row_pages.prefix_blocks.append(block)

    def _evict_for(self, missing_R: list[int]) -> bool:
        """Evict prefixes until each rank has enough free pages. If all of them are too few, evict none."""
        if self._shortage(missing_R) > self.pages_cached:
            return False
        while self._shortage(missing_R) > 0:
            self._evict(next(iter(self._unused_blocks)))
        return True

    def _shortage(self, missing_R: list[int]) -> int:
        """Return the most pages of a rank that are missing and not free."""
        return max(missing - len(free) for missing, free in zip(missing_R, self._free_pages, strict=True))

    def _evict(self, block: PrefixBlock) -> None:
        del self._prefix_blocks[block.key], self._unused_blocks[block]
        self._remove_user(block.pages)

    def _entries_to_copy(self, row_pages: RowPages, length: int, prompt_len: int) -> list[list[int]]:
        """Return for each rank the entries of the pages with other users that a row writes to up to `length` positions.

        These can only be the last page of a rank, if it is partly filled, or all of them if rows reuse their pages.
        """
        ranks = np.arange(self.layout.ranks)
        before_R, after_R = (self.layout.filled(end, prompt_len, ranks) for end in (row_pages.length, length))
        entries = []
        for rank, pages in enumerate(row_pages.pages):
            if self.ring is not None:
                first = 0
            else:
                first = before_R[rank] // self.page if after_R[rank] > before_R[rank] else len(pages)
            entries.append([entry for entry in range(first, len(pages)) if self._users[rank, pages[entry]] > 1])
        return entries

    def _allocate(self, rank: int) -> int:
        """Return a free page, which then has one user."""
        page = self._free_pages[rank].pop()
        self._users[rank, page] = 1
        return page

    def _add_user(self, pages: list[list[int]]) -> None:
        for users, own in zip(self._users, pages, strict=True):
            users[own] += 1

    def _remove_user(self, pages: list[list[int]]) -> None:
        """Remove a user of pages on each rank, and free those that have no other."""
        for users, own, free in zip(self._users, pages, self._free_pages, strict=True):
            users[own] -= 1
            free.extend(page for page in reversed(own) if not users[page])


def prefix_block_len(layout: BlockLayout, page: int) -> int | None:
    """Return the tokens of a prefix block, which fill whole pages on every rank, or None if prefixes cannot be shared.

    They cannot if a position's place depends on the prompt's length, or if neither of block and page divides the other.
    """
    block = layout.block
    if not layout.prefix_stable or max(block, page) % min(block, page):
        return None
    return layout.ranks * max(block, page)


def describe_prefix_caching(layout: BlockLayout, page: int, *, enabled: bool, windows: bool = False) -> str:
    """Return "on" if rows can share the pages of equal prefixes, or "off: " and the reason.

    Args:
        layout: Which rank owns which position.
        page: Tokens per page.
        enabled: Whether it is wanted.
        windows: Whether some layers have a window.
    """
    if not enabled:
        return "off: prefix_caching is False"
    if windows:
        return "off: layers with a window reuse their pages, so that those of a prefix do not last"
    if not layout.prefix_stable:
        return f"off: with placement {layout.placement} places depend on the prompt's length (choose striped)"
    if prefix_block_len(layout, page) is None:
        return f"off: neither of page {page} and block {layout.block} divides the other"
    return "on"
