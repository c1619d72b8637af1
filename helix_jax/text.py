"""Tokenizers, and detokenization of tokens as they are generated."""

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from helix_jax.config import ModelConfig
from helix_jax.validation import require_package

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING = 8  # ids that may wait to become a character, before invalid ones are returned as replacement characters


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text to token ids and back. Any object with these two methods will do."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, with replacement characters for what is not valid."""
        ...


class ByteTokenizer:
    """A tokenizer whose ids are UTF-8 bytes."""

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """Return the text of these bytes. Ids above 255 have none."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer from a tokenizer.json file.

    Args:
        file: The tokenizer.json file.

    Raises:
        MissingPackageError: The package tokenizers, of the extra `hf`, is not installed.
        ValueError: The file cannot be read.
    """

    def __init__(self, file: Path):
        package = require_package("tokenizers", f"'{file}'", "tokenizers")
        try:
            self._tokenizer = package.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"'{file}' cannot be read ({error}): download it again") from None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with the special tokens that the file adds."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        return self._tokenizer.decode(ids)


def open_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    """Open the tokenizer of a model folder. Return None if it has none.

    Raises:
        MissingPackageError: The tokenizer needs a package that is not installed.
        ValueError: config.json names an unknown tokenizer, or tokenizer.json cannot be read.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer is not None:
        raise ValueError(f"'{folder}': config.json: tokenizer is '{config.tokenizer}': choose bytes, or leave it out")
    file = folder / "tokenizer.json"
    return HuggingFaceTokenizer(file) if file.exists() else None


def chat_ids(folder: Path, text: str) -> list[int]:
    """Return the token ids of a user message in the chat template of a model folder, up to where the answer begins.

    Raises:
        MissingPackageError: A package of the extra `hf` is not installed.
        ValueError: The folder has no chat template, or one that cannot be used.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that PyTorch is not installed
    jinja2, transformers = (
        require_package(name, "--chat", "transformers jinja2") for name in ("jinja2", "transformers")
    )
    tokenizer = None
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer is not None and tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, jinja2.TemplateError) as error:
        raise ValueError(f"the chat template of '{folder}' cannot be used ({error}): leave out --chat") from None
    raise ValueError(f"'{folder}' has no chat template: leave out --chat")


class Detokenizer:
    """Converts token ids to text as they are generated, without splitting characters.

    Ids that may be the start of a character are pending until the character is complete. Each call decodes from the
    previous piece on, not from the start. The cost of a token therefore does not grow, and a tokenizer whose output
    depends on the preceding ids, such as a leading space, has them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._previous: list[int] = []
        self._pending: list[int] = []

    def append(self, token: int) -> str:
        """Append a token. Return the text that it completes, which is often empty."""
        self._pending.append(token)
        if not self._decode(self._pending).endswith(_REPLACEMENT):
            return self._take(len(self._pending))
        # The last three may be the start of a character of four bytes. Anything before them stays invalid.
        return self._take(len(self._pending) - 3) if len(self._pending) > _MAX_PENDING else ""

    def flush(self) -> str:
        """Return the text of the pending ids, valid or not."""
        return self._take(len(self._pending))

    def _decode(self, ids: list[int]) -> str:
        previous = self._tokenizer.decode(self._previous)
        return self._tokenizer.decode(self._previous + ids)[len(previous) :]

    def _take(self, count: int) -> str:
        piece = self._decode(self._pending[:count])
        if piece:
            self._previous, self._pending = self._pending[:count], self._pending[count:]
        return piece
