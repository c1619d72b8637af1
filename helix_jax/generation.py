"""Generates from a list of prompts, with an engine that is as large as they need."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from helix_jax.engine import Engine, Event, SamplingParams
from helix_jax.engine.params import check_no_sampling, params_of_each
from helix_jax.engine.requests import check_prompt
from helix_jax.engine.runner import default_chunk
from helix_jax.mesh import DP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.validation import check_type

# How all prompts continue, or each of them.
Params = SamplingParams | Sequence[SamplingParams] | None


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int] | np.ndarray],
    plan: Plan,
    params: Params = None,
    **options: Any,
) -> list[list[int]]:
    """Return the new tokens of each prompt, or with several samples (`params.n`) those of each sample, in order.

    Args:
        model: A model of `load` or `shard`.
        prompts: The token ids of each prompt.
        plan: How the mesh decodes: the plan that the model was loaded with.
        params: How the prompts continue: one for all, or one each. None: `SamplingParams()`.
        **options: Arguments of `Engine`, such as `page` and `chunk`. By default all prompts decode together.

    Raises:
        TypeError: A prompt is not a sequence of token ids, or an argument has the wrong type.
        ValueError: There are no prompts, a prompt is empty or too long for the model, a token id is not in the
            vocabulary, or the engine refuses an option.
    """
    engine = make_engine(model, prompts, plan, params, **options)
    return [list(output.tokens) for output in engine.generate(prompts, params)]


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int] | np.ndarray],
    plan: Plan,
    params: Params = None,
    **options: Any,
) -> Iterator[Event]:
    """Return the events of `generate`, as they happen.

    By default one token per prompt is decoded at a time. `steps_per_call` above 1 is faster, and returns the tokens of
    a call together.

    Returns:
        A `TokenEvent` per token and a `FinishedEvent` per prompt. Their ids are "0", "1" and so on, or with several
        samples "0/0", "0/1" and so on.

    Raises:
        TypeError: As `generate`.
        ValueError: As `generate`.
    """
    engine = make_engine(model, prompts, plan, params, **{"steps_per_call": 1, **options})
    engine.submit_all(prompts, params, ids=[str(index) for index in range(len(prompts))])
    return engine.events()


def make_engine(
    model: Transformer, prompts: Sequence[Sequence[int] | np.ndarray], plan: Plan, params: Params, **options: Any
) -> Engine:
    """Create an engine that is large enough to run all prompts at once. All samples of a prompt are in one dp group.

    Raises:
        TypeError: As `generate`.
        ValueError: As `generate`.
    """
    check_type("the model", model, Transformer, "a model of helix_jax.load or helix_jax.shard")
    check_type("plan", plan, Plan, "a helix_jax.Plan")
    check_no_sampling(options)
    config, dp, each = model.config, plan.mesh.shape[DP], params_of_each(params, prompts)
    if not each:
        raise ValueError("there are no prompts: give at least one")
    limits = {"vocab": config.vocab, "max_len": config.max_positions}
    lens = [
        len(check_prompt(f"prompt {index}", prompt, own.max_new_tokens, **limits))
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))
    ]
    samples = [own.n for own in each]
    defaults = {
        "rows": max(-(-sum(samples) // dp), *samples) * dp,
        "max_len": max(length + own.max_new_tokens for length, own in zip(lens, each, strict=True)),
    }
    engine_options = defaults | options
    if engine_options.get("chunk") is None:  # short prompts need no larger program
        engine_options["chunk"] = min(default_chunk(plan.mesh), 1 << (sum(lens) - 1).bit_length())
    return Engine(model, plan, **engine_options)
