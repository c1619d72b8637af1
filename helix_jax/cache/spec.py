"""Describes what a model caches."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from helix_jax.config import ModelConfig


@jax.tree_util.register_static  # a cache carries its spec, which is static in a jitted program
@dataclass(frozen=True)
class CacheSpec:
    """The shape and type of what every layer of a model caches per token.

    Args:
        layers: The number of layers.
        kv_heads: Key/value heads. 1 for a latent.
        head_width: Numbers per token and head.
        dtype: The type of the cached numbers.
        latent: Whether one vector per token stands for the keys and values of all heads. Such a layer has one array
            instead of two, and every device of tp stores all of it.
    """

    layers: int
    kv_heads: int
    head_width: int
    dtype: DTypeLike
    latent: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # one form, because a program is compiled for each

    @property
    def parts(self) -> int:
        """The arrays of numbers per token: keys and values, or the latent."""
        return 1 if self.latent else 2

    @classmethod
    def from_config(cls, config: ModelConfig, dtype: DTypeLike) -> "CacheSpec":
        """Return the spec of a model whose cache has the type `dtype`."""
        return cls(config.layers, config.kv_heads, config.cache_width, dtype, latent=config.latent is not None)
