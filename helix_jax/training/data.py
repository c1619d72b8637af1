"""Turns text and token files into one row of tokens, and cuts the sequences of each training step from it."""

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from helix_jax.text import ByteTokenizer, Tokenizer
from helix_jax.validation import check_in_vocabulary

_HASHED_TOKENS = 2**22  # that are in memory at once


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens of all files, one after the other.

    Args:
        tokens_X: The tokens. They are memory-mapped where possible.
        starts: Where documents start. The first is 0.
        held_out: The first token that is not trained on.
        bytes_per_token: The average for text files, None for token files.
    """

    tokens_X: np.ndarray
    starts: np.ndarray
    held_out: int
    bytes_per_token: float | None

    @property
    def has_documents(self) -> bool:
        """Whether there are several documents."""
        return len(self.starts) > 1

    def fingerprint(self) -> str:
        """Return a hash of the tokens and of the places where documents start."""
        digest = hashlib.blake2b(np.asarray(self.starts, np.int64).tobytes(), digest_size=16)
        for first in range(0, len(self.tokens_X), _HASHED_TOKENS):
            digest.update(np.asarray(self.tokens_X[first : first + _HASHED_TOKENS], np.int32).tobytes())
        return digest.hexdigest()


class Sequences(NamedTuple):
    """Sequences of S tokens and the one that follows.

    tokens_BS has shape [B, S + 1]. document_start_BS is the index in the sequence at which the document of a token
    starts. loss_mask_BS tells whether the token that follows belongs to the same document, and counts in the loss.
    """

    tokens_BS: np.ndarray  # [B, S + 1]
    document_start_BS: np.ndarray
    loss_mask_BS: np.ndarray


def open_corpus(
    files: Sequence[Path],
    tokenizer: Tokenizer | None,
    vocab: int,
    held_out: float,
    separator: str | None = None,
    end_id: int | None = None,
) -> Corpus:
    """Open text files, or token files (.npy, one row of integers). Each contains at least one document.

    A single file of tokens, or of text whose tokens are bytes, is memory-mapped; otherwise the tokens are in memory.

    Args:
        files: The files, in order.
        tokenizer: Encodes text files.
        vocab: The size of the model's vocabulary.
        held_out: The fraction of the tokens, at their end, that is not trained on.
        separator: The text that ends a document within a text file. It belongs to the document.
        end_id: The token that ends a document within a token file. It belongs to the document.

    Raises:
        ValueError: There are no files, one is empty or not what its suffix says, or a token is outside the vocabulary.
        OSError: A file cannot be read.
    """
    if not files:
        raise ValueError("there are no files to train on: name some in files of [data]")
    parts, starts, length = [], [], 0
    for file in files:
        tokens_X, inside = _tokens(file, end_id) if file.suffix == ".npy" else _text(file, tokenizer, separator)
        if not len(tokens_X):
            raise ValueError(f"'{file}' is empty: leave it out")
        check_in_vocabulary(f"'{file}'", (int(tokens_X.min()), int(tokens_X.max())), vocab)
        starts += [length, *(length + start for start in inside if start < len(tokens_X))]
        parts.append(tokens_X)
        length += len(tokens_X)
    tokens_X = parts[0] if len(parts) == 1 else np.concatenate(parts)
    of_tokens = any(file.suffix == ".npy" for file in files)
    bytes_per_token = None if of_tokens else sum(file.stat().st_size for file in files) / length
    return Corpus(tokens_X, np.asarray(starts), length - int(length * held_out), bytes_per_token)


def _tokens(file: Path, end_id: int | None) -> tuple[np.ndarray, list[int]]:
    try:
        tokens_X = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"'{file}' is not a NumPy file ({error}): write it with numpy.save") from None
    if not isinstance(tokens_X, np.ndarray):
        raise ValueError(f"'{file}' contains several arrays: write one row of tokens with numpy.save")
    if tokens_X.ndim != 1 or not np.issubdtype(tokens_X.dtype, np.integer):
        raise ValueError(f"'{file}' contains {tokens_X.dtype} of shape {tokens_X.shape}: give one row of integers")
    return tokens_X, [] if end_id is None else (np.flatnonzero(tokens_X == end_id) + 1).tolist()


def _text(file: Path, tokenizer: Tokenizer | None, separator: str | None) -> tuple[np.ndarray, list[int]]:
    if tokenizer is None or separator == "":
        raise ValueError(f"'{file}' is text: give a tokenizer for it, and a separator that is not empty, or none")
    if isinstance(tokenizer, ByteTokenizer):
        if not file.stat().st_size:
            return np.zeros(0, np.uint8), []
        text_X = np.memmap(file, np.uint8, "r")
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return text_X, [] if separator is None else list(_ends(text, separator.encode()))
    try:
        whole = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
    *ended, last = [whole] if separator is None else whole.split(separator)
    pieces = [*(piece + (separator or "") for piece in ended), *([last] if last else [])]
    ids = [tokenizer.encode(piece) for piece in pieces]
    tokens_X = np.concatenate([np.zeros(0, np.int32), *(np.asarray(piece, np.int32) for piece in ids)])
    return tokens_X, np.cumsum([len(piece) for piece in ids]).tolist()


def _ends(text: mmap.mmap, separator: bytes) -> Iterator[int]:
    at = text.find(separator)
    while at >= 0:
        yield at + len(separator)
        at = text.find(separator, at + len(separator))


def training_sequences(corpus: Corpus, context: int, batch: int, seed: int, step: int) -> Sequences:
    """Return the sequences of a step.

    The windows of an epoch lie side by side. Every epoch orders them differently, and offsets them differently.
    """
    starts = [_start(corpus.held_out, context, seed, index) for index in range(step * batch, (step + 1) * batch)]
    return slice_sequences(corpus, np.asarray(starts), context)


def check_corpus(corpus: Corpus, context: int) -> None:
    """Check that there is at least one sequence to train on.

    Raises:
        ValueError: There is none.
    """
    if corpus.held_out <= context:
        held_out = len(corpus.tokens_X) - corpus.held_out
        raise ValueError(
            f"{len(corpus.tokens_X)} tokens, {held_out} of them held out, are too few for one sequence of {context} "
            f"and the token after it: give more text, or less context"
        )


def slice_sequences(corpus: Corpus, start_B: np.ndarray, context: int) -> Sequences:
    """Return the sequences that start at `start_B`."""
    at_BS = start_B[:, None] + np.arange(context + 1)
    document_BS = np.searchsorted(corpus.starts, at_BS, side="right") - 1
    document_start_BS = np.maximum(corpus.starts[document_BS[:, :-1]] - start_B[:, None], 0)
    loss_mask_BS = document_BS[:, 1:] == document_BS[:, :-1]
    return Sequences(corpus.tokens_X[at_BS].astype(np.int32), document_start_BS, loss_mask_BS)


def _start(length: int, context: int, seed: int, index: int) -> int:
    count = max(1, (length - 1) // context - 1)  # the last window is left for the offset
    slack = length - 1 - count * context
    order, offset = _epoch(seed, index // count, count, slack)
    return int(order[index % count]) * context + offset


@lru_cache(maxsize=2)  # a batch may see the end of an epoch and the beginning of the next
def _epoch(seed: int, epoch: int, count: int, slack: int) -> tuple[np.ndarray, int]:
    random = np.random.default_rng((seed, epoch))
    return random.permutation(count), int(random.integers(0, slack + 1))


def held_out_windows(corpus: Corpus, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return windows that together predict every held-out token once, each after at least half a context.

    Returns:
        The starts [n], and which of the `context` predictions of each count [n, context].
    """
    first, half, length = corpus.held_out, context // 2, len(corpus.tokens_X)
    ends = np.minimum(np.arange(first + half, length + half, half), length)
    counted = ends - np.concatenate([[first], ends[:-1]])
    return ends - context - 1, np.arange(context) >= context - counted[:, None]
