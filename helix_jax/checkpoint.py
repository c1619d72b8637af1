"""Weights: from a Hugging Face folder, or from a model in memory, straight to their shards; and back to a folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
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
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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
    if kind not in FAMILIES:
        raise ValueError(f"{folder / 'config.json'}: unknown model_type {kind!r}: known are {', '.join(FAMILIES)}")
    if (folder / "generation_config.json").exists():
        stop = _read_json(folder / "generation_config.json").get("eos_token_id")
        published = published if stop is None else {**published, "eos_token_id": stop}
    return FAMILIES[kind].read_config(published)


def load(folder: str | Path, mesh: Mesh, dtype: DTypeLike = jnp.bfloat16) -> Transformer:
    """The model in a Hugging Face folder, its weights in `dtype`, each put from the file onto the devices that need it.

    Raises:
        ValueError: as `read_config`; no weights, a tensor missing, surplus or of a wrong shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = _tensor_files(folder)
    wanted: set[str] = set()

    def read(path: ParameterPath) -> np.ndarray:
        name, axes = llama.tensor_of(path)
        wanted.add(name)
        if name not in files:
            raise ValueError(f"'{folder}' lacks the tensor '{name}': the download may be incomplete")
        with safe_open(files[name], framework="numpy") as file:
            return _from_published(file.get_tensor(name), axes, path[-1], config, name)

    model = _materialise(config, mesh, read, dtype)
    surplus = sorted(name for name in set(files) - wanted if not llama.is_extra(name, config))
    if surplus:
        raise ValueError(f"'{folder}' has a tensor that a {config.layers}-layer model has no use for: '{surplus[0]}'")
    return model


def shard(model: Transformer, mesh: Mesh, dtype: DTypeLike | None = None) -> Transformer:
    """The same model, its weights dealt out to the devices of `mesh`, in `dtype` (default: as they are)."""
    values = dict(_parameters(model))
    return _materialise(model.config, mesh, values.__getitem__, dtype or model.embed_VD[...].dtype)


def save(model: Transformer, folder: str | Path, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes a Hugging Face folder that transformers and `load` open."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, value in _parameters(model):
        name, axes = llama.tensor_of(path)
        tensors[name] = _to_published(value.astype(dtype), axes, path[-1])
    _replace(folder / WEIGHTS_FILE, to_bytes(tensors, metadata={"format": "pt"}))
    published = llama.write_config(model.config, jnp.dtype(dtype).name)
    _replace(folder / "config.json", (json.dumps(published, indent=2) + "\n").encode())


def _parameters(model: Transformer) -> Iterator[tuple[ParameterPath, np.ndarray]]:
    """Every parameter on the host, without its padding."""
    dims = model.config.dims()
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        own = tuple(slice(dims[letter]) for letter in str(path[-1]).split("_")[-1])
        yield path, np.asarray(parameter[...])[own]


def _materialise(
    config: ModelConfig, mesh: Mesh, read: Callable[[ParameterPath], np.ndarray], dtype: DTypeLike
) -> Transformer:
    """A Transformer over `mesh`, one parameter at a time: read, padded with zeros to what the devices share, placed."""
    abstract = nnx.eval_shape(lambda: Transformer(config, devices=flat_size(mesh), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)

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
        index = _read_json(folder / INDEX_FILE).get("weight_map", {})
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
