"""The layout against a dealing of tokens one by one, which knows none of its formulas."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_jax.layout import PLACEMENTS, BlockLayout, rank_ranges


def dealt_owners(layout: BlockLayout, prompt_len: int, length: int) -> list[int]:
    """The owner of each position, positions_by_rank out as one would deal cards."""
    R, T = layout.ranks, layout.block
    if layout.placement == "striped":
        return [index // T % R for index in range(length)]
    blocks = [range(first, min(first + T, prompt_len)) for first in range(0, prompt_len, T)]
    piles = [len(blocks) // R + (rank < len(blocks) % R) for rank in range(R)]
    ranks = itertools.chain.from_iterable([rank] * pile for rank, pile in enumerate(piles))
    owners = [rank for rank, block in zip(ranks, blocks, strict=True) for _ in block]
    decoded = range(length - prompt_len)
    return (owners + [R - 1 if layout.placement == "last_rank" else d // T % R for d in decoded])[:length]


def held_by_dealing(layout: BlockLayout, prompt_len: int, longest: int) -> np.ndarray:
    """[length, rank]: how many of the first `length` positions each rank holds, counted."""
    owners = np.asarray(dealt_owners(layout, prompt_len, longest), int)
    given_out = owners[:, None] == np.arange(layout.ranks)
    return np.concatenate([np.zeros((1, layout.ranks), int), np.cumsum(given_out, 0)])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_small_case_equals_dealing_one_by_one(ranks: int, placement: str):
    """The whole product: blocks 1 to 16, prompts 0 to 64, 0 to 70 tokens decoded, every length up to there."""
    for block, prompt_len in itertools.product(range(1, 17), range(65)):
        layout = BlockLayout(ranks, block, placement)
        held = held_by_dealing(layout, prompt_len, prompt_len + 70)
        lengths, rank = np.arange(prompt_len + 71), np.arange(ranks)
        np.testing.assert_array_equal(layout.filled(lengths[:, None], prompt_len, rank), held)
        owners = np.argmax(np.diff(held, axis=0), 1)
        np.testing.assert_array_equal(layout.owner(lengths[:-1], prompt_len), owners)
        np.testing.assert_array_equal(layout.slot(lengths[:-1], prompt_len), held[lengths[:-1], owners])
        np.testing.assert_array_equal(layout.max_filled(lengths, prompt_len), held.max(1))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_python_ints_and_tracers_give_what_numpy_gives(placement: str):
    draw = random.Random(0)
    for _ in range(25):
        layout = BlockLayout(draw.randint(1, 8), draw.randint(1, 16), placement)
        prompt_len, decoded = draw.randint(0, 64), draw.randint(1, 70)
        positions = np.arange(prompt_len + decoded)
        ranks = np.arange(layout.ranks)[:, None]

        def on_arrays(positions, prompt_len, ranks, layout=layout):
            return (
                layout.filled(positions, prompt_len, ranks),
                layout.owner(positions, prompt_len),
                layout.slot(positions, prompt_len),
            )

        filled, owner, slot = on_arrays(positions, prompt_len, ranks)
        traced = jax.jit(on_arrays)(jnp.asarray(positions), jnp.int32(prompt_len), jnp.asarray(ranks))
        for ours, theirs in zip(traced, (filled, owner, slot), strict=True):
            assert ours.dtype == jnp.int32
            np.testing.assert_array_equal(ours, theirs)
        for p in draw.sample(list(map(int, positions)), min(10, len(positions))):
            assert [layout.filled(p, prompt_len, r) for r in range(layout.ranks)] == filled[:, p].tolist()
            assert (layout.owner(p, prompt_len), layout.slot(p, prompt_len)) == (owner[p], slot[p])
            assert type(layout.filled(p, prompt_len, 0)) is int
            assert type(layout.slot(p, prompt_len)) is int


layouts = st.builds(BlockLayout, st.integers(1, 300), st.integers(1, 5000), st.sampled_from(PLACEMENTS))


@settings(max_examples=300, deadline=None)
@given(layouts, st.integers(0, 2_000_000), st.integers(0, 2_000_000), st.data())
def test_laws_hold_at_any_size(layout: BlockLayout, prompt_len: int, length: int, data: st.DataObject):
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
def test_skew_stays_within_its_bound(ranks: int, block: int, prompt_len: int, decoded: int):
    for placement, bound in (("helix", 3 * block - 1), ("striped", block)):
        layout = BlockLayout(ranks, block, placement)
        filled = layout.filled(prompt_len + decoded, prompt_len, np.arange(ranks))
        assert filled.max() - filled.min() <= bound


@settings(max_examples=100, deadline=None)
@given(
    st.builds(BlockLayout, st.integers(1, 9), st.integers(1, 20), st.sampled_from(PLACEMENTS)),
    st.integers(0, 200),
    st.integers(0, 400),
)
def test_ranges_are_maximal_ordered_and_complete(layout: BlockLayout, prompt_len: int, length: int):
    held = rank_ranges(layout, length, prompt_len)
    for rank, ranges in enumerate(held):
        positions = [p for first, past_last in ranges for p in range(first, past_last)]
        assert positions == [p for p in range(length) if layout.owner(p, prompt_len) == rank]
        assert all(first < past_last for first, past_last in ranges)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))


def test_the_example_of_the_design():
    """Prompt 400, decode 400, block 100, four ranks."""
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
    held = rank_ranges(BlockLayout(ranks, block, placement), prompt_len, prompt_len)
    assert [[(first + 1, past_last) for first, past_last in ranges] for ranges in held] == one_based


def test_decode_starts_at_rank_0_whatever_the_prompt():
    for prompt_len in range(100):
        layout = BlockLayout(5, 7)
        assert [layout.owner(prompt_len + 7 * i, prompt_len) for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16), "cp is 0: give at least 1 rank"),
        ((4, 0), "block is 0: give at least 1 position per block"),
        ((4, 16, "spiral"), "unknown placement 'spiral': choose one of helix, striped, last_rank"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout(*arguments)
