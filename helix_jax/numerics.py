"""Matrix products whose precision follows their inputs, and indexing of narrow numbers.

The default for a float32 product is one bfloat16 pass on a TPU, and tf32 on a GPU (relative error 3e-4 on an H200,
where 'highest' gives 2e-7). Float32 inputs therefore use 'highest'. For bfloat16 inputs it changes nothing.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def einsum(spec: str, a: Array, b: Array, out: DTypeLike | None = None) -> Array:
    """Compute `jnp.einsum` at the full precision of its inputs.

    Args:
        spec: The subscripts.
        a: The first operand.
        b: The second operand.
        out: The type in which the sums are accumulated and returned, default that of the operands.
    """
    is_float32 = jnp.promote_types(a.dtype, b.dtype) == jnp.float32
    precision = lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=out)


def index_as_bits(index: Callable[..., Array], *arrays: Array) -> Array:
    """Apply a function that moves numbers and changes none, such as a gather, to arrays of one type.

    The function gets float8 numbers as bytes, and on a CPU bfloat16 numbers as unsigned integers. XLA's CPU backend
    gathers and scatters both in a wider type: it would convert the whole pool of pages, in every layer.

    Args:
        index: The function.
        arrays: Its arguments.
    """
    dtype = arrays[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 2:
        return index(*arrays)
    bits = jnp.uint8 if dtype.itemsize == 1 else jnp.uint16

    def index_bits(*arrays: Array) -> Array:
        moved = index(*(lax.bitcast_convert_type(x, bits) for x in arrays))
        return lax.bitcast_convert_type(moved, dtype)

    if bits == jnp.uint8:
        return index_bits(*arrays)
    return lax.platform_dependent(*arrays, cpu=index_bits, default=index)  # on a TPU, the bits would be a copy
