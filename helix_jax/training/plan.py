"""What a training run is: its settings, checked, and everything that is compiled into its step."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.config import ModelConfig
from helix_jax.layout import BlockLayout
from helix_jax.mesh import CP, DP, TP, AnyMesh
from helix_jax.training.ring import check_length


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
class TrainPlan:
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
        """Whether cuDNN attends: whole sequences of one document each, in bfloat16, of heads that the GPU takes."""
        plain = not (self.documents or self.model.sinks or self.model.latent) and self.layout.ranks == 1
        width, generation = self.model.head_width, self._cuda_generation
        takes = generation >= 8 and width % 8 == 0 and width <= (256 if generation >= 9 else 128)
        return plain and takes and jnp.dtype(self.dtype) == jnp.bfloat16

    @property
    def _cuda_generation(self) -> int:
        """8 is Ampere, 9 is Hopper; 0 of anything but NVIDIA's GPUs."""
        device = self.mesh.devices.flat[0] if isinstance(self.mesh, Mesh) else None
        generation = str(getattr(device, "compute_capability", "")).split(".")[0]
        return int(generation) if generation.isdigit() else 0

    @property
    def device_kind(self) -> str:
        """What the mesh's devices are called; nothing of a mesh whose devices are not there."""
        return self.mesh.devices.flat[0].device_kind if isinstance(self.mesh, Mesh) else ""
