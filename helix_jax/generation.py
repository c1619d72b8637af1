"""A batch of prompts to tokens: prefill in chunks, then one step per token, as a stream of events."""

import operator
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from helix_jax.arrays import put
from helix_jax.cache import CacheSpec, KVCache, Rows, make_cache, per_row
from helix_jax.config import ModelConfig
from helix_jax.mesh import EXPERT_WEIGHTS, ROWS_B, weight_sharding
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.sampling import Sampling, make_sampling
from helix_jax.step import StepOutput, step

DEFAULT_PAGE = 64
DEFAULT_CHUNK = 512

# A row's prompt; None is an idle row, which takes part in nothing.
Prompt = Sequence[int] | np.ndarray | None


class Compiled(NamedTuple):
    """The two programs, of a prefill chunk and of a decode step, are ready."""

    seconds: float


class Prefilled(NamedTuple):
    """`done` of the `total` positions of the longest prompt are in the cache, after `seconds` for this chunk."""

    done: int
    total: int
    seconds: float


class Decoded(NamedTuple):
    """The next token of each row, and the logits that it was chosen from.

    tokens: None for a row that is idle or has ended. logits_BV: without meaning there; on the device until it is read.
    seconds: 0 for the first tokens, which come out of the prefill.
    """

    tokens: tuple[int | None, ...]
    logits_BV: Array
    seconds: float


Event = Compiled | Prefilled | Decoded

# Runs one step and waits for it: on a CPU split into devices, steps that pile up deadlock.
Run = Callable[[KVCache, Rows, np.ndarray, np.ndarray], StepOutput]


def generate(model: Transformer, prompts: Sequence[Prompt], plan: Plan, **options) -> list[list[int]]:
    """The new tokens of each prompt; options and errors as `stream`."""
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
    """Continues every prompt by up to `max_new_tokens` tokens, and tells what happens as it happens.

    chunk: prompt tokens per prefill step. page: cache slots per page. sampling: greedy if left out. stop_token_ids: a row
    ends after any of these; the model's own if left out.

    Raises:
        ValueError: an empty prompt, a token id outside the vocabulary, more positions than the model has, heads that
            the mesh does not divide, a number below 1.
    """
    check_placed(model, plan)
    if sampling and len(sampling.seed_B) != len(prompts):
        raise ValueError(f"sampling is for {len(sampling.seed_B)} rows, but there are {len(prompts)} prompts")
    checked = check_request(model.config, prompts, max_new_tokens=max_new_tokens, chunk=chunk, page=page)
    lens = [len(prompt) for prompt in checked]
    # The last token is said, not cached.
    room = [n + max_new_tokens - 1 if n else 0 for n in lens]
    cache, rows = make_cache(plan, CacheSpec.from_config(model.config, model.dtype), lens, room, page=page)
    sampling = put(sampling or make_sampling(len(prompts)), plan.mesh, ROWS_B)
    weights = model.weights()

    def run(cache: KVCache, rows: Rows, tokens_BT: np.ndarray, count_B: np.ndarray) -> StepOutput:
        new = per_row(plan, tokens_BT), per_row(plan, count_B)
        return jax.block_until_ready(step(model.config, plan, weights, cache, rows, *new, sampling))

    ends = np.asarray(model.config.eos_token_ids if stop_token_ids is None else stop_token_ids, np.int32)
    return _events(run, cache, rows, checked, chunk, max_new_tokens, ends)


def _events(
    run: Run,
    cache: KVCache,
    rows: Rows,
    prompts: Sequence[Sequence[int]],
    chunk: int,
    max_new_tokens: int,
    ends: np.ndarray,
) -> Iterator[Event]:
    lens_B = np.asarray([len(prompt) for prompt in prompts])
    longest = int(lens_B.max())
    T = min(chunk, 1 << (longest - 1).bit_length())  # a short prompt needs no long program
    tokens_BS = np.zeros((len(prompts), -(-longest // T) * T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : lens_B[row]] = prompt

    began = time.perf_counter()
    for width in sorted({T, 1}):  # a step of idle rows changes nothing, and compiles
        cache, rows = run(cache, rows, tokens_BS[:, :width], np.zeros_like(lens_B))[2:]
    yield Compiled(time.perf_counter() - began)
    out = yield from _prefill(run, cache, rows, tokens_BS, lens_B, T)
    yield from _decode(run, out, lens_B > 0, max_new_tokens, ends)


def _prefill(
    run: Run, cache: KVCache, rows: Rows, tokens_BS: np.ndarray, lens_B: np.ndarray, T: int
) -> Generator[Event, None, StepOutput]:
    """Fills the cache with the prompts. Returns what a step would have that read the last token of every prompt."""
    longest = int(lens_B.max())
    token_B: Any = np.zeros(len(lens_B), np.int32)
    logits_BV: Any = None
    for first in range(0, longest, T):
        began = time.perf_counter()
        count_B = np.clip(lens_B - first, 0, T)
        out = run(cache, rows, tokens_BS[:, first : first + T], count_B)
        cache, rows = out.cache, out.rows
        ended_B = (count_B > 0) & (first + count_B == lens_B)
        if ended_B.any():
            token_B = np.where(ended_B, out.token_B, token_B)
            logits_BV = out.logits_BV if logits_BV is None else jnp.where(ended_B[:, None], out.logits_BV, logits_BV)
        yield Prefilled(min(first + T, longest), longest, time.perf_counter() - began)
    return StepOutput(token_B, logits_BV, cache, rows)


def _decode(run: Run, out: StepOutput, live_B: np.ndarray, max_new_tokens: int, ends: np.ndarray) -> Iterator[Event]:
    """Says the first token, and goes on from it until every row has ended."""
    seconds = 0.0
    for remaining in reversed(range(max_new_tokens)):
        token_B = np.asarray(out.token_B)
        said = tuple(int(token) if live else None for token, live in zip(token_B, live_B, strict=True))
        yield Decoded(said, out.logits_BV, seconds)
        live_B = live_B & ~np.isin(token_B, ends)
        if not remaining or not live_B.any():
            return
        began = time.perf_counter()
        out = run(out.cache, out.rows, token_B[:, None], live_B.astype(np.int32))
        seconds = time.perf_counter() - began


def check_placed(model: Transformer, plan: Plan) -> None:
    """Raises ValueError if the model's weights do not lie as the plan has them, or the mesh cannot share its heads."""
    placed = model.embed_VD[...].sharding
    if not isinstance(placed, NamedSharding) or placed.mesh != plan.mesh:
        raise ValueError("the model's weights lie on another mesh than the plan's: use load or shard with plan.mesh")
    plan.check_model(model.config)
    _check_experts(model, plan)


def _check_experts(model: Transformer, plan: Plan) -> None:
    """Experts that lie otherwise than the plan has them would be moved in every step."""
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = str(path[-1])
        if name in EXPERT_WEIGHTS[plan.experts]:
            lies, wanted = parameter[...].sharding, weight_sharding(plan.mesh, name, plan.experts)
            if not lies.is_equivalent_to(wanted, parameter.ndim):
                raise ValueError(f"the model's experts are not spread as the plan's '{plan.experts}': load them so")


def check_request(
    config: ModelConfig, prompts: Sequence[Prompt], *, max_new_tokens: int, chunk: int, page: int
) -> list[list[int]]:
    """The prompts as lists of ids, an idle row as an empty one: all that can be refused before a weight is loaded.

    Raises:
        ValueError: as `stream`, of the request itself.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill chunk", chunk), ("page", page)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give at least 1")
    if all(prompt is None for prompt in prompts):
        raise ValueError("no prompts: give at least one")
    return [_check_prompt(config, row, prompt, max_new_tokens) for row, prompt in enumerate(prompts)]


def _check_prompt(config: ModelConfig, row: int, prompt: Prompt, max_new_tokens: int) -> list[int]:
    if prompt is None:
        return []
    if not isinstance(prompt, Sequence | np.ndarray):
        raise ValueError(f"prompt {row} is {prompt!r}: give a list of prompts, each a sequence of token ids")
    if len(prompt) == 0:
        raise ValueError(f"prompt {row} is empty: give at least one token")
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(f"prompt {row} is not a sequence of token ids: give whole numbers") from None
    outside = [token for token in ids if not 0 <= token < config.vocab]
    if outside:
        raise ValueError(
            f"prompt {row}: token id {outside[0]} is outside of the vocabulary of {config.vocab}: "
            f"give ids from 0 to {config.vocab - 1}"
        )
    if len(ids) + max_new_tokens > config.max_positions:
        raise ValueError(
            f"prompt {row}: {len(ids)} tokens and {max_new_tokens} new ones exceed the model's "
            f"{config.max_positions} positions: shorten the prompt or ask for fewer"
        )
    return ids
