"""Output files of commands: JSON that is written as results arrive, and figures."""

import json
from pathlib import Path
from typing import Any

from helix_jax.validation import require_package


def write_json(file: Path | None, results: Any) -> None:
    """Write `results` as JSON, if there is a file to write to."""
    if file:
        file.write_text(json.dumps(results, indent=1) + "\n")


def new_figure(option: str, file: Path) -> Any:
    """Create a matplotlib figure for `file`. Called before anything is measured, so that a mistake is reported early.

    Args:
        option: The option that names the file, for error messages.
        file: Where the figure will be saved. Its suffix determines the format.

    Raises:
        ValueError: The file has no suffix, cannot be written, or matplotlib cannot write such files.
        MissingPackageError: matplotlib is not installed.
    """
    if not file.suffix:
        raise ValueError(f"{option} '{file}' has no suffix: give a file like figure.png")
    figure = require_package("matplotlib.figure", option, "'.[plot]'").Figure(layout="constrained")
    if file.suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{option} '{file}' has a suffix that matplotlib cannot write: give a file like figure.png")
    _check_writable(option, file)
    return figure


def _check_writable(option: str, file: Path) -> None:
    """Check that a file can be written, by opening it. A file that did not exist is removed again."""
    existed = file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise ValueError(
            f"{option} '{file}' cannot be written ({error.strerror}): give a file in a folder that exists"
        ) from None
    if not existed:
        file.unlink()
