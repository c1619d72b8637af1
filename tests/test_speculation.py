"""Speculative decoding: drafts change the number of steps, and never the output."""

import itertools
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import chi2

from helix_jax import Engine, FinishedEvent, Plan, SamplingParams, decoding, drafting, load, transfer
from helix_jax.checkpoint import shard
from helix_jax.draft_folder import open_draft
from helix_jax.engine import runner
from helix_jax.engine.options import check_speculation
from helix_jax.folder import ModelFolder
from helix_jax.models.transformer import Transformer
from helix_jax.speculation import (
    MAX_DRAFT_TOKENS,
    count_accepted,
    count_right,
    count_to_draft,
    propose,
    update_confidence,
)
from tests.conftest import GOLDEN
from tests.reference import BYTES, TINY, naive_greedy, naive_logits, plan_of, sharded_tiny_models, tiny_model

SHAPE = {"rows": 3, "page": 4, "pages": 14, "max_len": 96, "chunk": 32}
PARAMS = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "seed": 5, "top_k": 9},
    "penalised, with log-probabilities": {"repetition_penalty": 1.3, "logprobs": 2},
}


def look_up(tokens: list[int], drafts: int) -> tuple[list[int], int]:
    """Return the drafts of a row, found by trying every earlier place, and the length of the match."""
    best = (1, 0)
    for end in range(len(tokens) - 1):
        length = 0
        while length < min(8, end + 1) and tokens[end - length] == tokens[-1 - length]:
            length += 1
        best = max(best, (length, end))
    length, end = best
    return list(itertools.islice(itertools.cycle(tokens[end + 1 :]), drafts)), length if length > 1 else 0


def test_drafts_follow_the_last_occurrence_of_the_longest_match():
    random = np.random.default_rng(0)
    rows = [random.integers(0, 3, n).tolist() for n in (1, 2, 3, 5, 9, 20, 31, 40, 40, 40)]
    tokens_BS = np.full((len(rows), 40), 7, np.int32)
    for row, tokens in zip(tokens_BS, rows, strict=True):
        row[: len(tokens)] = tokens
    draft_BD, match_B = jax.jit(partial(propose, drafts=7))(jnp.asarray(tokens_BS), jnp.asarray([*map(len, rows)]))
    expected = [look_up(tokens, 7) for tokens in rows]
    assert match_B.tolist() == [match for _, match in expected]
    assert sum(match_B > 0) > 4
    for draft_D, (draft, match) in zip(draft_BD.tolist(), expected, strict=True):
        assert not match or draft_D == draft


def test_drafts_are_accepted_up_to_the_first_wrong_one():
    choice_BT = jnp.asarray([[1, 2, 3, 9], [1, 5, 3, 9], [4, 2, 3, 9], [1, 2, 3, 9]])
    draft_BD = jnp.broadcast_to(jnp.asarray([1, 2, 3]), (4, 3))
    assert count_accepted(choice_BT, draft_BD, jnp.asarray([3, 3, 3, 1])).tolist() == [3, 1, 0, 1]


def test_a_row_whose_drafts_were_wrong_has_to_be_right_again():
    right_B, count_B, accepted_B = jnp.asarray([0, 2, 3, 3]), jnp.asarray([0, 0, 7, 7]), jnp.asarray([0, 0, 7, 6])
    first_right_B = jnp.asarray([True, False, True, True])
    assert count_right(right_B, count_B, accepted_B, first_right_B).tolist() == [1, 0, 4, 0]


def confidence_after(results: list[tuple[int, int]], most: int = 5) -> int:
    """Return the confidence of a row after steps with so many drafts, and so many that were right."""
    confidence_B = jnp.zeros(1, jnp.int32)
    for count, accepted in results:
        confidence_B = update_confidence(confidence_B, *map(jnp.atleast_1d, (count, accepted)), most)
    return int(confidence_B[0])


def test_a_row_whose_drafts_are_wrong_drafts_less_and_tries_again_after_a_pause():
    def drafted_after(*results: tuple[int, int]) -> int:
        return int(count_to_draft(jnp.asarray([confidence_after(list(results))]), 5)[0])

    assert [drafted_after(*[(1, 1)] * steps) for steps in range(5)] == [1, 2, 4, 5, 5]
    assert drafted_after((1, 1), (2, 2), (4, 3)) == 3
    three_wrong = [(1, 0)] * 3
    assert [drafted_after(*three_wrong[:steps]) for steps in range(4)] == [1, 1, 1, 0]
    assert [drafted_after(*three_wrong, *[(0, 0)] * pause) for pause in (1, 31, 32)] == [0, 0, 1]
    assert drafted_after(*three_wrong, *[(0, 0)] * 32, (1, 0)) == 0
    assert drafted_after(*three_wrong, *[(0, 0)] * 32, (1, 1)) == 2
    assert confidence_after([(0, 0)] * 3) == 0  # no drafts, because a call ended


@pytest.fixture(scope="module")
def models():
    return sharded_tiny_models()


def make_engine(model, block: int = 4, placement: str = "helix", combine: str = "psum", **options) -> Engine:
    plan = Plan(model.embed_VD[...].sharding.mesh, block, placement, combine)
    return Engine(model, plan, **(SHAPE | options))


def repetitive_prompts() -> list[list[int]]:
    random = np.random.default_rng(3)
    phrase = random.integers(0, TINY.vocab, 7).tolist()
    return [phrase * 3, random.integers(0, TINY.vocab, 19).tolist(), [*phrase, 1, 2, *phrase]]


def run(engine: Engine, params: list[SamplingParams]) -> list[tuple]:
    outputs = engine.generate(repetitive_prompts(), params)
    return [(output.tokens, output.finish_reason, output.logprobs) for output in outputs]


def all_params(**options) -> list[SamplingParams]:
    return [SamplingParams(max_new_tokens=31 + index, **options) for index in range(3)]


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets the tokens that follow each prompt. They are the drafts, and are always verified."""
    following: dict[tuple[int, ...], list[int]] = {}

    def pad(tokens: list[int], length: int) -> np.ndarray:
        matches = ([*prompt, *more] for prompt, more in following.items() if tuple(tokens[: len(prompt)]) == prompt)
        known = next(matches, tokens)  # the row that does not exist has another prompt
        padded_S = np.zeros(length, np.int32)
        padded_S[: len(known)] = known
        padded_S[: len(tokens)] = tokens
        return padded_S

    def take(tokens_BS, known_B, drafts):
        index_BD = jnp.minimum(known_B[:, None] + jnp.arange(drafts), tokens_BS.shape[1] - 1)
        return jnp.take_along_axis(tokens_BS, index_BD, axis=1), jnp.where(known_B > 0, 99, 0)

    monkeypatch.setattr(runner, "_padded", pad)
    monkeypatch.setattr(drafting, "propose", take)
    decoding.decode.clear_cache()
    yield lambda tokens: following.update(zip(map(tuple, repetitive_prompts()), tokens, strict=True))
    decoding.decode.clear_cache()


def distort(tokens: list[int], kind: str) -> list[int]:
    random = np.random.default_rng(0)
    is_wrong = {"right": [False] * len(tokens), "wrong": [True] * len(tokens)}
    is_wrong["random"] = (random.random(len(tokens)) < 0.3).tolist()
    return [(token + wrong) % TINY.vocab for token, wrong in zip(tokens, is_wrong[kind], strict=True)]


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ((1, 4), {}),
        pytest.param((2, 4), {"placement": "striped", "block": 3, "page": 64, "pages": 2}, marks=pytest.mark.slow),
        pytest.param((1, 1), {"placement": "last_rank", "steps_per_call": 8, "pages": 48}, marks=pytest.mark.slow),
        pytest.param((1, 8), {"combine": "all_to_all", "block": 16, "pages": 20}, marks=pytest.mark.slow),
    ],
)
def test_the_output_does_not_change(models, mesh, options, inject):
    """With right, wrong and random drafts; greedy, sampled, and with a penalty and log-probabilities."""
    plain, drafting = (make_engine(models(*mesh), **options, speculate=how) for how in (None, "ngram"))
    for name, params in PARAMS.items():
        expected = run(plain, all_params(**params))
        for kind in ("right", "wrong", "random") if name == "greedy" else ("random",):
            inject([distort(tokens, kind) for tokens, *_ in expected])
            before = drafting.stats()
            for found, wanted in zip(run(drafting, all_params(**params)), expected, strict=True):
                assert found[:2] == wanted[:2]
                if wanted[2]:
                    np.testing.assert_allclose([x[0] for x in found[2]], [x[0] for x in wanted[2]], atol=1e-4)
            stats = drafting.stats()
            drafted = stats.drafted_tokens - before.drafted_tokens
            accepted = stats.accepted_tokens - before.accepted_tokens
            assert drafted > 0
            assert {"right": accepted == drafted, "wrong": accepted == 0}.get(kind, 0 < accepted < drafted)
    assert plain.stats().tokens_per_step == 1 < stats.tokens_per_step


def test_right_drafts_need_few_steps_and_a_stop_token_ends_a_group(models, inject):
    plain, drafting = (make_engine(models(1, 4), speculate=how) for how in (None, "ngram"))
    [(tokens, *_), *_] = expected = run(plain, all_params())
    inject([tokens for tokens, *_ in expected])
    assert run(drafting, all_params()) == expected
    assert drafting.stats().tokens_per_step > MAX_DRAFT_TOKENS / 2
    stop = all_params(stop_token_ids=[tokens[13]])
    assert run(drafting, stop) == run(plain, stop)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text", "deepseek_v3", "qwen3"])
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_windows_latents_and_quantised_caches_decode_the_same_with_drafts(name: str, cache_dtype: str, inject):
    plan = plan_of(1, 4, block=4, cache_dtype=cache_dtype)
    model = load(GOLDEN / name, plan, jnp.float32)
    options, params = {"rows": 3, "page": 4, "max_len": 96, "chunk": 8}, all_params(ignore_eos=True)
    plain, drafting = (Engine(model, plan, **options, speculate=how) for how in (None, "ngram"))
    expected = run(plain, params)
    inject([distort(tokens, "random") for tokens, *_ in expected])
    assert run(drafting, params) == expected
    assert drafting.stats().accepted_tokens > 0


@pytest.mark.slow
def test_random_requests_equal_those_without_drafts(models):
    """Most are preempted, because there are few pages."""
    random, model = np.random.default_rng(0), models(1, 4)
    prompts = [(random.integers(0, 5, random.integers(2, 9)).tolist() * 5)[:30] for _ in range(300)]
    params = [
        SamplingParams(max_new_tokens=int(random.integers(1, 40)), temperature=(i % 3) / 3, seed=i) for i in range(300)
    ]
    plain, drafting = (make_engine(model, pages=9, speculate=how) for how in (None, "ngram"))
    expected = plain.generate(prompts, params)
    found = drafting.generate(prompts, params)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert drafting.stats().preemptions > 0


def test_right_drafts_are_among_the_tokens_in_which_the_next_are_looked_up(models):
    engine = make_engine(models(1, 4), speculate="ngram")
    [output] = engine.generate([repetitive_prompts()[0]], SamplingParams(max_new_tokens=70))
    assert engine.stats().accepted_tokens > 0
    known = [*repetitive_prompts()[0], *output.tokens[:-1]]  # the last token was not appended
    assert engine.runner.state.drafts.tokens_BS[0, : len(known)].tolist() == known


# Draft models


def draft_of(model: Transformer, noise: float = 0.0, **changes) -> Transformer:
    """Return a draft model: the tiny model with noise in its weights, or with changes in its config."""
    draft = tiny_model(replace(TINY, **changes))
    random = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: x + noise * np.std(x) * random.standard_normal(x.shape), nnx.state(draft))
    nnx.update(draft, weights)
    return shard(draft, plan_of(*map(model.embed_VD[...].sharding.mesh.shape.get, ("tp", "cp", "dp"))))


def simulate_drafts(draft: Transformer, prompt: list[int], tokens: tuple[int, ...], most: int) -> tuple[int, int]:
    """Return how many tokens a model drafts for a row that one call decodes, and how many of them are right."""
    known, confidence_1, total = 1, jnp.zeros(1, jnp.int32), np.zeros(2, int)  # the first token is the prefill's
    while known < len(tokens):
        count = min(int(count_to_draft(confidence_1, most)[0]), len(tokens) - known - 1)
        [drafts] = naive_greedy(draft, [[*prompt, *tokens[:known]]], count, padded_to=96)
        matches = [ours == theirs for ours, theirs in zip(drafts, tokens[known:], strict=False)]
        result = [count, [*matches, False].index(False)]
        confidence_1 = update_confidence(confidence_1, *map(jnp.atleast_1d, result), most)
        known, total = known + result[1] + 1, total + result
    return tuple(total.tolist())


def test_a_draft_model_drafts_what_it_would_predict_and_the_output_does_not_change(models):
    """Its cache has the tokens of the model, and no others, also after wrong drafts and pauses."""
    model, prompt, params = models(1, 4), repetitive_prompts()[1], SamplingParams(max_new_tokens=70)
    [expected] = make_engine(model).generate([prompt], params)
    for noise in (0.0, 0.3, 3.0):
        engine = make_engine(model, speculate=draft_of(model, noise), steps_per_call=70)
        [output] = engine.generate([prompt], params)
        stats = engine.stats()
        assert output.tokens == expected.tokens
        drafts = stats.drafted_tokens, stats.accepted_tokens
        assert drafts == simulate_drafts(draft_of(models(1, 1), noise), prompt, output.tokens, 5)
        if not noise:
            assert drafts[0] == drafts[1]
            assert stats.tokens_per_step > 4
    assert drafts[1] < 0.2 * drafts[0] < 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options", "changes"),
    [
        ((1, 4), {"draft_tokens": 3}, {"layers": 1, "width": 16}),
        ((2, 4), {"placement": "striped", "block": 3, "page": 64, "pages": 2}, {"layers": 3}),
        ((1, 1), {"placement": "last_rank", "steps_per_call": 8, "pages": 48, "draft_tokens": 7}, {"head_width": 4}),
        ((1, 8), {"combine": "all_to_all", "block": 16, "pages": 20, "draft_tokens": 1}, {"window": 5}),
    ],
    ids=str,
)
def test_a_draft_model_does_not_change_the_output(models, mesh, options, changes):
    """Neither the model itself, whose drafts are all right, nor one with noise, nor one of another shape."""
    model = models(*mesh)
    if "window" in changes:
        changes |= {"windowed_layers": (1,)}
    drafts = {"itself": model, "with noise": draft_of(model, 0.3), "other": draft_of(model, 3.0, **changes)}
    plain = make_engine(model, **{name: value for name, value in options.items() if name != "draft_tokens"})
    engines = {name: make_engine(model, speculate=draft, **options) for name, draft in drafts.items()}
    for params in PARAMS.values():
        expected = run(plain, all_params(**params))
        for engine in engines.values():
            for found, wanted in zip(run(engine, all_params(**params)), expected, strict=True):
                assert found[:2] == wanted[:2]
                if wanted[2]:
                    np.testing.assert_allclose([x[0] for x in found[2]], [x[0] for x in wanted[2]], atol=1e-4)
    shares = [engine.stats().accepted_tokens / engine.stats().drafted_tokens for engine in engines.values()]
    assert shares[0] == 1 > shares[1] > shares[2]
    assert engines["itself"].stats().tokens_per_step > engines["other"].stats().tokens_per_step


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "mesh"), [("helix", (1, 4)), ("striped", (1, 2, 2))])
def test_the_cache_of_a_draft_model_is_shared_copied_and_computed_again_with_that_of_the_model(models, placement, mesh):
    """If it has the right tokens, a model that drafts for itself is always right."""
    random, model = np.random.default_rng(0), models(*mesh)
    prefix, tails = random.integers(0, TINY.vocab, 20).tolist(), random.integers(0, TINY.vocab, (60, 9)).tolist()
    prompts = [[*prefix, *tail][index % 3 * 5 :] for index, tail in enumerate(tails)]
    params = [
        SamplingParams(max_new_tokens=1 + index % 40, temperature=index % 3 / 2, seed=index, n=1 + index % 3)
        for index in range(len(prompts))
    ]
    options = {"placement": placement, "rows": 6, "pages": 12, "steps_per_call": 16}
    expected = make_engine(model, **options).generate(prompts, params)
    engine = make_engine(model, speculate=model, **options)
    assert [output.tokens for output in engine.generate(prompts, params)] == [output.tokens for output in expected]
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.shared_tokens > 0
    assert stats.drafted_tokens > 500
    assert stats.accepted_tokens >= 0.999 * stats.drafted_tokens  # but for ties


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text", "deepseek_v3", "qwen3", "windows"])
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_windows_latents_and_quantised_caches_of_a_draft_model(name: str, cache_dtype: str):
    plan = plan_of(1, 4, block=4, cache_dtype=cache_dtype)
    if name == "windows":  # in all layers, so that rows reuse their pages
        windowed = [replace(TINY, window=window, windowed_layers=(0, 1)) for window in (6, 3)]
        model, other = (shard(tiny_model(config), plan) for config in windowed)
    else:
        model = other = load(GOLDEN / name, plan, jnp.float32)
    options = {"rows": 3, "page": 4, "max_len": 160, "chunk": 8}
    params = [
        SamplingParams(max_new_tokens=100 + index, ignore_eos=True, temperature=0.5, seed=index, n=2)
        for index in range(3)
    ]
    expected = run(Engine(model, plan, **options), params)
    for draft in (model, other):
        engine = Engine(model, plan, speculate=draft, **options)
        assert run(engine, params) == expected
        stats = engine.stats()
        share = stats.accepted_tokens / stats.drafted_tokens
        assert share > 0.97 if draft is model else share < 0.97


@pytest.mark.slow
def test_a_request_can_be_transferred_between_engines_that_draft_and_those_that_do_not(models):
    four, two = models(1, 4), models(1, 2)
    engines = {
        "plain": make_engine(four),
        "ngram": make_engine(two, speculate="ngram", page=8),
        "drafting": make_engine(two, placement="striped", page=8, speculate=two, chunk=16),
        "other": make_engine(four, speculate=draft_of(four, 3.0), draft_tokens=2),
    }
    params = SamplingParams(max_new_tokens=60, temperature=0.5, seed=3)
    [expected] = engines["plain"].generate([repetitive_prompts()[1]], params)
    for source, target in (("plain", "drafting"), ("other", "drafting"), ("drafting", "ngram"), ("ngram", "other")):
        id = engines[source].submit(repetitive_prompts()[1], replace(params, max_new_tokens=60))
        for _ in range(2):
            engines[source].step()
        before = engines[target].stats()
        transfer(id, engines[source], engines[target])
        [output] = [event.result for event in engines[target].events() if isinstance(event, FinishedEvent)]
        assert output.tokens == expected.tokens
        stats = engines[target].stats()
        drafted = stats.drafted_tokens - before.drafted_tokens
        if target == "drafting":
            assert stats.accepted_tokens - before.accepted_tokens == drafted > 10


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("how", [None, "ngram", "itself", "a model with noise"])
def test_the_joint_distribution_of_three_tokens_is_that_of_the_model(how: str | None):
    """20,000 draws over a vocabulary of 8, compared with the probabilities of all 512 outcomes."""
    draws, params = 20_000, SamplingParams(max_new_tokens=3, temperature=0.2, ignore_eos=True)
    model = shard(tiny_model(replace(TINY, vocab=8)), plan_of(1, 2))
    prompt = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3] * 2
    drafter = {"itself": model, "a model with noise": draft_of(model, 0.3, vocab=8)}.get(how or "", how)
    engine = make_engine(model, rows=64, max_len=28, pages=80, chunk=1024, speculate=drafter)
    halves = [replace(params, n=draws // 2, seed=seed) for seed in (0, draws // 2)]
    outputs = engine.generate([prompt] * 2, halves)
    assert len(outputs) == draws
    observed_888 = np.zeros((8, 8, 8))
    for output in outputs:
        observed_888[output.tokens] += 1
    assert bool(how) == bool(engine.stats().drafted_tokens)
    p_888 = np.ones((8, 8, 8))
    for length in range(3):  # the probability of the token after each continuation of this length
        continuations = list(itertools.product(range(8), repeat=length))
        logits = naive_logits(tiny_model(model.config), [[*prompt, *tokens] for tokens in continuations], 28)
        logits = logits[:, len(prompt) + length - 1].astype(np.float64) / params.temperature
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p_888 *= (p / p.sum(-1, keepdims=True)).reshape((8,) * (length + 1) + (1,) * (2 - length))
    expected = draws * p_888.ravel()
    common = expected >= 5  # the rare outcomes are one
    counts = [np.append(x[common], x[~common].sum()) for x in (observed_888.ravel(), expected)]
    statistic = (np.square(counts[0] - counts[1]) / counts[1]).sum()
    assert chi2.sf(statistic, len(counts[0]) - 1) > 0.001


def test_a_draft_model_has_the_tokens_of_the_model(byte_model: Path, tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    model = ModelFolder.open(byte_model)

    def open_one(folder: Path, model: ModelFolder = model, max_len: int = 512) -> ModelFolder | None:
        return open_draft("speculate", folder, model, plan_of(1, 2), max_len)

    assert open_one(byte_model).config == BYTES
    config = json.loads((byte_model / "config.json").read_text())
    del config["tokenizer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_one(tmp_path) == ModelFolder(tmp_path, replace(BYTES, tokenizer=None), None)
    words = {f"<0x{byte:02X}>": byte ^ (byte > 253) for byte in range(256)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<0x00>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="another vocabulary than the model: token '<0xFE>' has id 255, not 254: give"):
        open_one(tmp_path)
    assert open_one(tmp_path, ModelFolder.open(tmp_path))
    with pytest.raises(ValueError, match="has 512 positions, and a request may have 513: allow only shorter ones"):
        open_one(byte_model, max_len=513)
    with pytest.raises(ValueError, match=r"the draft model: .* choose one of these meshes"):
        open_draft("speculate", byte_model, model, plan_of(3, 2), 512)
    with pytest.raises(ValueError, match="model folder 'some/where/else' does not exist"):
        open_one(Path("some/where/else"))


def test_invalid_ways_to_draft_are_rejected(models):
    model = models(1, 4)
    for options, error, message in (
        ({"speculate": "medusa"}, ValueError, "speculate is 'medusa': give 'ngram', or a draft model"),
        ({"speculate": "ngram", "draft_tokens": 0}, ValueError, "draft_tokens is 0: give at least 1"),
        ({"speculate": "ngram", "draft_tokens": 8}, ValueError, "draft_tokens is 8: give at most 7"),
        ({"draft_tokens": 3}, ValueError, "nothing is drafted without speculate: give both, or neither"),
        ({"speculate": draft_of(model, vocab=64)}, ValueError, "a vocabulary of 64 tokens, and the model one of 61"),
        ({"speculate": draft_of(model, max_positions=64)}, ValueError, "has 64 positions, and a request may have 96"),
        ({"speculate": models(2, 4)}, ValueError, "the draft model: the model's weights are on another mesh"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            make_engine(model, **options)
    for options, message in (((3, None), "speculate is 3: give 'ngram'"), (("ngram", 1.5), "give a whole number")):
        with pytest.raises(TypeError, match=message):
            check_speculation(*options)
    windowed = shard(tiny_model(replace(TINY, window=6, windowed_layers=(0, 1))), plan_of(1, 4))
    with pytest.raises(ValueError, match="keeps only the last 6 positions, and the draft model sees more: give"):
        make_engine(windowed, speculate=model)
