"""Every part of every parameter from where it is to the devices that need it, and no more of it than that."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.checkpoint.parameters import Index, ParameterPath, shapes, parameter_dtype, without_padding
from helix_jax.config import ModelConfig
from helix_jax.mesh import flat_size, stored_sharding, weight_sharding
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan

# The part of a parameter that an index leaves, on the host.
Read = Callable[[ParameterPath, Index], np.ndarray]


def shard(model: Transformer, plan: Plan, dtype: DTypeLike | None = None) -> Transformer:
    """Return the same model with its weights sharded as `plan` decodes with them.

    Args:
        model: A model whose weights may be anywhere.
        plan: The mesh, and how experts are sharded.
        dtype: The type of the new weights, default that of the model.
    """
    own, parameters = shapes(model.config), dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    @lru_cache(maxsize=1)  # the parts of one parameter are asked for one after the other
    def whole(path: ParameterPath) -> np.ndarray:
        return without_padding(parameters[path][...], own[path])

    def read(path: ParameterPath, index: Index) -> np.ndarray:
        return whole(path)[index]

    return place(model.config, cast(Mesh, plan.mesh), read, dtype or model.dtype, plan.experts)


def place(
    config: ModelConfig,
    mesh: Mesh,
    read: Read,
    dtype: DTypeLike,
    experts: str | None,
    placed: Callable[[ParameterPath], None] = lambda path: None,
) -> Transformer:
    """A Transformer over `mesh`, one parameter at a time, told to `placed`. experts None: as training keeps it."""
    own = shapes(config)
    graph, state = nnx.split(Transformer(config, devices=flat_size(mesh) if experts else 1, rngs=None))
    values = []
    for path, parameter in nnx.to_flat_state(state):
        name, shape = str(path[-1]), parameter.shape
        where = weight_sharding(mesh, name, experts) if experts else stored_sharding(mesh, name, shape)
        part = _padded_part(path, shape, own[path], read, parameter_dtype(path, dtype))
        values.append((path, parameter.replace(jax.make_array_from_callback(shape, where, part))))
        placed(path)
    return nnx.merge(graph, nnx.from_flat_state(values))


def _padded_part(
    path: ParameterPath, shape: tuple[int, ...], own: tuple[int, ...], read: Read, dtype: DTypeLike
) -> Callable[[Any], np.ndarray]:
    """What lies at an index into the padded parameter: of its own shape what `read` gives, zeros beyond."""
    parts: dict[Any, np.ndarray] = {}  # devices that hold copies share one

    def part(index: Index) -> np.ndarray:
        spans = tuple(span.indices(size)[:2] for span, size in zip(index, shape, strict=True))
        if spans not in parts:
            inside = tuple(slice(min(a, size), min(b, size)) for (a, b), size in zip(spans, own, strict=True))
            value = read(path, inside).astype(dtype)
            missing = [(0, b - a - n) for (a, b), n in zip(spans, value.shape, strict=True)]
            parts[spans] = np.pad(value, missing) if any(n for _, n in missing) else value
        return parts[spans]

    return part
