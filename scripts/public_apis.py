"""Times what users call: an engine's decoding, `generate`, and prefill."""

import time
from statistics import median
from typing import Any

import numpy as np

from helix_jax import generate
from helix_jax.decoding import DEFAULT_STEPS
from helix_jax.engine import Engine, FinishedEvent, SamplingParams
from helix_jax.engine.runner import default_chunk
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan

CALLS = 6  # timed calls of an engine
REPEATS = 3  # of what is timed as a whole


def time_engine(model: Transformer, plan: Plan, rows: int, context: int, **options: Any) -> float:
    """Return the milliseconds per token of an engine whose rows all decode, after prompts of `context` tokens.

    They are the time of some steps, divided by the tokens that one row gets in them.
    """
    engine = make_engine(model, plan, rows, context, **options)
    # While prompts are prefilled, each step decodes one token of the rows whose prompt is complete.
    limit = count_prefill_steps(plan, rows, context) + (CALLS + 3) * engine.steps_per_call
    engine.submit_all(random_prompts(engine, rows, context), SamplingParams(max_new_tokens=limit, ignore_eos=True))
    while engine.stats().prefilled_tokens < rows * context:
        engine.step()
    for _ in range(2):  # these fill the queue
        engine.step()
    start, before = time.perf_counter(), engine.stats().decoded_tokens
    for _ in range(CALLS):
        engine.step()
    seconds, tokens = time.perf_counter() - start, engine.stats().decoded_tokens - before
    return 1e3 * seconds * rows / tokens


def time_generate(model: Transformer, plan: Plan, rows: int, context: int, **options: Any) -> float:
    """Return the milliseconds per token of `generate`: how much longer it takes to generate more tokens."""
    steps = options["steps_per_call"]
    prompts = random_prompts(model, rows, context)
    few = count_prefill_steps(plan, rows, context) + steps  # so that no row ends before all of them decode
    many = few + CALLS * steps
    options |= {"max_len": context + many}

    def run(tokens: int) -> float:
        start = time.perf_counter()
        generate(model, prompts, plan, SamplingParams(max_new_tokens=tokens, ignore_eos=True), **options)
        return time.perf_counter() - start

    run(few)  # compiles
    differences = [run(many) - run(few) for _ in range(REPEATS)]
    return 1e3 * median(differences) / (many - few)


def time_prefill(model: Transformer, plan: Plan, rows: int, context: int, **options: Any) -> float:
    """Return the tokens per second of prefilling `rows` prompts of `context` tokens, up to the first token of each."""
    engine = make_engine(model, plan, rows, context, **options)
    tokens_per_s = []
    for _ in range(1 + REPEATS):  # the first is not counted
        prompts = random_prompts(engine, rows, context)
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(max_new_tokens=1))
        tokens_per_s.append(rows * context / (time.perf_counter() - start))
    return median(tokens_per_s[1:])


def time_to_first_token(model: Transformer, plan: Plan, context: int, **options: Any) -> float:
    """Return the seconds from creating an engine to its first token, compilation included."""
    start = time.perf_counter()
    engine = make_engine(model, plan, 1, context, **options)
    engine.submit_all(random_prompts(engine, 1, context), SamplingParams(max_new_tokens=1, ignore_eos=True))
    assert any(isinstance(event, FinishedEvent) for event in engine.events())
    return time.perf_counter() - start


def make_engine(model: Transformer, plan: Plan, rows: int, context: int, **options: Any) -> Engine:
    """Create an engine for prompts of `context` tokens, and compile its greedy programs."""
    new = count_prefill_steps(plan, rows, context) + (CALLS + 3) * options.get("steps_per_call", DEFAULT_STEPS)
    engine = Engine(model, plan, rows=rows, max_len=context + new, prefix_caching=False, **options)
    engine.warm_up(sampling=False)
    return engine


def count_prefill_steps(plan: Plan, rows: int, context: int) -> int:
    """Return an upper bound on the steps that prefill all prompts."""
    return rows * -(-context // default_chunk(plan.mesh))


def random_prompts(of: Engine | Transformer, rows: int, context: int) -> list[list[int]]:
    """Return prompts of random tokens."""
    return np.random.default_rng().integers(of.config.vocab, size=(rows, context)).tolist()
