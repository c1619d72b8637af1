"""A Hugging Face folder as it was published, read one tensor at a time."""

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.checkpoint.parameters import Home, Index, ParameterPath, family_of, homes
from helix_jax.checkpoint.placing import place
from helix_jax.checkpoint.quantised import dequantiser, is_number
from helix_jax.checkpoint.tensors import Stored, open_tensors, read_json
from helix_jax.config import ModelConfig
from helix_jax.families import FAMILIES
from helix_jax.families.family import TENSORS
from helix_jax.models.transformer import Transformer

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
    mesh: Mesh,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    experts: str = "flat",
    to_train: bool = False,
    on_read: Callable[[int, int], None] = lambda done, total: None,
) -> Transformer:
    """The model in a Hugging Face folder, its weights in `dtype`, each part put from the file onto the devices that
    need it. Quantised weights are dequantised on the way. What is left out is named in a warning of the log.

    experts: how experts are spread, as in Plan. to_train: weights in shares of all devices, as training keeps them, and
    not as a step of decoding reads them. on_read: is told the bytes of the files that are done, and all of them.

    Raises:
        ValueError: as `read_config`; no weights, a tensor missing, surplus, of a wrong shape or of another type than
            float, all said before the first is read.
    """
    folder = Path(folder)
    published, config = _read(folder)
    tensors, home_of = dequantiser(published)(open_tensors(folder)), homes(config)
    for home in home_of.values():
        _check(folder, home, tensors)
    _check_tied_head(config, tensors)
    _report_extras(folder, config, set(tensors) - {name for home in home_of.values() for name in home.names})

    # A tensor may hold several of our parameters: it counts when the first of them is there.
    left = {name: tensors[name].bytes for home in home_of.values() for name in home.names}
    total, done = sum(left.values()), 0

    def placed(path: ParameterPath) -> None:
        nonlocal done
        done += sum(left.pop(name, 0) for name in home_of[path].names)
        on_read(done, total)

    @lru_cache(maxsize=1)  # the parts of one parameter are read one after the other: dequantised once
    def whole(name: str) -> np.ndarray:
        return tensors[name].read(slice(None))

    def read(path: ParameterPath, index: Index) -> np.ndarray:
        return _read_part(home_of[path], tensors, whole, index)

    return place(config, mesh, read, dtype, None if to_train else experts, placed)


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


def _check(folder: Path, home: Home, tensors: dict[str, Stored]) -> None:
    for name in home.names:
        if name not in tensors:
            raise ValueError(f"'{folder}' lacks the tensor '{name}': the download may be incomplete")
        shape, wanted = list(tensors[name].shape), list(home.published_shape)
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


def _check_tied_head(config: ModelConfig, tensors: dict[str, Stored]) -> None:
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


def _read_part(home: Home, tensors: dict[str, Stored], whole: Callable[[str], np.ndarray], index: Index) -> np.ndarray:
    """The part of a parameter that `index` leaves. Experts are read one by one, and no others than are asked for."""
    if not (home.per_expert or home.axes[0] == home.letters[0] == "E"):
        return home.part(whole(home.names[0]))[index]
    experts, rest = range(home.shape[0])[index[0]], index[1:]
    shape = tuple(len(range(size)[span]) for span, size in zip(rest, home.shape[1:], strict=True))
    parts = np.empty((len(experts), *shape), tensors[home.names[0]].dtype)
    for i, e in enumerate(experts):
        if home.per_expert:
            parts[i] = home.part(whole(home.names[e]))[rest]
        else:
            parts[i] = home.part(tensors[home.names[0]].read(slice(e, e + 1)), E=1)[0][rest]
    return parts
