"""Write Hugging Face folders that transformers and `load` can read, one file at a time."""

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

from helix_jax.checkpoint.parameters import (
    ParameterPath,
    TensorLocation,
    family_of,
    fetch_unpadded,
    parameter_dtype,
    tensor_locations,
)
from helix_jax.checkpoint.reading import GENERATION_FILE
from helix_jax.checkpoint.tensors import INDEX_FILE, WEIGHTS_FILE, read_json
from helix_jax.config import ModelConfig
from helix_jax.models.transformer import Transformer
from helix_jax.processes import is_first
from helix_jax.validation import check_float_type, check_type

_MAX_FILE_BYTES = 4 * 10**9  # of a safetensors file, unless a single layer is larger
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # keys of config.json


def save(
    model: Transformer, folder: str | Path, dtype: DTypeLike | None = None, initial: str | Path | None = None
) -> None:
    """Write a model to a Hugging Face folder that transformers and `load` can read.

    A large model is written to several files with an index, and only one of them is in host memory at a time. If there
    are several processes, all must call this function, and the first one writes.

    Args:
        model: The model. Its weights may be sharded.
        folder: The folder, which is created if it does not exist.
        dtype: The type of the written weights, default that of the model.
        initial: The Hugging Face folder that the model was trained from. The special tokens in its config.json, and its
            generation_config.json, are written too.

    Raises:
        TypeError: The model is not a Transformer, or `dtype` not a type of floating-point numbers.
        ValueError: The folder contains a generation config or an index of another model, or the config.json of the
            family cannot describe this model.
        OSError: A file cannot be written, for example because the disk is full.
    """
    check_type("the model", model, Transformer, "a Transformer")
    if dtype is not None:
        check_float_type("dtype", dtype)
    folder, dtype = Path(folder), jnp.dtype(dtype or model.embed_VD[...].dtype)
    kept = {} if initial is None else _generation_files(Path(initial))
    published = describe_config(model.config, dtype.name) | kept.pop("config.json", {})
    location_of = tensor_locations(model.config)
    files = list(_group_by_file(location_of, dtype.itemsize))
    # Others read an index before a single file, or the single file first. Files of the same form are replaced.
    for file in (GENERATION_FILE, INDEX_FILE if len(files) == 1 else WEIGHTS_FILE):
        if (folder / file).exists() and file not in kept:
            raise ValueError(f"'{folder}' has a {file}, which would override this model: choose another folder")

    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, paths in enumerate(files, 1):
        name = WEIGHTS_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = _published_tensors(model, {path: location_of[path] for path in paths}, dtype)
        if is_first():
            _write_tensors(folder / name, tensors)
        index |= dict.fromkeys(tensors, name)
    if is_first():
        if len(files) > 1:
            _write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": index})
        for name, content in {**kept, "config.json": published}.items():
            _write_json(folder / name, content)


def _generation_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a folder says about generation: the special tokens of config.json, and generation_config.json."""
    published = read_json(folder / "config.json")
    files = {"config.json": {key: published[key] for key in _SPECIAL_TOKENS if key in published}}
    if (folder / GENERATION_FILE).exists():
        files[GENERATION_FILE] = read_json(folder / GENERATION_FILE)
    return files


def describe_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json that describes a model, after checking that it is read back as the same model.

    Args:
        config: The config of the model.
        dtype: The type of the weights that are written beside it.

    Raises:
        ValueError: The config.json of the family cannot describe this model. The message names a field.
    """
    published = family_of(config).write_config(config, dtype)
    read_back = family_of(config).read_config(published)
    for name, (value, supported) in _differences(config, read_back):
        raise ValueError(
            f"{name} is {value!r}: a '{config.family}' config.json can only have {supported!r}, choose another family"
        )
    return published


def _differences(first: Any, second: Any, where: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the fields in which two configs differ, and both values. Nested configs are compared field by field."""
    for f in fields(first):
        a, b = getattr(first, f.name), getattr(second, f.name)
        if is_dataclass(a) and is_dataclass(b):
            yield from _differences(a, b, f"{where}{f.name}.")
        elif a != b:
            yield f"{where}{f.name}", (a, b)


def _group_by_file(location_of: dict[ParameterPath, TensorLocation], itemsize: int) -> Iterator[list[ParameterPath]]:
    """Yield the parameters of each file. A layer is in one file, because a tensor may contain several parameters."""
    groups: dict[ParameterPath, list[ParameterPath]] = {}
    for path in location_of:
        groups.setdefault(path[:2] if path[0] == "layers" else ("outside",), []).append(path)
    paths, size = [], 0
    for group in groups.values():
        added = sum(int(np.prod(location_of[path].shape)) * itemsize for path in group)
        if paths and size + added > _MAX_FILE_BYTES:
            yield paths
            paths, size = [], 0
        paths, size = paths + group, size + added
    yield paths


def _published_tensors(
    model: Transformer, location_of: dict[ParameterPath, TensorLocation], dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Return the published tensors that contain the parameters of `location_of`."""
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    tensors: dict[str, np.ndarray] = {}
    for path, location in location_of.items():
        value = fetch_unpadded(model.config, path, parameters[path][...])
        for number, name in enumerate(location.names):
            tensor = tensors.setdefault(name, np.zeros(location.published_shape, parameter_dtype(path, dtype)))
            location.part(tensor)[...] = value[number] if location.per_expert else value
    return tensors


def _write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, _temporary(file), metadata={"format": "pt"})
    except SafetensorError as error:  # also raised for errors of the operating system
        raise OSError(f"'{file}' cannot be written ({error}): free disk space, and save again") from None
    _finish(file)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    _temporary(file).write_text(json.dumps(content, indent=2) + "\n")
    _finish(file)


def _temporary(file: Path) -> Path:
    """Return where a file is written before it replaces `file`, so that an interrupted write leaves no partial file."""
    return file.with_name(file.name + ".unfinished")


def _finish(file: Path) -> None:
    """Move a file that is complete to its place."""
    _temporary(file).replace(file)
