"""Load Hugging Face folders, one tensor at a time."""

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.checkpoint.hub import resolve_folder
from helix_jax.checkpoint.parameters import Index, ParameterPath, TensorLocation, family_of, tensor_locations
from helix_jax.checkpoint.placing import place
from helix_jax.checkpoint.quantised import choose_dequantiser, is_unquantised
from helix_jax.checkpoint.tensors import StoredTensor, open_tensors, read_json
from helix_jax.config import ModelConfig, Rope
from helix_jax.families import FAMILIES
from helix_jax.families.family import TENSORS
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.validation import check_choice, check_float_type, check_type

DEMO_MODEL = Path(__file__).parents[1] / "demo"  # the folder of the byte model that ships
GENERATION_FILE = "generation_config.json"

log = logging.getLogger("helix_jax")


def read_config(folder: str | Path) -> ModelConfig:
    """Read the config of the model in a Hugging Face folder.

    The end tokens are those of generation_config.json, if it has any, else those of config.json.

    Args:
        folder: A folder with a config.json file, or an id on the Hugging Face Hub, see `resolve_folder`.

    Raises:
        MissingPackageError: As `resolve_folder`.
        ValueError: As `resolve_folder`; or the folder or config.json does not exist, the file is invalid, or its
            `model_type`, an option or its quantisation is not supported.
    """
    return _read_configs(resolve_folder(folder))[1]


def load(
    folder: str | Path,
    plan: Plan,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    on_read: Callable[[int, int], None] = lambda done, total: None,
) -> Transformer:
    """Load the model in a Hugging Face folder, sharded as `plan` decodes with it.

    Each part of a tensor goes from the file straight to the devices that need it. Quantised weights are dequantised on
    the way. Tensors that decoding does not need, and LongRoPE, are named in warnings of the logger "helix_jax".

    Args:
        folder: A folder with config.json and safetensors files, or an id on the Hugging Face Hub, see `resolve_folder`.
        plan: The mesh, and how experts are sharded.
        dtype: The type of the weights.
        on_read: Called with the bytes of the files that have been read, and the total.

    Raises:
        TypeError: The folder is not a path, `plan` not a Plan, or `dtype` not a type of floating-point numbers.
        ValueError: As in `read_config`; or the mesh cannot share the heads, there are no weights, or a tensor is
            missing, unexpected, of the wrong shape or not a float. All of this is checked before the first tensor is
            read.
    """
    check_type("the model folder", folder, str | Path, "the path of a Hugging Face folder")
    check_type("plan", plan, Plan, "a helix_jax.Plan")
    check_float_type("dtype", dtype)
    return _load(resolve_folder(folder), cast(Mesh, plan.mesh), dtype, plan.experts, on_read)


def load_for_training(folder: str | Path, mesh: Mesh) -> Transformer:
    """Load the model in a Hugging Face folder as training stores it: float32, sharded over all devices.

    Args:
        folder: A folder with config.json and safetensors files.
        mesh: The mesh of the training run.

    Raises:
        ValueError: As in `load`.
    """
    return _load(Path(folder), mesh, jnp.float32, None, lambda done, total: None)


def _load(
    folder: Path, mesh: Mesh, dtype: DTypeLike, experts: str | None, on_read: Callable[[int, int], None]
) -> Transformer:
    """Load a folder. `experts` None shards the weights as training stores them."""
    published, config = _read_configs(folder)
    tensors, location_of = choose_dequantiser(published)(open_tensors(folder)), tensor_locations(config)
    for location in location_of.values():
        _check_tensors(folder, location, tensors)
    _check_tied_head(config, tensors)
    used = {name for location in location_of.values() for name in location.names}
    _report_extras(folder, config, set(tensors) - used)
    _report_long_rope(config.rope)

    # A tensor may contain several parameters. It counts as read when the first of them is placed.
    unread = {name: tensors[name].bytes for name in used}
    total, done = sum(unread.values()), 0

    def on_placed(path: ParameterPath) -> None:
        nonlocal done
        done += sum(unread.pop(name, 0) for name in location_of[path].names)
        on_read(done, total)

    @lru_cache(maxsize=1)  # the parts of one parameter are read one after the other, so it is dequantised once
    def read_tensor(name: str) -> np.ndarray:
        return tensors[name].read(slice(None))

    def read(path: ParameterPath, index: Index) -> np.ndarray:
        return _read_part(location_of[path], tensors, read_tensor, index)

    return place(config, mesh, read, dtype, experts, on_placed)


def _read_configs(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Return config.json, with the end tokens of generation_config.json, and the ModelConfig that it describes."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"model folder '{folder}' {problem}: give a Hugging Face folder")
    published = read_json(folder / "config.json")
    kind: Any = published.get("model_type")
    check_choice(f"{folder / 'config.json'}: model_type", kind, list(FAMILIES))
    choose_dequantiser(published)  # raises if the quantisation is not supported
    if (folder / GENERATION_FILE).exists():
        end_ids = read_json(folder / GENERATION_FILE).get("eos_token_id")
        published = published if end_ids is None else {**published, "eos_token_id": end_ids}
    return published, FAMILIES[kind].read_config(published)


def _check_tensors(folder: Path, location: TensorLocation, tensors: dict[str, StoredTensor]) -> None:
    """Check that the tensors of a parameter exist, and their shapes and types."""
    for name in location.names:
        if name not in tensors:
            raise ValueError(f"'{folder}' lacks the tensor '{name}': download the folder again, or correct config.json")
        shape, expected = list(tensors[name].shape), list(location.published_shape)
        if shape != expected:
            raise ValueError(
                f"tensor '{name}' has shape {shape}, expected {expected} from config.json: correct config.json"
            )
        if not is_unquantised(tensors[name]):
            raise ValueError(
                f"tensor '{name}' has type {tensors[name].type}: "
                f"add the quantization_config of the quantised weights to config.json"
            )


def _report_extras(folder: Path, config: ModelConfig, names: set[str]) -> None:
    """Log the tensors that decoding does not need, and raise if the family has no such tensors."""
    extras = sorted(names)
    for name in extras:
        if not family_of(config).is_extra(name, config):
            raise ValueError(
                f"'{folder}' has the tensor '{name}', which a model of {config.layers} layers does not have: "
                f"correct config.json"
            )
    if extras:
        names_text = extras[0] if len(extras) == 1 else f"{extras[0]} to {extras[-1]}"
        log.warning("skipped %d tensors that decoding does not need: %s", len(extras), names_text)


def _report_long_rope(rope: Rope) -> None:
    """Log that short texts are rotated otherwise than by transformers, which rotates a cache anew when it gets long."""
    if rope.kind == "longrope" and rope.factor > 1 and rope.long_factor != rope.short_factor:
        log.warning(
            "longrope: long_factor is used at all lengths, transformers uses short_factor up to %d positions",
            rope.original_positions,
        )


def _check_tied_head(config: ModelConfig, tensors: dict[str, StoredTensor]) -> None:
    """Check that a tied head, if the folder contains one, equals the embedding.

    Versions of transformers differ on which of the two they use.
    """
    embedding, head = (TENSORS[name].name for name in ("embed_VD", "head_VD"))
    if not config.tied_head or head not in tensors:
        return
    rows = range(0, config.vocab, 4096)
    parts = (tuple(tensors[name].read(slice(first, first + 4096)) for name in (embedding, head)) for first in rows)
    if tensors[head].shape != tensors[embedding].shape or not all(_are_same(*pair) for pair in parts):
        raise ValueError(f"tensors '{head}' and '{embedding}' differ, but tie_word_embeddings is true: set it to false")


def _are_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether arrays are equal. NaN equals NaN: padding of a vocabulary may be anything."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _read_part(
    location: TensorLocation, tensors: dict[str, StoredTensor], read_tensor: Callable[[str], np.ndarray], index: Index
) -> np.ndarray:
    """Read the part of a parameter that an index selects. Experts are read one by one, and only those selected."""
    if not (location.per_expert or location.axes[0] == location.letters[0] == "E"):
        return location.part(read_tensor(location.names[0]))[index]
    experts, rest = range(location.shape[0])[index[0]], index[1:]
    shape = tuple(len(range(size)[span]) for span, size in zip(rest, location.shape[1:], strict=True))
    parts = np.empty((len(experts), *shape), tensors[location.names[0]].dtype)
    for i, e in enumerate(experts):
        if location.per_expert:
            parts[i] = location.part(read_tensor(location.names[e]))[rest]
        else:
            parts[i] = location.part(tensors[location.names[0]].read(slice(e, e + 1)), E=1)[0][rest]
    return parts
