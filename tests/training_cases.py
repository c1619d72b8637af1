"""Cases that the tests of training share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from helix_jax.mesh import make_mesh
from helix_jax.training import (
    Sequences,
    TrainConfig,
    TrainPlan,
    init_state,
    make_optimizer,
    shard_batch,
    token_loss,
    train_step,
)
from tests.reference import TINY

CONFIG = TrainConfig(steps=50, batch=4, context=64, warmup_steps=5, learning_rate=1e-2)
BLOCK = 4


def train_plan(tp=1, cp=1, dp=1, model=TINY, dtype="float32", packed=True, **changes) -> TrainPlan:
    config = dataclasses.replace(CONFIG, **changes)
    return TrainPlan.from_config(config, model, make_mesh(tp, cp, dp), BLOCK, jnp.dtype(dtype), packed)


def packed_sequences(vocab: int = TINY.vocab) -> Sequences:
    """Four sequences, two of them with several documents."""
    tokens = np.random.default_rng(0).integers(0, vocab, (4, 65))
    start = np.zeros((4, 64), int)
    start[1, 20:], start[2, 50:], start[2, 60:] = 20, 50, 60
    mask = np.concatenate([start[:, 1:] == start[:, :-1], np.ones((4, 1), bool)], 1)
    return Sequences(tokens, start, mask)


def _recording(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer whose state also contains the last gradient, so that one program gives losses and gradients."""
    record = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
    )
    return optax.chain(record, optimizer)


OPTIMIZER = _recording(make_optimizer(CONFIG))


def losses_and_gradients(plan: TrainPlan, weights, sequences: Sequences, steps: int):
    """The losses of some steps, and the gradient of the first one."""
    state, losses, gradients = init_state(plan, OPTIMIZER, weights), [], None
    batch = shard_batch(plan, sequences, parts=plan.accumulate)
    for _ in range(steps):
        metrics, state = train_step(plan, OPTIMIZER, None, state, batch)
        losses.append(float(metrics.loss))
        if gradients is None:
            gradients = jax.tree.map(np.asarray, state.opt_state[0])
    return losses, gradients


def gradients_alone(plan: TrainPlan, weights, sequences: Sequences):
    """The gradients of the summed loss, without an optimizer."""
    batch = jax.tree.map(lambda x: x[0], shard_batch(plan, sequences))

    def loss(weights):
        return jnp.where(batch.loss_mask_XBS, token_loss(plan, weights, batch), 0).sum()

    state = init_state(plan, optax.sgd(0.0), weights)
    return jax.tree.map(np.asarray, jax.block_until_ready(jax.jit(jax.grad(loss))(state.weights)))


def largest_error(ours, expected) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs if b.any())
