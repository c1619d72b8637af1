"""Next-token training over a mesh: sequences are positions_by_rank over cp, heads and widths over tp, and what is kept over all.

Of the weights, and of what the optimizer remembers, a device keeps its share over dp, tp and cp alike, in float32.
"""

from helix_jax.training.plan import TrainConfig, TrainPlan
from helix_jax.training.state import Batch, TrainState, abstract_batch, abstract_state, shard_batch, init_state
from helix_jax.training.step import StepMetrics, eval_step, token_loss, train_step

LOG2_E = 1.4426950408889634

__all__ = [
    "LOG2_E",
    "Batch",
    "StepMetrics",
    "TrainConfig",
    "TrainState",
    "TrainPlan",
    "abstract_batch",
    "abstract_state",
    "shard_batch",
    "eval_step",
    "init_state",
    "token_loss",
    "train_step",
]
