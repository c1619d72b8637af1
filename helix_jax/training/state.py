"""What a run keeps and is given: weights and the optimizer's opt_state in shares of all devices, batches as positions_by_rank."""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Bool, Int

from helix_jax.arrays import put
from helix_jax.config import ModelConfig
from helix_jax.layout import positions_by_rank
from helix_jax.mesh import SEQ_BS, SEQ_XBS, REPLICATED, sharding, stored_sharding
from helix_jax.models.transformer import Transformer, Weights
from helix_jax.training.plan import TrainConfig, TrainPlan


class TrainState(NamedTuple):
    """Float32 master weights, what the optimizer remembers, and steps done. A step takes it over (donated)."""

    weights: Weights
    opt_state: optax.OptState
    step: Int[Array, ""]


class Batch(NamedTuple):
    """X parts of B sequences; along S stand positions in the order of `positions_by_rank(layout, S)`.

    first: where the document of each position starts. counted: whether the target is one to learn from.
    """

    tokens_XBS: Int[Array, "*X B S"]
    targets_XBS: Int[Array, "*X B S"]
    document_start_XBS: Int[Array, "*X B S"]
    loss_mask_XBS: Bool[Array, "*X B S"]


def shard_batch(run: TrainPlan, tokens_BS: np.ndarray, document_start_BS: np.ndarray, loss_mask_BS: np.ndarray, parts: int = 1) -> Batch:
    """Puts sequences on the mesh. tokens [B, S + 1]; first and counted [B, S], of the targets.

    parts 0: as a batch without parts, to be evaluated.
    """
    order = positions_by_rank(run.layout, document_start_BS.shape[1])
    halves = tokens_BS[:, :-1], tokens_BS[:, 1:], document_start_BS
    arrays = [np.asarray(x[:, order], np.int32) for x in halves] + [loss_mask_BS[:, order]]
    where = SEQ_XBS if parts else SEQ_BS
    shape = (parts, -1, len(order)) if parts else (-1, len(order))
    return Batch(*(put(x.reshape(shape), run.mesh, where) for x in arrays))


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


def abstract_state(run: TrainPlan) -> Any:
    """Shapes, types and places of a run's TrainState."""

    def stored(path: tuple[Any, ...], like: Any) -> jax.ShapeDtypeStruct:
        where = stored_sharding(run.mesh, _name(path), like.shape)
        return jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=where)

    def everywhere(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding(run.mesh, REPLICATED))

    shapes = nnx.to_pure_dict(nnx.state(Transformer(run.model, rngs=None), nnx.Param))
    weights = jax.tree.map_with_path(stored, shapes)
    optimizer = make_optimizer(run.config)
    opt_state = jax.eval_shape(optimizer.init, weights)
    opt_state = optax.tree_map_params(
        optimizer, lambda _, weight: weight, opt_state, weights, transform_non_params=everywhere
    )
    return TrainState(weights, opt_state, cast(Any, everywhere(jax.ShapeDtypeStruct((), jnp.int32))))


def abstract_batch(run: TrainPlan) -> Any:
    """Shapes, types and places of a run's Batch."""
    config = run.config
    shape = (config.accumulate, config.batch // config.accumulate, config.context)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding(run.mesh, SEQ_XBS))
    counted = jax.ShapeDtypeStruct(shape, bool, sharding=ints.sharding)
    return Batch(*cast(Any, (ints, ints, ints, counted)))


def init_state(run: TrainPlan, weights: Weights | None = None) -> TrainState:
    """A run's first state. The weights may lie anywhere; None: random ones, made where they are kept."""
    places = jax.tree.map(lambda like: like.sharding, abstract_state(run))

    def placed(x: Array, where: Any) -> Array:
        x = jnp.array(x, jnp.float32)  # a copy: the first step takes it over
        return put(x, run.mesh, where.spec) if x.is_fully_addressable else jax.device_put(x, where)

    if weights is None:
        make = jax.jit(partial(_random_weights, run.model, run.config.seed), out_shardings=places.weights)
        dealt_weights = make()
    else:
        dealt_weights = jax.tree.map(placed, weights, places.weights)
    opt_state = jax.jit(make_optimizer(run.config).init, out_shardings=places.opt_state)(dealt_weights)
    return TrainState(dealt_weights, opt_state, put(np.zeros((), np.int32), run.mesh, REPLICATED))


def _random_weights(model: ModelConfig, seed: int) -> Weights:
    return Transformer(model, rngs=nnx.Rngs(seed)).weights()
