"""Text as a long row of tokens, and the sequences that a step of training takes from it: a function of its number."""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from helix_jax.text import Bytes, Tokenizer


@dataclass(frozen=True, eq=False)
class Corpus:
    """tokens_X: of all files; mapped into memory, not read, where that can be. starts: of the documents in it, the
    first is 0. held_out: from this token on nothing is trained on. bytes_per_token: of text; None of tokens.
    """

    tokens_X: np.ndarray
    starts: np.ndarray
    held_out: int
    bytes_per_token: float | None

    @property
    def documents(self) -> bool:
        """Whether there is more than one."""
        return len(self.starts) > 1


class Sequences(NamedTuple):
    """Some of a corpus, each of S tokens and the one that follows. first: where the document of a token starts, in the
    sequence. counted: whether the token that follows is of the same document, and so to be learned.
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
    """Of text files, or of token files (.npy, one row of whole numbers): each at least one document.

    separator, end_id: what ends a document within a file, of text and of tokens; it is part of the document. One file
    of tokens, or of text whose tokens are bytes, is mapped; anything else is held in memory.

    Raises:
        ValueError: no files, an empty one, one that is not what its name says, an id outside of the vocabulary.
        OSError: a file that cannot be read.
    """
    if not files:
        raise ValueError("there are no files to train on: name some under [data] files")
    parts, starts, length = [], [], 0
    for file in files:
        tokens_X, inside = _tokens(file, end_id) if file.suffix == ".npy" else _text(file, tokenizer, separator)
        if not len(tokens_X):
            raise ValueError(f"'{file}' is empty: leave it out")
        _check_ids(file, tokens_X, vocab)
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
        raise ValueError(f"'{file}' is not a file of numpy ({error}): write it with numpy.save") from None
    if not isinstance(tokens_X, np.ndarray):
        raise ValueError(f"'{file}' holds several arrays: write one row of tokens with numpy.save")
    if tokens_X.ndim != 1 or not np.issubdtype(tokens_X.dtype, np.integer):
        raise ValueError(f"'{file}' holds {tokens_X.dtype} of shape {tokens_X.shape}: give one row of whole numbers")
    return tokens_X, [] if end_id is None else (np.flatnonzero(tokens_X == end_id) + 1).tolist()


def _text(file: Path, tokenizer: Tokenizer | None, separator: str | None) -> tuple[np.ndarray, list[int]]:
    if tokenizer is None or separator == "":
        raise ValueError(f"'{file}' is text: give a tokenizer for it, and a separator that is not empty, or none")
    if isinstance(tokenizer, Bytes):
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


def _check_ids(file: Path, tokens_X: np.ndarray, vocab: int) -> None:
    most, least = int(tokens_X.max()), int(tokens_X.min())
    if least < 0 or most >= vocab:
        raise ValueError(
            f"'{file}': token {most if most >= vocab else least} is outside of the model's vocabulary of {vocab}: "
            f"give the model's own tokenizer, or a larger vocab"
        )


def training_sequences(corpus: Corpus, context: int, batch: int, seed: int, step: int) -> Sequences:
    """What a step trains on. An epoch's windows lie side by side; each has another order, and is slice_sequences elsewhere."""
    starts = [_start(corpus.held_out, context, seed, index) for index in range(step * batch, (step + 1) * batch)]
    return slice_sequences(corpus, np.asarray(starts), context)


def check_corpus(corpus: Corpus, context: int) -> None:
    """Raises ValueError if there is not one sequence to train on."""
    if corpus.held_out <= context:
        held = len(corpus.tokens_X) - corpus.held_out
        raise ValueError(
            f"the text has {len(corpus.tokens_X)} tokens, of which {held} are held out: too few for one sequence of "
            f"{context} and the token after it: give more text, or less context"
        )


def slice_sequences(corpus: Corpus, start_B: np.ndarray, context: int) -> Sequences:
    """The sequences that start there."""
    at_BS = start_B[:, None] + np.arange(context + 1)
    document_BS = np.searchsorted(corpus.starts, at_BS, side="right") - 1
    document_start_BS = np.maximum(corpus.starts[document_BS[:, :-1]] - start_B[:, None], 0)
    return Sequences(corpus.tokens_X[at_BS].astype(np.int32), document_start_BS, document_BS[:, 1:] == document_BS[:, :-1])


def _start(length: int, context: int, seed: int, index: int) -> int:
    count = max(1, (length - 1) // context - 1)  # the last one is the room for cutting elsewhere
    room = length - 1 - count * context
    order, offset = _epoch(seed, index // count, count, room)
    return int(order[index % count]) * context + offset


@lru_cache(maxsize=2)  # a batch may see the end of an epoch and the beginning of the next
def _epoch(seed: int, epoch: int, count: int, room: int) -> tuple[np.ndarray, int]:
    random = np.random.default_rng((seed, epoch))
    return random.permutation(count), int(random.integers(0, room + 1))


def held_out_windows(corpus: Corpus, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the windows start that together predict every held-out token once, each after at least half a context.

    Returns the starts [n], and which of the `context` predictions of each count [n, context].
    """
    first, half, length = corpus.held_out, context // 2, len(corpus.tokens_X)
    ends = np.minimum(np.arange(first + half, length + half, half), length)
    counted = ends - np.concatenate([[first], ends[:-1]])
    return ends - context - 1, np.arange(context) >= context - counted[:, None]
