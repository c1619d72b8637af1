"""Opens a model folder: what is needed, beside the weights, to turn text and chats into token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, TypeGuard

import numpy as np

from helix_jax.chat import ChatTemplate, Message
from helix_jax.checkpoint import read_config, resolve_folder
from helix_jax.config import ModelConfig
from helix_jax.text import Tokenizer, encode_text, open_tokenizer
from helix_jax.validation import check_token_ids

# Text, token ids, or the messages of a chat.
AnyPrompt = str | Sequence[int] | np.ndarray | Sequence[Message]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder in Hugging Face format.

    Attributes:
        path: The folder.
        config: The model.
        tokenizer: Its tokenizer, None if it has none.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None

    @classmethod
    def open(cls, folder: str | Path) -> "ModelFolder":
        """Read the config of a model, and open its tokenizer.

        Args:
            folder: The path of the folder, or an id on the Hugging Face Hub, see `checkpoint.resolve_folder`.

        Raises:
            TypeError: As `resolve_folder`.
            MissingPackageError: As `resolve_folder` and `open_tokenizer`.
            ValueError: As `resolve_folder`, `read_config` and `open_tokenizer`.
        """
        path = resolve_folder(folder)
        config = read_config(path)
        return cls(path, config, open_tokenizer(path, config))

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template, which is read when it is first needed.

        Raises:
            MissingPackageError: As `ChatTemplate`.
            ValueError: As `ChatTemplate`.
        """
        return ChatTemplate(self.path)

    def encode(self, name: str, prompt: AnyPrompt, *, answer: bool = True) -> list[int]:
        """Return the token ids of a prompt.

        Args:
            name: The prompt, as error messages name it, such as "the prompt".
            prompt: Text, token ids, or the messages of a chat.
            answer: Whether the ids of a chat end where an answer begins.

        Raises:
            TypeError: The prompt is something else.
            MissingPackageError: As `ChatTemplate`.
            ValueError: It is empty, a token id is not in the vocabulary, the folder lacks what it needs, a tokenizer or
                a chat template, or the template does not accept the messages.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"'{self.path}' has no tokenizer.json: give token ids instead of text")
            return encode_text(name, prompt, self.tokenizer)
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence | np.ndarray):
            raise TypeError(f"{name} is {shorten(prompt)}: give text, token ids or messages")
        if is_chat(prompt):
            return self.chat_template.encode(name, prompt, answer=answer)
        return check_token_ids(name, prompt, self.config.vocab)


def is_chat(prompt: Any) -> TypeGuard[Sequence[Message]]:
    """Return whether a prompt is a list of messages."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
