"""A Hugging Face folder as it was published, read one tensor at a time."""

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.checkpoint.parameters import TensorLocation, Index, ParameterPath, family_of, tensor_locations
from helix_jax.checkpoint.placing import place
from helix_jax.checkpoint.quantised import dequantiser, is_number
from helix_jax.checkpoint.tensors import StoredTensor, open_tensors, read_json
from helix_jax.config import ModelConfig
from helix_jax.families import FAMILIES
from helix_jax.families.family import TENSORS
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan

DEMO_MODEL = Path(__file__).parents[1] / "demo"  # the folder of the byte model that ships
GENERATION_FILE = "generation_config.json"

log = logging.getLogger("helix_jax")


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder; its stop ids are those of generation_config.json, if it has any.

    Raises:
        ValueError: no such folder or config.json, a broken one, an unknown `model_type`, an option or a quantisation
            that is not supported.
    """
    return _read(Path(folder))[1]


def load(
    folder: str | Path,
    plan: Plan,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    on_read: Callable[[int, int], None] = lambda done, total: None,
) -> Transformer:
    """Load the model in a Hugging Face folder, sharded as `plan` decodes with it.

    Each part of a tensor goes from the file straight to the devices that need it. Quantised weights are dequantised on
    the way. Tensors that decoding does not need are named in a warning of the log "helix_jax".

    Args:
        folder: A folder with config.json and safetensors files.
        plan: The mesh, and how experts are sharded.
        dtype: The type of the weights.
        on_read: Called with the bytes of the files that have been read, and the total.

    Raises:
        ValueError: As `read_config`; or there are no weights, or a tensor is missing, unexpected, of the wrong shape or
            not a float. All of this is checked before the first tensor is read.
    """
    return _load(Path(folder), cast(Mesh, plan.mesh), dtype, plan.experts, on_read)


def load_for_training(folder: str | Path, mesh: Mesh) -> Transformer:
    """Load the model in a Hugging Face folder as training stores it: float32, sharded over all devices.

    Raises:
        ValueError: As `load`.
    """
    return _load(Path(folder), mesh, jnp.float32, None, lambda done, total: None)


def _load(
    folder: Path, mesh: Mesh, dtype: DTypeLike, experts: str | None, on_read: Callable[[int, int], None]
) -> Transformer:
    """Load a folder. `experts` None shards the weights as training stores them."""
    published, config = _read(folder)
    tensors, location_of = dequantiser(published)(open_tensors(folder)), tensor_locations(config)
    for location in location_of.values():
        _check(folder, location, tensors)
    _check_tied_head(config, tensors)
    used = {name for location in location_of.values() for name in location.names}
    _report_extras(folder, config, set(tensors) - used)

    # A tensor may contain several of our parameters: it counts as read when the first of them is placed.
    unread = {name: tensors[name].bytes for name in used}
    total, done = sum(unread.values()), 0

    def placed(path: ParameterPath) -> None:
        nonlocal done
        done += sum(unread.pop(name, 0) for name in location_of[path].names)
        on_read(done, total)

    @lru_cache(maxsize=1)  # the parts of one parameter are read one after the other, so it is dequantised once
    def whole(name: str) -> np.ndarray:
        return tensors[name].read(slice(None))

    def read(path: ParameterPath, index: Index) -> np.ndarray:
        return _read_part(location_of[path], tensors, whole, index)

    return place(config, mesh, read, dtype, experts, placed)


def _read(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """What config.json says, and what that means."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"model folder '{folder}' {what}: give a Hugging Face folder")
    published = read_json(folder / "config.json")
    kind = published.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{folder / 'config.json'}: unknown model_type {kind!r}: known are {', '.join(FAMILIES)}")
    dequantiser(published)  # a scheme that is not known is refused here, before anything else is looked at
    if (folder / GENERATION_FILE).exists():
        stop = read_json(folder / GENERATION_FILE).get("eos_token_id")
        published = published if stop is None else {**published, "eos_token_id": stop}
    return published, FAMILIES[kind].read_config(published)


def _check(folder: Path, location: TensorLocation, tensors: dict[str, StoredTensor]) -> None:
    for name in location.names:
        if name not in tensors:
            raise ValueError(f"'{folder}' lacks the tensor '{name}': the download may be incomplete")
        shape, wanted = list(tensors[name].shape), list(location.published_shape)
        if shape != wanted:
            raise ValueError(f"tensor '{name}' has shape {shape}, but config.json makes it {wanted}")
        if not is_number(tensors[name]):
            raise ValueError(
                f"tensor '{name}' is of type {tensors[name].type}: quantised weights need a known quantization_config"
            )


def _report_extras(folder: Path, config: ModelConfig, names: set[str]) -> None:
    extras = sorted(names)
    for name in extras:
        if not family_of(config).is_extra(name, config):
            raise ValueError(f"'{folder}' has a tensor that a {config.layers}-layer model has no use for: '{name}'")
    if extras:
        named = extras[0] if len(extras) == 1 else f"{extras[0]} to {extras[-1]}"
        log.warning("skipped %d tensors that decoding has no use for: %s", len(extras), named)


def _check_tied_head(config: ModelConfig, tensors: dict[str, StoredTensor]) -> None:
    """A tied head that is written out all the same is the embedding. Else versions of transformers differ on it."""
    embedding, head = (TENSORS[name].name for name in ("embed_VD", "head_VD"))
    if not config.tied_head or head not in tensors:
        return
    rows = range(0, config.vocab, 4096)
    parts = (tuple(tensors[name].read(slice(first, first + 4096)) for name in (embedding, head)) for first in rows)
    if tensors[head].shape != tensors[embedding].shape or not all(
        np.array_equal(ours, theirs) for ours, theirs in parts
    ):
        raise ValueError(
            f"'{head}' is not '{embedding}', but config.json has tie_word_embeddings true: set it to false"
        )


def _read_part(location: TensorLocation, tensors: dict[str, StoredTensor], whole: Callable[[str], np.ndarray], index: Index) -> np.ndarray:
    """The part of a parameter that `index` leaves. Experts are read one by one, and no others than are asked for."""
    if not (location.per_expert or location.axes[0] == location.letters[0] == "E"):
        return location.part(whole(location.names[0]))[index]
    experts, rest = range(location.shape[0])[index[0]], index[1:]
    shape = tuple(len(range(size)[span]) for span, size in zip(rest, location.shape[1:], strict=True))
    parts = np.empty((len(experts), *shape), tensors[location.names[0]].dtype)
    for i, e in enumerate(experts):
        if location.per_expert:
            parts[i] = location.part(whole(location.names[e]))[rest]
        else:
            parts[i] = location.part(tensors[location.names[0]].read(slice(e, e + 1)), E=1)[0][rest]
    return parts
