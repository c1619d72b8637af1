"""Several samples of a prompt: the prompt is prefilled and stored once, and each sample equals a request of its own."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax import DEMO_MODEL, Engine, FinishedEvent, Plan, SamplingParams, load, shard, transfer
from helix_jax.cli import batch as command
from helix_jax.cli.console import Reporter
from helix_jax.cli.jsonl import RejectedLine, RequestLine, ResultsFile, read_requests
from helix_jax.engine import sampling_params
from helix_jax.engine.output_text import OutputText
from helix_jax.engine.page_allocator import PageAllocator
from helix_jax.engine.requests import Request, sample_ids
from helix_jax.engine.scheduler import Scheduler
from helix_jax.folder import ModelFolder
from helix_jax.layout import PLACEMENTS, BlockLayout
from tests.conftest import GOLDEN
from tests.reference import TINY, plan_of, sharded_tiny_models, tiny_model
from tests.test_scheduler import SchedulerMachine

# The scheduler and the page allocator, without devices


def run_samples(seed: int) -> tuple[int, int]:
    """Run prompts with several samples on few pages, some of which are cancelled. Every token is checked.

    Returns:
        The number of copied pages, and that of tokens that were not prefilled.
    """
    random = np.random.default_rng(seed)
    machine = SchedulerMachine()
    sizes = {"block": [1, 2, 4], "page": [2, 4, 8], "max_steps": [1, 4], "chunk": [1, 3, 9], "pages": [8, 14, 40]}
    options = {name: int(random.choice(values)) for name, values in sizes.items()}
    machine.start(ranks=int(random.integers(1, 4)), placement=str(random.choice(PLACEMENTS)), budget=9, **options)
    copied, run = [], machine.devices.run
    machine.devices.run = lambda step, scheduler: copied.extend(step.page_copies) or run(step, scheduler)
    requests = set()
    for _ in range(6):
        prompt = random.integers(0, 3, random.integers(2, 20)).tolist()
        for index in range(random.integers(1, 6)):
            machine._submit(prompt, index, int(random.integers(2, 12)), {}, 1)
        requests |= set(machine.unfinished.values())
        machine.steps(int(random.integers(1, 12)))
        if machine.unfinished and random.random() < 0.5:
            machine._finish(machine.unfinished[random.choice(sorted(machine.unfinished))])
        machine.every_page_is_free_or_has_the_users_that_are_counted()
    machine.teardown()
    return len(copied), sum(request.shared_tokens for request in requests)


@pytest.mark.parametrize("seeds", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_samples_on_few_pages_are_those_of_separate_requests(seeds: int):
    copied, shared = np.sum([run_samples(seed) for seed in range(seeds)], axis=0)
    assert copied > 5 * seeds
    assert shared > 20 * seeds


def test_the_samples_of_a_prompt_are_in_one_dp_group():
    """They wait for its rows, although others are free."""
    layout = BlockLayout(2, 4)
    allocators = [PageAllocator(layout, pages=20, page=4, share=False) for _ in range(2)]
    scheduler = Scheduler(allocators, rows=6, budget=64, chunk=32, max_steps=4)
    prompts, params = ([1] * 20, [2] * 9), SamplingParams(max_new_tokens=8)
    for index, prompt in enumerate((prompts[0],) * 5 + (prompts[1],)):
        text = OutputText(None, ())
        scheduler.add(Request(str(index), prompt, params, frozenset(), index, text, index=index))
    groups, chunks, decoded = [], [], []
    for _ in range(20):
        step = scheduler.schedule()
        chunks += [(chunk.request.id, chunk.count) for chunk in step.chunks]
        decoded += [max(step.decodes.values(), default=0)]
        groups += [(one.request.id, scheduler.group_of(one.request.assigned_row)) for one in step.admissions]
    assert groups == [("0", 0), ("1", 0), ("2", 0), ("3", 0), ("4", 0), ("5", 1)]
    assert chunks == [("0", 20), ("5", 9)]
    assert max(decoded) == 4  # the free rows of the other group do not make calls shorter
    assert not scheduler.running
    assert [allocator.pages_in_use for allocator in allocators] == [(0, 0)] * 2


# On devices

# As in test_engine.py, so that both use the same compiled programs.
BLOCK = 4
SHAPE = {"rows": 4, "page": 4, "pages": 12, "max_len": 160, "chunk": 32}
SAMPLED = SamplingParams(max_new_tokens=12, temperature=1, seed=5)


@pytest.fixture(scope="module")
def make_engine():
    """Return a function that creates engines. It shards the weights once per mesh."""
    models = sharded_tiny_models()

    def make(tp=2, cp=4, dp=1, placement="helix", **options) -> Engine:
        model = models(tp, cp, dp)
        return Engine(model, Plan(model.embed_VD[...].sharding.mesh, BLOCK, placement), **(SHAPE | options))

    return make


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, TINY.vocab, length).tolist()


def separate_requests(params: SamplingParams) -> list[SamplingParams]:
    """Return the parameters of requests with the outputs of the samples."""
    return [replace(params, n=1, seed=(params.seed + index) % 2**64) for index in range(params.n)]


def solo_outputs(engine: Engine, prompt: list[int], params: SamplingParams) -> list[tuple[int, ...]]:
    """Return the tokens of requests that run one after another."""
    return [engine.generate([prompt], own)[0].tokens for own in separate_requests(params)]


def finished_outputs(events) -> list:
    return [event.result for event in events if isinstance(event, FinishedEvent)]


def pages_of_samples(engine: Engine) -> list[int]:
    """Return how many pages the running samples of one prompt need on each rank, if they share what they can."""
    layout, page, counts = engine.plan.layout, engine.page, []
    requests = engine.scheduler.running
    prompt_len = len(requests[0].prompt)
    for rank in range(layout.ranks):
        shared = layout.filled(prompt_len - 1, prompt_len, rank)
        lengths = [engine.scheduler.row_pages[request.id].length for request in requests]
        filled = [layout.filled(length, prompt_len, rank) for length in lengths]
        private = [-(-own // page) - shared // page for own in filled if own > shared]
        partly_filled = shared % page > 0 and len(private) < len(requests)
        counts.append(shared // page + sum(private) + partly_filled)
    return counts


@pytest.mark.parametrize(
    "options",
    [
        {"pages": 40},
        *(
            pytest.param({"pages": 40} | one, marks=pytest.mark.slow)
            for one in (
                {"placement": "striped"},
                {"placement": "striped", "page": 2},
                {"placement": "striped", "prefix_caching": False},
                {"placement": "last_rank", "page": 8},
            )
        ),
    ],
    ids=str,
)
def test_a_prompt_is_prefilled_and_stored_once(make_engine, options):
    """At each step, the pages in use are those of the prompt and what each sample has written besides."""
    engine, prompt = make_engine(**options), random_prompt(91)
    params = replace(SAMPLED, max_new_tokens=40, n=4)
    assert engine.submit(prompt, params, "a") == "a"
    outputs, steps = [], 0
    while engine.busy:
        outputs += finished_outputs(engine.step())
        if len(engine.scheduler.running) == params.n:
            assert list(engine.stats().pages_in_use) == pages_of_samples(engine)
            steps += 1
    assert steps >= 2
    stats = engine.stats()
    assert (stats.prefilled_tokens, stats.shared_tokens) == (91, 3 * 90)
    assert (stats.preemptions, set(stats.pages_in_use)) == (0, {0})
    outputs.sort(key=lambda output: output.index)
    assert [(o.id, o.index, o.seed, o.shared_tokens) for o in outputs] == [
        (f"a/{index}", index, 5 + index, 90 if index else 0) for index in range(4)
    ]
    assert [output.tokens for output in outputs] == solo_outputs(make_engine(**options), prompt, params)
    assert len({output.tokens for output in outputs}) == 4


def run_random_samples(engine: Engine, seed: int, prompts: int, longest: int, most: int) -> None:
    """Submit prompts with several samples over time, cancel some of these, and compare the others with solo runs."""
    random, vocab = np.random.default_rng(seed), engine.config.vocab
    submitted, outputs, cancelled = {}, {}, set()
    while engine.busy or len(submitted) < prompts:
        if len(submitted) < prompts and random.random() < 0.5:
            prompt = random.integers(0, vocab, random.integers(1, longest)).tolist()
            settings = {"max_new_tokens": int(random.integers(1, most)), "n": int(random.integers(1, 7))}
            params = SamplingParams(**settings, temperature=1, top_k=20, repetition_penalty=1.1, seed=len(submitted))
            id = engine.submit(prompt, params, f"prompt {len(submitted)}")
            submitted[id] = prompt, params
        if engine.requests and random.random() < 0.05:
            cancelled.add(str(random.choice(sorted(engine.requests))))
            engine.cancel(sorted(cancelled & set(engine.requests))[0])
        outputs |= {output.id: output for output in finished_outputs(engine.step())}
    assert set(engine.stats().pages_in_use) == {0}
    assert len(outputs) == sum(params.n for _, params in submitted.values())
    for id, (prompt, params) in submitted.items():
        ids = sample_ids(id, params.n)
        for tokens, own in zip(solo_outputs(engine, prompt, params), ids, strict=True):
            assert outputs[own].tokens == tokens[: len(outputs[own].tokens)]
            assert len(outputs[own].tokens) == len(tokens) or own in cancelled


@pytest.mark.parametrize(
    ("options", "prompts"),
    [
        pytest.param({"steps_per_call": 4}, 6, marks=pytest.mark.slow),
        *(
            pytest.param(options, 20, marks=pytest.mark.slow)
            for options in (
                {"steps_per_call": 1},
                {"placement": "striped", "steps_per_call": 32},
                {"steps_per_call": 16, "speculate": "ngram"},
                {"placement": "striped", "dp": 2, "cp": 2, "pages": 18},
                {"placement": "last_rank", "page": 16, "pages": 7},
            )
        ),
    ],
    ids=str,
)
def test_random_samples_on_few_pages_equal_separate_requests(make_engine, options, prompts):
    engine = make_engine(**options)
    run_random_samples(engine, seed=1, prompts=prompts, longest=90, most=40)
    assert engine.stats().preemptions >= 1
    assert engine.stats().shared_tokens >= 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tp", "cp", "cache_dtype"),
    [
        ("llama", 2, 2, "fp8"),
        ("deepseek_v3", 1, 4, "fp8"),
        ("gpt_oss", 2, 2, None),
        ("gemma3_text", 1, 4, "fp8"),
    ],
)
def test_samples_of_other_families_and_caches_equal_separate_requests(family, tp, cp, cache_dtype):
    """Latents, layers with windows, and pages with scales."""
    plan = plan_of(tp, cp, block=BLOCK, **({"cache_dtype": cache_dtype} if cache_dtype else {}))
    options = {"rows": 4, "pages": 6 * 4 // cp, "page": 4, "max_len": 100, "chunk": 3, "budget": 12}
    engine = Engine(load(GOLDEN / family, plan, jnp.float32), plan, **options)
    run_random_samples(engine, seed=2, prompts=12, longest=50, most=30)
    assert engine.stats().preemptions >= 1
    assert engine.stats().shared_tokens >= 100


@pytest.mark.slow
@pytest.mark.parametrize(("windowed_layers", "chunk"), [((0,), 1), ((0, 1), 5), ((0, 1), 1)])
def test_samples_get_copies_of_windows(windowed_layers: tuple[int, ...], chunk: int):
    """In a model with other layers too, and in one without, over several turns of the rings."""
    config = replace(TINY, layers=2, window=6, windowed_layers=windowed_layers)
    plan = plan_of(1, 4, block=BLOCK)
    engine = Engine(shard(tiny_model(config), plan), plan, rows=4, page=4, max_len=200, chunk=chunk)
    prompt, params = random_prompt(50), replace(SAMPLED, max_new_tokens=100, n=6)
    outputs = engine.generate([prompt], params)
    # When the first four end, no ring has the window before the end of the prompt. The fifth prefills the prompt.
    assert engine.stats().shared_tokens == 4 * 49
    assert [output.tokens for output in outputs] == solo_outputs(engine, prompt, params)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("placement", ["helix", "striped"])
def test_eight_samples_of_a_long_prompt_store_it_once(placement: str):
    """With the demo model, on 8 devices."""
    plan = plan_of(1, 8, block=16, placement=placement)
    engine = Engine(load(DEMO_MODEL, plan, jnp.float32), plan, rows=8, page=16, max_len=2048)
    prompt = list((b"And it came to pass in those days, " * 60)[:1900])
    engine.submit(prompt, replace(SAMPLED, n=8, max_new_tokens=48))
    outputs, most = [], [0]
    while engine.busy:
        outputs += finished_outputs(engine.step())
        if len(engine.scheduler.running) == 8:
            assert list(engine.stats().pages_in_use) == pages_of_samples(engine)
            most = max(most, list(engine.stats().pages_in_use))
    assert engine.stats().prefilled_tokens == 1900
    prompt_pages = engine.scheduler.allocators[0].count_pages(1900, 1900)
    assert prompt_pages.sum() <= sum(most) <= prompt_pages.sum() + 8 * (8 + 48 // 16)
    outputs.sort(key=lambda output: output.index)
    assert [o.tokens for o in outputs] == solo_outputs(engine, prompt, replace(SAMPLED, n=8, max_new_tokens=48))


def test_samples_that_find_no_row_wait_and_one_may_be_cancelled(make_engine):
    """A cancelled sample changes no other, whether it waits, prefills or decodes."""
    engine, prompt, params = make_engine(), random_prompt(40), replace(SAMPLED, n=7)
    expected = solo_outputs(engine, prompt, params)
    for cancelled, steps in ((0, 0), (0, 1), (6, 1), (0, 4), (2, 4)):
        engine.submit(prompt, params, "a")
        events = [event for _ in range(steps) for event in engine.step()]
        engine.cancel(f"a/{cancelled}")
        outputs = {output.index: output for output in finished_outputs([*events, *engine.events()])}
        assert outputs[cancelled].finish_reason == "cancelled"
        assert [outputs[i].tokens for i in range(7) if i != cancelled] == [
            *expected[:cancelled],
            *expected[cancelled + 1 :],
        ]
    assert engine.stats().pages_in_use == (0,) * 4


@pytest.mark.slow
def test_samples_that_never_run_together_prefill_the_prompt_again(make_engine):
    engine, prompt, params = make_engine(rows=1), random_prompt(40), replace(SAMPLED, n=3)
    outputs = engine.generate([prompt], params)
    assert engine.stats().prefilled_tokens == 3 * 40
    assert [output.tokens for output in outputs] == solo_outputs(engine, prompt, params)


def test_all_samples_can_be_cancelled_by_the_id_that_was_submitted(make_engine):
    engine = make_engine()
    engine.submit_all([random_prompt(9)] * 2, [replace(SAMPLED, n=3), SAMPLED], ["a", "b"])
    for id in ("a", "a/1", "b"):
        with pytest.raises(ValueError, match=f"a request '{id}' has not finished yet: give another id"):
            engine.submit([1], id=id)
    with pytest.raises(ValueError, match="a request 'b' has not finished yet"):
        engine.submit([1], replace(SAMPLED, n=2), id="b")
    with pytest.raises(ValueError, match="request 'a' has 3 samples: give the id of one, such as 'a/0', 'a/1'"):
        transfer("a", engine, engine)
    engine.step()
    engine.cancel("a/1")
    engine.cancel("a")
    with pytest.raises(ValueError, match="no request 'a' is waiting or running"):
        engine.cancel("a")
    outputs = finished_outputs(engine.events())
    assert [(o.id, o.finish_reason) for o in outputs] == [
        *((f"a/{i}", "cancelled") for i in (1, 0, 2)),
        ("b", "length"),
    ]
    assert engine.submit([1], SAMPLED, "a") == "a"


def test_outputs_are_in_the_order_of_prompts_and_samples(make_engine):
    """A prompt of one token, seeds that wrap around, and a seed that is drawn."""
    engine = make_engine()
    params = [replace(SAMPLED, n=3, seed=2**64 - 2), replace(SAMPLED, seed=None, n=2), SamplingParams(max_new_tokens=3)]
    outputs = engine.generate([[1], random_prompt(10), [2]], params)
    assert [output.index for output in outputs] == [0, 1, 2, 0, 1, 0]
    assert [output.seed for output in outputs[:3]] == [2**64 - 2, 2**64 - 1, 0]
    assert (outputs[3].seed + 1) % 2**64 == outputs[4].seed
    assert [o.tokens for o in outputs[:3]] == solo_outputs(engine, [1], params[0])
    assert [o.tokens for o in outputs[3:5]] == solo_outputs(
        engine, random_prompt(10), replace(params[1], seed=outputs[3].seed)
    )
    assert "/" not in outputs[5].id


def test_the_first_sample_reports_log_probabilities_of_the_prompt(make_engine):
    engine, prompt = make_engine(), random_prompt(20)
    params = replace(SAMPLED, n=3, prompt_logprobs=2, prompt_logprobs_start=5, logprobs=1)
    first, *others = engine.generate([prompt], params)
    assert len(first.prompt_logprobs) == 15
    assert [output.prompt_logprobs for output in others] == [None, None]
    assert [len(output.logprobs) for output in (first, *others)] == [12] * 3
    alone = engine.generate([prompt] * 3, separate_requests(params))
    np.testing.assert_allclose(first.prompt_logprobs.logprobs_S, alone[0].prompt_logprobs.logprobs_S, atol=1e-5)
    assert [output.tokens for output in (first, *others)] == [output.tokens for output in alone]
    assert engine.stats().prefilled_tokens == 4 * 20


def test_one_sample_can_be_transferred(make_engine):
    source, target, prompt = (
        make_engine(steps_per_call=4),
        make_engine(tp=1, cp=2, page=2, pages=200),
        random_prompt(30),
    )
    expected = solo_outputs(source, prompt, replace(SAMPLED, n=3))
    source.submit(prompt, replace(SAMPLED, n=3), "a")
    for _ in range(3):
        source.step()
    transfer("a/1", source, target)
    outputs = finished_outputs([*source.events(), *target.events()])
    assert [o.tokens for o in sorted(outputs, key=lambda output: output.index)] == expected


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"n": 0}, ValueError, "n is 0: give at least 1"),
        ({"n": 20000}, ValueError, "n is 20000: give at most 16384"),
        ({"n": 3}, ValueError, "n is 3 with temperature 0, so that all samples are equal: give a temperature too"),
        (
            {"n": 2, "temperature": 1, "max_new_tokens": 0, "prompt_logprobs": 1},
            ValueError,
            "n is 2 with max_new_tokens 0",
        ),
        ({"n": True}, TypeError, "n is True: give a whole number"),
        ({"n": 2.0}, TypeError, "n"),  # of beartype, in the tests
        ({"n": "2"}, TypeError, "n"),
    ],
)
def test_an_invalid_number_of_samples_is_rejected(params, error, message):
    with pytest.raises(error, match=message):
        sampling_params(params)


# `helix-jax batch`


def line_of(**fields) -> bytes:
    return json.dumps({"id": "a", "prompt": "And", "n": 3, "temperature": 1} | fields).encode()


def test_samples_with_a_result_are_skipped():
    params = SamplingParams(n=3, temperature=1)
    for done, missing in [((), ()), (("a/1",), (1,)), (("b", "b/0"), ())]:
        assert list(read_requests([line_of()], set(done))) == [RequestLine(1, "a", "And", params, missing)]
    for done in (("a/0", "a/1", "a/2"), ("a",)):
        assert list(read_requests([line_of()], set(done))) == []
    _, same = read_requests([line_of(), line_of(id="a/2", n=1)], ())
    assert same == RejectedLine(2, "a/2", "id 'a/2' is used in line 1 already: give every line its own id")
    _, sample = read_requests([line_of(id="a/2", n=1), line_of()], ())
    assert "id 'a/2' is used in line 1 already" in sample.error
    [greedy] = read_requests([line_of(temperature=0)], ())
    assert greedy.error == "n is 3 with temperature 0, so that all samples are equal: give a temperature too"


def test_a_batch_has_a_line_for_each_sample_and_continues_with_those_that_are_missing(make_engine, tmp_path: Path):
    def answer(*lines: bytes) -> list[dict]:
        engine = make_engine()
        with ResultsFile(out) as results:
            requests, folder = read_requests(lines, results.done), ModelFolder(tmp_path, engine.config, None)
            command._answer_all(engine, folder, requests, results, 2, Reporter())
        return [json.loads(line) for line in out.read_text().splitlines()]

    out, settings = tmp_path / "out.jsonl", {"prompt": None, "prompt_ids": random_prompt(8), "max_new_tokens": 6}
    lines = line_of(**settings, seed=4), line_of(**settings, id=7, n=1, seed=5)
    complete = {(entry["id"], entry.get("index")): entry["tokens"] for entry in answer(*lines)}
    assert set(complete) == {("a", 0), ("a", 1), ("a", 2), (7, None)}
    assert complete["a", 1] == complete[7, None]
    entries = out.read_text().splitlines(keepends=True)
    out.write_text("".join(line for line in entries if '"index": 1' not in line))
    again = answer(*lines)
    assert len(again) == 4
    assert (again[-1]["id"], again[-1]["index"], again[-1]["seed"]) == ("a", 1, 5)
    assert {(entry["id"], entry.get("index")): entry["tokens"] for entry in again} == complete
