"""What training keeps on the devices: weights and optimizer state, and the batches of a step."""

from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Bool, Int

from helix_jax.arrays import put, without_weak_types
from helix_jax.config import ModelConfig
from helix_jax.layout import positions_by_rank
from helix_jax.mesh import REPLICATED, SEQ_BS, SEQ_XBS, sharding, stored_sharding
from helix_jax.models.transformer import Transformer, Weights
from helix_jax.training.data import Sequences
from helix_jax.training.plan import TrainConfig, TrainPlan


class TrainState(NamedTuple):
    """Float32 weights, the optimizer state, and the number of steps done. A step takes it as a donated argument."""

    weights: Weights
    opt_state: Any  # optax.OptState, whose recursive annotation cannot be rendered
    step: Int[Array, ""]


class Batch(NamedTuple):
    """X parts of B sequences. The positions along S are in the order of `positions_by_rank(layout, S)`.

    document_start is the index at which the document of a position starts: nothing before it is seen. loss_mask tells
    which targets count in the loss.
    """

    tokens_XBS: Int[Array, "*X B S"]
    targets_XBS: Int[Array, "*X B S"]
    document_start_XBS: Int[Array, "*X B S"]
    loss_mask_XBS: Bool[Array, "*X B S"]


def shard_batch(plan: TrainPlan, sequences: Sequences, parts: int = 1) -> Batch:
    """Place sequences on the mesh.

    Args:
        plan: The mesh and the placement.
        sequences: The sequences of one step.
        parts: Into how many parts they are split. 0 gives a batch without the axis X, for evaluation.
    """
    tokens_BS, document_start_BS, loss_mask_BS = sequences
    order = positions_by_rank(plan.layout, document_start_BS.shape[1])
    integers = tokens_BS[:, :-1], tokens_BS[:, 1:], document_start_BS
    arrays = [np.asarray(x[:, order], np.int32) for x in integers] + [loss_mask_BS[:, order]]
    where = SEQ_XBS if parts else SEQ_BS
    shape = (parts, -1, len(order)) if parts else (-1, len(order))
    return Batch(*(put(x.reshape(shape), plan.mesh, where) for x in arrays))


@lru_cache  # another object of the same optimizer would compile the step again
def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the default optimizer: clipping, and AdamW with linear warm-up and a cosine decay to zero."""
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.warmup_steps, config.steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=_is_decayed),
    )


def _is_decayed(weights: Weights) -> Weights:
    """Mark the weights with weight decay: matrices, but not norms, biases or sinks."""
    others = ("norm", "bias", "sink")
    return jax.tree.map_with_path(lambda path, _: not any(word in _name(path) for word in others), weights)


def _name(path: tuple[Any, ...]) -> str:
    """Return the name of the parameter at the end of a path."""
    return str(path[-1].key)


def abstract_state(plan: TrainPlan, optimizer: optax.GradientTransformation) -> Any:
    """Return the TrainState of a plan as shapes, types and shardings."""

    def stored(path: tuple[Any, ...], like: Any) -> jax.ShapeDtypeStruct:
        where = stored_sharding(plan.mesh, _name(path), like.shape)
        return jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=where)

    def replicated(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding(plan.mesh, REPLICATED))

    shapes = nnx.to_pure_dict(nnx.state(Transformer(plan.model, rngs=None), nnx.Param))
    weights = jax.tree.map_with_path(stored, shapes)
    opt_state = jax.eval_shape(optimizer.init, weights)
    opt_state = optax.tree_map_params(
        optimizer, lambda _, weight: weight, opt_state, weights, transform_non_params=replicated
    )
    return TrainState(weights, opt_state, cast(Any, replicated(jax.ShapeDtypeStruct((), jnp.int32))))


def abstract_batch(plan: TrainPlan, batch: int, context: int) -> Any:
    """Return a Batch of `batch` sequences of `context` tokens as shapes, types and shardings."""
    shape = (plan.accumulate, batch // plan.accumulate, context)
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding(plan.mesh, SEQ_XBS))
    mask = jax.ShapeDtypeStruct(shape, bool, sharding=integers.sharding)
    return Batch(*cast(Any, (integers, integers, integers, mask)))


def init_state(plan: TrainPlan, optimizer: optax.GradientTransformation, weights: Weights | None = None) -> TrainState:
    """Create the first state.

    Its arrays have the types and the shardings of those that a step returns, so that the second step runs the program
    of the first.

    Args:
        plan: The mesh and the model.
        optimizer: Its state is created too.
        weights: Initial weights, which may be on any devices. They are copied. None draws random ones from the seed.
    """
    places = jax.tree.map(lambda like: like.sharding, abstract_state(plan, optimizer))

    def place(x: Array, where: Any) -> Array:
        x = jnp.array(x, jnp.float32)  # a copy, because the first step donates it
        return put(x, plan.mesh, where.spec) if x.is_fully_addressable else jax.device_put(x, where)

    if weights is None:
        draw = jax.jit(partial(_random_weights, plan.model, plan.seed), out_shardings=places.weights)
        stored_weights = draw()
    else:
        stored_weights = jax.tree.map(place, weights, places.weights)
    init = jax.jit(lambda weights: without_weak_types(optimizer.init(weights)), out_shardings=places.opt_state)
    opt_state = init(stored_weights)
    return TrainState(stored_weights, opt_state, put(np.zeros((), np.int32), plan.mesh, REPLICATED))


def _random_weights(model: ModelConfig, seed: int) -> Weights:
    return without_weak_types(Transformer(model, rngs=nnx.Rngs(seed)).weights())
