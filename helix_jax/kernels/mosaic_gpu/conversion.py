"""Converts quantised numbers for the matrix unit. float16 represents every float8 exactly."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array

from helix_jax.kernels.mosaic_gpu.work import ROWS

_LOADED = plgpu.Layout.WGMMA_UPCAST_2X  # a thread loads four bytes at once, and stores eight
_COLUMNS = 64  # stored at once
_LARGEST_FLOAT16 = 65504.0


def convert(numbers: Any, target: Any) -> None:
    """Convert a tile in shared memory to float16, without its scales, which are applied to the products."""
    tile, width = target.shape
    for row in range(0, tile, ROWS):
        rows = pl.ds(row, ROWS)
        x = plgpu.layout_cast(numbers[rows], _LOADED)
        for column in range(0, width, _COLUMNS):
            target[rows, pl.ds(column, _COLUMNS)] = x[:, column : column + _COLUMNS].astype(jnp.float16)


def clip_to_float16(q: Array) -> Array:
    """Convert queries. Numbers beyond the range of float16 would give one weight of 1 anyway."""
    return jnp.clip(q, -_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype(jnp.float16)
