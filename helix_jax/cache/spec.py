"""Describes what a model caches: a spec for each group of layers that cache alike."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from helix_jax.config import ModelConfig
from helix_jax.quantisation import FLOAT8
from helix_jax.validation import check_int

_GROUP = 128  # numbers of a latent that share a scale


@jax.tree_util.register_static  # a cache carries its spec, which is static in a jitted program
@dataclass(frozen=True)
class CacheSpec:
    """What each layer of a cache group caches per token. The layers of a group share a pool and a page table.

    A new kind of layer, such as one with a recurrent state, gets a group of its own: a spec that says so here, its
    arrays in `KVCache`, and their use in `helix_attention`.

    Args:
        layers: The number of layers.
        kv_heads: Key/value heads. 1 for a latent. A larger tp stores copies of them.
        head_width: Numbers per token and head.
        dtype: The type of the cached numbers. float8_e4m3 numbers have scales, see `helix_jax.quantisation`: one per
            token and head, or per 128 numbers of a latent.
        latent: Whether one vector per token stands for the keys and values of all heads. Such a layer has one array
            instead of two, and every device of tp stores all of it.
        window: How many positions a query sees, its own included. Older ones need not be kept. None: all.
        exact_width: How many numbers at the end of each vector are bfloat16 if the others are float8: the rotary part
            of a latent.
    """

    layers: int
    kv_heads: int
    head_width: int
    dtype: DTypeLike
    latent: bool = False
    window: int | None = None
    exact_width: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # one form, because a program is compiled for each
        for name in ("layers", "kv_heads", "head_width"):
            check_int(name, getattr(self, name), least=1)
        if self.window is not None:
            check_int("window", self.window, least=1)
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise TypeError(f"dtype is {self.dtype}: give a type of floating-point numbers, such as jnp.bfloat16")
        numbers = self.head_width - self.exact_width
        if self.quantised and numbers % self.scales:
            raise ValueError(
                f"an fp8 cache cannot divide the {numbers} numbers of a latent among {self.scales} scales: "
                f"choose another type of cache"
            )

    @property
    def parts(self) -> int:
        """The arrays of numbers per token: keys and values, or the latent."""
        return 1 if self.latent else 2

    @property
    def bytes_per_token(self) -> int:
        """The bytes of a token in all layers, if each head is stored once."""
        vector = self.head_width * jnp.dtype(self.dtype).itemsize
        if self.quantised:
            vector = (self.head_width - self.exact_width) + 4 * self.scales + 2 * self.exact_width
        return self.layers * self.parts * self.kv_heads * vector

    @property
    def quantised(self) -> bool:
        """Whether the numbers have scales."""
        return self.dtype == FLOAT8

    @property
    def scales(self) -> int:
        """The scales per vector, if it is quantised."""
        return -(-(self.head_width - self.exact_width) // _GROUP) if self.latent else 1


def cache_specs(config: ModelConfig, dtype: DTypeLike) -> tuple[CacheSpec, ...]:
    """Return the spec of each cache group of a model. The group of layers that see all positions is the first.

    Args:
        config: The model.
        dtype: The type of the cached numbers, `plan.cache_dtype_for` that of the model.
    """
    same = {"kv_heads": config.kv_heads, "head_width": config.cache_width, "dtype": dtype}
    if config.latent:
        same |= {"latent": True, "exact_width": config.cache_width - config.latent.width}
    return tuple(CacheSpec(layers, window=window, **same) for window, layers in _layers_by_window(config).items())


def layer_groups(config: ModelConfig, groups: int) -> tuple[tuple[int, int], ...]:
    """Return for each layer of a model the index of its cache group, and its own index in the group.

    Args:
        config: The model.
        groups: The number of its groups. If there is one, all layers are in it, with and without a window.
    """
    if groups == 1:
        return tuple((0, layer) for layer in range(config.layers))
    of_windows = {window: (group, itertools.count()) for group, window in enumerate(_layers_by_window(config))}
    of_layers = (of_windows[config.window_of(layer)] for layer in range(config.layers))
    return tuple((group, next(index)) for group, index in of_layers)


def _layers_by_window(config: ModelConfig) -> dict[int | None, int]:
    windowed = len(set(config.windowed_layers))
    counts = {None: config.layers - windowed, config.window: windowed} if windowed else {None: config.layers}
    return {window: layers for window, layers in counts.items() if layers}
