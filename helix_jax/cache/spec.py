"""Describes what a model caches: a spec for each group of layers that cache alike."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from helix_jax.config import ModelConfig


@jax.tree_util.register_static  # a cache carries its spec, which is static in a jitted program
@dataclass(frozen=True)
class CacheSpec:
    """What each layer of a cache group caches per token. The layers of a group share a pool and a page table.

    A new kind of layer, such as one with a recurrent state, gets a group of its own: a spec that says so here, its
    arrays in `KVCache`, and their use in `helix_attention`.

    Args:
        layers: The number of layers.
        kv_heads: Key/value heads. 1 for a latent.
        head_width: Numbers per token and head.
        dtype: The type of the cached numbers.
        latent: Whether one vector per token stands for the keys and values of all heads. Such a layer has one array
            instead of two, and every device of tp stores all of it.
        window: How many positions a query sees, its own included. Older ones need not be kept. None: all.
    """

    layers: int
    kv_heads: int
    head_width: int
    dtype: DTypeLike
    latent: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # one form, because a program is compiled for each

    @property
    def parts(self) -> int:
        """The arrays of numbers per token: keys and values, or the latent."""
        return 1 if self.latent else 2


def cache_specs(config: ModelConfig, dtype: DTypeLike) -> tuple[CacheSpec, ...]:
    """Return the spec of each cache group of a model. The group of layers that see all positions is the first.

    Args:
        config: The model.
        dtype: The type of the cached numbers.
    """
    same = {"kv_heads": config.kv_heads, "head_width": config.cache_width, "dtype": dtype}
    same["latent"] = config.latent is not None
    return tuple(CacheSpec(layers, window=window, **same) for window, layers in _layers_by_window(config).items())


def layer_groups(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Return for each layer of a model the index of its cache group, and its own index in the group."""
    groups = {window: (group, itertools.count()) for group, window in enumerate(_layers_by_window(config))}
    of_layers = (groups[config.window_of(layer)] for layer in range(config.layers))
    return tuple((group, next(index)) for group, index in of_layers)


def _layers_by_window(config: ModelConfig) -> dict[int | None, int]:
    windowed = len(set(config.windowed_layers))
    counts = {None: config.layers - windowed, config.window: windowed} if windowed else {None: config.layers}
    return {window: layers for window, layers in counts.items() if layers}
