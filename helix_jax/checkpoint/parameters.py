"""The parameters of a model and the published tensors that contain them, known before any weight is read."""

from functools import cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from helix_jax.arrays import fetch
from helix_jax.checkpoint.merged_axes import published_shape, select_part
from helix_jax.config import ModelConfig
from helix_jax.families import FAMILIES, Family
from helix_jax.heads import HeadLayout, first_places
from helix_jax.models.transformer import Transformer
from helix_jax.validation import check_choice

# The path of a parameter in the module tree, such as ("layers", 0, "ff", "up_DF").
ParameterPath = tuple[Any, ...]
# An index into a parameter: a slice per axis.
Index = tuple[slice, ...]

# This bias is float32 in a model of any type, as in published folders: experts are selected by comparison.
_FLOAT32 = ("selection_bias_E",)


class TensorLocation(NamedTuple):
    """The location of a parameter in a published folder: one tensor, or one per expert.

    Attributes:
        shape: The shape of the parameter.
        names: The names of the tensors.
        published_shape: The shape of each tensor.
        axes: The letters of the axes of each tensor, as in `merged_axes`.
        letters: The letters of the part of the parameter that is in one tensor.
        sizes: The size of each letter.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    published_shape: tuple[int, ...]
    axes: str
    letters: str
    sizes: dict[str, int]

    @property
    def per_expert(self) -> bool:
        """Whether there is one tensor per expert."""
        return len(self.letters) < len(self.shape)

    def part(self, published: np.ndarray, **sizes: int) -> np.ndarray:
        """Return the parameter inside a tensor, as a view. `sizes` replaces sizes of letters, for a partial tensor."""
        return select_part(published, self.axes, self.letters, {**self.sizes, **sizes})


@cache
def parameter_shapes(config: ModelConfig) -> dict[ParameterPath, tuple[int, ...]]:
    """Return the shape of every parameter, without padding."""
    model = Transformer(config, rngs=None)
    return {path: param.shape for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def tensor_locations(config: ModelConfig) -> dict[ParameterPath, TensorLocation]:
    """Return the location of every parameter."""
    family = family_of(config)
    return {path: _tensor_location(family, config, path, shape) for path, shape in parameter_shapes(config).items()}


def _tensor_location(
    family: Family, config: ModelConfig, path: ParameterPath, shape: tuple[int, ...]
) -> TensorLocation:
    tensor = family.tensor_of(path)
    letters = str(path[-1]).split("_")[-1]
    sizes = {**config.dims(), **dict(zip(letters, shape, strict=True))}
    names = (tensor.name,)
    if "{e}" in tensor.name:
        names, letters = tuple(tensor.name.format(e=e) for e in range(shape[0])), letters.removeprefix("E")
    return TensorLocation(shape, names, published_shape(tensor.axes, sizes), tensor.axes, letters, sizes)


def family_of(config: ModelConfig) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: The config names an unknown family.
    """
    check_choice("family", config.family, FAMILIES)
    return FAMILIES[config.family]


def parameter_dtype(path: ParameterPath, dtype: DTypeLike) -> DTypeLike:
    """Return the type of a parameter in a model of type `dtype`."""
    return np.float32 if path[-1] in _FLOAT32 else dtype


def fetch_unpadded(config: ModelConfig, path: ParameterPath, value: Any) -> np.ndarray:
    """Copy a parameter to the host, without its padding and without copies of heads.

    The array is copied on its devices first: JAX caches the host copy of an array, so the whole model would stay on
    the host.
    """
    whole, name = fetch(jnp.copy(value)), str(path[-1])
    for axis, size in enumerate(parameter_shapes(config)[path]):
        if whole.shape[axis] != size:
            heads = HeadLayout.of(config, value.sharding.mesh).heads_on(name, axis)
            places = np.arange(size) if heads is None else first_places(heads, size)
            whole = np.take(whole, places, axis)
    return whole
