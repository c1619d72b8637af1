"""Computes what tests compare the library with: float64 softmax in NumPy, and a model without cache or mesh."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from helix_jax.attention import Partial, merge_sink
from helix_jax.checkpoint import shard
from helix_jax.config import ModelConfig
from helix_jax.mesh import make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.parsing import parse_dataclass, read_toml
from helix_jax.plan import Plan

TIE = 1e-4

# 16 query and 8 key/value heads fit every tp x cp <= 8 of powers of two. Vocabulary and feed-forward need padding.
TINY = ModelConfig(layers=2, width=32, heads=16, kv_heads=8, head_width=8, ff_width=52, vocab=61, max_positions=4096)

BYTES_SHAPE = {"layers": 2, "width": 32, "heads": 8, "kv_heads": 2, "head_width": 4, "ff_width": 48, "vocab": 256}
BYTES = ModelConfig(**BYTES_SHAPE, max_positions=512, tied_head=True, tokenizer="bytes")


def tiny_model(config: ModelConfig = TINY, seed: int = 0) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(seed))


def shape_in(file: Path) -> ModelConfig:
    """Return the [model] table of a TOML config."""
    return parse_dataclass(ModelConfig, read_toml(file)["model"], str(file))


def plan_of(tp: int = 1, cp: int = 1, dp: int = 1, **options: Any) -> Plan:
    """Return a plan on the first tp * cp * dp fake devices."""
    return Plan(make_mesh(tp, cp, dp), **options)


def causal_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array | None,
    state: None,
    *,
    scale: float,
    window: int | None = None,
    sink_N: Array | None = None,
    v_width: int | None = None,
) -> tuple[Array, None]:
    """Attend with JAX's own function, in the form that a Transformer calls. With sinks its gradients are wrong."""
    with jax.default_matmul_precision("highest" if q_BTNH.dtype == jnp.float32 else "default"):
        output: Any = jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            k_BTKH if v_BTKH is None else v_BTKH,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="xla",
            return_residual=sink_N is not None,
        )
    if sink_N is None:
        return output[..., :v_width], state
    o_BTNH, lse_BTN = output
    return merge_sink(Partial(o_BTNH, lse_BTN.astype(jnp.float32)), sink_N).o_BTNH.astype(q_BTNH.dtype), state


def quantise_in_numpy(x, scales: int = 1, exact: int = 0) -> np.ndarray:
    """Return vectors as an fp8 cache stores them: each group of numbers divided by its scale, rounded, and multiplied.

    The last `exact` numbers are rounded to bfloat16.
    """
    x = np.asarray(x, np.float32)
    numbers, rest = np.split(x, [x.shape[-1] - exact], axis=-1)
    groups = numbers.reshape(*numbers.shape[:-1], scales, -1)
    scale = np.abs(groups).max(-1, keepdims=True) * np.float32(1 / 448)
    rounded = (groups / np.where(scale == 0, np.float32(1), scale)).astype(jnp.float8_e4m3fn).astype(np.float32)
    return np.concatenate([(rounded * scale).reshape(numbers.shape), rest.astype(jnp.bfloat16)], -1, dtype=np.float32)


def softmax_attention(q_TNH, k_SKH, v_SKH, visible_TS, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return outputs [T, N, H] and log-sum-exps [T, N] of one row in float64; (0, -inf) where nothing is visible."""
    q, k, v = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (q_TNH, k_SKH, v_SKH))
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    s = np.where(visible_TS[:, None], scale * np.einsum("tnh,snh->tns", q, k), -np.inf)
    top = np.max(s, -1, keepdims=True, initial=-1e300)
    p = np.exp(s - top)
    total = p.sum(-1)
    some = total > 0
    o = np.einsum("tns,snh->tnh", p, v) / np.where(some, total, 1)[..., None]
    return o, np.where(some, top[..., 0] + np.log(np.where(some, total, 1)), -np.inf)


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@nnx.jit
def _all_logits(model: Transformer, tokens_BS: jax.Array) -> jax.Array:
    position_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    x_BSD, _ = model(tokens_BS, position_BS, causal_attention, [None] * model.config.layers)
    return model.logits(x_BSD)


def sharded_tiny_models() -> Callable[..., Transformer]:
    """Return a function that shards the tiny model over (tp, cp, dp), once for each."""
    return cache(lambda tp, cp, dp=1: shard(tiny_model(), plan_of(tp, cp, dp)))


def naive_logits(model: Transformer, texts: Sequence[Sequence[int]], padded_to: int) -> np.ndarray:
    """Return logits [row, position, V] from one causal pass without a cache, in which padding changes nothing."""
    tokens_BS = np.zeros((len(texts), padded_to), np.int32)
    for row, text in enumerate(texts):
        tokens_BS[row, : len(text)] = text
    return np.asarray(_all_logits(model, jnp.asarray(tokens_BS)))


def naive_greedy(model: Transformer, prompts: Sequence[Sequence[int]], steps: int, padded_to: int) -> list[list[int]]:
    """Decode greedily by running the whole text through the model for each new token."""
    texts = [list(prompt) for prompt in prompts]
    for _ in range(steps):
        logits = naive_logits(model, texts, padded_to)
        for row, text in enumerate(texts):
            text.append(int(logits[row, len(text) - 1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def ties_before_difference(
    model: Transformer, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int], padded_to: int
) -> int:
    """Return 0 if the tokens are equal, 1 if the first difference is at a tie of the two best logits; else fail."""
    if list(ours) == list(theirs):
        return 0
    index = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    text = [*prompt, *theirs[:index]]
    best = np.sort(naive_logits(model, [text], padded_to)[0, len(text) - 1])[-2:]
    gap = best[1] - best[0]
    assert gap < TIE, f"token {index} is {ours[index]}, not {theirs[index]}; the two best logits differ by {gap:.2g}"
    return 1


def gaps_of(model: Transformer, prompt: Sequence[int], tokens: Sequence[int], padded_to: int) -> np.ndarray:
    """Return the difference between the best naive logit and that of the token, for each generated token."""
    logits = naive_logits(model, [[*prompt, *tokens]], padded_to)[0, len(prompt) - 1 : len(prompt) + len(tokens) - 1]
    return logits.max(-1) - logits[np.arange(len(tokens)), tokens]
