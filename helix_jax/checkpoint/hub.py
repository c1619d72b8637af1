"""Finds models that are named by their id on the Hugging Face Hub, such as "HuggingFaceTB/SmolLM2-135M-Instruct"."""

import importlib
import json
import os
import re
from pathlib import Path

from helix_jax.checkpoint.tensors import INDEX_FILE, WEIGHTS_FILE
from helix_jax.validation import MissingPackageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = ("*.json", "*.safetensors", "*.jinja")  # what is downloaded, of the files outside of subfolders
_TIMEOUT_S = 5  # for the first answer of the hub
_LONGEST_REASON = 150


def resolve_folder(folder: str | Path) -> Path:
    """Return the folder of a model: a local one, or that of an id on the Hugging Face Hub.

    Whatever exists at the path is used as it is. Otherwise an id, "owner/name", is looked up in the local cache of the
    hub, where a complete model is used without asking the hub for a newer one. A model that is not there is downloaded,
    if the package huggingface_hub is installed.

    Args:
        folder: A path, or an id.

    Returns:
        The path of the folder. A path that does not exist and is not an id is returned too: what reads it reports that.

    Raises:
        TypeError: It is neither a string nor a path.
        MissingPackageError: A model must be downloaded, and huggingface_hub is not installed.
        ValueError: The download failed.
    """
    if not isinstance(folder, str | Path):
        raise TypeError(f"the model folder is {folder!r}: give a path, or an id on the Hugging Face Hub")
    path = Path(folder)
    if path.exists() or not _HUB_ID.fullmatch(str(folder)):
        return path
    return _cached_snapshot(str(folder)) or _download(str(folder))


def _cached_snapshot(id: str) -> Path | None:
    """Return the complete snapshot of a model in the cache, None if there is none, or several without a main one."""
    repository = _cache_folder() / f"models--{id.replace('/', '--')}"
    main, snapshots = repository / "refs" / "main", repository / "snapshots"
    found = [snapshots / main.read_text().strip()] if main.exists() else list(snapshots.glob("*"))
    return found[0] if len(found) == 1 and _is_complete(found[0]) else None


def _cache_folder() -> Path:
    """Return where huggingface_hub stores models."""
    variables = os.environ
    user_cache = Path(variables.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(variables.get("HF_HOME") or user_cache / "huggingface")
    folder = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    return Path(folder).expanduser()


def _is_complete(folder: Path) -> bool:
    """Return whether a snapshot, of which any file may be missing, has a config and all weights."""
    if not (folder / "config.json").exists():
        return False
    if (folder / WEIGHTS_FILE).exists():
        return True
    try:
        files = set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((folder / file).exists() for file in files)


def _download(id: str) -> Path:
    missing = f"model '{id}' is neither a folder nor complete in the hub cache '{_cache_folder()}'"
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise MissingPackageError(
            f"{missing}: pip install huggingface_hub, which downloads it, or give the path of a folder"
        ) from None
    try:
        reason = "it has no config.json, or not all of its safetensors files"
        patterns = {"allow_patterns": list(_FILES), "ignore_patterns": ["*/*"]}
        folder = Path(hub.snapshot_download(id, cache_dir=_cache_folder(), etag_timeout=_TIMEOUT_S, **patterns))
        if _is_complete(folder):  # without a network, the package returns an incomplete one
            return folder
    except Exception as error:  # its own kinds, and those of the HTTP client, which have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST_REASON]
    raise ValueError(
        f"{missing}, and cannot be downloaded ({reason}): check the name and the network, or run "
        f"`hf download {id} --local-dir DIR` elsewhere and give that folder"
    )
