"""Tests that greedy tokens depend on no mesh, placement, combine, chunk, page, steps per call or other row.

The reference is a loop without a cache.
"""

import itertools
import random
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.checkpoint import shard
from helix_jax.combine import COMBINES
from helix_jax.config import Experts
from helix_jax.engine import SamplingParams
from helix_jax.generation import generate
from helix_jax.layout import PLACEMENTS
from helix_jax.mesh import make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from tests.reference import TINY, gaps_of, naive_greedy, plan_of, ties_before_difference, tiny_model

BLOCK, STEPS, PADDED = 3, 50, 160  # at cp 8 two full rotations are 48 tokens
WHOLE = 128
FACTORS = {
    "cp": (1, 2, 4, 8),
    "tp": (1, 2, 4, 8),
    "placement": PLACEMENTS,
    "combine": COMBINES,
    "chunk": (1, 7, WHOLE),
    "steps": (1, 4, 32),
}
FAST_CASES = 6  # they contain every setting
MORE_CHUNKS = {**FACTORS, "chunk": (1, 7, 64, WHOLE)}


def pairs(case: dict) -> set:
    return set(itertools.combinations(case.items(), 2))


def covering_cases(factors: dict) -> list[dict]:
    """Return few cases that cover every possible pair of settings: repeatedly the case with most uncovered pairs."""
    possible = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    possible = [case for case in possible if case["tp"] * case["cp"] <= 8]
    random.Random(0).shuffle(possible)
    uncovered = set().union(*map(pairs, possible))
    cases = []
    while uncovered:
        cases.append(max(possible, key=lambda case: len(uncovered & pairs(case))))
        uncovered -= pairs(cases[-1])
    return cases


def fast_and_slow_cases() -> list:
    """Return the first cases of those that cover all pairs; then, marked slow, the others, and more chunk sizes."""
    covering = covering_cases(FACTORS)
    fast = covering[:FAST_CASES]
    slow = covering[FAST_CASES:] + [case for case in covering_cases(MORE_CHUNKS) if case not in covering]
    marked = [(case, ()) for case in fast] + [(case, pytest.mark.slow) for case in slow]
    return [pytest.param(case, id="-".join(map(str, case.values())), marks=marks) for case, marks in marked]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Return one shorter than a block, one longer than a chunk and not a multiple of a block, and one more."""
    draw = random.Random(0)
    return [draw.choices(range(TINY.vocab), k=n) for n in (2, 100, 24)]


@pytest.fixture(scope="module")
def tiny() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="module")
def naive(tiny, prompts) -> list[list[int]]:
    tokens = naive_greedy(tiny, prompts, STEPS, PADDED)
    assert min(len(set(row)) for row in tokens) > 5  # a text that repeats one token proves little
    return tokens


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Return the plan that all tests below share, so that they share its programs too."""
    return Plan(make_mesh(2, 4), BLOCK)


@pytest.fixture(scope="module")
def model(tiny, plan) -> Transformer:
    return shard(tiny, plan)


OPTIONS = {"page": 4, "chunk": 8}  # likewise shared
TWENTY = SamplingParams(max_new_tokens=20)
SAMPLED = replace(TWENTY, temperature=1.0, top_k=20, top_p=0.9)


@pytest.mark.parametrize("case", fast_and_slow_cases())
def test_tokens_equal_those_of_a_loop_without_cache_or_mesh(case, tiny, prompts, naive):
    plan = Plan(make_mesh(case["tp"], case["cp"]), BLOCK, case["placement"], case["combine"])
    options = {"page": 4, "chunk": case["chunk"], "steps_per_call": case["steps"]}
    tokens = generate(shard(tiny, plan), prompts, plan, SamplingParams(max_new_tokens=STEPS), **options)
    for prompt, row, expected in zip(prompts, tokens, naive, strict=True):
        assert ties_before_difference(tiny, prompt, row, expected, PADDED) == 0


@pytest.mark.parametrize(
    ("placement", "combine"),
    [
        ("helix", "psum"),
        *(pytest.param(placement, "psum", marks=pytest.mark.slow) for placement in PLACEMENTS[1:]),
        *(pytest.param("helix", combine, marks=pytest.mark.slow) for combine in COMBINES[1:]),
    ],
)
def test_600_steps_of_block_16_over_8_ranks(placement: str, combine: str, tiny, prompts):
    """The naive model chooses each token after those before it, in one pass. By induction that is its loop."""
    plan = Plan(make_mesh(1, 8), 16, placement, combine)
    tokens = generate(shard(tiny, plan), prompts, plan, SamplingParams(max_new_tokens=600), page=16, chunk=64)
    padded = 704
    for prompt, row in zip(prompts, tokens, strict=True):
        assert len(row) == 600
        gaps = gaps_of(tiny, prompt, row, padded)
        assert gaps.max() < 1e-4, f"token {gaps.argmax()} is {gaps.max():.2g} below the best"
        assert (gaps > 0).sum() <= 2


def test_a_row_alone_generates_what_it_generates_in_a_batch(prompts, naive, plan, model):
    """One row of the batch is greedy, the others draw; alone, each row has the seed that it has in the batch."""
    params = [replace(SAMPLED, seed=row) for row in range(3)]
    params[1] = TWENTY
    batch = generate(model, prompts, plan, params, **OPTIONS)
    assert batch[1] == naive[1][:20]
    assert batch[2] != naive[2][:20]
    for row in (1, 2):
        assert generate(model, [prompts[row]], plan, params[row], **OPTIONS) == [batch[row]]


@pytest.mark.slow
@pytest.mark.parametrize("params", [TWENTY, SAMPLED])
def test_every_row_alone_generates_what_it_generates_in_a_batch(params: SamplingParams, prompts, plan, model):
    each = [replace(params, seed=7 + row) for row in range(3)]
    batch = generate(model, prompts, plan, each, page=4)
    for prompt, own, row in zip(prompts, each, batch, strict=True):
        assert generate(model, [prompt], plan, own, page=4) == [row]


def test_a_row_ends_after_a_stop_id_and_the_others_continue(prompts, naive, plan, model):
    stop = naive[0][5]
    tokens = generate(model, prompts, plan, replace(TWENTY, stop_token_ids=[stop]), **OPTIONS)
    for row, whole in zip(tokens, naive, strict=True):
        expected = whole[:20]
        assert row == (expected[: expected.index(stop) + 1] if stop in expected else expected)
    assert len(tokens[0]) <= 6
    assert len(set(map(len, tokens))) > 2


def test_tokens_do_not_depend_on_dp(tiny, prompts, naive):
    plan = Plan(make_mesh(tp=2, cp=2, dp=2), BLOCK)
    params = SamplingParams(max_new_tokens=STEPS)
    assert generate(shard(tiny, plan), prompts, plan, params, page=4, chunk=16, steps_per_call=4) == naive


def test_bfloat16_tokens_are_nearly_those_of_float32(tiny, prompts, plan):
    """Each token's float32 logit, after the same text, is within the rounding of bfloat16 of the best."""
    model = shard(tiny, plan, jnp.bfloat16)
    tokens = generate(model, prompts, plan, SamplingParams(max_new_tokens=STEPS), page=4, chunk=16)
    rows = zip(prompts, tokens, strict=True)
    gaps = np.concatenate([gaps_of(tiny, prompt, row, PADDED) for prompt, row in rows])
    assert len(gaps) == 3 * STEPS
    assert gaps.max() < 0.1
    assert (gaps > 0).mean() < 0.1


def test_prompts_may_be_arrays(prompts, naive, plan, model):
    tokens = generate(model, [np.array(prompt) for prompt in prompts], plan, TWENTY, **OPTIONS)
    assert tokens == [row[:20] for row in naive]


@pytest.mark.parametrize(
    ("prompts", "options", "error", "named"),
    [
        ([[]], {}, ValueError, "prompt 0 is empty: give at least one token"),
        (
            [[1], [2, 61]],
            {},
            ValueError,
            "prompt 1: token id 61 is outside the vocabulary of 61: give ids from 0 to 60",
        ),
        ([[-1]], {}, ValueError, "prompt 0: token id -1 is outside"),
        ([[1] * 4000], {}, ValueError, "prompt 0: 4000 tokens and 128 new ones exceed the maximum of 4096 positions"),
        ([], {}, ValueError, "no prompts: give at least one"),
        ([[1], [2]], {"params": [TWENTY]}, ValueError, "there are 1 params for 2 prompts"),
        ([[1]], {"params": 20}, TypeError, "params"),
        ("abc", {}, TypeError, "prompt"),
        ([[1]], {"steps_per_call": 0}, ValueError, "steps_per_call is 0: give at least 1"),
        ([[1]], {"chunk": 0}, ValueError, "chunk is 0: give at least 1"),
        ([[1]], {"page": 0}, ValueError, "page is 0: give at least 1"),
        ([np.array(["a"])], {}, TypeError, "prompt 0 is not a sequence of token ids but of type ndarray: give"),
        ([np.array([1.7])], {}, TypeError, "prompt 0 is not a sequence of token ids"),
        ([[True]], {}, TypeError, "prompt 0 is not a sequence of token ids"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(prompts, options, error, named: str, plan, model):
    with pytest.raises(error, match=named):
        generate(model, prompts, plan, **options)


def test_weights_on_another_mesh_are_refused(tiny, model):
    plan = Plan(make_mesh(1, 4))
    for other in (tiny, model):
        with pytest.raises(ValueError, match="another mesh than the plan's: use load or shard"):
            generate(other, [[1]], plan)


def test_experts_that_are_sharded_otherwise_than_the_plan_has_them_are_refused():
    experts = Experts(num_experts=4, top_k=2, width=16)
    model = tiny_model(replace(TINY, layers=1, experts=experts))
    with pytest.raises(ValueError, match="experts='cp'.*: use load or shard"):
        generate(shard(model, plan_of(2, 2)), [[1]], plan_of(2, 2, experts="cp"))
