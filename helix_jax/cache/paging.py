"""Converts between slots and pages. Python ints, NumPy arrays and JAX tracers use the same code."""

from typing import Any

from helix_jax.layout import BlockLayout, Integer


def pages_needed(slots: Integer, page: int) -> Integer:
    """Return how many pages of `page` tokens `slots` slots need."""
    return -(-slots // page)


def split_slot(slot: Integer, page: int) -> tuple[Any, Any]:
    """Return the entry of the page table that holds a slot, and the slot's offset within that page."""
    return slot // page, slot % page


def ring_pages(layout: BlockLayout, window: int, in_flight: int, page: int) -> int:
    """Return how many pages a rank needs for a row whose queries see a window, if it reuses them in a ring.

    Args:
        layout: Which rank stores which position.
        window: How many positions a query sees, its own included.
        in_flight: The most tokens that a call appends, or that are undone later.
        page: Tokens per page.
    """
    slots = layout.max_filled_in(window - 1 + in_flight)
    return pages_needed(slots - 1, page) + 1  # they may begin inside of a page


def max_pages_per_row(layout: BlockLayout, max_len: int, page: int) -> int:
    """Return how many pages one rank needs at most for a row of up to `max_len` positions, for any prompt length."""
    if layout.max_skew is None:
        return pages_needed(max_len, page)
    # No rank exceeds an even share by more than max_skew, which is below 3 blocks for every placement.
    even_share = -(-max_len // layout.ranks)
    return pages_needed(min(max_len, even_share + 3 * layout.block), page)
