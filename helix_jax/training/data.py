"""Turns text and token files into one row of tokens, and cuts the sequences of each training step from it."""

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

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

    @property
    def has_held_out(self) -> bool:
        """Whether some tokens are not trained on."""
        return self.held_out < len(self.tokens_X)

    def fingerprint(self) -> str:
        """Return a hash of the tokens and of the places where documents start."""
        digest = hashlib.blake2b(np.asarray(self.starts, np.int64).tobytes(), digest_size=16)
        for first in range(0, len(self.tokens_X), _HASHED_TOKENS):
            digest.update(np.asarray(self.tokens_X[first : first + _HASHED_TOKENS], np.int32).tobytes())
        return digest.hexdigest()


class Sequences(NamedTuple):
    """Sequences of S tokens and the one that follows. `make_sequences` and `masked_sequences` create and check them.

    tokens_BS has shape [B, S + 1]. document_start_BS is the index in the sequence at which the document of a token
    starts, before which nothing is seen. loss_mask_BS tells whether the token that follows counts in the loss.
    """

    tokens_BS: np.ndarray  # [B, S + 1]
    document_start_BS: np.ndarray
    loss_mask_BS: np.ndarray


def make_sequences(tokens: Any, loss_mask: Any = None, document_start: Any = None) -> Sequences:
    """Return sequences after checking them.

    Args:
        tokens: Token ids [B, S + 1].
        loss_mask: Bools [B, S]: whether the token that follows counts in the loss. None: all count.
        document_start: Integers [B, S]: the index at which the document of each token starts. None: one document.

    Raises:
        TypeError: The tokens or starts are not integers, or the mask is not bool.
        ValueError: A shape is wrong, no token counts in the loss, or a document starts after its tokens.
    """
    try:
        tokens_BS = np.asarray(tokens)
    except ValueError:
        raise ValueError("the sequences of a batch have different lengths: give [B, S + 1]") from None
    if not np.issubdtype(tokens_BS.dtype, np.integer):
        raise TypeError(f"a batch has dtype {tokens_BS.dtype}: give an integer array of token ids")
    if tokens_BS.ndim != 2 or tokens_BS.shape[0] < 1 or tokens_BS.shape[1] < 2:
        raise ValueError(f"a batch has shape {tokens_BS.shape}: give [B, S + 1] with at least 1 sequence of 2 tokens")
    shape = (tokens_BS.shape[0], tokens_BS.shape[1] - 1)
    mask_BS = np.ones(shape, bool) if loss_mask is None else np.asarray(loss_mask)
    start_BS = np.zeros(shape, np.int32) if document_start is None else np.asarray(document_start)
    kinds = ("document_start_BS", start_BS, np.integer, "integers"), ("loss_mask_BS", mask_BS, np.bool_, "booleans")
    for name, given_BS, kind, wanted in kinds:
        if not np.issubdtype(given_BS.dtype, kind):
            raise TypeError(f"{name} of a batch has dtype {given_BS.dtype}: give {wanted}")
        if given_BS.shape != shape:
            raise ValueError(
                f"{name} of a batch has shape {given_BS.shape} beside tokens {tokens_BS.shape}: give {shape}"
            )
    if not mask_BS.any():
        raise ValueError("loss_mask_BS of a batch is False everywhere: set it where the next token counts")
    if (start_BS < 0).any() or (start_BS > np.arange(shape[1])).any():
        raise ValueError("document_start_BS of a batch has an index below 0 or after its token: correct it")
    return Sequences(tokens_BS, start_BS, mask_BS)


def masked_sequences(rows: Sequence[Sequence[tuple[Any, bool]]], context: int) -> Sequences:
    """Return sequences that are put together from pieces, of which only some count in the loss.

    To fine-tune on chats, the pieces are the messages in their template, and those of the assistant count.

    Args:
        rows: The pieces of each row: their token ids, and whether these count in the loss.
        context: Tokens per sequence. Shorter rows are padded at their end, which does not count in the loss.

    Raises:
        TypeError: Token ids are not integers.
        ValueError: A row has more than `context + 1` tokens, or no token counts in the loss.
    """
    shape = len(rows), context + 1
    tokens_BS, counts_BS = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for row, pieces in enumerate(rows):
        ids = [id for tokens, _ in pieces for id in tokens]
        if len(ids) > context + 1:
            raise ValueError(
                f"row {row} has {len(ids)} tokens, more than context {context} and one: "
                f"give a larger context, or leave the row out"
            )
        if not all(isinstance(id, int | np.integer) for id in ids):
            raise TypeError(f"row {row} has token ids that are not whole numbers: encode its text with a tokenizer")
        tokens_BS[row, : len(ids)] = ids
        counts_BS[row, : len(ids)] = np.repeat([bool(counts) for _, counts in pieces], [len(t) for t, _ in pieces])
    return make_sequences(tokens_BS, counts_BS[:, 1:])


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
