"""Weights: from a Hugging Face folder, or from a model in memory, straight to their shards; and back to a folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from helix_jax.config import ModelConfig
from helix_jax.mesh import flat_size, weight_sharding
from helix_jax.models import llama
from helix_jax.models.transformer import Transformer

FAMILIES = {"llama": llama}
DEMO_MODEL = Path(__file__).parent / "demo"  # the folder of the byte model that ships
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"

# A parameter's place in the module tree: ("layers", 0, "ff", "up_DF").
ParameterPath = tuple[Any, ...]


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder; its stop ids are those of generation_config.json, if it has any.

    Raises:
        ValueError: no such folder or config.json, a broken one, an unknown `model_type`, an option not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model folder '{folder}' does not exist: give a Hugging Face folder")
    published = _read_json(folder / "config.json")
    kind = published.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{folder / 'config.json'}: unknown model_type {kind!r}: known are {', '.join(FAMILIES)}")
    if (folder / GENERATION_FILE).exists():
        stop = _read_json(folder / GENERATION_FILE).get("eos_token_id")
        published = published if stop is None else {**published, "eos_token_id": stop}
    return FAMILIES[kind].read_config(published)


def load(folder: str | Path, mesh: Mesh, dtype: DTypeLike = jnp.bfloat16) -> Transformer:
    """The model in a Hugging Face folder, its weights in `dtype`, each put from the file onto the devices that need it.

    Raises:
        ValueError: as `read_config`; no weights, a tensor missing, surplus, of a wrong shape or of another type than
            float, said before the first is read where it can be.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = _tensor_files(folder)
    _check_names(folder, config, set(files))

    def read(path: ParameterPath) -> np.ndarray:
        name, axes = _family(config).tensor_of(path)
        return _from_published(_read_tensor(files[name], name), axes, path[-1], config, name)

    return _materialise(config, mesh, read, dtype)


def shard(model: Transformer, mesh: Mesh, dtype: DTypeLike | None = None) -> Transformer:
    """The same model, its weights dealt out to the devices of `mesh`, in `dtype` (default: as they are)."""
    values = dict(_parameters(model))
    return _materialise(model.config, mesh, values.__getitem__, dtype or model.embed_VD[...].dtype)


def save(model: Transformer, folder: str | Path, dtype: DTypeLike | None = None) -> None:
    """Writes a Hugging Face folder that transformers and `load` open, in `dtype` (default: as the weights are).

    Raises:
        ValueError: the folder holds the index or the generation config of another model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in (INDEX_FILE, GENERATION_FILE):
        if (folder / file).exists():
            raise ValueError(f"'{folder}' holds another model's {file}, which would go before this one: choose another")
    family, tensors, dtype = _family(model.config), {}, dtype or model.embed_VD[...].dtype
    for path, value in _parameters(model):
        name, axes = family.tensor_of(path)
        tensors[name] = _to_published(value.astype(dtype), axes, path[-1])
    _replace(folder / WEIGHTS_FILE, to_bytes(tensors, metadata={"format": "pt"}))
    published = family.write_config(model.config, jnp.dtype(dtype).name)
    _replace(folder / "config.json", (json.dumps(published, indent=2) + "\n").encode())


def _parameters(model: Transformer) -> Iterator[tuple[ParameterPath, np.ndarray]]:
    """Every parameter on the host, without its padding."""
    dims = model.config.dims()
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        own = tuple(slice(dims[letter]) for letter in str(path[-1]).split("_")[-1])
        yield path, np.asarray(parameter[...])[own]


def _family(config: ModelConfig) -> ModuleType:
    if config.family not in FAMILIES:
        raise ValueError(f"unknown family '{config.family}': choose one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def _abstract(config: ModelConfig, devices: int = 1) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, devices=devices, rngs=nnx.Rngs(0)))


def _check_names(folder: Path, config: ModelConfig, names: set[str]) -> None:
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(_abstract(config), nnx.Param))]
    wanted = {_family(config).tensor_of(path)[0] for path in paths}
    for name in sorted(wanted - names):
        raise ValueError(f"'{folder}' lacks the tensor '{name}': the download may be incomplete")
    for name in sorted(names - wanted):
        if not _family(config).is_extra(name, config):
            raise ValueError(f"'{folder}' has a tensor that a {config.layers}-layer model has no use for: '{name}'")


def _read_tensor(file: Path, name: str) -> np.ndarray:
    try:
        with safe_open(file, framework="numpy") as opened:
            value = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{file}' does not give the tensor '{name}' ({error}): fetch it again") from None
    if not jnp.issubdtype(value.dtype, jnp.floating) or value.dtype.itemsize < 2:
        raise ValueError(f"tensor '{name}' is of type {value.dtype}: quantised weights are not supported")
    return value


def _materialise(
    config: ModelConfig, mesh: Mesh, read: Callable[[ParameterPath], np.ndarray], dtype: DTypeLike
) -> Transformer:
    """A Transformer over `mesh`, one parameter at a time: read, padded with zeros to what the devices share, placed."""
    graph, state = nnx.split(_abstract(config, flat_size(mesh)))

    def place(path: ParameterPath, shape: tuple[int, ...]) -> jax.Array:
        value = read(path).astype(dtype)
        value = np.pad(value, [(0, padded - size) for padded, size in zip(shape, value.shape, strict=True)])
        return jax.make_array_from_callback(shape, weight_sharding(mesh, path[-1]), value.__getitem__)

    placed = [(path, param.replace(place(path, param.shape))) for path, param in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def _from_published(value: np.ndarray, axes: str, parameter: str, config: ModelConfig, name: str) -> np.ndarray:
    """Splits merged axes and brings them into the order of our parameter."""
    dims = config.dims()
    shape = tuple(int(np.prod([dims[letter] for letter in axis])) for axis in axes.split())
    if value.shape != shape:
        raise ValueError(f"tensor '{name}' has shape {list(value.shape)}, but config.json makes it {list(shape)}")
    letters, ours = axes.replace(" ", ""), parameter.split("_")[-1]
    return value.reshape([dims[letter] for letter in letters]).transpose([letters.index(d) for d in ours])


def _to_published(value: np.ndarray, axes: str, parameter: str) -> np.ndarray:
    """The inverse of `_from_published`."""
    ours = parameter.split("_")[-1]
    dims = dict(zip(ours, value.shape, strict=True))
    shape = [int(np.prod([dims[letter] for letter in axis])) for axis in axes.split()]
    theirs = value.transpose([ours.index(letter) for letter in axes.replace(" ", "")])
    return np.ascontiguousarray(theirs.reshape(shape))


def _replace(file: Path, content: bytes) -> None:
    """Writes whole or not at all: a file that is cut off by a kill or a full disk never takes the old one's place."""
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(file)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor. The index decides, if there is one."""
    if (folder / INDEX_FILE).exists():
        index = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"'{folder / INDEX_FILE}' has no weight_map from tensors to files: fetch it again")
        lost = sorted({file for file in index.values() if not (folder / file).exists()})
        if lost:
            raise ValueError(f"'{folder}' lacks '{lost[0]}', which its index names: the download may be incomplete")
        return {name: folder / file for name, file in index.items()}
    file = folder / WEIGHTS_FILE
    if not file.exists():
        raise ValueError(f"'{folder}' has no weights: it needs {WEIGHTS_FILE}, or {INDEX_FILE} and its files")
    try:
        with safe_open(file, framework="numpy") as opened:
            return dict.fromkeys(opened.keys(), file)
    except SafetensorError as error:
        raise ValueError(f"'{file}' is not a whole safetensors file ({error}): fetch it again") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"'{file}' does not exist: give a Hugging Face folder") from None
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' is not a JSON object: fetch it again")
    return content
