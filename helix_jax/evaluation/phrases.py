"""Passkeys, the questions for them, and the answers, as tokens of a model."""

from functools import cached_property
from itertools import takewhile

from helix_jax.evaluation.texts import encode_plain, special_tokens_around
from helix_jax.text import ByteTokenizer, Tokenizer
from helix_jax.training.passkeys import DIGITS, NAMES, fact, question


class Phrases:
    """The phrases that `training/passkeys.py` inserts into text, as tokens.

    Byte models read them as in training, where fact and question end with a space. Other tokenizers join a space to the
    word that follows it, so there the fact and the question end before it, and the answer begins with it.

    Args:
        tokenizer: The tokenizer of the model.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._is_of_bytes = isinstance(tokenizer, ByteTokenizer)

    @cached_property
    def beginning(self) -> list[int]:
        """The special tokens that every text begins with."""
        return special_tokens_around(self._tokenizer)[0]

    @property
    def answer_tokens(self) -> int:
        """The most tokens of a passkey: one per digit, and one for the space."""
        return DIGITS if self._is_of_bytes else DIGITS + 1

    @cached_property
    def question_tokens(self) -> int:
        """The tokens of the longest question and its answer."""
        return max(len(self.question(name)) for name in NAMES) + self.answer_tokens

    def fact(self, name: str, key: str) -> list[int]:
        """Return the sentence that states a passkey."""
        return self._encode(fact(name, key))

    def question(self, name: str) -> list[int]:
        """Return the question for a passkey, up to where the answer begins."""
        return self._encode(question(name))

    def key_offset(self, name: str, key: str) -> int:
        """Return the index of the first token of a passkey in its fact."""
        stated = fact(name, key)
        pairs = zip(self._encode(stated), self._encode(stated[: stated.index(key.encode())]), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def answer(self, ids: list[int]) -> str:
        """Return the text of an answer, as long as a passkey."""
        return self.text(ids).strip()[:DIGITS]

    def text(self, ids: list[int]) -> str:
        """Return the text of tokens. Bytes are decoded as Latin-1, which represents every byte."""
        if self._is_of_bytes:
            return bytes(id for id in ids if id < 256).decode("latin-1")
        return self._tokenizer.decode(ids)

    def _encode(self, phrase: bytes) -> list[int]:
        return list(phrase) if self._is_of_bytes else encode_plain(self._tokenizer, phrase.decode().rstrip())
