"""Moves arrays between the host and the devices of a mesh, and counts their bytes."""

import math
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from helix_jax.mesh import AnyMesh, Spec, sharding


def put(values: Any, mesh: AnyMesh, spec: Spec) -> Any:
    """Place host arrays on the devices of a mesh.

    Args:
        values: An array, or a pytree of them. With several processes, each passes the same values.
        mesh: The mesh.
        spec: How every array is sharded, one of the constants in helix_jax/mesh.py.
    """
    where = sharding(mesh, spec)
    if where.is_fully_addressable:
        return jax.device_put(values, where)

    def assemble(value: Any) -> jax.Array:  # device_put would compare the values of all processes on every call
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(assemble, values)


def fetch(x: jax.Array) -> np.ndarray:
    """Copy an array to the host of every process.

    This is a collective call if part of `x` is on the devices of another process.
    """
    is_local = x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x) if is_local else np.asarray(multihost_utils.process_allgather(x, tiled=True))


def without_weak_types(tree: Any) -> Any:
    """Return a pytree of arrays whose types are not weak.

    JAX compiles a program again for an argument of another type, and `float32` and a weak `float32`, such as that of
    `jnp.full(shape, 1.0)`, are different ones.
    """
    return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), tree)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes that each device stores of a pytree of arrays, or of `jax.ShapeDtypeStruct` with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
