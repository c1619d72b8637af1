"""Matrix products whose precision follows their inputs: float32 means float32.

The default for a float32 product is one bfloat16 pass on a TPU, and tf32 on a GPU (relative error 3e-4 on an H200,
where 'highest' gives 2e-7). Float32 inputs therefore use 'highest'. For bfloat16 inputs it changes nothing.
"""

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
