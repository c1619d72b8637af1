"""Allocates the pages of all ranks on the host, ahead of the devices, from lengths alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass
class RowPages:
    """The pages of one row.

    Attributes:
        pages: The pages on each rank, in the order of their slots.
        length: How many positions they suffice for.
        prefix_blocks: The prefix blocks of its first tokens. If another row registered a block first, this row has
            pages of its own for the same tokens, and uses the registered block only to extend the prefix.
    """

    pages: list[list[int]]
    length: int = 0
    prefix_blocks: list[PrefixBlock] = field(default_factory=list)

    @classmethod
    def empty(cls, ranks: int) -> "RowPages":
        """Return the pages of a row that has none yet."""
        return cls([[] for _ in range(ranks)])


class PageAllocator:
    """The pages of all ranks: free, used by rows, or cached with a prefix for a later request that starts with it.

    A rank provides pages only for the blocks that it will own. A prefix block is identified by its tokens and by the
    block that it follows. Blocks that no row uses stay cached until pages run out. The one that was released first is
    evicted first.

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
            for pages, block_pages in zip(row_pages.pages, block.pages, strict=True):
                pages.extend(block_pages)
        return row_pages, len(row_pages.prefix_blocks) * self.prefix_block_len

    def grow(self, row_pages: RowPages, length: int, prompt_len: int) -> list[tuple[int, int, int]] | None:
        """Allocate the pages that a row is missing for `length` positions, evicting cached prefixes if necessary.

        Returns:
            The new pages as (rank, entry of the page table, page), or None if there are too few. Then nothing changed.
        """
        if length <= row_pages.length:
            return []
        needed_R = self.count_pages(length, prompt_len)
        missing_R = [int(needed) - len(pages) for needed, pages in zip(needed_R, row_pages.pages, strict=True)]
        if not self._evict_for(missing_R):
            return None
        new_pages = []
        for rank, missing in enumerate(missing_R):
            for _ in range(missing):
                page = self._free_pages[rank].pop()
                new_pages.append((rank, len(row_pages.pages[rank]), page))
                row_pages.pages[rank].append(page)
        row_pages.length = length
        return new_pages

    def register_prefix(self, row_pages: RowPages, tokens: Sequence[int], length: int) -> None:
        """Register the first `length` of a row's tokens as cached, so that other rows can use them from now on."""
        if self.prefix_block_len is None:
            return
        for index in range(len(row_pages.prefix_blocks), length // self.prefix_block_len):
            key = self._key(row_pages, tokens, index)
            if key not in self._prefix_blocks:
                span = slice(index * self._pages_per_block, (index + 1) * self._pages_per_block)
                self._prefix_blocks[key] = PrefixBlock(key, [pages[span] for pages in row_pages.pages])
            self._use(row_pages, self._prefix_blocks[key])

    def release(self, row_pages: RowPages) -> None:
        """Free the pages of a row. Those of prefix blocks stay cached."""
        self.num_releases += 1
        for rank, pages in enumerate(row_pages.pages):
            cached = {page for block in row_pages.prefix_blocks for page in block.pages[rank]}
            self._free_pages[rank].extend(page for page in reversed(pages) if page not in cached)
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

        def shortage() -> int:
            return max(missing - len(free) for missing, free in zip(missing_R, self._free_pages, strict=True))

        if shortage() > self.pages_cached:
            return False
        while shortage() > 0:
            self._evict(next(iter(self._unused_blocks)))
        return True

    def _evict(self, block: PrefixBlock) -> None:
        del self._prefix_blocks[block.key], self._unused_blocks[block]
        for free, pages in zip(self._free_pages, block.pages, strict=True):
            free.extend(reversed(pages))


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
