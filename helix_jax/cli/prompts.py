"""Reads prompts, from the command line or from files, as token ids."""

import json
from pathlib import Path

from helix_jax.text import Tokenizer


def encode(text: str, source: str, tokenizer: Tokenizer | None, model: Path) -> list[int]:
    """Return the token ids of a text.

    Args:
        text: The text.
        source: The source of the text, as error messages name it.
        tokenizer: The tokenizer of the model, None if it has none.
        model: The model folder, as error messages name it.

    Raises:
        ValueError: There is no tokenizer, or the text is empty or not valid Unicode.
    """
    if tokenizer is None:
        raise ValueError(f"'{model}' has no tokenizer.json: give token ids with --prompt-ids FILE.json")
    if not text:
        raise ValueError(f"{source} is empty: give at least one character")
    try:
        return tokenizer.encode(text)
    except UnicodeEncodeError:
        raise ValueError(f"{source} is not valid UTF-8: give text, or token ids with --prompt-ids") from None


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
