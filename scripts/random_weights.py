"""Creates random weights and caches on the devices of a mesh. A step takes as long with them as with real ones."""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from helix_jax.abstract import abstract_weights
from helix_jax.config import ModelConfig
from helix_jax.models.transformer import Weights

WEIGHT_SCALE = 0.02


def make_random_weights(config: ModelConfig, mesh: Mesh, dtype: DTypeLike) -> Weights:
    """Create the weights of a model, one parameter at a time, each with its sharding.

    The padding is random too, which does not change the time of a step.

    Args:
        config: The model.
        mesh: The mesh that decodes.
        dtype: The type of the weights. A few parameters are float32 nevertheless.
    """
    abstract, structure = jax.tree_util.tree_flatten_with_path(abstract_weights(config, mesh, dtype))
    weights = [
        compile_draw(str(path[-1].key), like.shape, like.dtype, like.sharding)(seed)
        for seed, (path, like) in enumerate(abstract)
    ]
    return jax.tree_util.tree_unflatten(structure, weights)


@cache  # the layers share one compilation
def compile_draw(name: str, shape: tuple[int, ...], dtype: DTypeLike, where: Sharding) -> Callable[[int], Array]:
    """Return a jitted function that creates a parameter from a seed. Norms are ones."""

    def draw(seed: Array) -> Array:
        return jnp.ones(shape, dtype) if "norm" in name else make_noise(shape, dtype, seed, WEIGHT_SCALE)

    return jax.jit(draw, out_shardings=where)


@partial(jax.jit, donate_argnums=0)
def fill_with_noise(zeros_AKWH: Array, seed: Array | int) -> Array:
    """Replace an array of zeros by random numbers, in place."""
    return zeros_AKWH + make_noise(zeros_AKWH.shape, zeros_AKWH.dtype, seed)


def make_noise(shape: tuple[int, ...], dtype: DTypeLike, seed: Array | int, scale: float = 1.0) -> Array:
    """Compute numbers of mean 0 and standard deviation `scale`, each a hash of its index.

    XLA fuses this into one loop, in which each device writes its shard without temporary memory. The random bits of
    jax.random would be arrays of their own.
    """
    bits = jnp.asarray(seed, jnp.uint32)
    for axis in range(len(shape)):
        along_axis = [size if index == axis else 1 for index, size in enumerate(shape)]
        bits = mix_bits(bits + lax.broadcasted_iota(jnp.uint32, along_axis, axis) * np.uint32(0x9E3779B9))
    uniform = lax.bitcast_convert_type(bits, jnp.int32).astype(jnp.float32) * 2.0**-31
    return (3**0.5 * scale * uniform).astype(dtype)


def mix_bits(bits: Array) -> Array:
    """Apply the last step of MurmurHash3, after which each bit depends on all bits of the input."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
