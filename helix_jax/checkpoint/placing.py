"""Place each part of each parameter on the devices that need it. No device or host receives more than its parts."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.checkpoint.parameters import Index, ParameterPath, fetch_unpadded, parameter_dtype, parameter_shapes
from helix_jax.checkpoint.spec_table import Weights, shard_by_table
from helix_jax.config import ModelConfig
from helix_jax.heads import PADDING, HeadLayout
from helix_jax.mesh import Spec, flat_size, stored_sharding, weight_sharding
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.validation import check_float_type, check_type

# Returns the part of a parameter that an index selects, on the host.
Read = Callable[[ParameterPath, Index], np.ndarray]


def shard(
    model: Weights, plan: Plan | Mesh, dtype: DTypeLike | None = None, *, specs: Mapping[str, Spec] | None = None
) -> Weights:
    """Return the same weights on the devices of a mesh: those of a `Transformer`, or with `specs` those of any model.

    A model of your own, for example with a tensor parallel output projection after `helix_attention`:

        specs = {"*/output/kernel": P(("tp", "cp"), None, None), "*/query/kernel": P(None, "tp", None), "*": P()}
        model = helix_jax.shard(model, plan, specs=specs)

    Args:
        model: A `Transformer`. With `specs` also any other Flax NNX module, whose `nnx.Param`s are placed, or a pytree
            of arrays. The weights may be anywhere.
        plan: The mesh, and how the experts of a `Transformer` are sharded. With `specs`, it may be any mesh.
        dtype: The type of the new weights, default that of the model. Integers keep theirs.
        specs: Patterns of parameter paths, and the PartitionSpec of the parameters that match. The first pattern that
            matches counts. A path is the names and indices on the way to a parameter, with slashes between them, such
            as "layers/0/attention/q_DNH". In a pattern, `*` stands for any text and `?` for a character, as in the
            standard library's fnmatch. None: a `Transformer` is sharded as `plan` decodes with it.

    Returns:
        A new model, module or pytree. The weights of `model` are not changed.

    Raises:
        TypeError: Without `specs`, `model` is not a Transformer or `plan` not a Plan; or a weight is not an array, or a
            value of `specs` not a PartitionSpec.
        ValueError: The mesh cannot share the heads of the model; a pattern matches no parameter, or only those of
            earlier patterns; no pattern matches a parameter; the mesh has no such axis; or a spec has too many
            dimensions, or axes whose sizes do not divide that of the parameter. Then nothing is placed.
    """
    if dtype is not None:
        check_float_type("dtype", dtype)
    if specs is not None:
        check_type("plan", plan, Plan | Mesh, "a helix_jax.Plan or a jax.sharding.Mesh")
        return shard_by_table(model, plan.mesh if isinstance(plan, Plan) else plan, specs, dtype)
    check_type("the model", model, Transformer, "a Transformer, or specs, a table of PartitionSpecs")
    check_type("plan", plan, Plan, "a helix_jax.Plan")
    return cast(Weights, _shard_transformer(cast(Transformer, model), cast(Plan, plan), dtype))


def _shard_transformer(model: Transformer, plan: Plan, dtype: DTypeLike | None) -> Transformer:
    """Shard a model as `plan` decodes with it."""
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
        read_part = partial(_read_padded, path, sources, read, parameter_dtype(path, dtype), {})
        values.append((path, parameter.replace(jax.make_array_from_callback(shape, sharding, read_part))))
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


def _read_padded(
    path: ParameterPath,
    sources: list[np.ndarray],
    read: Read,
    dtype: DTypeLike,
    parts: dict[Any, np.ndarray],
    index: Any,
) -> np.ndarray:
    """Read the part of the padded parameter that an index selects. The padding is zeros.

    Args:
        path: The parameter.
        sources: The result of `_sources`.
        read: Returns a part of a parameter on the host.
        dtype: The type of the result.
        parts: What was read so far, because devices with the same part share one array.
        index: The part of a device.
    """
    spans = tuple(span.indices(len(source))[:2] for span, source in zip(index, sources, strict=True))
    if spans not in parts:
        wanted = [source[first:last] for (first, last), source in zip(spans, sources, strict=True)]
        inside = tuple(_hull(ids) for ids in wanted)
        value = read(path, inside).astype(dtype)
        for axis, (ids, span) in enumerate(zip(wanted, inside, strict=True)):
            value = _select(value, ids, span.start, axis)
        parts[spans] = value
    return parts[spans]


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
