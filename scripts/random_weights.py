"""Weights and caches of random numbers, made where they lie: a step takes its usual time over them."""

from collections.abc import Callable
from functools import cache as cached
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from helix_jax.checkpoint.parameters import parameter_dtype
from helix_jax.config import ModelConfig
from helix_jax.mesh import weight_sharding
from helix_jax.models.transformer import Transformer, Weights

WEIGHT_SCALE = 0.02


def random_weights(config: ModelConfig, mesh: Mesh, dtype: DTypeLike) -> Weights:
    """Made where they lie, one by one. The padding is random too, which takes no other time."""
    padded = nnx.to_flat_state(nnx.state(Transformer(config, devices=mesh.size, rngs=None), nnx.Param))
    made = []
    for seed, (path, parameter) in enumerate(padded):
        make = maker(str(path[-1]), parameter.shape, parameter_dtype(path, dtype), weight_sharding(mesh, str(path[-1])))
        made.append((path, make(seed)))
    return nnx.to_pure_dict(nnx.from_flat_state(made))


@cached  # of all layers one compilation
def maker(name: str, shape: tuple[int, ...], dtype: DTypeLike, where: Sharding) -> Callable[[int], Array]:
    def make(seed: Array) -> Array:
        return jnp.ones(shape, dtype) if "norm" in name else noise(shape, dtype, seed, WEIGHT_SCALE)

    return jax.jit(make, out_shardings=where)


@partial(jax.jit, donate_argnums=0)
def filled(zeros_AKWH: Array, seed: Array | int) -> Array:
    return zeros_AKWH + noise(zeros_AKWH.shape, zeros_AKWH.dtype, seed)


def noise(shape: tuple[int, ...], dtype: DTypeLike, seed: Array | int, scale: float = 1.0) -> Array:
    """Numbers of mean 0 and standard deviation `scale`, each a hash of where it stands.

    It is all one loop: each device writes its part and needs no room beside it. The bits of jax.random are arrays.
    """
    bits = jnp.asarray(seed, jnp.uint32)
    for axis in range(len(shape)):
        own = [size if at == axis else 1 for at, size in enumerate(shape)]
        bits = mixed(bits + lax.broadcasted_iota(jnp.uint32, own, axis) * np.uint32(0x9E3779B9))
    uniform = lax.bitcast_convert_type(bits, jnp.int32).astype(jnp.float32) * 2.0**-31
    return (3**0.5 * scale * uniform).astype(dtype)


def mixed(bits: Array) -> Array:
    """The last step of MurmurHash3: each bit comes to depend on all."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
