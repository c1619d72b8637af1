"""Next-token training over a mesh: sequences are dealt over cp, heads and widths over tp, and what is kept over all.

Of the weights, and of what the optimizer remembers, a device keeps its share over dp, tp and cp alike, in float32.
"""

from helix_jax.train.run import TrainConfig, Training
from helix_jax.train.state import Batch, TrainState, abstract_batch, abstract_state, deal, start
from helix_jax.train.step import Told, evaluate, surprise, train_step

LOG2_E = 1.4426950408889634

__all__ = [
    "LOG2_E",
    "Batch",
    "Told",
    "TrainConfig",
    "TrainState",
    "Training",
    "abstract_batch",
    "abstract_state",
    "deal",
    "evaluate",
    "start",
    "surprise",
    "train_step",
]
