"""A Hugging Face folder that transformers and `load` open, written one file at a time."""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from helix_jax.checkpoint.parameters import TensorLocation, ParameterPath, family_of, tensor_locations, parameter_dtype, without_padding
from helix_jax.checkpoint.reading import GENERATION_FILE
from helix_jax.checkpoint.tensors import INDEX_FILE, WEIGHTS_FILE
from helix_jax.config import ModelConfig
from helix_jax.models.transformer import Transformer
from helix_jax.processes import is_first

_FILE_BYTES = 4 * 10**9  # of one safetensors file, unless a single layer is larger


def save(model: Transformer, folder: str | Path, dtype: DTypeLike | None = None) -> None:
    """Writes a Hugging Face folder that transformers and `load` open, in `dtype` (default: as the weights are).

    One file, or several and an index for a large model: the host holds one of them at a time. Of several processes the
    first writes, and all call it.

    Raises:
        ValueError: the folder holds a generation config, or, beside a single file, an index of another model; the
            family's config.json cannot say what this model is.
        OSError: a file cannot be written: a full disk, say.
    """
    folder, dtype = Path(folder), jnp.dtype(dtype or model.embed_VD[...].dtype)
    published = describe_config(model.config, dtype.name)
    location_of = tensor_locations(model.config)
    files = list(_files(location_of, dtype.itemsize))
    for file in (GENERATION_FILE, *((INDEX_FILE,) if len(files) == 1 else ())):  # of several files the index is ours
        if (folder / file).exists():
            raise ValueError(f"'{folder}' holds another model's {file}, which would go before this one: choose another")

    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, paths in enumerate(files, 1):
        name = WEIGHTS_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = _published(model, {path: location_of[path] for path in paths}, dtype)
        if is_first():
            _write_tensors(folder / name, tensors)
        index |= dict.fromkeys(tensors, name)
    if is_first():
        if len(files) > 1:
            _write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": index})
        _write_json(folder / "config.json", published)


def describe_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of its family, once that is known to make the same model.

    Raises:
        ValueError: the family's config.json cannot say what this model is.
    """
    published = family_of(config).write_config(config, dtype)
    again = family_of(config).read_config(published)
    for name, (ours, theirs) in _differences(config, again):
        raise ValueError(f"a '{config.family}' folder cannot say {name} {ours!r}, only {theirs!r}: not written")
    return published


def _differences(ours: Any, theirs: Any, where: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The fields in which two configs differ, those of their parts by themselves."""
    for f in fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if is_dataclass(a) and is_dataclass(b):
            yield from _differences(a, b, f"{where}{f.name}.")
        elif a != b:
            yield f"{where}{f.name}", (a, b)


def _files(location_of: dict[ParameterPath, TensorLocation], itemsize: int) -> Iterator[list[ParameterPath]]:
    """Which parameters go to a file together: whole layers, since a tensor may hold several of our parameters."""
    groups: dict[ParameterPath, list[ParameterPath]] = {}
    for path in location_of:
        groups.setdefault(path[:2] if path[0] == "layers" else ("outside",), []).append(path)
    paths, size = [], 0
    for group in groups.values():
        added = sum(int(np.prod(location_of[path].shape)) * itemsize for path in group)
        if paths and size + added > _FILE_BYTES:
            yield paths
            paths, size = [], 0
        paths, size = paths + group, size + added
    yield paths


def _published(model: Transformer, location_of: dict[ParameterPath, TensorLocation], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The published tensors that hold these parameters."""
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    tensors: dict[str, np.ndarray] = {}
    for path, location in location_of.items():
        value = without_padding(parameters[path][...], location.shape)
        for number, name in enumerate(location.names):
            whole = tensors.setdefault(name, np.zeros(location.published_shape, parameter_dtype(path, dtype)))
            location.part(whole)[...] = value[number] if location.per_expert else value
    return tensors


def _write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, _unfinished(file), metadata={"format": "pt"})
    except SafetensorError as error:  # is no OSError, whatever the system said
        raise OSError(f"'{file}' cannot be written ({error}): make room, and save again") from None
    _finish(file)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    _unfinished(file).write_text(json.dumps(content, indent=2) + "\n")
    _finish(file)


def _unfinished(file: Path) -> Path:
    """Where a file is written before it takes its place: cut off by a kill or a full disk, it never does."""
    return file.with_name(file.name + ".unfinished")


def _finish(file: Path) -> None:
    _unfinished(file).replace(file)
