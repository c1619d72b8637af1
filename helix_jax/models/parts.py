"""The parts of all models: parameters named by their shape, lookups, norms, and gated feed-forwards.

The name of a parameter determines its shape and its sharding: `q_DNH` has the shape [D, N, H], and its PartitionSpec is
mesh.WEIGHTS["q_DNH"].
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
    """Makes the parameters of a model: normal matrices of variance 1 / fan-in, norms of gain 1, and biases of 0.

    Args:
        config: The model's config.
        devices: How many devices share the weights.
        rngs: The source of the random values. None makes shapes without values, and does not trace: tracing the
            initialisation of 126 layers only for their shapes took 7 s.
        ff_width: The size of F, if it is not that of a dense layer.
    """

    def __init__(self, config: ModelConfig, devices: int, rngs: nnx.Rngs | None, ff_width: int | None = None):
        self.config, self.devices, self.rngs = config, devices, rngs
        self.dims = config.dims(devices, ff_width)

    def of_width(self, ff_width: int) -> "Parameters":
        """Return the same with another size of F."""
        return Parameters(self.config, self.devices, self.rngs, ff_width)

    def matrix(self, name: str, fan_in: str, gain: float = 1.0) -> nnx.Param[Array]:
        """Make a matrix. `fan_in` are the letters of its input dimensions, `gain` is a factor on its values."""
        std = gain / math.sqrt(math.prod(self.dims[letter] for letter in fan_in))
        return self._make(name, lambda shape, rngs: std * jax.random.normal(rngs.params(), shape))

    def onto_residual(self, name: str, fan_in: str) -> nnx.Param[Array]:
        """Make a matrix whose product is added to the residual stream. It is smaller, the more layers there are."""
        return self.matrix(name, fan_in, gain=(2 * self.config.layers) ** -0.5)

    def norm(self, name: str) -> nnx.Param[Array]:
        """Make the weight of a norm."""
        neutral = 0.0 if self.config.norm_offset else 1.0
        return self._make(name, lambda shape, _: jnp.full(shape, neutral, jnp.float32))

    def bias(self, name: str) -> nnx.Param[Array]:
        """Make a bias."""
        return self._make(name, lambda shape, _: jnp.zeros(shape))

    def _make(self, name: str, value: Callable[[tuple[int, ...], nnx.Rngs], Array]) -> nnx.Param[Array]:
        shape = tuple(self.dims[letter] for letter in name.split("_")[-1])
        if self.rngs is None:
            return nnx.Param(cast(Array, jax.ShapeDtypeStruct(shape, jnp.float32)))
        return nnx.Param(value(shape, self.rngs))


@jax.custom_vjp
def lookup(table_VD: Array, index_BT: Array) -> Array:
    """Look up rows of a table. Its gradient is summed in float32: bfloat16 sums stop growing after 256 equal terms."""
    return jnp.take(table_VD, index_BT, axis=0, mode="clip")


def _lookup_forward(table_VD: Array, index_BT: Array) -> tuple[Array, tuple[Array, Array]]:
    return lookup(table_VD, index_BT), (table_VD, index_BT)


def _lookup_backward(residuals: tuple[Array, Array], gradient_BTD: Array) -> tuple[Array, np.ndarray]:
    table_VD, index_BT = residuals
    sum_VD = jnp.zeros(table_VD.shape, jnp.float32).at[index_BT].add(gradient_BTD.astype(jnp.float32), mode="clip")
    return sum_VD.astype(table_VD.dtype), np.zeros(index_BT.shape, jax.dtypes.float0)


lookup.defvjp(_lookup_forward, _lookup_backward)


def rms_norm(x: Array, weight: nnx.Param[Array], config: ModelConfig, eps: float | None = None) -> Array:
    """Return x / rms(x) * weight over the last axis, computed in float32. `eps` replaces that of the config."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + (config.norm_eps if eps is None else eps))
    return _with_gain(x32, weight, config).astype(x.dtype)


def rms_norm_heads(x_BTNH: Array, weight: nnx.Param[Array], config: ModelConfig, heads: int) -> Array:
    """Return x / rms(x) * weight, where the mean is over all heads of a token, computed in float32.

    Args:
        x_BTNH: The heads. If a mesh shares them, the sum over the heads becomes an all-reduce over tp.
        weight: A weight per number.
        config: The model's config.
        heads: Over how many heads the mean is. The others are padding, whose numbers are zeros. If all heads have
            equally many copies, the mean over all of them is that over one of each.
    """
    x32 = x_BTNH.astype(jnp.float32)
    mean = jnp.sum(x32 * x32, (-2, -1), keepdims=True) / (heads * x32.shape[-1])
    return _with_gain(x32 * jax.lax.rsqrt(mean + config.norm_eps), weight, config).astype(x_BTNH.dtype)


def _with_gain(x32: Array, weight: nnx.Param[Array], config: ModelConfig) -> Array:
    gain = weight[...].astype(jnp.float32)
    return x32 * (1 + gain if config.norm_offset else gain)


def gated(gate: Array, up: Array, config: ModelConfig) -> Array:
    """Return the hidden state of a gated feed-forward: activation(gate) * up."""
    if config.activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    return jax.nn.silu(gate) * up


def clamped_gated(gate: Array, up: Array, limit: float, config: ModelConfig) -> Array:
    """Return the hidden state of gpt-oss: gate and up are clamped, the sigmoid is scaled, and 1 is added to up."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)


class FeedForward(nnx.Module):
    """A dense gated feed-forward."""

    def __init__(self, config: ModelConfig, make: Parameters):
        self.config = config
        self.gate_DF = make.matrix("gate_DF", "D")
        self.up_DF = make.matrix("up_DF", "D")
        self.down_FD = make.onto_residual("down_FD", "F")

    def __call__(self, x_BTD: Array) -> Array:
        gate_BTF = einsum("btd,df->btf", x_BTD, self.gate_DF[...])
        up_BTF = einsum("btd,df->btf", x_BTD, self.up_DF[...])
        return einsum("btf,fd->btd", gated(gate_BTF, up_BTF, self.config), self.down_FD[...])
