"""Greedy tokens depend on no mesh, placement, combine, chunk, page or neighbour: against a loop without a cache."""

import itertools
import random

import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.checkpoint import shard
from helix_jax.combine import COMBINES
from helix_jax.generation import generate
from helix_jax.layout import PLACEMENTS, BlockLayout
from helix_jax.mesh import make_mesh
from helix_jax.plan import Plan
from helix_jax.sampling import make_sampling
from tests.reference import TINY, gaps_of, naive_greedy, plan_of, ties_before_difference, tiny_model

BLOCK, STEPS, PADDED = 3, 50, 160  # at cp 8 two full rotations are 48 tokens
WHOLE = 128
FACTORS = {
    "cp": (1, 2, 4, 8),
    "tp": (1, 2, 4, 8),
    "placement": PLACEMENTS,
    "combine": COMBINES,
    "chunk": (1, 7, 64, WHOLE),
}


def pairs(case: dict) -> set:
    return set(itertools.combinations(case.items(), 2))


def covering_cases() -> list[dict]:
    """Few cases in which every pair of settings that can stand together does: the best of a crowd, again and again."""
    every = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    every = [case for case in every if case["tp"] * case["cp"] <= 8]
    random.Random(0).shuffle(every)
    wanted = set().union(*map(pairs, every))
    cases = []
    while wanted:
        cases.append(max(every, key=lambda case: len(wanted & pairs(case))))
        wanted -= pairs(cases[-1])
    return cases


@pytest.fixture(scope="session")
def prompts() -> list[list[int] | None]:
    """One shorter than a block, one longer than a chunk and not a multiple of a block, one idle row, one more."""
    draw = random.Random(0)
    return [None if n is None else draw.choices(range(TINY.vocab), k=n) for n in (2, 100, None, 24)]


@pytest.fixture(scope="session")
def naive(prompts) -> list[list[int]]:
    live = [prompt for prompt in prompts if prompt]
    tokens = naive_greedy(tiny_model(), live, STEPS, PADDED)
    assert min(len(set(row)) for row in tokens) > 5  # a text that repeats one token proves little
    return [tokens[0], tokens[1], [], tokens[2]]


@pytest.mark.parametrize("case", covering_cases(), ids=lambda case: "-".join(map(str, case.values())))
def test_tokens_equal_those_of_a_loop_without_cache_or_mesh(case, prompts, naive):
    mesh = make_mesh(case["tp"], case["cp"])
    plan = Plan(mesh, BLOCK, case["placement"], case["combine"])
    model = shard(tiny_model(), plan)
    ours = generate(model, prompts, plan, max_new_tokens=STEPS, page=4, chunk=case["chunk"])
    assert ours[2] == []
    for prompt, row, expected in zip(prompts, ours, naive, strict=True):
        if prompt:
            assert ties_before_difference(tiny_model(), prompt, row, expected, PADDED) == 0


@pytest.mark.parametrize(
    ("placement", "how"),
    [(placement, "psum") for placement in PLACEMENTS] + [("helix", how) for how in COMBINES[1:]],
)
def test_600_steps_of_block_16_over_8_ranks(placement: str, how: str, prompts):
    """Judged in one pass: the naive model must say each token after those before it. By induction that is its loop."""
    mesh = make_mesh(1, 8)
    plan = Plan(mesh, 16, placement, how)
    ours = generate(shard(tiny_model(), plan), prompts, plan, max_new_tokens=600, page=16)
    padded = 704
    for prompt, row in zip(prompts, ours, strict=True):
        if prompt is None:
            assert row == []
            continue
        assert len(row) == 600
        gaps = gaps_of(tiny_model(), prompt, row, padded)
        assert gaps.max() < 1e-4, f"token {gaps.argmax()} is {gaps.max():.2g} below the best"
        assert (gaps > 0).sum() <= 2


def test_a_row_alone_says_what_it_says_in_a_crowd(prompts):
    mesh = make_mesh(2, 4)
    plan = Plan(mesh, BLOCK)
    model = shard(tiny_model(), plan)
    options = {"max_new_tokens": 20, "page": 4}
    for sampling in ({}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 7}):
        crowd = generate(model, prompts, plan, sampling=make_sampling(4, **sampling), **options)
        for row, prompt in enumerate(prompts):
            if prompt:
                seeded = sampling | {"seed": sampling["seed"] + row} if sampling else {}
                alone = generate(model, [prompt], plan, sampling=make_sampling(1, **seeded), **options)
                assert alone == [crowd[row]]


def test_a_row_ends_after_a_stop_id_and_the_others_go_on(prompts, naive):
    mesh = make_mesh(1, 4)
    plan = Plan(mesh, BLOCK)
    model = shard(tiny_model(), plan)
    stop = naive[0][5]
    ours = generate(model, prompts, plan, max_new_tokens=20, stop_token_ids=[stop])
    for row, whole in zip(ours, naive, strict=True):
        expected = whole[:20]
        assert row == (expected[: expected.index(stop) + 1] if stop in expected else expected)
    assert len(ours[0]) <= 6


def test_tokens_do_not_depend_on_dp(prompts, naive):
    mesh = make_mesh(tp=2, cp=2, dp=2)
    plan = Plan(mesh, BLOCK)
    assert generate(shard(tiny_model(), plan), prompts, plan, max_new_tokens=STEPS, page=4, chunk=7) == naive


def test_bfloat16_says_what_float32_would_or_nearly(prompts):
    """Each token's float32 logit, after the same text, lies within the rounding of bfloat16 of the best."""
    mesh = make_mesh(2, 4)
    model = shard(tiny_model(), Plan(mesh), jnp.bfloat16)
    ours = generate(model, prompts, Plan(mesh, BLOCK), max_new_tokens=STEPS)
    gaps = np.concatenate(
        [
            gaps_of(tiny_model(), prompt, row, PADDED)
            for prompt, row in zip(prompts, ours, strict=True)
            if prompt is not None
        ]
    )
    assert len(gaps) == 3 * STEPS
    assert gaps.max() < 0.1
    assert (gaps > 0).mean() < 0.1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty: give at least one token"),
        ([[1], [2, 61]], {}, "prompt 1: token id 61 is outside the vocabulary of 61: give ids from 0 to 60"),
        ([[-1]], {}, "prompt 0: token id -1 is outside"),
        ([[1] * 4000], {}, "prompt 0: 4000 tokens and 128 new ones exceed the model's 4096 positions: shorten"),
        ([None], {}, "no prompts: give at least one"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0: give at least 1"),
        ([[1]], {"chunk": 0}, "prefill chunk is 0: give at least 1"),
        ([[1]], {"page": 0}, "page is 0: give at least 1"),
        ([np.array(["a"])], {}, "prompt 0 is not a sequence of token ids: give whole numbers"),
        ([np.array([1.7])], {}, "prompt 0 is not a sequence of token ids"),
        ([[1]], {"sampling": make_sampling(2)}, "sampling is for 2 rows, but there are 1 prompts"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(prompts, options, message):
    mesh = make_mesh(1, 4)
    with pytest.raises(ValueError, match=message):
        generate(shard(tiny_model(), Plan(mesh)), prompts, Plan(mesh), **options)


def test_prompts_may_be_arrays():
    mesh = make_mesh(1, 4)
    plan = Plan(mesh)
    model = shard(tiny_model(), plan)
    lists, arrays = [[1, 2, 3], None], [np.array([1, 2, 3]), None]
    assert generate(model, arrays, plan, max_new_tokens=3) == generate(model, lists, plan, max_new_tokens=3)


def test_weights_on_another_mesh_are_refused():
    plan = Plan(make_mesh(1, 4))
    for model in (tiny_model(), shard(tiny_model(), plan_of(2, 4))):
        with pytest.raises(ValueError, match="another mesh than the plan's: use load or shard with plan.mesh"):
            generate(model, [[1]], plan)
