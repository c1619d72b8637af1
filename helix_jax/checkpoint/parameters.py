"""The parameters of a model and the published tensors that hold them, before there is any weight."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from helix_jax.arrays import fetch
from helix_jax.checkpoint.merged_axes import our_part, published_shape
from helix_jax.config import ModelConfig
from helix_jax.families import FAMILIES, Family
from helix_jax.models.transformer import Transformer

# A parameter's place in the module tree: ("layers", 0, "ff", "up_DF"). An index into it: a slice per axis.
ParameterPath = tuple[Any, ...]
Index = tuple[slice, ...]

# Choosing experts is a comparison: its bias is not rounded, whatever the rest is computed in, as publishers have it.
_FLOAT32 = ("selection_bias_E",)


class TensorLocation(NamedTuple):
    """Where a parameter lives in a published folder: in one tensor, or in one for each expert.

    shape: of the parameter. names: of the tensors. published_shape: of each of them. axes, letters: as in
    `merged_axes`; sizes: of the letters.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    published_shape: tuple[int, ...]
    axes: str
    letters: str
    sizes: dict[str, int]

    @property
    def per_expert(self) -> bool:
        return len(self.letters) < len(self.shape)

    def part(self, published: np.ndarray, **sizes: int) -> np.ndarray:
        """The parameter within a tensor, as a view; `sizes`: of a letter, if only a part of the tensor is given."""
        return our_part(published, self.axes, self.letters, {**self.sizes, **sizes})


def shapes(config: ModelConfig) -> dict[ParameterPath, tuple[int, ...]]:
    """Of every parameter, without padding."""
    model = Transformer(config, rngs=None)
    return {path: param.shape for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def tensor_locations(config: ModelConfig) -> dict[ParameterPath, TensorLocation]:
    """Of every parameter."""
    family = family_of(config)
    return {path: _tensor_location(family, config, path, shape) for path, shape in shapes(config).items()}


def _tensor_location(family: Family, config: ModelConfig, path: ParameterPath, shape: tuple[int, ...]) -> TensorLocation:
    tensor = family.tensor_of(path)
    letters = str(path[-1]).split("_")[-1]
    sizes = {**config.dims(), **dict(zip(letters, shape, strict=True))}
    names = (tensor.name,)
    if "{e}" in tensor.name:
        names, letters = tuple(tensor.name.format(e=e) for e in range(shape[0])), letters.removeprefix("E")
    return TensorLocation(shape, names, published_shape(tensor.axes, sizes), tensor.axes, letters, sizes)


def family_of(config: ModelConfig) -> Family:
    if config.family not in FAMILIES:
        raise ValueError(f"unknown family '{config.family}': choose one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def parameter_dtype(path: ParameterPath, dtype: DTypeLike) -> DTypeLike:
    return np.float32 if path[-1] in _FLOAT32 else dtype


def without_padding(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter on the host, as large as the model makes it.

    Of a copy: an array that has been looked at keeps what was seen, and the whole model would end on the host.
    """
    return fetch(jnp.copy(value))[tuple(map(slice, shape))]
