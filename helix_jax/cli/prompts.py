"""Reads files with prompts."""

import json
from pathlib import Path


def read_text(file: Path) -> str:
    """Return the text of a prompt file.

    Raises:
        ValueError: It is not UTF-8.
        FileNotFoundError: It cannot be read.
    """
    try:
        return _read(file).decode()
    except UnicodeDecodeError:
        raise ValueError(f"prompt file '{file}' is not valid UTF-8: give text, or ids with --prompt-ids") from None


def read_ids(file: Path) -> list[int]:
    """Return the token ids in a prompt file.

    Raises:
        ValueError: It is not a JSON list of whole numbers.
        FileNotFoundError: It cannot be read.
    """
    try:
        ids = json.loads(_read(file))
    except ValueError as error:
        raise ValueError(f"prompt file '{file}' is not JSON ({error}): give a list of token ids") from None
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"prompt file '{file}' is not a list of token ids: give one like [1, 2, 3]")
    return ids


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()  # no check before: the file may be a pipe
    except OSError as error:
        raise FileNotFoundError(f"prompt file '{file}' cannot be read: {error.strerror}") from None
