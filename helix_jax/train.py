"""Next-token training: the loss, one optimizer step, and bits per byte of a text that was held out."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from helix_jax.attention import Partial, with_sink
from helix_jax.config import ModelConfig
from helix_jax.models.transformer import Transformer, Weights, assemble

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Warm-up, then a cosine to zero; AdamW with decoupled decay of everything but the norms.

    Raises:
        ValueError: a size below 1, or a share outside of [0, 1).
    """

    steps: int
    batch: int
    context: int
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    dropout: float = 0.0
    held_out: float = 0.05
    eval_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("context", 2), ("eval_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}: give at least 0, fewer than the {self.steps} steps")
        for name in ("dropout", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share of at least 0, below 1")


class TrainState(NamedTuple):
    """Float32 master weights and what the optimizer remembers. A step takes it over (donated)."""

    weights: Weights
    memory: optax.OptState
    step: Int[Array, ""]


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.warmup_steps, config.steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=_is_matrix),
    )


def start(weights: Weights, config: TrainConfig) -> TrainState:
    return TrainState(weights, make_optimizer(config).init(weights), jnp.zeros((), jnp.int32))


def _is_matrix(weights: Weights) -> Weights:
    return jax.tree.map(lambda weight: weight.ndim > 1, weights)


def nats_per_token(
    model: Transformer, tokens_BS: Int[Array, "B S"], drop: nnx.Dropout | None = None
) -> Float[Array, "B S-1"]:
    """The surprise of each token but the first, given all before it."""
    inputs_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    position_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape)
    states = (None,) * model.config.layers
    x_BTD, _ = model(inputs_BT, position_BT, causal_attention, states, drop=drop or (lambda x_BTD: x_BTD))
    return optax.softmax_cross_entropy_with_integer_labels(model.logits(x_BTD), targets_BT)


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
    """Attention within the call itself, without a cache, in the form that a Transformer takes."""
    plain = v_BTKH is not None and sink_N is None
    flash = plain and jax.default_backend() == "gpu" and q_BTNH.dtype == jnp.bfloat16
    with jax.default_matmul_precision("highest" if q_BTNH.dtype == jnp.float32 else "default"):
        found: Any = jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            k_BTKH if v_BTKH is None else v_BTKH,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn" if flash else "xla",
            return_residual=sink_N is not None,
        )
    if sink_N is None:
        return found[..., :v_width], state
    o_BTNH, lse_BTN = found
    return with_sink(Partial(o_BTNH, lse_BTN.astype(jnp.float32)), sink_N).o_BTNH.astype(q_BTNH.dtype), state


def train_step(
    model_config: ModelConfig,
    config: TrainConfig,
    dtype: DTypeLike,
    state: TrainState,
    tokens_BS: Int[Array, "B S"],
) -> tuple[Float[Array, ""], TrainState]:
    """One step on a batch, computed in `dtype`. Returns the mean surprise in nats, and the state after it."""

    def loss(weights: Weights) -> Array:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        drop = nnx.Dropout(config.dropout, rngs=nnx.Rngs(dropout=key))
        model = assemble(model_config, jax.tree.map(lambda weight: weight.astype(dtype), weights))
        return nats_per_token(model, tokens_BS, drop).mean()

    nats, gradients = jax.value_and_grad(loss)(state.weights)
    updates, memory = make_optimizer(config).update(gradients, state.memory, state.weights)
    weights = cast(Weights, optax.apply_updates(state.weights, updates))
    return nats, TrainState(weights, memory, state.step + 1)


def held_out_windows(text: np.ndarray, first: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows that together predict every token from `first` on once, each after at least half a context.

    Returns windows [n, context + 1], and which of their `context` predictions count [n, context].
    """
    half = context // 2
    ends = np.minimum(np.arange(first + half, len(text) + half, half), len(text))
    counted = ends - np.concatenate([[first], ends[:-1]])
    windows_nS = np.stack([text[end - context - 1 : end] for end in ends])
    return windows_nS, np.arange(context) >= context - counted[:, None]
