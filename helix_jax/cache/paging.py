"""Integer arithmetic between slots and pages. It takes ints, NumPy arrays and JAX tracers alike."""

from typing import Any

from helix_jax.layout import BlockLayout, Integer


def pages_needed(slots: Integer, page: int) -> Integer:
    """Return how many pages of `page` tokens hold `slots` slots."""
    return -(-slots // page)


def split_slot(slot: Integer, page: int) -> tuple[Any, Any]:
    """Return the entry of the page table that holds a slot, and the slot's offset within that page."""
    return slot // page, slot % page


def max_pages_per_row(layout: BlockLayout, max_len: int, page: int) -> int:
    """Return how many pages one rank needs at most for a row of up to `max_len` positions, whatever its prompt."""
    skew = layout.max_skew
    even = max_len if skew is None else -(-max_len // layout.ranks) + 3 * layout.block
    return pages_needed(min(max_len, even), page)
