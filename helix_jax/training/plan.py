"""The settings of training: of a run, and of its compiled step."""

import math
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.config import ModelConfig
from helix_jax.layout import BlockLayout
from helix_jax.mesh import CP, DP, TP, AnyMesh, first_device
from helix_jax.training.ring import check_length
from helix_jax.validation import check_int, check_type

_AMPERE, _HOPPER = 8, 9  # major numbers of the compute capability
_FLASH_WIDTH, _HOPPER_FLASH_WIDTH = 128, 256  # widest heads of cuDNN's backward pass


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains: batches, the default optimizer (AdamW), and evaluation. The table [train] of a config file.

    Args:
        steps: Steps of the whole run.
        batch: Sequences per step.
        context: Tokens per sequence.
        accumulate: Parts into which a batch is split to save memory. Their gradients are added.
        remat: Whether a layer keeps only its input, and is computed again in the backward pass.
        learning_rate: The peak, reached after the warm-up. From there a cosine decays to zero.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Decoupled weight decay of everything but norms, biases and sinks.
        clip_norm: The largest norm of the gradient.
        dropout: The fraction of what a layer adds to the residual stream that is dropped.
        held_out: The fraction of the tokens, at their end, that is not trained on.
        eval_every: Steps between evaluations of the held-out tokens, each followed by a checkpoint.
        seed: Determines the initial weights, the order of the data, passkeys and dropout.

    Raises:
        ValueError: A value is out of range, or `accumulate` does not divide the batch.
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
        for name, least in {"steps": 1, "batch": 1, "context": 2, "accumulate": 1, "eval_every": 1, "seed": 0}.items():
            check_int(name, getattr(self, name), least=least)
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}: give 0 or a positive number")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}: give at least 0 and fewer than {self.steps} steps")
        for name in ("dropout", "held_out"):
            _check_fraction(name, getattr(self, name))
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide the batch of {self.batch}: give a divisor")


@dataclass(frozen=True)
class TrainPlan:
    """How a mesh trains a model: everything that is compiled into the train step except optimizer and loss.

    Sequences are sharded over cp with the placement "striped", so that every rank has the same work.

    Args:
        model: The shape of the model.
        mesh: A mesh of `make_mesh`.
        block: Positions per block of the placement.
        dtype: The type that layers compute in. Weights and optimizer state are float32.
        packed: Whether a sequence may contain several documents. If not, and cp is 1, a GPU uses cuDNN's attention
            where it can.
        accumulate: Parts into which a batch is split.
        remat: Whether a layer keeps only its input, and is computed again in the backward pass.
        dropout: The fraction of what a layer adds to the residual stream that is dropped.
        seed: Determines random initial weights and dropout.

    Raises:
        TypeError: The model, the mesh or a number has the wrong type.
        ValueError: tp does not divide the heads, or a value is out of range.
    """

    model: ModelConfig
    mesh: AnyMesh
    block: int = 16
    dtype: DTypeLike = jnp.float32
    packed: bool = True
    accumulate: int = 1
    remat: bool = True
    dropout: float = 0.0
    seed: int = 0

    @classmethod
    def from_config(
        cls, config: TrainConfig, model: ModelConfig, mesh: AnyMesh, block: int, dtype: DTypeLike, packed: bool = True
    ) -> "TrainPlan":
        """Return the plan of a run, after checking that the mesh can share its batches.

        Raises:
            ValueError: As the class, or as `check_batch`.
        """
        step = {"accumulate": config.accumulate, "remat": config.remat, "dropout": config.dropout, "seed": config.seed}
        plan = cls(model, mesh, block, dtype, packed, **step)
        plan.check_batch(config.batch, config.context)
        return plan

    def __post_init__(self) -> None:
        check_type("model", self.model, ModelConfig, "a helix_jax.ModelConfig, the config of the model")
        check_type("mesh", self.mesh, AnyMesh, "a mesh of helix_jax.make_mesh(tp=..., cp=...)")
        tp = self.mesh.shape[TP]
        for name in ("heads", "kv_heads"):
            heads = getattr(self.model, name)
            if heads % tp and not (name == "kv_heads" and self.model.latent):
                raise ValueError(f"tp {tp} does not divide the {heads} {name}: choose a tp that does")
        check_int("accumulate", self.accumulate, least=1)
        check_int("seed", self.seed, least=0)
        _check_fraction("dropout", self.dropout)
        _ = self.layout  # validates the block

    @cached_property
    def layout(self) -> BlockLayout:
        """The assignment of positions to the cp ranks."""
        return BlockLayout(self.mesh.shape[CP], self.block, "striped")

    def check_batch(self, batch: int, context: int) -> None:
        """Check that a batch of `batch` sequences of `context` tokens can be trained on.

        Raises:
            ValueError: The context exceeds the model's positions, cp does not divide it evenly, or dp and `accumulate`
                do not divide the batch.
        """
        dp = self.mesh.shape[DP]
        if context > self.model.max_positions:
            raise ValueError(
                f"context {context} exceeds max_positions {self.model.max_positions}: "
                f"give shorter sequences, or raise max_positions"
            )
        check_length(self.layout, context)
        if batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide the batch of {batch}: give a divisor")
        part = batch // self.accumulate
        if part % dp:
            raise ValueError(
                f"dp {dp} does not divide the {part} sequences of a part of a batch: give a larger batch, or less dp"
            )

    @property
    def uses_cudnn(self) -> bool:
        """Whether attention uses cuDNN: for whole sequences of one document in bfloat16, if the GPU takes the heads."""
        plain = not (self.packed or self.model.sinks or self.model.latent) and self.layout.ranks == 1
        width, generation = self.model.head_width, self._cuda_generation
        widest = _HOPPER_FLASH_WIDTH if generation >= _HOPPER else _FLASH_WIDTH
        supported = generation >= _AMPERE and width % 8 == 0 and width <= widest
        return plain and supported and jnp.dtype(self.dtype) == jnp.bfloat16

    @property
    def _cuda_generation(self) -> int:
        """The major compute capability of NVIDIA GPUs, 0 for other devices."""
        generation = str(getattr(first_device(self.mesh), "compute_capability", "")).split(".")[0]
        return int(generation) if generation.isdigit() else 0

    @property
    def device_kind(self) -> str:
        """The name of the mesh's devices; empty for an abstract mesh."""
        return self.mesh.devices.flat[0].device_kind if isinstance(self.mesh, Mesh) else ""


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}: give a fraction from 0 to below 1")
