"""Place each part of each parameter on the devices that need it. No device or host receives more than its parts."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.checkpoint.parameters import Index, ParameterPath, fetch_unpadded, parameter_dtype, parameter_shapes
from helix_jax.config import ModelConfig
from helix_jax.mesh import flat_size, stored_sharding, weight_sharding
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan

# Returns the part of a parameter that an index selects, on the host.
Read = Callable[[ParameterPath, Index], np.ndarray]


def shard(model: Transformer, plan: Plan, dtype: DTypeLike | None = None) -> Transformer:
    """Return the same model with its weights sharded as `plan` decodes with them.

    Args:
        model: A model whose weights may be anywhere.
        plan: The mesh, and how experts are sharded.
        dtype: The type of the new weights, default that of the model.

    Returns:
        A new model. The weights of `model` are not changed.
    """
    unpadded, parameters = parameter_shapes(model.config), dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    @lru_cache(maxsize=1)  # the parts of one parameter are read one after the other
    def fetch_parameter(path: ParameterPath) -> np.ndarray:
        return fetch_unpadded(parameters[path][...], unpadded[path])

    def read(path: ParameterPath, index: Index) -> np.ndarray:
        return fetch_parameter(path)[index]

    return place(model.config, cast(Mesh, plan.mesh), read, dtype or model.dtype, plan.experts)


def place(
    config: ModelConfig,
    mesh: Mesh,
    read: Read,
    dtype: DTypeLike,
    experts: str | None,
    on_placed: Callable[[ParameterPath], None] = lambda path: None,
) -> Transformer:
    """Return a Transformer on a mesh, built one parameter at a time.

    Args:
        config: The config of the model.
        mesh: The mesh.
        read: Returns a part of a parameter on the host.
        dtype: The type of the weights.
        experts: How experts are sharded. None: all weights are sharded as training stores them.
        on_placed: Called after each parameter.
    """
    unpadded = parameter_shapes(config)
    graph, state = nnx.split(Transformer(config, devices=flat_size(mesh) if experts else 1, rngs=None))
    values = []
    for path, parameter in nnx.to_flat_state(state):
        name, shape = str(path[-1]), parameter.shape
        sharding = weight_sharding(mesh, name, experts) if experts else stored_sharding(mesh, name, shape)
        read_padded = _pad_reader(path, shape, unpadded[path], read, parameter_dtype(path, dtype))
        values.append((path, parameter.replace(jax.make_array_from_callback(shape, sharding, read_padded))))
        on_placed(path)
    return nnx.merge(graph, nnx.from_flat_state(values))


def _pad_reader(
    path: ParameterPath, shape: tuple[int, ...], unpadded: tuple[int, ...], read: Read, dtype: DTypeLike
) -> Callable[[Any], np.ndarray]:
    """Return a function that reads the part of the padded parameter that an index selects. The padding is zeros."""
    parts: dict[Any, np.ndarray] = {}  # devices with the same part share one array

    def read_padded(index: Index) -> np.ndarray:
        spans = tuple(span.indices(size)[:2] for span, size in zip(index, shape, strict=True))
        if spans not in parts:
            inside = tuple(slice(min(a, size), min(b, size)) for (a, b), size in zip(spans, unpadded, strict=True))
            value = read(path, inside).astype(dtype)
            missing = [(0, b - a - n) for (a, b), n in zip(spans, value.shape, strict=True)]
            parts[spans] = np.pad(value, missing) if any(n for _, n in missing) else value
        return parts[spans]

    return read_padded
