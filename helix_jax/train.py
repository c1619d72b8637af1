"""Next-token training over a mesh: sequences are dealt over cp, heads and widths over tp, and what is kept over all.

Of the weights, and of what the optimizer remembers, a device keeps its share over dp, tp and cp alike, in float32. A
layer's weights are gathered over dp and cp where it runs, in the type that it computes in; its gradients go back to
their shares.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from helix_jax.config import ModelConfig
from helix_jax.layout import BlockLayout, dealt
from helix_jax.mesh import (
    CP,
    DEALT_BS,
    DEALT_BSD,
    DEALT_XBS,
    DP,
    REPLICATED,
    TP,
    AnyMesh,
    gathered_sharding,
    sharding,
    stored_sharding,
)
from helix_jax.models.transformer import Layer, Transformer, Weights, assemble
from helix_jax.ring import check_length, ring_attention

LOG2_E = 1.4426950408889634
_LOGITS = 2**27  # of a device at once: half a gigabyte


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Warm-up, then a cosine to zero; AdamW with decoupled decay of everything but norms and biases.

    batch: sequences of a step, of `context` tokens each, worked off in `accumulate` parts. remat: a layer keeps its
    input alone, and is computed again on the way back. held_out: this share of the text, its end, is not trained on.

    Raises:
        ValueError: a size below 1, a batch that its parts do not divide, a share outside of [0, 1).
    """

    steps: int
    batch: int
    context: int
    accumulate: int = 1
    remat: bool = True
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    dropout: float = 0.0
    held_out: float = 0.05
    eval_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        least_of = {"steps": 1, "batch": 1, "context": 2, "accumulate": 1, "eval_every": 1, "seed": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}: give 0 or a positive number")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}: give at least 0, fewer than the {self.steps} steps")
        for name in ("dropout", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share of at least 0, below 1")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide the batch of {self.batch}: give a divisor")


@dataclass(frozen=True)
class Training:
    """A run: everything that is compiled into its step. dtype: of what is computed; the weights are float32.

    documents: whether a sequence may hold several. If none does and cp is 1, a GPU attends by cuDNN where it can.

    Raises:
        ValueError: a layout for another number of ranks than the mesh has, heads that tp does not divide, a context
            that the ranks' blocks do not divide, parts of a batch that dp does not divide.
    """

    model: ModelConfig
    config: TrainConfig
    mesh: AnyMesh
    layout: BlockLayout
    dtype: DTypeLike
    documents: bool = True

    def __post_init__(self) -> None:
        tp, cp, dp = (self.mesh.shape[axis] for axis in (TP, CP, DP))
        if self.layout.ranks != cp:
            raise ValueError(
                f"the layout deals to {self.layout.ranks} ranks, but the mesh has cp {cp}: make them equal"
            )
        for name in ("heads", "kv_heads"):
            heads = getattr(self.model, name)
            if heads % tp and not (name == "kv_heads" and self.model.latent):
                raise ValueError(f"tp {tp} does not divide the {heads} {name}: give a tp that does")
        if self.config.context > self.model.max_positions:
            context, most = self.config.context, self.model.max_positions
            raise ValueError(f"context {context} exceeds max_positions {most}: give less, or raise max_positions")
        check_length(self.layout, self.config.context)
        part = self.config.batch // self.config.accumulate
        if part % dp:
            raise ValueError(
                f"dp {dp} does not divide the {part} sequences of a part of a batch: give more, or less dp"
            )

    @property
    def flash(self) -> bool:
        """Whether cuDNN attends: whole sequences of one document each, in bfloat16."""
        plain = not (self.documents or self.model.sinks or self.model.latent) and self.layout.ranks == 1
        on_gpu = isinstance(self.mesh, Mesh) and self.mesh.devices.flat[0].platform == "gpu"
        return plain and on_gpu and jnp.dtype(self.dtype) == jnp.bfloat16

    @property
    def device_kind(self) -> str:
        """What the mesh's devices are called; nothing of a mesh whose devices are not there."""
        return self.mesh.devices.flat[0].device_kind if isinstance(self.mesh, Mesh) else ""


class TrainState(NamedTuple):
    """Float32 master weights, what the optimizer remembers, and steps done. A step takes it over (donated)."""

    weights: Weights
    memory: optax.OptState
    step: Int[Array, ""]


class Batch(NamedTuple):
    """X parts of B sequences; along S stand positions in the order of `dealt(layout, S)`.

    first: where the document of each position starts. counted: whether the target is one to learn from.
    """

    tokens_XBS: Int[Array, "*X B S"]
    targets_XBS: Int[Array, "*X B S"]
    first_XBS: Int[Array, "*X B S"]
    counted_XBS: Bool[Array, "*X B S"]


def deal(run: Training, tokens_BS: np.ndarray, first_BS: np.ndarray, counted_BS: np.ndarray, parts: int = 1) -> Batch:
    """Puts sequences on the mesh. tokens [B, S + 1]; first and counted [B, S], of the targets.

    parts 0: as a batch without parts, to be evaluated.
    """
    order = dealt_order(run.layout, first_BS.shape[1])
    halves = tokens_BS[:, :-1], tokens_BS[:, 1:], first_BS
    arrays = [np.asarray(x[:, order], np.int32) for x in halves] + [counted_BS[:, order]]
    where = sharding(run.mesh, DEALT_XBS if parts else DEALT_BS)
    shape = (parts, -1, len(order)) if parts else (-1, len(order))
    return Batch(*(jax.device_put(x.reshape(shape), where) for x in arrays))


@lru_cache
def dealt_order(layout: BlockLayout, length: int) -> np.ndarray:
    """As `dealt`."""
    return np.asarray(dealt(layout, length), np.int32)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.warmup_steps, config.steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=_decays),
    )


def _decays(weights: Weights) -> Weights:
    """The matrices."""
    others = ("norm", "bias", "sink")
    return jax.tree.map_with_path(lambda path, _: not any(word in _name(path) for word in others), weights)


def _name(path: tuple[Any, ...]) -> str:
    """Of a parameter, at the end of its path."""
    return str(path[-1].key)


def abstract_state(run: Training) -> Any:
    """Shapes, types and places of a run's TrainState."""

    def stored(path: tuple[Any, ...], like: Any) -> jax.ShapeDtypeStruct:
        where = stored_sharding(run.mesh, _name(path), like.shape)
        return jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=where)

    def everywhere(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding(run.mesh, REPLICATED))

    shapes = nnx.to_pure_dict(nnx.state(Transformer(run.model, rngs=None), nnx.Param))
    weights = jax.tree.map_with_path(stored, shapes)
    optimizer = make_optimizer(run.config)
    memory = jax.eval_shape(optimizer.init, weights)
    memory = optax.tree_map_params(
        optimizer, lambda _, weight: weight, memory, weights, transform_non_params=everywhere
    )
    return TrainState(weights, memory, cast(Any, everywhere(jax.ShapeDtypeStruct((), jnp.int32))))


def abstract_batch(run: Training) -> Any:
    """Shapes, types and places of a run's Batch."""
    config = run.config
    shape = (config.accumulate, config.batch // config.accumulate, config.context)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding(run.mesh, DEALT_XBS))
    counted = jax.ShapeDtypeStruct(shape, bool, sharding=ints.sharding)
    return Batch(*cast(Any, (ints, ints, ints, counted)))


def start(run: Training, weights: Weights | None = None) -> TrainState:
    """A run's first state. The weights may lie anywhere; None: random ones, made where they are kept."""
    places = jax.tree.map(lambda like: like.sharding, abstract_state(run))

    def placed(x: Array, where: Any) -> Array:  # a copy: the first step takes it over
        return jax.device_put(jnp.array(x, jnp.float32), where)

    if weights is None:
        make = jax.jit(partial(_random_weights, run.model, run.config.seed), out_shardings=places.weights)
        dealt_weights = make()
    else:
        dealt_weights = jax.tree.map(placed, weights, places.weights)
    memory = jax.jit(make_optimizer(run.config).init, out_shardings=places.memory)(dealt_weights)
    return TrainState(dealt_weights, memory, jax.device_put(jnp.zeros((), jnp.int32), places.step))


def _random_weights(model: ModelConfig, seed: int) -> Weights:
    return Transformer(model, rngs=nnx.Rngs(seed)).weights()


def surprise(run: Training, weights: Weights, batch: Batch, drop: Callable[[Array], Array] | None = None) -> Array:
    """Nats of each target of one part, in the order of the batch [B, S]."""
    tokens_BS, targets_BS, first_BS, _ = batch
    position_BS = jnp.asarray(dealt_order(run.layout, tokens_BS.shape[1])) - first_BS
    attention = _flash_attention if run.flash else ring_attention(run.mesh, run.layout, first_BS)
    ready = {name: x if name == "layers" else _ready(run, name, x) for name, x in weights.items()}
    model = assemble(run.model, ready)
    states, drop = (None,) * run.model.layers, drop or (lambda x_BSD: x_BSD)
    x_BSD, _ = model(tokens_BS, position_BS, attention, states, drop=drop, around=lambda layer: _gathered(run, layer))
    return _nats(run, model, x_BSD, targets_BS)


def _nats(run: Training, model: Transformer, x_BSD: Array, targets_BS: Array) -> Array:
    """Of each target, a piece of every rank's share at a time: all logits of a long sequence are too many to keep."""
    B, S, D = x_BSD.shape
    ranks, parts = run.layout.ranks, run.mesh.shape[DP] * run.mesh.shape[TP]
    pieces = _pieces(S // ranks, B * run.model.vocab // parts)
    x_XBRcD = jnp.moveaxis(x_BSD.reshape(B, ranks, pieces, -1, D), 2, 0)
    targets_XBRc = jnp.moveaxis(targets_BS.reshape(B, ranks, pieces, -1), 2, 0)

    def one_piece(given: tuple[Array, Array]) -> Array:
        x_BRcD, targets_BRc = given
        x_BRcD = lax.with_sharding_constraint(x_BRcD, sharding(run.mesh, DEALT_BSD))
        return optax.softmax_cross_entropy_with_integer_labels(model.logits(x_BRcD), targets_BRc)

    nats_XBRc = lax.map(jax.checkpoint(one_piece), (x_XBRcD, targets_XBRc))
    return jnp.moveaxis(nats_XBRc, 0, 2).reshape(B, S)


def _pieces(slots: int, logits_per_slot: int) -> int:
    """Into how many equal pieces a rank's share is cut, so that none has more than _LOGITS, if that can be."""
    least = min(slots, -(-slots * logits_per_slot // _LOGITS))
    return next(pieces for pieces in range(max(1, least), slots + 1) if slots % pieces == 0)


def _ready(run: Training, name: str, weight: Array) -> Array:
    """A weight as it computes: cast, and whole but for tp."""
    return lax.with_sharding_constraint(weight.astype(run.dtype), gathered_sharding(run.mesh, name, weight.shape))


def _gathered(run: Training, layer: Layer) -> Callable[..., tuple[Array, Any]]:
    """A layer whose weights are made ready where it runs, on the way back once more."""
    graph, state = nnx.split(layer)
    parameters = dict(nnx.to_flat_state(state))
    weights = {path: parameter[...] for path, parameter in parameters.items()}

    def call(x_BSD: Array, *rest: Any) -> tuple[Array, Any]:
        def compute(weights: dict[Any, Array], x_BSD: Array) -> Array:
            x_BSD = lax.with_sharding_constraint(x_BSD, sharding(run.mesh, DEALT_BSD))
            ready = [(path, parameters[path].replace(_ready(run, str(path[-1]), x))) for path, x in weights.items()]
            return nnx.merge(graph, nnx.from_flat_state(ready))(x_BSD, *rest)[0]

        return (jax.checkpoint(compute) if run.config.remat else compute)(weights, x_BSD), None

    return call


def _flash_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array | None,
    state: Any,
    *,
    scale: float,
    window: int | None = None,
    sink_N: Array | None = None,
    v_width: int | None = None,
) -> tuple[Array, Any]:
    """By cuDNN, in the form that a Transformer takes. No sinks, no latents: it has no gradient of the log-sum-exp."""
    assert v_BTKH is not None
    assert sink_N is None
    left = None if window is None else (window - 1, 0)
    how: dict[str, Any] = {"scale": scale, "is_causal": True, "local_window_size": left, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, **how), state


class Told(NamedTuple):
    """Of a step, before its update: the mean surprise in nats, and the norm of the gradient before it is clipped."""

    nats: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def _train_step(run: Training, state: TrainState, batch: Batch) -> tuple[Told, TrainState]:
    """One step on a batch, and the state after it."""
    places = jax.tree.map(lambda like: like.sharding, abstract_state(run))
    counted = jnp.maximum(batch.counted_XBS.sum(), 1)
    key = jax.random.fold_in(jax.random.key(run.config.seed), state.step)

    def loss(weights: Weights, part: Batch, index: Array) -> Array:
        nats_BS = surprise(run, weights, part, dropout(run.config.dropout, jax.random.fold_in(key, index)))
        return jnp.where(part.counted_XBS, nats_BS, 0).sum() / counted

    def add(sofar: tuple[Array, Weights], part: tuple[Batch, Array]) -> tuple[tuple[Array, Weights], None]:
        found = jax.value_and_grad(loss)(state.weights, *part)
        found = found[0], lax.with_sharding_constraint(found[1], places.weights)
        return jax.tree.map(jnp.add, sofar, found), None

    nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.weights)
    (nats, gradients), _ = lax.scan(add, nothing, (batch, jnp.arange(len(batch.tokens_XBS))))
    updates, memory = make_optimizer(run.config).update(gradients, state.memory, state.weights)
    weights = cast(Weights, optax.apply_updates(state.weights, updates))
    after = lax.with_sharding_constraint(TrainState(weights, memory, state.step + 1), places)
    return Told(nats, optax.tree.norm(gradients)), after


train_step = jax.jit(_train_step, static_argnums=0, donate_argnums=1)
evaluate = jax.jit(surprise, static_argnums=0)


def dropout(rate: float, key: Array) -> Callable[[Array], Array] | None:
    """A different mask at each of its places in the program, over positions as they are dealt: each cp has its own."""
    places = itertools.count()

    def drop(x: Array) -> Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, next(places)), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0)

    return drop if rate else None
