"""The tensors of a Hugging Face folder, over the memory maps of its safetensors files: only what is used is read.

The safetensors package reads no float8 into NumPy, hence this reader of its format; it writes what we write.
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
    """A tensor in a file. `read` gives the part of it that a slice of its first axis leaves; `bytes`: in the file.

    dtype: of what is read; None for a `type` of the file that NumPy has no like of, which cannot be read.
    """

    shape: tuple[int, ...]
    type: str
    dtype: np.dtype | None
    bytes: int
    read: Callable[[slice], np.ndarray]


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by name. The index decides which files are looked at, if there is one.

    Raises:
        ValueError: no weights, a file that the index names and is not there, one that is cut off, or is none.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        file = folder / WEIGHTS_FILE
        if not file.exists():
            raise ValueError(f"'{folder}' has no weights: it needs {WEIGHTS_FILE}, or {INDEX_FILE} and its files")
        return _open_file(file)
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"'{index}' has no weight_map from tensors to files: fetch it again")
    names = sorted(set(files.values()))
    lost = [file for file in names if not (folder / file).exists()]
    if lost:
        raise ValueError(f"'{folder}' lacks '{lost[0]}', which its index names: the download may be incomplete")
    opened = {file: _open_file(folder / file) for file in names}
    for name, file in files.items():
        if name not in opened[file]:
            raise ValueError(f"'{folder / file}' does not hold '{name}', which the index seeks there: fetch it again")
    return {name: opened[file][name] for name, file in files.items()}


def _open_file(file: Path) -> dict[str, StoredTensor]:
    """Source: the format's description at github.com/huggingface/safetensors."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
            if size < 8 or start > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(start - 8))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _entry(file, start, size, **entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{file}' is not a whole safetensors file ({error}): fetch it again") from None


def _entry(file: Path, start: int, size: int, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    kind = np.dtype(_DTYPES[dtype]) if dtype in _DTYPES else None
    first, last = data_offsets
    wanted = last - first if kind is None else math.prod(shape) * kind.itemsize
    if last - first != wanted or not 0 <= first <= last <= size - start:
        raise ValueError(f"bytes {first} to {last} do not hold {dtype} {shape}")

    def read(lead: slice) -> np.ndarray:
        if kind is None:
            raise ValueError(f"type {dtype} in '{file}' is not supported")
        if 0 in shape:
            return np.zeros(shape, kind)[lead]
        return np.memmap(file, kind, "r", start + first, tuple(shape))[lead]

    return StoredTensor(tuple(shape), dtype, kind, last - first, read)


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"'{file}' does not exist: give a Hugging Face folder") from None
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' is not a JSON object: fetch it again")
    return content
