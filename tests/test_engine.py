"""The engine on devices: the output of a request does not depend on other requests, on preemptions or on transfers."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax import (
    Engine,
    FinishedEvent,
    Plan,
    SamplingParams,
    TokenEvent,
    generate,
    load,
    shard,
    transfer,
)
from helix_jax.cache import ring_pages
from helix_jax.decoding import decode, decode_steps
from helix_jax.engine import engine as engine_module
from helix_jax.engine import runner, sampling_params
from helix_jax.sampling import apply_repetition_penalty
from helix_jax.text import ByteTokenizer
from tests.conftest import GOLDEN
from tests.reference import TIE, TINY, gaps_of, naive_logits, plan_of, sharded_tiny_models, tiny_model

BLOCK = 4
# One shape for most tests, so that each program is compiled once per mesh and placement. The pages are few enough that
# random requests are preempted.
SHAPE = {"rows": 4, "page": 4, "pages": 12, "max_len": 160, "chunk": 32}
PADDED = 160  # one program for the reference, too
# Another mesh, placement and page size, to transfer requests to and from.
OTHER = {"tp": 1, "cp": 2, "page": 2, "pages": 200}
TEN = SamplingParams(max_new_tokens=10)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def make_engine(model):
    """Return a function that creates engines. It shards the weights once per mesh."""
    models = sharded_tiny_models()

    def make(tp=2, cp=4, dp=1, placement="helix", **options) -> Engine:
        model = models(tp, cp, dp)
        return Engine(model, Plan(model.embed_VD[...].sharding.mesh, BLOCK, placement), **(SHAPE | options))

    return make


def random_prompts(seed: int, count: int, longest: int, vocab: int = TINY.vocab) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab, n).tolist() for n in random.integers(1, longest, count)]


def short_prompts(seed: int, count: int) -> list[list[int]]:
    """Prompts of 8 tokens, which one prefill program serves."""
    return np.random.default_rng(seed).integers(0, TINY.vocab, (count, 8)).tolist()


def finished_outputs(events) -> list:
    return [event.result for event in events if isinstance(event, FinishedEvent)]


def check_pages(engine: Engine) -> None:
    """Check that no page is lost, that each row has the pages that it needs, and that the ranks differ by the skew."""
    allocators, layout = engine.scheduler.allocators, engine.plan.layout
    for allocator in allocators:
        free_R = np.array([len(free) for free in allocator._free_pages])
        assert (free_R + allocator.pages_in_use + allocator.pages_cached == allocator.pages).all()
    for request in engine.scheduler.running:
        pages_R = np.array([len(pages) for pages in engine.scheduler.row_pages[request.id].pages])
        assert (pages_R >= allocator.count_pages(request.num_computed, len(request.prompt))).all()
        ahead = -(-layout.block // allocator.page)
        assert pages_R.max() - pages_R.min() <= -(-layout.max_skew // allocator.page) + ahead


def run_random_requests(engine: Engine, requests: int, longest: int, most: int, cancelled: int, seed: int = 0):
    """Submit random requests over time, and cancel some of them.

    Returns:
        The prompts and outputs of the others, by number.
    """
    random = np.random.default_rng(seed)
    prompts = random_prompts(seed, requests, longest, engine.config.vocab)
    prompts = [prompt[: max(1, int(len(prompt) * random.random() ** 3))] for prompt in prompts]  # most are short
    for prompt in prompts[::4]:  # and some start like another
        prompt[:] = (prompts[int(random.integers(0, 4))][: longest // 2] + prompt)[:longest]
    to_cancel = set(random.choice(requests, cancelled, replace=False).tolist())
    outputs, index = {}, 0
    while engine.busy or index < requests:
        for _ in range(random.integers(0, 3)):
            if index < requests:
                engine.submit(prompts[index], SamplingParams(max_new_tokens=int(random.integers(1, most))), str(index))
                index += 1
        cancellable = [id for id in engine.requests if int(id) in to_cancel]
        if cancellable and random.random() < 0.1:
            engine.cancel(cancellable[0])
        for output in finished_outputs(engine.step()):
            outputs[output.id] = output
        check_pages(engine)
    assert set(engine.stats().pages_in_use) == {0}
    assert len(outputs) == requests
    return {int(id): (prompts[int(id)], o) for id, o in outputs.items() if o.finish_reason != "cancelled"}


def check_greedy(model, results) -> None:
    """Check that each token is the most probable one by a model without a cache, or that the two best are a tie."""
    ties = 0
    for prompt, output in results.values():
        length = len(prompt) + len(output.tokens)
        padded_to = PADDED if length <= PADDED else 1 << (length - 1).bit_length()
        gaps = gaps_of(model, prompt, output.tokens, padded_to)
        assert gaps.max() < TIE
        ties += gaps.max() > 0
    assert ties <= max(1, len(results) // 300)


@pytest.mark.parametrize(
    "options",
    [
        {"placement": "helix", "steps_per_call": 4},
        {"placement": "striped"},
        {"placement": "striped", "dp": 2, "cp": 2, "pages": 20},
        *(pytest.param({"placement": "helix", "steps_per_call": k}, marks=pytest.mark.slow) for k in (1, 32)),
        *(pytest.param({"placement": "striped", "steps_per_call": k}, marks=pytest.mark.slow) for k in (1, 4)),
        pytest.param({"placement": "helix", "steps_per_call": 5, "fixed": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_outputs_do_not_change_when_pages_run_out(model, make_engine, options, monkeypatch):
    """Also if a decode call takes all of its steps, as on several GPUs."""
    options = dict(options)
    if options.pop("fixed", False):
        monkeypatch.setattr(sys.modules["helix_jax.decoding"], "_has_fixed_length", lambda plan: True)
    engine = make_engine(**options)
    results = run_random_requests(engine, requests=24, longest=110, most=50, cancelled=4, seed=4)
    assert engine.stats().preemptions >= 2
    check_greedy(model, results)
    assert [output.finish_reason for _, output in results.values()] == ["length"] * len(results)


def test_an_engine_of_one_row_on_several_gpus_has_one_program_that_decodes(model, make_engine, monkeypatch):
    """It decodes the last token of a request, too, which here is the only one of its call."""
    max_steps = []

    def record(*arguments: Any) -> Any:
        max_steps.append(arguments[5])
        return decode(*arguments)

    monkeypatch.setattr(sys.modules["helix_jax.decoding"], "_has_fixed_length", lambda plan: True)
    monkeypatch.setattr(runner, "decode_program", lambda plan: record)
    engine, prompt = make_engine(rows=1, steps_per_call=4), [1, 2, 3]
    [output] = engine.generate([prompt], SamplingParams(max_new_tokens=1 + 4 + 1))
    assert max_steps == [4, 4]
    assert len(output.tokens) == 6
    check_greedy(model, {0: (prompt, output)})
    assert decode_steps(engine.plan, 4, rows=2, drafts=False) == (1, 4)


@pytest.mark.parametrize(
    ("family", "tp", "cp", "steps", "requests"),
    [
        ("deepseek_v3", 1, 4, 32, 10),
        pytest.param("gpt_oss", 2, 2, 4, 40, marks=pytest.mark.slow),
        pytest.param("gpt_oss", 2, 2, 1, 10, marks=pytest.mark.slow),
        pytest.param("gemma3_text", 1, 4, 32, 40, marks=pytest.mark.slow),
    ],
)
def test_outputs_of_other_families_do_not_change_when_pages_run_out(
    family: str, tp: int, cp: int, steps: int, requests: int
):
    """Layers with windows reuse their pages. The prefixes of such models are not shared."""
    plan = plan_of(tp, cp, block=BLOCK, placement="striped")
    options = {"rows": 3, "pages": 5 * 4 // cp, "page": 4, "max_len": 100, "chunk": 3, "budget": 16}
    options["steps_per_call"] = steps
    engine = Engine(load(GOLDEN / family, plan, jnp.float32), plan, **options)
    results = run_random_requests(engine, requests, longest=60, most=30, cancelled=requests // 5)
    assert engine.stats().preemptions >= 1
    if engine.config.windowed_layers:
        assert engine.stats().prefix_caching.startswith("off: layers with a window reuse their pages")
    else:
        assert engine.stats().shared_tokens >= 16
    check_greedy(load(GOLDEN / family, plan_of(), jnp.float32), results)


@pytest.mark.parametrize(
    ("family", "tp", "cp", "options"),
    [
        ("llama", 2, 4, {"placement": "helix", "steps_per_call": 4}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("deepseek_v3", 1, 4, {"placement": "striped", "steps_per_call": 32}),
                ("gpt_oss", 2, 2, {"placement": "helix"}),
            )
        ),
    ],
)
def test_outputs_with_an_fp8_cache_depend_on_nothing_else(family: str, tp: int, cp: int, options: dict):
    """Neither on the mesh, the placement, the pages and chunks, nor on preemption and the steps per call."""
    alone = plan_of(cache_dtype="fp8")
    plan = plan_of(tp, cp, block=BLOCK, placement=options.pop("placement"), cache_dtype="fp8")
    options |= {"rows": 6, "pages": 6 * 4 // cp, "page": 4, "max_len": 100, "chunk": 3, "budget": 24}
    engine = Engine(load(GOLDEN / family, plan, jnp.float32), plan, **options)
    assert all(cache.spec.quantised for cache in engine.runner.state.caches)
    results = run_random_requests(engine, requests=16, longest=60, most=30, cancelled=2)
    assert engine.stats().preemptions >= 1
    prompts, outputs = zip(*results.values(), strict=True)
    params = [SamplingParams(max_new_tokens=len(output.tokens)) for output in outputs]
    model = load(GOLDEN / family, alone, jnp.float32)
    assert generate(model, prompts, alone, params, chunk=32) == [list(output.tokens) for output in outputs]


@pytest.mark.slow
def test_a_request_with_an_fp8_cache_can_be_transferred():
    """Its scales move with it. An engine with another type of cache is refused."""
    plans = plan_of(1, 4, block=BLOCK, cache_dtype="fp8"), plan_of(2, 2, placement="striped", cache_dtype="fp8")
    source, target = (
        Engine(shard(tiny_model(), plan), plan, rows=2, page=page, max_len=200, chunk=16, steps_per_call=4)
        for plan, page in zip(plans, (4, 8), strict=True)
    )
    prompt, params = [1, 2, 3, 4] * 12, SamplingParams(max_new_tokens=40)
    id = source.submit(prompt, params)
    events = [event for _ in range(5) for event in source.step()]
    unquantised = plan_of(1, 2)
    other = Engine(shard(tiny_model(), unquantised), unquantised, **SHAPE)
    with pytest.raises(ValueError, match="different models or types of cache: create both from the same config, dtype"):
        transfer(id, source, other)
    transfer(id, source, target)
    tokens = [event.token for event in [*events, *source.events(), *target.events()] if isinstance(event, TokenEvent)]
    alone = plan_of(cache_dtype="fp8")
    assert [tokens] == generate(shard(tiny_model(), alone), [prompt], alone, params, chunk=32)


WINDOW = 6


@pytest.mark.parametrize(
    ("placement", "windowed_layers", "steps"),
    [
        ("helix", (0,), 200),
        ("striped", (0, 1), 200),
        *(
            pytest.param(*case, 600, marks=pytest.mark.slow)
            for case in (("last_rank", (1,)), ("helix", (0, 1)), ("helix", (0,)), ("striped", (0, 1)))
        ),
    ],
)
def test_layers_with_windows_reuse_their_pages(placement: str, windowed_layers: tuple[int, ...], steps: int):
    """Over many steps, in a model with other layers too, where requests are preempted, and in one without."""
    config = replace(TINY, layers=2, max_positions=1024, window=WINDOW, windowed_layers=windowed_layers)
    plan, alone = plan_of(1, 4, block=BLOCK, placement=placement), plan_of()
    only_windows = len(windowed_layers) == config.layers
    pages = steps // 3 if placement == "last_rank" else steps // 10  # enough for one of the two rows
    options = {"rows": 2, "page": 4, "max_len": 700, "chunk": 5, "pages": None if only_windows else pages}
    engine = Engine(shard(tiny_model(config), plan), plan, **options)
    ring = ring_pages(plan.layout, WINDOW, 5, 4)
    assert ring <= 4
    assert engine.runner.pages_per_row[-1] == ring
    assert engine.runner.state.caches[-1].pages == 4 * engine.rows * ring
    prompts = random_prompts(5, 2, 40)
    params = SamplingParams(max_new_tokens=steps)
    engine.submit_all(prompts, params)
    outputs = {}
    while engine.busy:
        for output in finished_outputs(engine.step()):
            outputs[output.id] = list(output.tokens)
        if only_windows:
            assert max(engine.stats().pages_in_use) <= engine.rows * ring
    assert (engine.stats().preemptions > 0) != only_windows
    model = shard(tiny_model(config), alone)
    assert list(outputs.values()) == generate(model, prompts, alone, params, page=64, chunk=32)


@pytest.mark.slow
def test_a_request_of_a_model_with_windows_can_be_transferred():
    """To another mesh, placement and page size, in the middle of its prompt and of its output."""
    config = replace(TINY, layers=2, max_positions=1024, window=WINDOW, windowed_layers=(1,))
    plans = plan_of(1, 4, block=BLOCK), plan_of(2, 2, block=2, placement="striped")
    source, target = (
        Engine(shard(tiny_model(config), plan), plan, rows=2, page=page, max_len=200, chunk=chunk, steps_per_call=4)
        for plan, page, chunk in zip(plans, (4, 8), (5, 3), strict=True)
    )
    prompts, params = [[1, 2, 3, 4] * 3, [5, 6, 7] * 25], SamplingParams(max_new_tokens=40)
    ids = source.submit_all(prompts, params)
    tokens = {id: [] for id in ids}
    events = [event for _ in range(6) for event in source.step()]
    for id in ids:
        transfer(id, source, target)
    events += [*source.events(), *target.events()]
    for event in events:
        if isinstance(event, TokenEvent):
            tokens[event.id].append(event.token)
    alone = plan_of()
    assert list(tokens.values()) == generate(shard(tiny_model(config), alone), prompts, alone, params, chunk=32)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("placement", "steps"), [("helix", 1), ("striped", 4), ("helix", 32), ("striped", 32)])
def test_outputs_of_many_long_requests_do_not_change_when_pages_run_out(model, make_engine, placement, steps):
    engine = make_engine(placement=placement, steps_per_call=steps, page=16, pages=38, max_len=2400, chunk=256, rows=8)
    results = run_random_requests(engine, requests=300, longest=2000, most=400, cancelled=30)
    assert engine.stats().preemptions >= 50
    check_greedy(model, results)


@pytest.fixture
def count_programs(caplog) -> Iterator[Callable[[], Counter]]:
    """Return a function that counts the large programs that were compiled since its last call, in any thread."""
    names = ("admit", "edit_page_table", "prefill", "choose_first", "decode")

    def count() -> Counter:
        compiled = re.findall(r"Finished XLA compilation of jit\(_?(\w+)\)", caplog.text)
        caplog.clear()
        return Counter(name for name in compiled if name in names)

    jax.config.update("jax_log_compiles", True)
    try:
        yield count
    finally:
        jax.config.update("jax_log_compiles", False)


def test_warm_up_compiles_every_program_of_a_shape_once(count_programs):
    """Without sampling: two prefill programs (one chunk of 4, or two of 2) and one for decoding."""
    plan = plan_of(1, 2, block=BLOCK, placement="striped")
    model = shard(tiny_model(replace(TINY, layers=1)), plan)
    engine = Engine(model, plan, rows=3, page=4, max_len=64, chunk=4)
    engine.warm_up(sampling=False)
    assert count_programs() == {"admit": 1, "edit_page_table": 1, "prefill": 2, "decode": 1}
    run_random_requests(engine, requests=6, longest=30, most=10, cancelled=1)
    assert not count_programs()
    engine.warm_up()
    assert count_programs() == {"choose_first": 2, "decode": 1}
    params = [SamplingParams(max_new_tokens=4 + i, temperature=i % 2, logprobs=3 * (i % 3) or None) for i in range(6)]
    engine.generate(random_prompts(1, 6, 20), params)
    assert not count_programs()


def test_a_draw_depends_on_the_seed_and_not_on_the_batch(model, make_engine):
    """All settings at once, alone and in a batch, where greedy rows run in the sampling program. `generate` agrees."""
    prompts = short_prompts(3, 6)
    params = [
        SamplingParams(max_new_tokens=12, temperature=1.0, seed=7),
        SamplingParams(max_new_tokens=9, temperature=2.0, top_k=9, seed=8),
        SamplingParams(max_new_tokens=7, temperature=1.5, top_p=0.8, min_p=0.05, seed=9),
        SamplingParams(max_new_tokens=12, repetition_penalty=1.3),
        SamplingParams(max_new_tokens=12, logprobs=3),
        SamplingParams(max_new_tokens=20),
    ]
    engine = make_engine()
    together = engine.generate(prompts, params)
    alone = [engine.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert [output.tokens for output in together] == [output.tokens for output in alone]
    assert [output.seed for output in together] == [7, 8, 9, None, None, None]
    plan = plan_of()
    unsharded = shard(tiny_model(), plan)
    shorter = [replace(own, max_new_tokens=7) for own in params[:2]]
    tokens = generate(unsharded, prompts[:2], plan, shorter, chunk=32)
    assert tokens == [list(output.tokens)[:7] for output in alone[:2]]
    check_penalised(model, prompts[3], together[3].tokens, 1.3)
    check_greedy(model, {row: (prompts[row], together[row]) for row in (4, 5)})


def check_penalised(model, prompt: list[int], tokens: tuple[int, ...], penalty: float) -> None:
    """Check greedy tokens with a repetition penalty, which must make a difference."""
    logits_TV = naive_logits(model, [[*prompt, *tokens]], PADDED)[0, len(prompt) - 1 :]
    greedy = []
    for index, token in enumerate(tokens):
        logits_V = logits_TV[index].copy()
        greedy.append(int(logits_V.argmax()))
        seen = list({*prompt, *tokens[:index]})
        logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty)
        assert logits_V.max() - logits_V[token] < TIE
    assert tokens != tuple(greedy)


def test_a_request_without_a_seed_draws_one_and_can_be_repeated(make_engine, monkeypatch):
    engine = make_engine()
    [prompt] = short_prompts(10, 1)
    params = SamplingParams(max_new_tokens=8, temperature=2)
    samples = engine.generate([prompt] * 3, params)
    assert len({output.tokens for output in samples}) == 3
    assert len({output.seed for output in samples}) == 3
    assert all(0 <= output.seed < 2**64 for output in samples)
    repeated = engine.generate([prompt] * 3, [replace(params, seed=output.seed) for output in samples])
    assert [(o.tokens, o.seed) for o in repeated] == [(o.tokens, o.seed) for o in samples]
    # Several processes agree on the entropy of an engine, and submit in the same order.
    monkeypatch.setattr(engine_module, "on_first_process", lambda do: 5)
    seeds = []
    for engine in (make_engine(), make_engine()):
        ids = [engine.submit(prompt, params) for _ in range(2)]
        seeds.append([engine.requests[id].params.seed for id in ids])
    assert seeds[0] == seeds[1]
    assert seeds[0][0] != seeds[0][1]


def test_seeds_that_differ_by_2_to_the_32_differ(make_engine):
    [prompt] = short_prompts(11, 1)
    params = [SamplingParams(max_new_tokens=8, temperature=2, seed=7 + i * 2**32) for i in range(3)]
    outputs = make_engine().generate([prompt] * 3, params)
    assert len({output.tokens for output in outputs}) == 3
    assert [output.seed for output in outputs] == [one.seed for one in params]


def test_logprobs_are_those_of_the_logits(model, make_engine):
    [prompt] = short_prompts(4, 1)
    [output] = make_engine().generate([prompt], SamplingParams(max_new_tokens=5, logprobs=4))
    assert len(output.logprobs) == 5
    for (chosen, top), token in zip(output.logprobs, output.tokens, strict=True):
        ids, values = zip(*top, strict=True)
        assert ids[0] == token
        assert chosen == values[0] == max(values)
        assert len(top) == 4
    text = [*prompt, *output.tokens]
    logits = naive_logits(model, [text], PADDED)[0, len(prompt) - 1 : len(text) - 1]
    expected = -np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    np.testing.assert_allclose([chosen for chosen, _ in output.logprobs], expected, atol=1e-5)


def test_a_repeated_token_is_penalised():
    logits_BV = jnp.asarray([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    seen_BV = jnp.asarray([[True, True, False]] * 2)
    penalised_BV = apply_repetition_penalty(logits_BV, seen_BV, jnp.asarray([2.0, 1.0]))
    np.testing.assert_array_equal(penalised_BV, [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0]])


def test_a_stop_token_or_a_stop_string_ends_a_request_and_frees_its_pages(make_engine):
    engine = make_engine(tokenizer=ByteTokenizer())
    [prompt] = short_prompts(5, 1)
    [whole] = engine.generate([prompt], SamplingParams(max_new_tokens=20))
    third = whole.tokens[2]
    index = whole.tokens.index(third)
    [by_id] = engine.generate([prompt], SamplingParams(max_new_tokens=20, stop_token_ids=(third,)))
    assert (by_id.tokens, by_id.finish_reason) == (whole.tokens[: index + 1], "stop")
    [by_text] = engine.generate([prompt], SamplingParams(max_new_tokens=20, stop=(chr(third),)))
    assert (by_text.finish_reason, by_text.text) == ("stop", ByteTokenizer().decode(list(whole.tokens[:index])))
    assert engine.stats().pages_in_use == (0,) * 4


def test_the_end_tokens_of_the_model_end_a_request_unless_they_are_ignored(make_engine):
    engine = make_engine()
    engine.config = replace(engine.config, eos_token_ids=(7, 8))
    options = [{}, {"ignore_eos": True}, {"stop_token_ids": [9]}, {"stop_token_ids": [9], "ignore_eos": True}]
    ids = [engine.submit([1], SamplingParams(**one)) for one in options]
    assert [engine.requests[id].stop_token_ids for id in ids] == [{7, 8}, set(), {7, 8, 9}, {9}]


def test_the_end_of_a_request_does_not_depend_on_the_steps_per_call(make_engine):
    """Stop tokens, stop strings and limits, at every offset within a call."""
    [prompt] = short_prompts(5, 1)
    outputs = []
    for steps in (1, 4, 32):
        engine = make_engine(tokenizer=ByteTokenizer(), steps_per_call=steps)
        [whole] = engine.generate([prompt], SamplingParams(max_new_tokens=12))
        params = [SamplingParams(max_new_tokens=limit) for limit in range(1, 12)]
        params += [SamplingParams(max_new_tokens=12, stop_token_ids=[token]) for token in whole.tokens]
        params += [SamplingParams(max_new_tokens=12, stop=[chr(token)]) for token in whole.tokens]
        results = engine.generate([prompt] * len(params), params)
        outputs.append([(o.tokens, o.text, o.finish_reason) for o in (whole, *results)])
        assert engine.stats().pages_in_use == (0,) * 4
    assert outputs[0] == outputs[1] == outputs[2]
    assert {reason for _, _, reason in outputs[0]} == {"length", "stop"}


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_a_cancelled_request_has_the_first_tokens_of_its_output(make_engine, steps):
    engine = make_engine(steps_per_call=steps)
    prompt, other = short_prompts(14, 2)
    whole, kept = engine.generate([prompt, other], SamplingParams(max_new_tokens=40))
    for calls in range(1, 5):
        id, kept_id = engine.submit_all([prompt, other], SamplingParams(max_new_tokens=40))
        events = [event for _ in range(calls) for event in engine.step()]
        if id in engine.requests:
            engine.cancel(id)
        outputs = {output.id: output for output in finished_outputs([*events, *engine.events()])}
        assert outputs[id].tokens == whole.tokens[: len(outputs[id].tokens)]
        assert outputs[kept_id].tokens == kept.tokens


def test_invalid_unicode_is_rejected(make_engine):
    with pytest.raises(ValueError, match=r"'\\ud800', half of a character: give valid Unicode"):
        make_engine(tokenizer=ByteTokenizer()).submit("a\ud800b")


def test_events_contain_the_text_piece_by_piece(make_engine):
    engine = make_engine(tokenizer=ByteTokenizer())
    id = engine.submit("0123 567", SamplingParams(max_new_tokens=15))
    events = list(engine.events())
    pieces = [event.text for event in events if isinstance(event, TokenEvent)]
    assert events[-1] == FinishedEvent(id, events[-1].result)
    assert "".join(pieces) == events[-1].result.text
    assert len(pieces) == 15


def test_a_shared_prefix_is_prefilled_once(model, make_engine):
    """Prefix blocks have 16 tokens (a block of 4 on each of 4 ranks). What is not shared is computed."""
    first = (random_prompts(6, 1, 90)[0] * 9)[:100]
    second = [*first[:90], 1, 2, 3]
    engine = make_engine(placement="striped")
    assert engine.prefix_caching_status == "on"
    outputs = [engine.generate([prompt], TEN)[0] for prompt in (first, second, first)]
    assert [output.shared_tokens for output in outputs] == [0, 80, 96]
    assert engine.stats().prefilled_tokens == 100 + 13 + 4
    assert outputs[0].tokens == outputs[2].tokens
    check_greedy(model, dict(enumerate(zip((first, second), outputs, strict=False))))
    at_once = make_engine(placement="striped", budget=512).generate([first, second, first], TEN)
    assert [(o.shared_tokens, o.tokens) for o in at_once] == [(o.shared_tokens, o.tokens) for o in outputs]
    without = make_engine(placement="striped", prefix_caching=False)
    separate = without.generate([first, second], TEN)
    assert [(o.shared_tokens, o.tokens) for o in separate] == [(0, o.tokens) for o in outputs[:2]]
    assert without.prefix_caching_status == "off: prefix_caching is False"
    assert "choose striped" in make_engine().prefix_caching_status


def test_a_long_prompt_does_not_delay_other_requests(make_engine):
    """While its 4 chunks are prefilled, the other request gets a token in every step."""
    engine = make_engine(steps_per_call=4)
    engine.submit([1, 2, 3], SamplingParams(max_new_tokens=60), "short")
    for _ in range(3):
        engine.step()
    engine.submit(list(range(60)) * 2 + [1, 2], SamplingParams(max_new_tokens=2), "long")
    steps = [[event.id for event in engine.step() if isinstance(event, TokenEvent)] for _ in range(8)]
    assert all("short" in ids for ids in steps)
    assert ["long" in ids for ids in steps].index(True) >= 4


SLOW_TRANSFERS = [
    ({"tp": 2, "cp": 1}, {"tp": 1, "cp": 4, "page": 8}),
    ({"tp": 2, "cp": 1, "placement": "striped"}, {"tp": 1, "cp": 4, "placement": "striped"}),
    ({"tp": 1, "cp": 4}, {"tp": 1, "cp": 2, "page": 2}),
]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({"placement": "striped"}, OTHER),
        (OTHER, {}),
        *(pytest.param(*({"pages": 200} | one for one in pair), marks=pytest.mark.slow) for pair in SLOW_TRANSFERS),
    ],
)
def test_a_transferred_request_continues_in_the_other_engine(model, make_engine, source, target):
    """While it decodes, in the middle of its prompt, and before it has a row."""
    source, target = make_engine(**source), make_engine(**target)
    lengths = {"decoding": 8, "other": 8, "prefilling": 120, "waiting": 8, "last": 8}
    prompts = {id: (random_prompts(8, 1, 90)[0] * 60)[-length:] for id, length in lengths.items()}
    for id, prompt in prompts.items():
        source.submit(prompt, TEN, id)
    tokens = {id: [] for id in prompts}

    def collect(events) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                tokens[event.id].append(event.token)

    for _ in range(3):
        collect(source.step())
    assert source.requests["decoding"].num_computed > lengths["decoding"]
    assert 0 < source.requests["prefilling"].num_computed < lengths["prefilling"]
    assert source.requests["waiting"].row is None
    for id in ("decoding", "prefilling", "waiting"):
        transfer(id, source, target)
    assert set(target.requests) == {"decoding", "prefilling", "waiting"}
    for engine in (source, target):
        collect(engine.events())
        assert engine.stats().pages_in_use == (0,) * engine.plan.layout.ranks
    for id, prompt in prompts.items():
        assert len(tokens[id]) == 10
        assert gaps_of(model, prompt, tokens[id], PADDED).max() < TIE


def test_a_request_that_cannot_be_transferred_stays(make_engine):
    source, small = make_engine(), make_engine(**(OTHER | {"pages": 2}))
    [prompt] = short_prompts(13, 1)
    params = SamplingParams(max_new_tokens=8)
    id = source.submit(prompt, params)
    source.step()
    with pytest.raises(ValueError, match="need 4 pages of 2 on one rank, and it has 2"):
        transfer(id, source, small)
    with pytest.raises(ValueError, match="no request 'x' is waiting or running"):
        transfer("x", source, small)
    full = make_engine(**OTHER)
    for row in range(4):
        full.submit(prompt, params, f"row {row}")
    full.step()
    with pytest.raises(ValueError, match="no free row, or too few free pages"):
        transfer(id, source, full)
    full.submit(prompt, params, id)
    with pytest.raises(ValueError, match="has a request 'request-0' already"):
        transfer(id, source, full)
    [output] = finished_outputs(source.events())
    assert [o.tokens for o in finished_outputs(full.events())] == [output.tokens] * 5


@pytest.fixture(scope="module")
def small_engine(make_engine):
    """Return an engine that never runs."""
    return make_engine(pages=9)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], {}, ValueError, "the prompt is empty"),
        ([1, 61], {}, ValueError, "token id 61 is outside the vocabulary of 61"),
        ([1, True], {}, TypeError, "the prompt is not a sequence of token ids"),
        ("words", {}, ValueError, "text needs a tokenizer, and the engine has none"),
        (
            [1] * 150,
            {"max_new_tokens": 11},
            ValueError,
            "150 tokens and 11 new ones exceed the maximum of 160",
        ),
        ([1] * 100, {"max_new_tokens": 50}, ValueError, "need 11 pages of 4 on one rank, and it has 9"),
        ([1], {"temperature": -1}, ValueError, "temperature is -1: give 0"),
        ([1], {"temperature": "hot"}, TypeError, "temperature"),
        ([1], {"top_p": 0}, ValueError, "top_p is 0: give a probability above 0"),
        ([1], {"min_p": 2}, ValueError, "min_p is 2: give a number from 0 to 1"),
        ([1], {"repetition_penalty": 0}, ValueError, "repetition_penalty is 0: give a positive number"),
        ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0: give at least 1"),
        ([1], {"max_new_tokens": 1.5}, TypeError, "max_new_tokens"),
        ([1], {"top_k": -3}, ValueError, "top_k is -3: give 0"),
        ([1], {"seed": 2**64}, ValueError, "seed is 18446744073709551616: give a whole number from 0 to 2^64 - 1"),
        ([1], {"seed": True}, TypeError, "seed"),
        ([1], {"stop": [""]}, ValueError, "stop is ('',): give a list of strings that are not empty"),
        ([1], {"stop": [1]}, TypeError, "stop"),
        ([1], {"stop_token_ids": [True]}, TypeError, "stop_token_ids"),
        ([1], {"ignore_eos": 1}, TypeError, "ignore_eos"),
        ([1], {"logprobs": 21}, ValueError, "logprobs is 21: give 0 to 20"),
        ([1], {"beams": 2}, ValueError, "unknown key 'beams': choose one of"),
    ],
)
def test_an_invalid_request_is_rejected_and_others_continue(small_engine, prompt, params, error, message):
    """With the type checks of the tests, the message of a TypeError is that of beartype, which names the parameter."""
    small_engine.submit([1, 2], SamplingParams(max_new_tokens=3), "good")
    with pytest.raises(error, match=re.escape(message)):
        small_engine.submit(prompt, sampling_params(params))
    with pytest.raises(ValueError, match="a request 'good' has not finished yet"):
        small_engine.submit([1], id="good")
    with pytest.raises(ValueError, match="no request 'bad'"):
        small_engine.cancel("bad")
    assert list(small_engine.requests) == ["good"]
    small_engine.cancel("good")
    assert [event.result.finish_reason for event in small_engine.step()] == ["cancelled"]


def test_none_in_a_mapping_means_the_default():
    names = ("max_new_tokens", "temperature", "seed", "stop", "stop_token_ids", "logprobs")
    assert sampling_params(dict.fromkeys(names)) == SamplingParams()
    assert sampling_params({"stop": "x", "stop_token_ids": [3]}) == SamplingParams(stop=("x",), stop_token_ids=(3,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 0}, ValueError, "rows is 0: give at least 1"),
        ({"rows": 1.5}, TypeError, "rows"),
        ({"pages": 0}, ValueError, "pages is 0"),
        ({"chunk": 0}, ValueError, "chunk is 0"),
        ({"budget": 0}, ValueError, "budget is 0"),
        ({"steps_per_call": 0}, ValueError, "steps_per_call is 0: give at least 1"),
        ({"dp": 2, "cp": 2, "rows": 3}, ValueError, "dp 2 does not divide 3 rows: give a multiple of 2"),
        ({"max_len": 5000}, ValueError, "max_len is 5000: give at most the model's 4096 positions"),
    ],
)
def test_invalid_options_are_rejected(make_engine, options, error, message):
    with pytest.raises(error, match=message):
        make_engine(**options)


def test_misuse_is_an_error_with_a_fix(make_engine):
    engine = make_engine()
    with pytest.raises(TypeError, match="prompts is a string: give a list"):
        engine.generate("0123")
    engine.submit(np.array([1, 2, 3]), SamplingParams(max_new_tokens=4, stop=["x"][:0]), "request-1")
    assert [engine.submit([1]), engine.submit([1])] == ["request-2", "request-3"]
    engine.step()
    with pytest.raises(ValueError, match="3 requests are running: call warm_up before"):
        engine.warm_up()


def test_events_that_were_not_consumed_are_returned_later(make_engine):
    engine = make_engine()
    for _ in range(3):
        engine.submit([1, 2], SamplingParams(max_new_tokens=3))
    ids = []
    while engine.busy:
        for event in engine.events():
            ids.append(event.id)
            break
    assert Counter(ids) == {f"request-{i}": 4 for i in range(3)}


def test_an_interrupted_step_loses_nothing(make_engine, monkeypatch):
    engine = make_engine()
    [prompt] = short_prompts(12, 1)
    expected = engine.generate([prompt], TEN)[0].tokens
    engine.submit(prompt, TEN)
    engine.step()
    engine.step()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "asarray", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.drain()
    assert [output.tokens for output in finished_outputs(engine.events())] == [expected]


def test_a_transferred_request_is_the_newest_in_the_other_engine(make_engine):
    source, target = make_engine(**OTHER), make_engine()
    for _ in range(3):
        id = source.submit([1, 2, 3], TEN)
    target.submit([1, 2], TEN, "there")
    for engine in (source, target):
        engine.step()
    transfer(id, source, target)
    assert target.requests[id].order > target.requests["there"].order
    assert target.submit([1], TEN) != id


def test_invalid_prompts_leave_nothing_behind(make_engine):
    engine = make_engine()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([[1], []])
    with pytest.raises(ValueError, match="there are 1 params for 2 prompts"):
        engine.generate([[1], [2]], [SamplingParams()])
    assert not engine.busy
    other = engine.submit([1, 2], SamplingParams(max_new_tokens=3))
    assert len(engine.generate([[1]], SamplingParams(max_new_tokens=2))[0].tokens) == 2
    assert [event.id for event in engine.events()] == [other] * 4  # three tokens and the end


@pytest.mark.parametrize(
    "options", [{}, {"placement": "striped"}, {"placement": "last_rank", "page": 16, "pages": None}], ids=str
)
def test_every_placement_decodes(model, make_engine, options):
    [prompt] = random_prompts(9, 1, 40)
    prompt = (prompt * 32)[:32]
    [output] = make_engine(**options).generate([prompt], SamplingParams(max_new_tokens=30))
    assert gaps_of(model, prompt, output.tokens, PADDED).max() < TIE
