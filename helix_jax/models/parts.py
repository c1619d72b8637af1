"""What every module of a model is made of: parameters named by their shape, lookups, norms, gated feed-forwards.

A parameter's name says all about it: `q_DNH` has the shape [D, N, H], is sharded as mesh.WEIGHTS["q_DNH"] says, and is
initialised for the fan-in that stands beside it.
"""

import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from helix_jax.config import ModelConfig
from helix_jax.numerics import einsum


class Parameters:
    """Makes the parameters of a model: matrices normal of variance 1 / fan-in, norms that change nothing, biases 0.

    rngs: None makes shapes without values, and at once: tracing 126 layers for them took 7 s. ff_width: which
    feed-forward's width F stands for, if not the dense layers'.
    """

    def __init__(self, config: ModelConfig, devices: int, rngs: nnx.Rngs | None, ff_width: int | None = None):
        self.config, self.devices, self.rngs = config, devices, rngs
        self.dims = config.dims(devices, ff_width)

    def of_width(self, ff_width: int) -> "Parameters":
        return Parameters(self.config, self.devices, self.rngs, ff_width)

    def matrix(self, name: str, fan_in: str, gain: float = 1.0) -> nnx.Param[Array]:
        std = gain / math.sqrt(math.prod(self.dims[letter] for letter in fan_in))
        return self._make(name, lambda shape, rngs: std * jax.random.normal(rngs.params(), shape))

    def onto_residual(self, name: str, fan_in: str) -> nnx.Param[Array]:
        """A matrix whose product is added to the residual stream: smaller, the more layers add to it."""
        return self.matrix(name, fan_in, gain=(2 * self.config.layers) ** -0.5)

    def norm(self, name: str) -> nnx.Param[Array]:
        neutral = 0.0 if self.config.norm_offset else 1.0
        return self._make(name, lambda shape, _: jnp.full(shape, neutral))

    def bias(self, name: str) -> nnx.Param[Array]:
        return self._make(name, lambda shape, _: jnp.zeros(shape))

    def _make(self, name: str, value: Callable[[tuple[int, ...], nnx.Rngs], Array]) -> nnx.Param[Array]:
        shape = tuple(self.dims[letter] for letter in name.split("_")[-1])
        if self.rngs is None:
            return nnx.Param(cast(Array, jax.ShapeDtypeStruct(shape, jnp.float32)))
        return nnx.Param(value(shape, self.rngs))


@jax.custom_vjp
def lookup(table_VD: Array, index_BT: Array) -> Array:
    """Rows of a table. Its gradient is summed in float32: in bfloat16 a sum stops growing after 256 equal lookups."""
    return jnp.take(table_VD, index_BT, axis=0, mode="clip")


def _looked_up(table_VD: Array, index_BT: Array) -> tuple[Array, tuple[Array, Array]]:
    return lookup(table_VD, index_BT), (table_VD, index_BT)


def _summed(given: tuple[Array, Array], found_BTD: Array) -> tuple[Array, np.ndarray]:
    table_VD, index_BT = given
    summed_VD = jnp.zeros(table_VD.shape, jnp.float32).at[index_BT].add(found_BTD.astype(jnp.float32), mode="clip")
    return summed_VD.astype(table_VD.dtype), np.zeros(index_BT.shape, jax.dtypes.float0)


lookup.defvjp(_looked_up, _summed)


def rms_norm(x: Array, weight: nnx.Param[Array], config: ModelConfig, eps: float | None = None) -> Array:
    """x / rms(x) * weight over the last axis, in float32. eps: if not the config's."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + (config.norm_eps if eps is None else eps))
    gain = weight[...].astype(jnp.float32)
    return (x32 * (1 + gain if config.norm_offset else gain)).astype(x.dtype)


def gated(gate: Array, up: Array, config: ModelConfig) -> Array:
    """The activation of a gated feed-forward: act(gate) * up."""
    if config.activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    return jax.nn.silu(gate) * up


def clamped_gated(gate: Array, up: Array, limit: float, config: ModelConfig) -> Array:
    """gpt-oss's: both clamped to the limit, the gate's sigmoid steeper, one added to what it gates."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)


class FeedForward(nnx.Module):
    """The dense one: gate, up, down."""

    def __init__(self, config: ModelConfig, make: Parameters):
        self.config = config
        self.gate_DF = make.matrix("gate_DF", "D")
        self.up_DF = make.matrix("up_DF", "D")
        self.down_FD = make.onto_residual("down_FD", "F")

    def __call__(self, x_BTD: Array) -> Array:
        gate_BTF = einsum("btd,df->btf", x_BTD, self.gate_DF[...])
        up_BTF = einsum("btd,df->btf", x_BTD, self.up_DF[...])
        return einsum("btf,fd->btd", gated(gate_BTF, up_BTF, self.config), self.down_FD[...])
