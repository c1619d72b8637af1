"""The text that the evaluations read, as tokens of a model: text that it was not trained on, and windows of it."""

from dataclasses import dataclass

import numpy as np

from helix_jax.text import ByteTokenizer, Tokenizer
from helix_jax.validation import check_in_vocabulary


@dataclass(frozen=True, eq=False)
class TokenText:
    """Text as tokens of a model.

    Args:
        tokens_X: The token ids, without special tokens.
        tokenizer: The tokenizer that they are from.
    """

    tokens_X: np.ndarray
    tokenizer: Tokenizer

    def windows(self, length: int, count: int) -> np.ndarray:
        """Return `count` windows of `length` tokens, [count, length], evenly spaced over the text.

        They begin with the special tokens that the tokenizer adds before a text.
        """
        beginning = np.asarray(special_tokens_around(self.tokenizer)[0], np.int32)
        taken = length - len(beginning)
        starts = np.linspace(0, len(self.tokens_X) - taken, count).astype(int)
        return np.stack([np.concatenate([beginning, self.tokens_X[start : start + taken]]) for start in starts])

    def count_bytes(self, tokens_BS: np.ndarray, span: int) -> int:
        """Return the bytes of text that the last `span` tokens of all rows have together."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return span * len(tokens_BS)
        rows = tokens_BS.tolist()
        return sum(self._byte_length(row) - self._byte_length(row[:-span]) for row in rows)

    def _byte_length(self, ids: list[int]) -> int:
        return len(self.tokenizer.decode(ids).encode())


def held_out_text(text: bytes, share: float, tokenizer: Tokenizer, vocab: int, min_tokens: int) -> TokenText:
    """Return the end of a text, which training holds out, as tokens.

    Args:
        text: The whole text. If the tokens are not bytes, it is UTF-8.
        share: The share of it that is held out, above 0 and at most 1.
        tokenizer: The tokenizer of the model.
        vocab: The size of the model's vocabulary.
        min_tokens: The tokens that the evaluation needs.

    Raises:
        ValueError: The share is out of range, the text is not UTF-8, a token is outside the vocabulary, or fewer than
            `min_tokens` tokens are held out.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the held-out share is {share}: give a number above 0, at most 1")
    tokens_X = _encode(text[len(text) - int(len(text) * share) :], tokenizer)
    if len(tokens_X):
        check_in_vocabulary("the text", (int(tokens_X.min()), int(tokens_X.max())), vocab)
    if len(tokens_X) < min_tokens:
        raise ValueError(
            f"the held-out text has {len(tokens_X)} tokens, but {min_tokens} are needed: "
            f"give more text, a larger held-out share, or shorter contexts"
        )
    return TokenText(tokens_X, tokenizer)


def _encode(text: bytes, tokenizer: Tokenizer) -> np.ndarray:
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(text, np.uint8).astype(np.int32)
    first = next((at for at in range(min(4, len(text))) if text[at] & 0xC0 != 0x80), 0)  # a character may be cut
    try:
        return np.asarray(encode_plain(tokenizer, text[first:].decode()), np.int32)
    except UnicodeDecodeError as error:
        raise ValueError(f"the text is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None


def encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text without the special tokens that a tokenizer adds before and after it."""
    before, after = special_tokens_around(tokenizer)
    ids = tokenizer.encode(text)
    return ids[len(before) : len(ids) - len(after)]


def special_tokens_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer adds before and after every text, such as a beginning of sequence."""
    special = set(getattr(tokenizer, "special_tokens", {}).values())
    if not special:
        return [], []
    ids = tokenizer.encode("a")
    plain = [at for at, id in enumerate(ids) if id not in special]
    first, last = (plain[0], plain[-1] + 1) if plain else (0, len(ids))
    return ids[:first], ids[last:]
