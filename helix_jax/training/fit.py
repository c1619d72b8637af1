"""The training loop: a model, batches, any optax optimizer and any loss."""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import optax

from helix_jax.config import ModelConfig
from helix_jax.mesh import make_mesh
from helix_jax.models.transformer import Transformer, assemble
from helix_jax.training.data import Sequences, make_sequences
from helix_jax.training.plan import TrainPlan
from helix_jax.training.state import Batch, TrainState, init_state, shard_batch
from helix_jax.training.step import Loss, StepMetrics, train_step
from helix_jax.validation import check_in_vocabulary, check_int, check_type

_log = logging.getLogger("helix_jax")

OnStep = Callable[[int, StepMetrics, TrainState], None]


def fit(
    model: Transformer | ModelConfig,
    batches: Iterable[Any],
    optimizer: optax.GradientTransformation,
    *,
    steps: int | None = None,
    loss: Loss = None,
    plan: TrainPlan | None = None,
    state: TrainState | None = None,
    on_step: OnStep | None = None,
) -> Transformer:
    """Train a model on batches of tokens.

    Args:
        model: The model to start from, with weights on any devices, or a config for random weights.
        batches: Arrays of token ids [B, S + 1], or `Sequences`, which also have a loss mask and document starts
            (`make_sequences`, `masked_sequences`). Any iterable will do. Pass the same shape in every step: another
            shape compiles again. B must be a multiple of `accumulate * dp`, and S of `block * cp`. The next batch is
            fetched while the current step runs.
        optimizer: Any optax optimizer.
        steps: The total number of steps, including those that `state` has done. None: until the batches end.
        loss: A function of (logits [B, S, V], targets [B, S], loss_mask [B, S]) that returns a scalar. It needs memory
            for all logits at once. With `accumulate`, it is called for each part of the batch, and the results are
            averaged: a masked mean is then not weighted by the number of targets. None is the mean cross-entropy of the
            targets where the loss mask is true, without that memory.
        plan: The mesh and the training options. None: all devices on cp, float32.
        state: A state to continue from, instead of the weights of `model`. It is donated: do not use it afterwards.
        on_step: Called after every step with the number of steps done, the metrics, and the state, which contains the
            optimizer state. The next step donates it: save or copy what is needed.

    Returns:
        The trained model, with float32 weights that are sharded as training stores them. `helix_jax.save` writes it,
        and `helix_jax.shard` places it for decoding.

    Raises:
        TypeError: The model, the optimizer, a batch or another argument has the wrong type.
        ValueError: A batch has the wrong shape or a token outside the vocabulary, there are no batches, the plan is for
            another model, or the loss is not a scalar.
    """
    config = _check_model(model)
    _check_arguments(optimizer, batches, loss, plan, state, on_step)
    if steps is not None:
        check_int("steps", steps, least=1)
    plan = TrainPlan(config, make_mesh()) if plan is None else plan
    if plan.model != config:
        raise ValueError("plan.model differs from the config of the model: create the plan with this config")
    if state is None:
        state = init_state(plan, optimizer, model.weights() if isinstance(model, Transformer) else None)
    first = int(state.step)
    remaining = None if steps is None else max(0, steps - first)
    done = first
    for metrics, after in train_steps(plan, optimizer, loss, state, islice(batches, remaining)):
        done, state = done + 1, after
        if on_step:
            on_step(done, metrics, after)
    _check_end(done, first, steps)
    return assemble(config, state.weights)


def train_steps(
    plan: TrainPlan, optimizer: optax.GradientTransformation, loss: Loss, state: TrainState, batches: Iterable[Any]
) -> Iterator[tuple[StepMetrics, TrainState]]:
    """Train on every batch. Yields the metrics and the state after each step. Arguments and errors as `fit`."""
    iterator = (_to_batch(plan, batch) for batch in batches)
    batch = next(iterator, None)
    if batch is not None and loss is not None:
        _check_loss(plan, loss, batch)
    while batch is not None:
        metrics, state = train_step(plan, optimizer, loss, state, batch)
        batch = next(iterator, None)  # while the devices work
        # On a CPU that is split into devices never more than one step may be queued.
        yield jax.block_until_ready(metrics), state


def _to_batch(plan: TrainPlan, batch: Any) -> Batch:
    if isinstance(batch, Sequences):
        sequences = make_sequences(batch.tokens_BS, batch.loss_mask_BS, batch.document_start_BS)
    else:
        sequences = make_sequences(batch)
    tokens_BS = sequences.tokens_BS
    plan.check_batch(tokens_BS.shape[0], tokens_BS.shape[1] - 1)
    check_in_vocabulary("the batch", (int(tokens_BS.min()), int(tokens_BS.max())), plan.model.vocab)
    return shard_batch(plan, sequences, parts=plan.accumulate)


def _check_model(model: Any) -> ModelConfig:
    if isinstance(model, Transformer):
        return model.config
    if isinstance(model, ModelConfig):
        return model
    raise TypeError(f"the model is a {type(model).__name__}: give a Transformer or a ModelConfig")


def _check_arguments(optimizer: Any, batches: Any, loss: Any, plan: Any, state: Any, on_step: Any) -> None:
    """Check the types of the arguments of `fit`."""
    _check_optimizer(optimizer)
    check_type("batches", batches, Iterable, "a list of batches, or an iterator")
    check_type("plan", plan, TrainPlan | None, "a helix_jax.training.TrainPlan(config, mesh)")
    check_type("state", state, TrainState | None, "a TrainState, as on_step receives it")
    check_type("loss", loss, Callable | None, "a function")
    check_type("on_step", on_step, Callable | None, "a function")


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}: give an optax optimizer, like optax.adamw(1e-3)"
        )


def _check_loss(plan: TrainPlan, loss: Callable[..., Any], batch: Batch) -> None:
    """Check that the loss is a scalar that depends on arrays, without computing it."""
    _, B, S = batch.tokens_XBS.shape
    like = jax.ShapeDtypeStruct
    logits = like((B, S, plan.model.vocab), jnp.float32)
    returned: list[Any] = []

    def call(*arrays: jax.Array) -> None:
        returned.append(loss(*arrays))

    jax.eval_shape(call, logits, like((B, S), jnp.int32), like((B, S), bool))
    [value] = returned
    if not isinstance(value, jax.Array):
        raise ValueError(f"the loss returned a {type(value).__name__}: return a scalar array computed from the logits")
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"the loss returned {value.dtype} of shape={value.shape}: return a scalar of type float32")


def _check_end(done: int, first: int, steps: int | None) -> None:
    if done == first and (steps is None or first < steps):
        raise ValueError("batches is empty: give at least one, and no iterator that has been used up")
    if steps is not None and done < steps:
        _log.warning("the batches ended after step %d: %d steps were requested", done, steps)
