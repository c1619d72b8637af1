"""Places the weights of any model on a mesh, by a table of patterns and PartitionSpecs."""

import math
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from helix_jax.arrays import put
from helix_jax.mesh import AnyMesh, Spec, sharding

Weights = TypeVar("Weights")  # an nnx.Module, or a pytree of arrays


def shard_by_table(weights: Weights, mesh: AnyMesh, specs: Mapping[str, Spec], dtype: DTypeLike | None) -> Weights:
    """Return the same weights on a mesh, like `shard` with `specs`. Everything is checked before the first is placed.

    Raises:
        TypeError: A weight is not an array, or a value of the table is not a PartitionSpec.
        ValueError: A pattern or a parameter has no match, or a spec does not fit the parameter or the mesh.
    """
    _check_table(mesh, specs)
    paths = dict(_parameters(weights))
    chosen = _match(list(paths), specs)
    for path, value in paths.items():
        _check_parameter(mesh, path, value, chosen[path], specs[chosen[path]])

    def place(path: str, value: Any) -> jax.Array:
        spec = specs[chosen[path]]
        if dtype is not None and jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(dtype)
        is_local = not isinstance(value, jax.Array) or value.is_fully_addressable
        return put(value, mesh, spec) if is_local else jax.device_put(value, sharding(mesh, spec))

    if not isinstance(weights, nnx.Module):
        return jax.tree.map_with_path(lambda path, value: place(_join(path), value), weights)
    graph, state = nnx.split(weights)
    placed = [
        (path, variable.replace(place(_join_names(path), variable[...])) if _is_parameter(variable) else variable)
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def _parameters(weights: Any) -> list[tuple[str, Any]]:
    """Return the path and the value of each parameter."""
    if isinstance(weights, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(weights))
        return [(_join_names(path), variable[...]) for path, variable in flat if _is_parameter(variable)]
    return [(_join(path), value) for path, value in jax.tree.leaves_with_path(weights)]


def _is_parameter(variable: Any) -> bool:
    return isinstance(variable, nnx.Param)


def _join(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _join_names(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _check_table(mesh: AnyMesh, specs: Any) -> None:
    if not isinstance(specs, Mapping):
        raise TypeError(f"specs is a {type(specs).__name__}: give a dict of patterns and PartitionSpecs")
    for pattern, spec in specs.items():
        if not isinstance(pattern, str):
            raise TypeError(f"specs has the key {pattern!r}: give a pattern of parameter paths, such as '*/kernel'")
        if not isinstance(spec, Spec):
            raise TypeError(f"specs['{pattern}'] is {spec!r}: give a jax.sharding.PartitionSpec")
        axes = [axis for dim in spec for axis in _axes(dim)]
        for axis, uses in Counter(axes).items():
            if axis not in mesh.axis_names:
                known = ", ".join(map(str, mesh.axis_names))
                raise ValueError(f"specs['{pattern}']: the mesh has no axis {axis!r}: choose one of {known}")
            if uses > 1:
                raise ValueError(f"specs['{pattern}'] uses the axis '{axis}' {uses} times: use it for one dimension")


def _axes(dim: Any) -> tuple[Any, ...]:
    """Return the mesh axes over which a dimension is sharded."""
    return dim if isinstance(dim, tuple) else () if dim is None else (dim,)


def _match(paths: list[str], specs: Mapping[str, Spec]) -> dict[str, str]:
    """Return the first pattern that matches each path."""
    chosen: dict[str, str] = {}
    for pattern in specs:
        matching = [path for path in paths if fnmatchcase(path, pattern)]
        if not matching:
            shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
            raise ValueError(
                f"specs['{pattern}'] matches no parameter: correct the pattern; there are {shown or 'none'}"
            )
        if all(path in chosen for path in matching):
            raise ValueError(
                f"specs['{pattern}'] is never used, because patterns before it match '{matching[0]}' "
                f"and all others of it: move it to the front, or leave it out"
            )
        chosen |= {path: pattern for path in matching if path not in chosen}
    for path in paths:
        if path not in chosen:
            raise ValueError(
                f"no pattern of specs matches the parameter '{path}': add one, or '*': PartitionSpec() as the last, "
                f"which replicates the others"
            )
    return chosen


def _check_parameter(mesh: AnyMesh, path: str, value: Any, pattern: str, spec: Spec) -> None:
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"the parameter '{path}' is a {type(value).__name__}: give arrays")
    if len(spec) > value.ndim:
        raise ValueError(
            f"specs['{pattern}'] has {len(spec)} dimensions, but the parameter '{path}' has shape "
            f"{[*value.shape]}: give at most {value.ndim}"
        )
    for number, (size, dim) in enumerate(zip(value.shape, spec, strict=False)):
        devices = math.prod(mesh.shape[axis] for axis in _axes(dim))
        if size % devices:
            axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in _axes(dim))
            raise ValueError(
                f"{axes} does not divide dimension {number} of the parameter '{path}', which is {size}: "
                f"change specs['{pattern}'], the mesh, or pad the parameter"
            )
