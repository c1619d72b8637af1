"""Read tensors from the safetensors files of a Hugging Face folder, through memory maps: only what is used is read.

The safetensors package cannot read float8 into NumPy, so this module reads the format itself. The package still writes
the files.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PREFIX, _HEAD, _EMBEDDING = "model.", "lm_head.", "embed_tokens.weight"

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        shape: Its shape.
        type: The name of its type in the file.
        dtype: The type in which it is read. None for a type without a NumPy equivalent, which cannot be read.
        bytes: Its size in the file.
        read: Returns the part that a slice of the first axis selects.
    """

    shape: tuple[int, ...]
    type: str
    dtype: np.dtype | None
    bytes: int
    read: Callable[[slice], np.ndarray]


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a folder by name: those of the single file, if there is one, like transformers.

    Otherwise the index determines which files are opened. It may name tensors that no file contains: whether one of
    them is needed is decided later. Names lack the prefix "model." in folders of models without a head; it is added.

    Raises:
        ValueError: There are no weights, or a file is missing, cut off or not a safetensors file.
    """
    tensors = _open_files(folder)
    if _EMBEDDING not in tensors:
        return tensors
    return {name if name.startswith(_HEAD) else _PREFIX + name: tensor for name, tensor in tensors.items()}


def _open_files(folder: Path) -> dict[str, StoredTensor]:
    file, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if file.exists():
        return _open_file(file)
    if not index.exists():
        raise ValueError(f"'{folder}' has no weights: add {WEIGHTS_FILE}, or {INDEX_FILE} and its files")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"'{index}' has no weight_map from tensors to files: download it again")
    names = sorted(set(files.values()))
    missing = [file for file in names if not (folder / file).exists()]
    if missing:
        raise ValueError(f"'{folder}' lacks the file '{missing[0]}', which its index names: download it again")
    opened = {file: _open_file(folder / file) for file in names}
    found = {name: tensor for tensors in opened.values() for name, tensor in tensors.items()}
    return found | {name: opened[file][name] for name, file in files.items() if name in opened[file]}


def _open_file(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file.

    Source: the description of the format at github.com/huggingface/safetensors.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
            if size < 8 or start > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(start - 8))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _stored_tensor(file, start, size, **entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{file}' is not a complete safetensors file ({error}): download it again") from None


def _stored_tensor(
    file: Path, start: int, size: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> StoredTensor:
    """Return a tensor from its entry in the header, whose keys are the last three parameters."""
    kind = np.dtype(_DTYPES[dtype]) if dtype in _DTYPES else None
    first, last = data_offsets
    expected = last - first if kind is None else math.prod(shape) * kind.itemsize
    if last - first != expected or not 0 <= first <= last <= size - start:
        raise ValueError(f"bytes {first} to {last} cannot contain {dtype} {shape}")

    def read(lead: slice) -> np.ndarray:
        if kind is None:
            raise ValueError(f"a tensor in '{file}' has type {dtype}: only {', '.join(_DTYPES)} are supported")
        if 0 in shape:
            return np.zeros(shape, kind)[lead]
        return np.memmap(file, kind, "r", start + first, tuple(shape))[lead]

    return StoredTensor(tuple(shape), dtype, kind, last - first, read)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a Hugging Face folder.

    Raises:
        ValueError: The file does not exist, or does not contain a JSON object.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"'{file}' does not exist: give a Hugging Face folder") from None
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' is not a JSON object: download it again")
    return content
