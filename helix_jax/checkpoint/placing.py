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
from helix_jax.heads import PADDING, HeadLayout
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

    Raises:
        ValueError: The mesh cannot share the heads of the model.
    """
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    @lru_cache(maxsize=1)  # the parts of one parameter are read one after the other
    def fetch_parameter(path: ParameterPath) -> np.ndarray:
        return fetch_unpadded(model.config, path, parameters[path][...])

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
    unpadded, layout = parameter_shapes(config), HeadLayout.of(config, mesh) if experts else None
    graph, state = nnx.split(Transformer(config, devices=flat_size(mesh) if experts else 1, rngs=None))
    values = []
    for path, parameter in nnx.to_flat_state(state):
        name, shape = str(path[-1]), parameter.shape
        shape = layout.padded_shape(name, shape) if layout else shape
        sharding = weight_sharding(mesh, name, experts) if experts else stored_sharding(mesh, name, shape)
        sources = _sources(name, shape, unpadded[path], layout)
        read_padded = _pad_reader(path, sources, read, parameter_dtype(path, dtype))
        values.append((path, parameter.replace(jax.make_array_from_callback(shape, sharding, read_padded))))
        on_placed(path)
    return nnx.merge(graph, nnx.from_flat_state(values))


def _sources(
    name: str, shape: tuple[int, ...], unpadded: tuple[int, ...], layout: HeadLayout | None
) -> list[np.ndarray]:
    """Return for each axis of a padded parameter the index that each place has without padding, or PADDING."""
    heads = [layout.heads_on(name, axis) if layout else None for axis in range(len(shape))]
    return [
        np.pad(np.arange(old), (0, new - old), constant_values=PADDING) if ids is None else ids
        for new, old, ids in zip(shape, unpadded, heads, strict=True)
    ]


def _pad_reader(
    path: ParameterPath, sources: list[np.ndarray], read: Read, dtype: DTypeLike
) -> Callable[[Any], np.ndarray]:
    """Return a function that reads the part of the padded parameter that an index selects. The padding is zeros."""
    parts: dict[Any, np.ndarray] = {}  # devices with the same part share one array

    def read_padded(index: Index) -> np.ndarray:
        spans = tuple(span.indices(len(source))[:2] for span, source in zip(index, sources, strict=True))
        if spans not in parts:
            wanted = [source[first:last] for (first, last), source in zip(spans, sources, strict=True)]
            inside = tuple(_hull(ids) for ids in wanted)
            value = read(path, inside).astype(dtype)
            for axis, (ids, span) in enumerate(zip(wanted, inside, strict=True)):
                value = _select(value, ids, span.start, axis)
            parts[spans] = value
        return parts[spans]

    return read_padded


def _hull(ids: np.ndarray) -> slice:
    """Return the smallest slice that contains all indices, without padding."""
    ids = ids[ids != PADDING]
    return slice(int(ids.min()), int(ids.max()) + 1) if len(ids) else slice(0, 0)


def _select(value: np.ndarray, ids: np.ndarray, first: int, axis: int) -> np.ndarray:
    """Return the values of some indices of an axis, of which `value` has those from `first` on. Padding gives 0."""
    if np.array_equal(ids, np.arange(first, first + value.shape[axis])):
        return value
    selected = np.zeros((*value.shape[:axis], len(ids), *value.shape[axis + 1 :]), value.dtype)
    is_head, before = ids != PADDING, (slice(None),) * axis
    selected[(*before, is_head)] = value[(*before, ids[is_head] - first)]
    return selected
