"""Text to token ids and back; and text as it comes, without broken characters."""

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from helix_jax.config import ModelConfig

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_PATIENCE = 8  # ids that may be held back before what is broken is given out as such


@runtime_checkable
class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Bytes:
    """Ids are UTF-8 bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class HuggingFace:
    """A published tokenizer.json. Needs the extra `hf`."""

    def __init__(self, file: Path):
        try:
            from tokenizers import Tokenizer as Published
        except ImportError:
            raise ValueError(f"'{file}' needs the package tokenizers: pip install tokenizers") from None
        try:
            self._published = Published.from_file(str(file))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"'{file}' cannot be read ({error}): fetch it again") from None

    def encode(self, text: str) -> list[int]:
        return self._published.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._published.decode(ids)


def open_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a model folder; None if it has none.

    Raises:
        ValueError: a kind that is unknown, or one that needs a package which is not installed.
    """
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer is not None:
        raise ValueError(f"'{folder}': unknown tokenizer '{config.tokenizer}' in config.json: only 'bytes' is built in")
    file = folder / "tokenizer.json"
    return HuggingFace(file) if file.exists() else None


def chat_ids(folder: Path, text: str) -> list[int]:
    """`text` as what the user says in the chat template of a model folder, up to where the answer begins.

    Raises:
        ValueError: a package of the extra `hf` that is not installed, no template, or one that cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell that PyTorch is not there
    try:
        import jinja2
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(f"--chat needs the package {error.name}: pip install transformers jinja2") from None
    tokenizer = None
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer is not None and tokenizer.chat_template:
            said = [{"role": "user", "content": text}]
            return list(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, jinja2.TemplateError) as error:
        raise ValueError(f"the chat template of '{folder}' cannot be used ({error}): leave out --chat") from None
    raise ValueError(f"'{folder}' has no chat template: leave out --chat")


class Detokenizer:
    """Turns ids into text as they come, holding back what may be the start of a character.

    Decodes from the last piece that was given out, not from the start: the cost of a token does not grow, and a
    tokenizer that looks at its neighbours (a leading space, say) sees one.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._given: list[int] = []
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """The text that `token` completes; often none."""
        self._held.append(token)
        if not self._piece(self._held).endswith(_BROKEN):
            return self._give(len(self._held))
        # The last three may be the start of a character, of four bytes at most; what is broken before them stays so.
        return self._give(len(self._held) - 3) if len(self._held) > _PATIENCE else ""

    def rest(self) -> str:
        """What is still held back, broken or not."""
        return self._give(len(self._held))

    def _piece(self, ids: list[int]) -> str:
        before = self._tokenizer.decode(self._given)
        return self._tokenizer.decode(self._given + ids)[len(before) :]

    def _give(self, count: int) -> str:
        piece = self._piece(self._held[:count])
        if piece:
            self._given, self._held = self._held[:count], self._held[count:]
        return piece
