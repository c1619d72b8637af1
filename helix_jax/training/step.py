"""The train step: the token_loss of each next token, its gradients, and what the optimizer makes of them.

A layer's weights are gathered over dp and cp where it runs, in the type that it computes in; its gradients go back to
their shares.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from helix_jax.layout import positions_by_rank
from helix_jax.mesh import SEQ_BSD, DP, TP, compute_sharding, sharding
from helix_jax.models.transformer import Layer, Transformer, Weights, assemble, compute_logits
from helix_jax.training.ring import ring_attention
from helix_jax.training.plan import TrainPlan
from helix_jax.training.state import Batch, TrainState, abstract_state, make_optimizer

_LOGITS = 2**27  # of a device at once: half a gigabyte


def token_loss(run: TrainPlan, weights: Weights, batch: Batch, drop: Callable[[Array], Array] | None = None) -> Array:
    """Nats of each target of one part, in the order of the batch [B, S]."""
    tokens_BS, targets_BS, document_start_BS, _ = batch
    position_BS = jnp.asarray(positions_by_rank(run.layout, tokens_BS.shape[1])) - document_start_BS
    attention = _flash_attention if run.flash else ring_attention(run.mesh, run.layout, document_start_BS)
    ready = {name: x if name == "layers" else _ready(run, name, x) for name, x in weights.items()}
    model = assemble(run.model, ready)
    states, drop = (None,) * run.model.layers, drop or (lambda x_BSD: x_BSD)
    x_BSD, _ = model(tokens_BS, position_BS, attention, states, drop=drop, around=lambda layer: _gathered(run, layer))
    return _nats(run, model, x_BSD, targets_BS)


def _nats(run: TrainPlan, model: Transformer, x_BSD: Array, targets_BS: Array) -> Array:
    """Of each target, a piece of every rank's share at a time: all logits of a long sequence are too many to keep."""
    B, S, D = x_BSD.shape
    ranks, parts = run.layout.ranks, run.mesh.shape[DP] * run.mesh.shape[TP]
    pieces = _pieces(S // ranks, B * run.model.vocab // parts)
    x_XBRcD = jnp.moveaxis(x_BSD.reshape(B, ranks, pieces, -1, D), 2, 0)
    targets_XBRc = jnp.moveaxis(targets_BS.reshape(B, ranks, pieces, -1), 2, 0)
    head_VD = model.head().astype(jnp.float32)  # in which its gradient is summed over the pieces

    def one_piece(given: tuple[Array, Array]) -> Array:
        x_BRcD, targets_BRc = given
        x_BRcD = lax.with_sharding_constraint(x_BRcD, sharding(run.mesh, SEQ_BSD))
        logits = compute_logits(run.model, head_VD.astype(run.dtype), x_BRcD)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets_BRc)

    nats_XBRc = lax.map(jax.checkpoint(one_piece), (x_XBRcD, targets_XBRc))
    return jnp.moveaxis(nats_XBRc, 0, 2).reshape(B, S)


def _pieces(slots: int, logits_per_slot: int) -> int:
    """Into how many equal pieces a rank's share is cut, so that none has more than _LOGITS, if that can be."""
    least = min(slots, -(-slots * logits_per_slot // _LOGITS))
    return next(pieces for pieces in range(max(1, least), slots + 1) if slots % pieces == 0)


def _ready(run: TrainPlan, name: str, weight: Array) -> Array:
    """A weight as it computes: cast, and whole but for tp."""
    return lax.with_sharding_constraint(weight.astype(run.dtype), compute_sharding(run.mesh, name, weight.shape))


def _gathered(run: TrainPlan, layer: Layer) -> Callable[..., tuple[Array, Any]]:
    """A layer whose weights are made ready where it runs, on the way back once more."""
    graph, state = nnx.split(layer)
    parameters = dict(nnx.to_flat_state(state))
    weights = {path: parameter[...] for path, parameter in parameters.items()}

    def call(x_BSD: Array, *rest: Any) -> tuple[Array, Any]:
        def compute(weights: dict[Any, Array], x_BSD: Array) -> Array:
            x_BSD = lax.with_sharding_constraint(x_BSD, sharding(run.mesh, SEQ_BSD))
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


class StepMetrics(NamedTuple):
    """Of a step, before its update: the mean token_loss in nats, and the norm of the gradient before it is clipped."""

    nats: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def _train_step(run: TrainPlan, state: TrainState, batch: Batch) -> tuple[StepMetrics, TrainState]:
    """One step on a batch, and the state after it."""
    places = jax.tree.map(lambda like: like.sharding, abstract_state(run))
    counted = jnp.maximum(batch.loss_mask_XBS.sum(), 1)
    key = jax.random.fold_in(jax.random.key(run.config.seed), state.step)

    def loss(weights: Weights, part: Batch, index: Array) -> Array:
        nats_BS = token_loss(run, weights, part, dropout(run.config.dropout, jax.random.fold_in(key, index)))
        return jnp.where(part.loss_mask_XBS, nats_BS, 0).sum() / counted

    def add(sofar: tuple[Array, Weights], part: tuple[Batch, Array]) -> tuple[tuple[Array, Weights], None]:
        found = jax.value_and_grad(loss)(state.weights, *part)
        found = found[0], lax.with_sharding_constraint(found[1], places.weights)
        return jax.tree.map(jnp.add, sofar, found), None

    nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.weights)
    (nats, gradients), _ = lax.scan(add, nothing, (batch, jnp.arange(len(batch.tokens_XBS))))
    updates, opt_state = make_optimizer(run.config).update(gradients, state.opt_state, state.weights)
    weights = cast(Weights, optax.apply_updates(state.weights, updates))
    after = lax.with_sharding_constraint(TrainState(weights, opt_state, state.step + 1), places)
    return StepMetrics(nats, optax.tree.norm(gradients)), after


train_step = jax.jit(_train_step, static_argnums=0, donate_argnums=1)
eval_step = jax.jit(token_loss, static_argnums=0)


def dropout(rate: float, key: Array) -> Callable[[Array], Array] | None:
    """A different mask at each of its places in the program, over positions as they are positions_by_rank: each cp has its own."""
    places = itertools.count()

    def drop(x: Array) -> Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, next(places)), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0)

    return drop if rate else None
