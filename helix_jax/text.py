"""Tokenizers, and detokenization of tokens as they are generated."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from helix_jax.config import ModelConfig
from helix_jax.validation import require_package

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # of tokenizers with byte fallback
_CONTEXT = 32  # ids of the prompt that a detokenizer decodes


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

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token."""
        return {f"<0x{byte:02X}>": byte for byte in range(256)}

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """Return the text of these bytes. Ids above 255 have none."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer from a tokenizer.json file, and the tokens that a tokenizer_config.json beside it adds.

    As in transformers, text is neither truncated nor padded, whatever the file says.

    Args:
        file: The tokenizer.json file.

    Raises:
        MissingPackageError: The package tokenizers, of the extra `hf`, is not installed.
        ValueError: A file cannot be read, or both give a token different ids.
    """

    def __init__(self, file: Path):
        package = require_package("tokenizers", f"'{file}'", "tokenizers")
        try:
            self._tokenizer = package.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"'{file}' cannot be read ({error}): download it again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_tokens(package, file.with_name("tokenizer_config.json"))

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the tokens that decoding leaves out."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    def token_of(self, id: int) -> str | None:
        """Return the token with an id, as it is in the vocabulary."""
        return self._tokenizer.id_to_token(id)

    def _add_tokens(self, package: Any, file: Path) -> None:
        """Add the tokens that only tokenizer_config.json lists."""
        try:
            listed = json.loads(file.read_text()).get("added_tokens_decoder") or {} if file.exists() else {}
            entries = sorted((int(id), dict(entry)) for id, entry in listed.items())
            tokens = [(id, package.AddedToken(**_without_type(entry))) for id, entry in entries]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"'{file}' cannot be read ({error}): download it again") from None
        for id, token in tokens:
            if self._tokenizer.token_to_id(token.content) is None:
                add = self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens
                add([token])
            found = self._tokenizer.token_to_id(token.content)
            if found != id:
                raise ValueError(
                    f"token '{token.content}' has id {id} in '{file}', but {found} in tokenizer.json: correct one"
                )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with the special tokens that the file adds."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        return self._tokenizer.decode(ids)


def check_stop_string(tokenizer: Tokenizer | None, stop: str) -> None:
    """Check that a stop string can occur in text.

    Raises:
        ValueError: It contains a special token, which is not part of the text.
    """
    for token, id in getattr(tokenizer, "special_tokens", {}).items():
        if token in stop:
            raise ValueError(
                f"stop string {stop!r} contains the special token '{token}', which text leaves out: "
                f"give stop_token_ids=({id},)"
            )


def _without_type(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "__type"}


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


def encode_text(name: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a text.

    Args:
        name: The text, as error messages name it, such as "the prompt".
        text: The text.
        tokenizer: The tokenizer of the model.

    Raises:
        ValueError: The text is empty, or not valid Unicode.
    """
    if not text:
        raise ValueError(f"{name} is empty: give at least one character")
    try:
        text.encode()  # tokenizers report this in different ways
    except UnicodeEncodeError as error:
        invalid = text[error.start : error.end]
        raise ValueError(f"{name} contains {invalid!a}, half of a character: give valid Unicode") from None
    return tokenizer.encode(text)


class Detokenizer:
    """Converts token ids to text as they are generated, without splitting characters.

    The pieces add up to the text that decoding all ids at once gives after the context. Text that later ids may change
    is pending: a character whose bytes are incomplete, and a run of byte-fallback tokens, which is decoded as a whole.
    The cost of a token does not depend on how many came before it.

    Args:
        tokenizer: Converts ids to text.
        context: The ids before the first one, such as the prompt. They decide whether the text begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._window = [int(id) for id in context[-_CONTEXT:]]  # the last ids, from which text is decoded
        self._settled = len(self._window)  # of these ids, all text was returned
        self._returned = len(self._tokenizer.decode(self._window))  # characters of the window's text

    def append(self, token: int) -> str:
        """Append a token. Return the text that it completes, which is often empty."""
        if self._is_textless(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if self._is_byte(token):
            return ""
        piece = self._return(text, len(text) - text.endswith(_REPLACEMENT))
        if len(self._window) > 2 * _CONTEXT:
            self._shorten()
        return piece

    def flush(self) -> str:
        """Return the text of the pending ids, valid or not."""
        text = self._tokenizer.decode(self._window)
        return self._return(text, len(text))

    def _return(self, text: str, end: int) -> str:
        piece = text[self._returned : end]
        self._returned = max(self._returned, end)
        if end == len(text):  # the ids of the last piece suffice as context of the next
            new = self._window[self._settled :]
            if new_text := self._tokenizer.decode(new):
                self._window, self._returned = new, len(new_text)
            self._settled = len(self._window)
        return piece

    def _shorten(self) -> None:
        """Drop the first ids of a window that never became complete characters, if the text is the same without."""
        decode, first = self._tokenizer.decode, self._window[:_CONTEXT]
        before, after = decode(first), decode(self._window[_CONTEXT:])
        if before + after == decode(self._window) and len(before) <= self._returned:
            self._window = self._window[_CONTEXT:]
            self._settled, self._returned = max(0, self._settled - _CONTEXT), self._returned - len(before)

    def _is_textless(self, token: int) -> bool:
        """Return whether a token has no text wherever it is, like special tokens. Two spaces at the start have some."""
        decode = self._tokenizer.decode
        return not decode([token, token])

    def _is_byte(self, token: int) -> bool:
        to_token = getattr(self._tokenizer, "token_of", None)
        return to_token is not None and _BYTE_TOKEN.fullmatch(to_token(token) or "") is not None
