"""The train step: the loss of each next token, its gradients, and the optimizer's update.

The weights of a layer are gathered over dp and cp where the layer runs, in the type that it computes in. The gradients
are scattered back to the shards.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from helix_jax.arrays import without_weak_types
from helix_jax.layout import positions_by_rank
from helix_jax.mesh import DP, SEQ_BSD, TP, compute_sharding, sharding
from helix_jax.models.transformer import Layer, Transformer, Weights, assemble, compute_logits
from helix_jax.training.plan import TrainPlan
from helix_jax.training.ring import ring_attention
from helix_jax.training.state import Batch, TrainState, abstract_state

_MAX_LOGITS = 2**27  # on a device at once: half a gigabyte

# (logits [B, S, V], targets [B, S], loss_mask [B, S]) -> scalar. None is the mean loss of the targets that count.
Loss = Callable[[Array, Array, Array], Array] | None
Dropout = Callable[[Array], Array]


class StepMetrics(NamedTuple):
    """The loss of a step before its update, and the norm of its gradient before the optimizer clips it."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def token_loss(plan: TrainPlan, weights: Weights, batch: Batch, dropout: Dropout | None = None) -> Array:
    """Return the cross-entropy of each target of a part, in nats, in the order of the batch [B, S]."""
    model, x_BSD = _run_model(plan, weights, batch, dropout)
    return _chunked_token_loss(plan, model, x_BSD, batch.targets_XBS)


def _run_model(plan: TrainPlan, weights: Weights, batch: Batch, dropout: Dropout | None) -> tuple[Transformer, Array]:
    """Return the model with the weights that it computes with, and its last hidden state [B, S, D]."""
    tokens_BS, _, document_start_BS, _ = batch
    position_BS = jnp.asarray(positions_by_rank(plan.layout, tokens_BS.shape[1])) - document_start_BS
    attention = _cudnn_attention if plan.uses_cudnn else ring_attention(plan.mesh, plan.layout, document_start_BS)
    ready = {name: x if name == "layers" else _gather(plan, name, x) for name, x in weights.items()}
    model = assemble(plan.model, ready)
    options = {"dropout": dropout or (lambda x_BSD: x_BSD), "wrap_layer": partial(_gather_layer, plan)}
    x_BSD, _ = model(tokens_BS, position_BS, attention, None, **options)
    return model, x_BSD


def _chunked_token_loss(plan: TrainPlan, model: Transformer, x_BSD: Array, targets_BS: Array) -> Array:
    """Compute the loss a chunk of positions of every rank at a time: all logits at once need too much memory."""
    B, S, D = x_BSD.shape
    ranks, parts = plan.layout.ranks, plan.mesh.shape[DP] * plan.mesh.shape[TP]
    chunks = _num_chunks(S // ranks, B * plan.model.vocab // parts)
    x_XBRcD = jnp.moveaxis(x_BSD.reshape(B, ranks, chunks, -1, D), 2, 0)
    targets_XBRc = jnp.moveaxis(targets_BS.reshape(B, ranks, chunks, -1), 2, 0)
    head_VD = model.head().astype(jnp.float32)  # its gradient is summed over the chunks in this type

    def chunk_loss(chunk: tuple[Array, Array]) -> Array:
        x_BRcD, targets_BRc = chunk
        x_BRcD = lax.with_sharding_constraint(x_BRcD, sharding(plan.mesh, SEQ_BSD))
        logits = compute_logits(plan.model, head_VD.astype(plan.dtype), x_BRcD)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets_BRc)

    loss_XBRc = lax.map(jax.checkpoint(chunk_loss), (x_XBRcD, targets_XBRc))
    return jnp.moveaxis(loss_XBRc, 0, 2).reshape(B, S)


def _num_chunks(slots: int, logits_per_slot: int) -> int:
    """Return into how many equal chunks `slots` are split so that none has more than _MAX_LOGITS, if possible."""
    least = min(slots, -(-slots * logits_per_slot // _MAX_LOGITS))
    return next(chunks for chunks in range(max(1, least), slots + 1) if slots % chunks == 0)


def _custom_loss(
    plan: TrainPlan, loss: Callable[..., Array], weights: Weights, batch: Batch, dropout: Dropout | None
) -> Array:
    """Apply a loss function to all logits of a part, with the positions in their natural order."""
    model, x_BSD = _run_model(plan, weights, batch, dropout)
    order = positions_by_rank(plan.layout, x_BSD.shape[1])
    arrays = (model.logits(x_BSD), batch.targets_XBS, batch.loss_mask_XBS)
    if plan.layout.ranks > 1:
        arrays = tuple(jnp.take(x, np.argsort(order), axis=1) for x in arrays)
    return loss(*arrays)


def _gather(plan: TrainPlan, name: str, weight: Array) -> Array:
    """Return a weight in the type that layers compute in, gathered over dp and cp."""
    return lax.with_sharding_constraint(weight.astype(plan.dtype), compute_sharding(plan.mesh, name, weight.shape))


def _gather_layer(plan: TrainPlan, layer: Layer) -> Callable[..., tuple[Array, Any]]:
    """Return a layer whose weights are gathered where it runs, and with remat once more in the backward pass."""
    graph, state = nnx.split(layer)
    parameters = dict(nnx.to_flat_state(state))
    weights = {path: parameter[...] for path, parameter in parameters.items()}

    def call(x_BSD: Array, *rest: Any) -> tuple[Array, Any]:
        def compute(weights: dict[Any, Array], x_BSD: Array) -> Array:
            x_BSD = lax.with_sharding_constraint(x_BSD, sharding(plan.mesh, SEQ_BSD))
            ready = [(path, parameters[path].replace(_gather(plan, str(path[-1]), x))) for path, x in weights.items()]
            return nnx.merge(graph, nnx.from_flat_state(ready))(x_BSD, *rest)[0]

        return (jax.checkpoint(compute) if plan.remat else compute)(weights, x_BSD), None

    return call


def _cudnn_attention(
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
    """Attend with cuDNN. It has no gradient of the log-sum-exp, so sinks and latents are not supported."""
    assert v_BTKH is not None
    assert sink_N is None
    left = None if window is None else (window - 1, 0)
    how: dict[str, Any] = {"scale": scale, "is_causal": True, "local_window_size": left, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, **how), state


def _train_step(
    plan: TrainPlan, optimizer: optax.GradientTransformation, loss: Loss, state: TrainState, batch: Batch
) -> tuple[StepMetrics, TrainState]:
    """Train on one batch.

    Args:
        plan: The mesh and the model.
        optimizer: Any optax optimizer. Pass the same object in every step: another one compiles again.
        loss: A function of all logits of a part, whose values are averaged over the parts of the batch. None is the
            mean of `token_loss` over the targets that count, computed without holding all logits.
        state: The state before the step. It is donated.
        batch: A batch of `shard_batch`.

    Returns:
        The metrics, and the state after the step.
    """
    places = jax.tree.map(lambda like: like.sharding, abstract_state(plan, optimizer))
    parts = len(batch.tokens_XBS)
    num_targets = jnp.maximum(batch.loss_mask_XBS.sum(), 1)
    key = jax.random.fold_in(jax.random.key(plan.seed), state.step)

    def part_loss(weights: Weights, part: Batch, index: Array) -> Array:
        dropout = make_dropout(plan.dropout, jax.random.fold_in(key, index))
        if loss is not None:
            return _custom_loss(plan, loss, weights, part, dropout) / parts
        loss_BS = token_loss(plan, weights, part, dropout)
        return jnp.where(part.loss_mask_XBS, loss_BS, 0).sum() / num_targets

    def add_part(total: tuple[Array, Weights], part: tuple[Batch, Array]) -> tuple[tuple[Array, Weights], None]:
        value, gradients = jax.value_and_grad(part_loss)(state.weights, *part)
        gradients = lax.with_sharding_constraint(gradients, places.weights)
        return jax.tree.map(jnp.add, total, (value, gradients)), None

    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.weights)
    (value, gradients), _ = lax.scan(add_part, zero, (batch, jnp.arange(parts)))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.weights)
    weights = cast(Weights, optax.apply_updates(state.weights, updates))
    after = TrainState(weights, without_weak_types(opt_state), state.step + 1)
    after = lax.with_sharding_constraint(after, places)
    return StepMetrics(value, optax.tree.norm(gradients)), after


train_step = jax.jit(_train_step, static_argnums=(0, 1, 2), donate_argnums=3)
eval_step = jax.jit(token_loss, static_argnums=0)


def make_dropout(rate: float, key: Array) -> Dropout | None:
    """Return a function that drops numbers, with another mask at each of its calls in the program; None at rate 0.

    Masks are drawn for positions in the order of the batch, so each cp draws others.
    """
    calls = itertools.count()

    def drop(x: Array) -> Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, next(calls)), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0)

    return drop if rate else None
