"""Pages of 8-bit numbers: float8 with a scale per group of numbers, which are quantised when they are written."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

FLOAT8 = jnp.float8_e4m3fn
EXACT = jnp.bfloat16
_SCALE = np.float32(1 / 448)  # 448 is the largest number of FLOAT8


class QuantisedPages(NamedTuple):
    """Pages of vectors. The numbers of a vector are those of `numbers` times their scale, followed by those of `exact`.

    Attributes:
        numbers_AKWH: The quantised numbers, float8_e4m3.
        scales_AKWX: The scale of each of X groups of adjacent numbers, float32.
        exact_AKWR: Numbers that are not quantised, bfloat16. None: there are none. (An array of width 0 makes the XLA
            of JAX 0.11 crash when it partitions a program for several CPU devices.)
    """

    numbers_AKWH: Float[Array, "*A K W H"]
    scales_AKWX: Float[Array, "*A K W X"]
    exact_AKWR: Float[Array, "*A K W R"] | None

    @property
    def exact_width(self) -> int:
        """How many numbers of a vector are not quantised."""
        return 0 if self.exact_AKWR is None else self.exact_AKWR.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the pages without quantisation."""
        return (*self.numbers_AKWH.shape[:-1], self.numbers_AKWH.shape[-1] + self.exact_width)

    @property
    def dtype(self) -> DTypeLike:
        """The type of the quantised numbers."""
        return self.numbers_AKWH.dtype


def quantise(x_BH: Float[Array, "*B H"], scales: int, exact: int = 0) -> QuantisedPages:
    """Quantise vectors. The largest number of each group becomes the largest that float8 has.

    Args:
        x_BH: The vectors.
        scales: The number of groups with a scale of their own.
        exact: How many numbers at the end of each vector are not quantised.
    """
    numbers, rest = jnp.split(x_BH, [x_BH.shape[-1] - exact], axis=-1)
    groups = numbers.astype(jnp.float32).reshape(*numbers.shape[:-1], scales, -1)
    scale = jnp.abs(groups).max(-1) * _SCALE
    scaled = groups / jnp.where(scale == 0, 1, scale)[..., None]
    return QuantisedPages(scaled.reshape(numbers.shape).astype(FLOAT8), scale, rest.astype(EXACT) if exact else None)


def dequantise(pages: QuantisedPages, dtype: DTypeLike) -> Array:
    """Return the vectors of pages, computed in float32, as an array of `dtype`."""
    numbers, scale = pages.numbers_AKWH.astype(jnp.float32), pages.scales_AKWX
    scaled = (numbers.reshape(*scale.shape, -1) * scale[..., None]).reshape(numbers.shape).astype(dtype)
    return scaled if pages.exact_AKWR is None else jnp.concatenate([scaled, pages.exact_AKWR.astype(dtype)], -1)
