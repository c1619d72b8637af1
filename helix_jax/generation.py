"""Generate from a batch of prompts: prefill in chunks, then one step per token, as a stream of events."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from helix_jax.arrays import put
from helix_jax.cache import CacheSpec, KVCache, Rows, make_cache, per_row
from helix_jax.config import ModelConfig
from helix_jax.mesh import ROWS_B
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.sampling import Sampling
from helix_jax.step import StepOutput, check_model_placement, step
from helix_jax.validation import check_int, check_token_ids

DEFAULT_PAGE = 64
DEFAULT_CHUNK = 512

# The prompt of a row. None is an idle row, which generates nothing.
Prompt = Sequence[int] | np.ndarray | None


class Compiled(NamedTuple):
    """The programs for a prefill chunk and for a decode step are compiled."""

    seconds: float


class Prefilled(NamedTuple):
    """A prefill chunk is done.

    Attributes:
        done: Positions of the longest prompt that are in the cache.
        total: The length of the longest prompt.
        seconds: The time of this chunk.
    """

    done: int
    total: int
    seconds: float


class Decoded(NamedTuple):
    """Each row has a new token.

    Attributes:
        tokens: The token of each row, None for a row that is idle or has ended.
        logits_BV: The logits that the tokens were chosen from, on the device. Undefined for a row without a token.
        seconds: The time of the step. 0 for the first tokens, which the prefill computes.
    """

    tokens: tuple[int | None, ...]
    logits_BV: Array
    seconds: float


Event = Compiled | Prefilled | Decoded

# Runs one step and waits for it: on a CPU that is split into devices, programs that queue up deadlock.
RunStep = Callable[[KVCache, Rows, np.ndarray, np.ndarray], StepOutput]


def generate(model: Transformer, prompts: Sequence[Prompt], plan: Plan, **options: Any) -> list[list[int]]:
    """Return the new tokens of each prompt.

    Args:
        model: A model of `load` or `shard`.
        prompts: The token ids of each prompt. None is an idle row.
        plan: How the mesh decodes: the plan that the model was loaded with.
        **options: As in `stream`.

    Raises:
        TypeError: As `stream`.
        ValueError: As `stream`.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    for event in stream(model, prompts, plan, **options):
        if isinstance(event, Decoded):
            for row, token in zip(tokens, event.tokens, strict=True):
                row.extend([] if token is None else [token])
    return tokens


def stream(
    model: Transformer,
    prompts: Sequence[Prompt],
    plan: Plan,
    *,
    max_new_tokens: int = 128,
    page: int = DEFAULT_PAGE,
    chunk: int = DEFAULT_CHUNK,
    sampling: Sampling | None = None,
    stop_token_ids: Sequence[int] | None = None,
) -> Iterator[Event]:
    """Generate up to `max_new_tokens` tokens after each prompt, as a stream of events.

    Args:
        model: A model of `load` or `shard`.
        prompts: The token ids of each prompt. None is an idle row.
        plan: How the mesh decodes: the plan that the model was loaded with.
        max_new_tokens: The most tokens to generate per row.
        page: Cache slots per page.
        chunk: Prompt tokens per prefill step.
        sampling: The sampling settings of each row, default greedy.
        stop_token_ids: A row ends after any of these, default those of the model.

    Returns:
        One `Compiled`, a `Prefilled` per chunk, and a `Decoded` per token.

    Raises:
        TypeError: A prompt is not a sequence of token ids, or a number is not an int.
        ValueError: A prompt is empty or too long for the model, a token id is not in the vocabulary, a number is below
            1, the mesh does not divide the heads, or the model was not loaded with this plan.
    """
    check_model_placement(model, plan)
    checked = check_request(model.config, prompts, max_new_tokens=max_new_tokens, chunk=chunk, page=page)
    if sampling and len(sampling.temperature_B) != len(prompts):
        rows = len(prompts)
        raise ValueError(
            f"sampling has {len(sampling.temperature_B)} rows for {rows} prompts: use make_sampling({rows})"
        )
    lens = [len(prompt) for prompt in checked]
    max_lens = [n + max_new_tokens - 1 if n else 0 for n in lens]  # the last token is not cached
    cache, rows = make_cache(plan, CacheSpec.from_config(model.config, model.dtype), lens, max_lens, page=page)
    is_greedy = sampling is None or not np.asarray(sampling.temperature_B).any()
    settings = None if is_greedy else put(sampling, plan.mesh, ROWS_B)
    weights = model.weights()

    def run(cache: KVCache, rows: Rows, tokens_BT: np.ndarray, count_B: np.ndarray) -> StepOutput:
        new = per_row(plan, tokens_BT), per_row(plan, count_B)
        return jax.block_until_ready(step(model.config, plan, weights, cache, rows, *new, settings))

    end_ids = np.asarray(model.config.eos_token_ids if stop_token_ids is None else stop_token_ids, np.int32)
    return _events(run, cache, rows, checked, chunk, max_new_tokens, end_ids)


def _events(
    run: RunStep,
    cache: KVCache,
    rows: Rows,
    prompts: Sequence[Sequence[int]],
    chunk: int,
    max_new_tokens: int,
    end_ids: np.ndarray,
) -> Iterator[Event]:
    lens_B = np.asarray([len(prompt) for prompt in prompts])
    longest = int(lens_B.max())
    T = min(chunk, 1 << (longest - 1).bit_length())  # a short prompt needs no long program
    tokens_BS = np.zeros((len(prompts), -(-longest // T) * T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : lens_B[row]] = prompt

    start = time.perf_counter()
    for width in sorted({T, 1}):  # a step over idle rows compiles the program and changes nothing
        cache, rows = run(cache, rows, tokens_BS[:, :width], np.zeros_like(lens_B))[2:]
    yield Compiled(time.perf_counter() - start)
    out = yield from _prefill(run, cache, rows, tokens_BS, lens_B, T)
    yield from _decode(run, out, lens_B > 0, max_new_tokens, end_ids)


def _prefill(
    run: RunStep, cache: KVCache, rows: Rows, tokens_BS: np.ndarray, lens_B: np.ndarray, T: int
) -> Generator[Event, None, StepOutput]:
    """Prefill the prompts in chunks. Return the output of a step that read the last token of every prompt."""
    longest = int(lens_B.max())
    token_B: Any = np.zeros(len(lens_B), np.int32)
    logits_BV: Any = None
    for first in range(0, longest, T):
        start = time.perf_counter()
        count_B = np.clip(lens_B - first, 0, T)
        out = run(cache, rows, tokens_BS[:, first : first + T], count_B)
        cache, rows = out.cache, out.rows
        ended_B = (count_B > 0) & (first + count_B == lens_B)
        if ended_B.any():
            token_B = np.where(ended_B, out.token_B, token_B)
            logits_BV = out.logits_BV if logits_BV is None else jnp.where(ended_B[:, None], out.logits_BV, logits_BV)
        yield Prefilled(min(first + T, longest), longest, time.perf_counter() - start)
    return StepOutput(token_B, logits_BV, cache, rows)


def _decode(
    run: RunStep, out: StepOutput, live_B: np.ndarray, max_new_tokens: int, end_ids: np.ndarray
) -> Iterator[Event]:
    """Yield the tokens that the prefill chose, then decode until every row has ended."""
    seconds = 0.0
    for remaining in reversed(range(max_new_tokens)):
        token_B = np.asarray(out.token_B)
        tokens = tuple(int(token) if live else None for token, live in zip(token_B, live_B, strict=True))
        yield Decoded(tokens, out.logits_BV, seconds)
        live_B = live_B & ~np.isin(token_B, end_ids)
        if not remaining or not live_B.any():
            return
        start = time.perf_counter()
        out = run(out.cache, out.rows, token_B[:, None], live_B.astype(np.int32))
        seconds = time.perf_counter() - start


def check_request(
    config: ModelConfig, prompts: Sequence[Prompt], *, max_new_tokens: int, chunk: int, page: int
) -> list[list[int]]:
    """Check everything about a request that can be checked before weights are loaded.

    Returns:
        The prompts as lists of ids. An idle row is an empty list.

    Raises:
        TypeError: A prompt is not a sequence of token ids, or a number is not an int.
        ValueError: A prompt is empty or too long for the model, a token id is not in the vocabulary, or a number is
            below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk), ("page", page)):
        check_int(name, value, least=1)
    if all(prompt is None for prompt in prompts):
        raise ValueError("there are no prompts: give at least one")
    return [
        [] if prompt is None else _check_prompt(config, f"prompt {row}", prompt, max_new_tokens)
        for row, prompt in enumerate(prompts)
    ]


def _check_prompt(config: ModelConfig, name: str, prompt: Sequence[int] | np.ndarray, max_new_tokens: int) -> list[int]:
    ids = check_token_ids(name, prompt, config.vocab)
    if len(ids) + max_new_tokens > config.max_positions:
        raise ValueError(
            f"{name}: {len(ids)} tokens and {max_new_tokens} new ones exceed the model's {config.max_positions} "
            f"positions: shorten the prompt or reduce max_new_tokens"
        )
    return ids
