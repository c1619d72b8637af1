"""Chats: lists of messages, and the chat template of a model folder, which turns them into token ids."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from helix_jax.validation import check_choice, require_package

ROLES = ("system", "developer", "user", "assistant", "tool")

# A role and a content, and whatever else a chat template knows.
Message = Mapping[str, Any]


def user_message(text: str) -> list[dict[str, Any]]:
    """Return the chat that consists of a text as a user message."""
    return [{"role": "user", "content": text}]


def check_messages(name: str, messages: Any) -> list[dict[str, Any]]:
    """Return the messages of a chat, checked, with their contents as text.

    Args:
        name: The messages, as error messages name them.
        messages: The messages. A content may be a list of parts of the type "text", as in the API of OpenAI.

    Raises:
        TypeError: The messages are not a list of objects, or a content is not text.
        ValueError: There are no messages, or a role is unknown.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        example = "[{'role': 'user', 'content': 'Hello'}]"
        raise TypeError(f"{name} is {shorten(messages)}: give a list of messages, like {example}")
    if not messages:
        raise ValueError(f"{name} has no messages: give at least one")
    return [_check_message(f"{name}, message {index}", message) for index, message in enumerate(messages)]


def _check_message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{name} is {shorten(message)}: give an object like {{'role': 'user', 'content': 'Hello'}}")
    check_choice(f"{name}: role", message.get("role"), ROLES)
    return {**message, "content": _text_of(f"{name}: content", message.get("content"))}


def _text_of(name: str, content: Any) -> str:
    """Return a content as text. Of a list, templates of text models would write the Python syntax."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise TypeError(f"{name} is {shorten(content)}: give text, as the models here read nothing else")
    return "".join(part["text"] for part in parts)


class ChatTemplate:
    """The chat template of a model folder.

    Args:
        folder: The folder, with a tokenizer.json file and a chat template as transformers stores it.

    Raises:
        MissingPackageError: A package of the extra `hf` is not installed.
        ValueError: The folder has no chat template, or one that cannot be read.
    """

    def __init__(self, folder: Path):
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that PyTorch is not installed
        jinja2, transformers = (
            require_package(name, "a chat", "transformers jinja2") for name in ("jinja2", "transformers")
        )
        self._folder, self._errors = folder, (ValueError, KeyError, TypeError, AttributeError, jinja2.TemplateError)
        tokenizer = None
        try:
            if (folder / "tokenizer.json").exists():
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, *self._errors) as error:
            raise ValueError(f"the tokenizer of '{folder}' cannot be read ({error}): download it again") from None
        if tokenizer is None or not tokenizer.chat_template:
            raise ValueError(f"'{folder}' has no chat template: give text instead of messages, without --chat")
        self._tokenizer = tokenizer

    def encode(self, name: str, messages: Sequence[Message], *, answer: bool = True) -> list[int]:
        """Return the token ids of a chat.

        Args:
            name: The messages, as error messages name them.
            messages: The messages, each with a role and a content.
            answer: Whether the ids end where an answer begins, so that a model continues with it.

        Raises:
            TypeError: As `check_messages`.
            ValueError: As `check_messages`, or the template does not accept these messages.
        """
        checked = check_messages(name, messages)
        try:
            ids = self._tokenizer.apply_chat_template(checked, add_generation_prompt=answer, return_dict=False)
        except self._errors as error:
            raise ValueError(
                f"{name}: the chat template of '{self._folder}' does not accept these messages ({error}): change them"
            ) from None
        return list(ids)
