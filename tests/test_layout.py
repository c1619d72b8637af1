"""Checks the layout against an enumeration that distributes positions one by one and uses none of its formulas."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_jax.cache import max_pages_per_row, pages_needed
from helix_jax.layout import PLACEMENTS, BlockLayout, positions_by_rank, rank_ranges

DECODED = 70


def enumerate_owners(layout: BlockLayout, prompt_len: int, length: int) -> list[int]:
    """Return the owner of each position, assigned one block after the other."""
    R, T = layout.ranks, layout.block
    if layout.placement == "striped":
        return [index // T % R for index in range(length)]
    blocks = [range(first, min(first + T, prompt_len)) for first in range(0, prompt_len, T)]
    blocks_per_rank = [len(blocks) // R + (rank < len(blocks) % R) for rank in range(R)]
    ranks = itertools.chain.from_iterable([rank] * count for rank, count in enumerate(blocks_per_rank))
    owners = [rank for rank, block in zip(ranks, blocks, strict=True) for _ in block]
    decoded = range(length - prompt_len)
    return (owners + [R - 1 if layout.placement == "last_rank" else d // T % R for d in decoded])[:length]


def cumulative_counts(layout: BlockLayout, owners: np.ndarray) -> np.ndarray:
    """Return [prompt, length, rank]: how many of the first `length` positions each rank owns."""
    owned = owners[..., None] == np.arange(layout.ranks)
    return np.concatenate([np.zeros_like(owned[:, :1], int), np.cumsum(owned, 1)], 1)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_small_case_equals_the_enumeration(ranks: int, placement: str):
    """Blocks of 1 to 16, prompts of 0 to 64 tokens, 0 to 70 decoded tokens, every length up to there."""
    longest = 64 + DECODED
    prompts = np.arange(65)[:, None]
    position = np.arange(longest)
    exists = position < prompts + DECODED
    for block in range(1, 17):
        layout = BlockLayout(ranks, block, placement)
        owners = np.asarray([enumerate_owners(layout, prompt_len, longest) for [prompt_len] in prompts])
        counts = cumulative_counts(layout, owners)
        lengths = np.arange(longest + 1)
        filled = np.broadcast_to(layout.filled(lengths[:, None], prompts[..., None], np.arange(ranks)), counts.shape)
        np.testing.assert_array_equal(filled[:, :-1][exists], counts[:, :-1][exists])
        np.testing.assert_array_equal(filled[:, 1:][exists], counts[:, 1:][exists])
        fullest = np.broadcast_to(layout.max_filled(lengths, prompts), counts.shape[:2])
        np.testing.assert_array_equal(fullest[:, 1:][exists], counts.max(2)[:, 1:][exists])
        owner = np.broadcast_to(layout.owner(position, prompts), exists.shape)
        np.testing.assert_array_equal(owner[exists], owners[exists])
        slots = np.take_along_axis(counts[:, :-1], owners[..., None], 2)[..., 0]
        slot = np.broadcast_to(layout.slot(position, prompts), exists.shape)
        np.testing.assert_array_equal(slot[exists], slots[exists])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_python_ints_and_tracers_give_the_same_as_numpy(placement: str):
    draw = random.Random(0)
    for _ in range(5):
        layout = BlockLayout(draw.randint(1, 8), draw.randint(1, 16), placement)
        prompt_len, decoded = draw.randint(0, 64), draw.randint(1, 70)
        positions = np.arange(prompt_len + decoded)
        ranks = np.arange(layout.ranks)[:, None]

        def compute(positions, prompt_len, ranks, layout=layout):
            return (
                layout.filled(positions, prompt_len, ranks),
                layout.owner(positions, prompt_len),
                layout.slot(positions, prompt_len),
            )

        filled, owner, slot = compute(positions, prompt_len, ranks)
        traced = jax.jit(compute)(positions.astype(np.int32), np.int32(prompt_len), ranks.astype(np.int32))
        for ours, theirs in zip(traced, (filled, owner, slot), strict=True):
            assert ours.dtype == jnp.int32
            np.testing.assert_array_equal(ours, theirs)
        for p in draw.sample(list(map(int, positions)), min(10, len(positions))):
            assert [layout.filled(p, prompt_len, r) for r in range(layout.ranks)] == filled[:, p].tolist()
            assert (layout.owner(p, prompt_len), layout.slot(p, prompt_len)) == (owner[p], slot[p])
            assert type(layout.filled(p, prompt_len, 0)) is int
            assert type(layout.slot(p, prompt_len)) is int


# Arguments of BlockLayout. The tests create it, because beartype's checks use `random`, which strategies must not.
layouts = st.tuples(st.integers(1, 300), st.integers(1, 5000), st.sampled_from(PLACEMENTS))
small_layouts = st.tuples(st.integers(1, 9), st.integers(1, 20), st.sampled_from(PLACEMENTS))


@settings(max_examples=300, deadline=None)
@given(layouts, st.integers(0, 2_000_000), st.integers(0, 2_000_000), st.data())
def test_the_invariants_hold_at_any_size(arguments: tuple, prompt_len: int, length: int, data: st.DataObject):
    layout = BlockLayout(*arguments)
    ranks = np.arange(layout.ranks)
    filled = layout.filled(length, prompt_len, ranks)
    assert filled.sum() == length
    after = layout.filled(length + 1, prompt_len, ranks)
    owner = layout.owner(length, prompt_len)
    np.testing.assert_array_equal(after - filled, ranks == owner)
    assert layout.slot(length, prompt_len) == filled[owner]
    earlier = data.draw(st.integers(-100, length))
    assert (layout.filled(earlier, prompt_len, ranks) <= filled).all()
    assert layout.filled(earlier, prompt_len, ranks).sum() == max(earlier, 0)
    np.testing.assert_array_equal(filled, layout.filled(np.int64(length), np.int64(prompt_len), ranks))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 10_000), st.integers(0, 10_000))
def test_ranks_differ_by_at_most_max_skew(ranks: int, block: int, prompt_len: int, decoded: int):
    for placement, bound in (("helix", 3 * block - 1), ("striped", block)):
        layout = BlockLayout(ranks, block, placement)
        filled = layout.filled(prompt_len + decoded, prompt_len, np.arange(ranks))
        assert filled.max() - filled.min() <= bound
        assert layout.max_skew == bound
    assert BlockLayout(ranks, block, "last_rank").max_skew is None


@settings(max_examples=100, deadline=None)
@given(small_layouts, st.integers(0, 200), st.integers(0, 400), st.integers(1, 40))
def test_no_rank_needs_more_pages_than_max_pages_per_row(arguments: tuple, prompt_len: int, max_len: int, page: int):
    layout = BlockLayout(*arguments)
    prompt_len = min(prompt_len, max_len)
    fullest = int(layout.max_filled(max_len, prompt_len))
    assert pages_needed(fullest, page) <= max_pages_per_row(layout, max_len, page) <= pages_needed(max_len, page)


@settings(max_examples=100, deadline=None)
@given(small_layouts, st.integers(0, 60), st.integers(1, 80))
def test_no_rank_stores_more_of_a_span_than_max_filled_in(arguments: tuple, prompt_len: int, span: int):
    """And one rank stores as many of some span, except that runs of a prompt may be shorter than the span."""
    layout = BlockLayout(*arguments)
    owner = np.asarray([layout.owner(p, prompt_len) for p in range(prompt_len + 3 * span + 200)])
    most = 0
    for first in range(len(owner) - span + 1):
        most = max(most, int(np.bincount(owner[first : first + span]).max()))
    assert most <= layout.max_filled_in(span)
    assert most == layout.max_filled_in(span) or layout.placement == "helix"


@settings(max_examples=100, deadline=None)
@given(small_layouts, st.integers(0, 200), st.integers(0, 400))
def test_ranges_are_maximal_ordered_and_complete(arguments: tuple, prompt_len: int, length: int):
    layout = BlockLayout(*arguments)
    by_rank = rank_ranges(layout, length, prompt_len)
    owners = np.asarray([layout.owner(p, prompt_len) for p in range(length)], int)
    for rank, ranges in enumerate(by_rank):
        positions = [p for first, past_last in ranges for p in range(first, past_last)]
        assert positions == np.flatnonzero(owners == rank).tolist()
        assert all(first < past_last for first, past_last in ranges)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_positions_by_rank_are_ordered_by_rank_and_slot(placement: str):
    layout = BlockLayout(3, 4, placement)
    order = positions_by_rank(layout, 50)
    places = [(layout.owner(p, 50), layout.slot(p, 50)) for p in order.tolist()]
    assert places == sorted(places)
    assert sorted(order.tolist()) == list(range(50))


def test_the_example_of_the_design():
    """A prompt of 400 tokens, 400 decoded tokens, blocks of 100, four ranks."""
    assert rank_ranges(BlockLayout(4, 100, "helix"), 800, 400) == [
        [(0, 100), (400, 500)],
        [(100, 200), (500, 600)],
        [(200, 300), (600, 700)],
        [(300, 400), (700, 800)],
    ]
    assert rank_ranges(BlockLayout(4, 100, "last_rank"), 800, 400) == [
        [(0, 100)],
        [(100, 200)],
        [(200, 300)],
        [(300, 800)],
    ]
    assert rank_ranges(BlockLayout(4, 100, "striped"), 800, 400) == rank_ranges(BlockLayout(4, 100), 800, 400)


@pytest.mark.parametrize(
    ("prompt_len", "block", "ranks", "placement", "one_based"),
    [
        (13, 2, 4, "helix", [[(1, 4)], [(5, 8)], [(9, 12)], [(13, 13)]]),
        (13, 2, 4, "striped", [[(1, 2), (9, 10)], [(3, 4), (11, 12)], [(5, 6), (13, 13)], [(7, 8)]]),
        (12, 4, 2, "helix", [[(1, 8)], [(9, 12)]]),
        (12, 4, 2, "striped", [[(1, 4), (9, 12)], [(5, 8)]]),
        (10, 4, 4, "helix", [[(1, 4)], [(5, 8)], [(9, 10)], []]),
    ],
)
def test_prompts_of_the_tensorrt_llm_fixtures(prompt_len, block, ranks, placement, one_based):
    by_rank = rank_ranges(BlockLayout(ranks, block, placement), prompt_len, prompt_len)
    assert [[(first + 1, past_last) for first, past_last in ranges] for ranges in by_rank] == one_based


def test_decoding_starts_at_rank_0_for_any_prompt_length():
    layout = BlockLayout(5, 7)
    for prompt_len in range(100):
        assert [layout.owner(prompt_len + 7 * i, prompt_len) for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]
        assert layout.decode_start(prompt_len) == prompt_len


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_places_depend_on_the_prompt_length_unless_prefix_stable(placement: str):
    layout = BlockLayout(3, 4, placement)
    places = [[(layout.owner(p, L), layout.slot(p, L)) for p in range(60)] for L in (10, 50)]
    assert (places[0] == places[1]) == layout.prefix_stable
    assert layout.decode_start(10) == (0 if layout.prefix_stable else 10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 16), ValueError, "cp is 0: give at least 1"),
        ((4, 0), ValueError, "block is 0: give at least 1"),
        ((4, 16, "spiral"), ValueError, "placement is 'spiral': choose one of helix, striped, last_rank"),
        ((2**16, 2**15), ValueError, "block 32768 x cp 65536 exceeds 32-bit integers: choose a smaller block"),
        ((4, True), TypeError, "block is True: give a whole number"),
    ],
)
def test_an_invalid_layout_is_rejected(arguments, error, message):
    with pytest.raises(error, match=message):
        BlockLayout(*arguments)
