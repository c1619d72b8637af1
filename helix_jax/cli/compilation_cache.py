"""The persistent compilation cache of the commands: a program that was compiled before is read from disk."""

import os
from pathlib import Path

import jax

LIMIT_BYTES = 4 * 2**30
_LEAST_COMPILE_S = 0.1  # programs that compile faster are not stored


def enable_compilation_cache(choice: str) -> None:
    """Let JAX store compiled programs in a folder. Least recently used ones are removed beyond `LIMIT_BYTES`.

    Args:
        choice: "auto", "off", or a folder, in which a folder of our own is used, because others may store programs
            there too. "auto" is what JAX is configured to do, for example by JAX_COMPILATION_CACHE_DIR, else the user's
            cache folder, unless nothing can be written there.

    Raises:
        ValueError: The folder that was given cannot be written, or its name is empty.
    """
    if not choice:
        raise ValueError("--compilation-cache is '': give a folder, or off")
    if choice == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if choice == "auto" and jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        folder = (_user_cache_folder() if choice == "auto" else Path(choice)) / "helix_jax"
        _prepare(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        if choice == "auto":
            return
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"--compilation-cache is '{choice}', which cannot be written ({reason}): give another folder, or off"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LIMIT_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_COMPILE_S)


def _user_cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _prepare(folder: Path) -> None:
    """Create the folder. Remove programs without a time of their last use, which JAX cannot order.

    A process that is killed while it stores a program leaves one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "Permission denied")
    for program in folder.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
            program.unlink(missing_ok=True)
