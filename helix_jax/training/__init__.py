"""Next-token training on a mesh: sequences sharded over cp, heads and widths over tp, the batch over dp.

Weights and optimizer state are float32, and sharded over all devices.

    import optax
    from helix_jax import training

    model = training.fit(config, batches, optax.adamw(1e-3), steps=100)
"""

from helix_jax.training.checkpointer import Checkpointer
from helix_jax.training.data import Corpus, Sequences, make_sequences, masked_sequences, open_corpus
from helix_jax.training.fit import fit, train_steps
from helix_jax.training.log import BITS_PER_NAT
from helix_jax.training.plan import TrainConfig, TrainPlan
from helix_jax.training.state import (
    Batch,
    TrainState,
    abstract_batch,
    abstract_state,
    init_state,
    make_optimizer,
    shard_batch,
)
from helix_jax.training.step import StepMetrics, eval_step, token_loss, train_step

__all__ = [
    "BITS_PER_NAT",
    "Batch",
    "Checkpointer",
    "Corpus",
    "Sequences",
    "StepMetrics",
    "TrainConfig",
    "TrainPlan",
    "TrainState",
    "abstract_batch",
    "abstract_state",
    "eval_step",
    "fit",
    "init_state",
    "make_optimizer",
    "make_sequences",
    "masked_sequences",
    "open_corpus",
    "shard_batch",
    "token_loss",
    "train_step",
    "train_steps",
]
