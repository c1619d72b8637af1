"""Tests the corpus, the sequences that are cut from it, held-out windows and recall tasks."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_jax.text import ByteTokenizer
from helix_jax.training.data import (
    Corpus,
    check_corpus,
    held_out_windows,
    make_sequences,
    masked_sequences,
    open_corpus,
    slice_sequences,
    training_sequences,
)
from helix_jax.training.passkeys import NAMES, fact, insert_passkeys, passkey_drill, question, recall_mask


class WordLengths:
    """A tokenizer whose tokens are words, and whose ids are their lengths."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join("x" * i for i in ids)


def make_corpus(length: int, starts=(0,), held_out: int = 0) -> Corpus:
    return Corpus(np.arange(length), np.asarray(starts), length - held_out, 1.0)


def test_byte_text_is_memory_mapped_and_split_at_the_separator(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    corpus = open_corpus([tmp_path / "a.txt"], ByteTokenizer(), 256, 0.25, "\n\n")
    assert isinstance(corpus.tokens_X, np.memmap)
    assert corpus.starts.tolist() == [0, 5, 10]
    assert (len(corpus.tokens_X), corpus.held_out, corpus.bytes_per_token) == (15, 12, 1.0)
    assert not open_corpus([tmp_path / "a.txt"], ByteTokenizer(), 256, 0.0).has_documents


def test_each_file_is_a_document_and_any_tokenizer_encodes_it(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a bb ccc")
    (tmp_path / "b.txt").write_text("dddd|ee|f")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    corpus = open_corpus(files, WordLengths(), 8, 0.0, "|")
    assert corpus.tokens_X.tolist() == [1, 2, 3, 5, 3, 1]  # the separator belongs to the document that it ends
    assert corpus.starts.tolist() == [0, 3, 4, 5]
    assert corpus.bytes_per_token == (8 + 9) / len(corpus.tokens_X)


def test_a_token_file_is_memory_mapped_and_split_after_the_end_id(tmp_path: Path):
    np.save(tmp_path / "t.npy", np.asarray([5, 6, 0, 7, 0], np.uint16))
    corpus = open_corpus([tmp_path / "t.npy"], None, 8, 0.0, end_id=0)
    assert isinstance(corpus.tokens_X, np.memmap)
    assert corpus.starts.tolist() == [0, 3]
    assert corpus.bytes_per_token is None


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "x.txt' is empty: leave it out"),
        (b"\xff\xfe", {"vocab": 128}, r"x.txt.* 254 .*vocabulary of 128"),
        (b"abc", {"tokenizer": None}, "x.txt' is text: give a tokenizer"),
        (b"abc", {"separator": ""}, "a separator that is not empty"),
        (np.zeros((2, 2), np.int32), {}, r"x.npy' contains int32 of shape \(2, 2\): give one row of integers"),
        (np.zeros(3), {}, "contains float64 of shape"),
        (np.asarray([-1]), {}, r"x.npy.* -1 "),
        ("not an array", {}, "x.npy' is not a NumPy file"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_an_error(tmp_path: Path, content, options, message: str):
    file = tmp_path / ("x.txt" if isinstance(content, bytes) else "x.npy")
    if isinstance(content, np.ndarray):
        np.save(file, content)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        open_corpus([file], **{"tokenizer": ByteTokenizer(), "vocab": 256, "held_out": 0.0} | options)


def test_no_files_and_too_little_text_are_errors(tmp_path: Path):
    with pytest.raises(ValueError, match="there are no files to train on"):
        open_corpus([], ByteTokenizer(), 256, 0.0)
    check_corpus(make_corpus(20, held_out=3), 16)
    message = "20 tokens, 4 of them held out, are too few for one sequence of 16"
    with pytest.raises(ValueError, match=message):
        check_corpus(make_corpus(20, held_out=4), 16)


@given(st.integers(2, 20), st.integers(1, 200), st.integers(0, 50), st.integers(1, 7), st.integers(0, 3))
def test_an_epoch_has_every_adjacent_window_once_and_no_held_out_token(
    context: int, more: int, held_out: int, batch: int, seed: int
):
    corpus = make_corpus(context + more + held_out, held_out=held_out)
    count = max(1, (corpus.held_out - 1) // context - 1)
    steps = -(-count // batch)
    drawn = np.concatenate([training_sequences(corpus, context, batch, seed, step).tokens_BS for step in range(steps)])
    epoch = drawn[:count]
    assert epoch.max() < corpus.held_out
    starts = sorted(epoch[:, 0])
    assert np.diff(starts).tolist() == [context] * (count - 1)
    again = training_sequences(corpus, context, batch, seed, 0).tokens_BS
    np.testing.assert_array_equal(again, drawn[:batch])


def test_epochs_and_seeds_give_different_orders():
    corpus = make_corpus(1000)
    first, second, other = (
        training_sequences(corpus, 10, 98, seed, step).tokens_BS for seed, step in ((0, 0), (0, 1), (1, 0))
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_document_starts_and_the_loss_mask_separate_documents():
    sequences = slice_sequences(make_corpus(30, starts=(0, 12, 15)), np.asarray([10, 13]), 6)
    assert sequences.tokens_BS[0].tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert sequences.document_start_BS.tolist() == [[0, 0, 2, 2, 2, 5], [0, 0, 2, 2, 2, 2]]
    assert sequences.loss_mask_BS.tolist() == [[True, False, True, True, False, True], [True, False, *[True] * 4]]


@given(st.integers(2, 81), st.integers(0, 300), st.integers(1, 300))
def test_held_out_windows_predict_every_token_once_after_half_a_context(context: int, before: int, held_out: int):
    corpus = make_corpus(context + 1 + before + held_out, held_out=held_out)
    starts, counted = held_out_windows(corpus, context)
    predicted = slice_sequences(corpus, starts, context).tokens_BS[:, 1:][counted]
    assert sorted(predicted) == list(range(corpus.held_out, len(corpus.tokens_X)))
    index = np.broadcast_to(np.arange(context), counted.shape)[counted]
    assert (index + 1 >= context // 2).all()


def test_every_passkey_is_stated_before_it_is_asked_for():
    text = b"".join(b"The line %d of the text, and more of it.\n" % n for n in range(100))
    with_passkeys = insert_passkeys(text, np.random.default_rng(0))
    assert len(with_passkeys) == len(text)
    assert with_passkeys == insert_passkeys(text, np.random.default_rng(0))
    questions = 0
    for name in NAMES:
        for answer in re.finditer(re.escape(question(name)) + rb"(\d{5,})\. ", with_passkeys):
            stated = with_passkeys.find(fact(name, answer[1].decode()))
            assert 0 <= stated < answer.start()
            questions += 1
    assert questions >= 1


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_in_a_drill_only_passkeys_that_were_stated_count(progress: float):
    text, random = b"In the beginning God created the heaven and the earth. " * 3, np.random.default_rng(0)
    has_repeated_digit = False
    for _ in range(20):
        drill = passkey_drill(text, random, progress)
        mask = recall_mask(drill)
        assert len(drill) == len(mask) == len(text)
        assert mask.any()
        for start in np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1):
            end = drill.index(b".", start)
            stated = drill[:start].split(b"The passkey of ")[-1] + drill[start:end] + b"."
            assert mask[start : end + 1].all()
            assert b"The passkey of " + stated in drill[:start]  # this name with this key
            has_repeated_digit |= len(set(drill[start:end])) < end - start
    assert has_repeated_digit == (progress > 0.5)


def test_only_the_pieces_that_count_are_in_the_loss():
    rows = [[([1, 2], False), ([3, 4], True), ([5], False), ([6], True)], [([7], False), ([8], True)]]
    sequences = masked_sequences(rows, 7)
    assert sequences.tokens_BS.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], [7, 8, 0, 0, 0, 0, 0, 0]]
    targets_BS = sequences.tokens_BS[:, 1:]
    assert [row[mask].tolist() for row, mask in zip(targets_BS, sequences.loss_mask_BS, strict=True)] == [
        [3, 4, 6],
        [8],
    ]
    assert not sequences.document_start_BS.any()


TOKENS = np.zeros((2, 5), int)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: masked_sequences([[([1] * 9, True)]], 7),
            ValueError,
            "row 0 has 9 tokens, more than context 7 and one",
        ),
        (lambda: masked_sequences([[("text", True)]], 7), TypeError, "row 0 has token ids that are not whole numbers"),
        (lambda: masked_sequences([[([1, 2], False)]], 7), ValueError, "loss_mask_BS of a batch is False everywhere"),
        (lambda: masked_sequences([], 7), ValueError, r"a batch has shape \(0, 8\): give .* at least 1 sequence"),
        (
            lambda: make_sequences(TOKENS, np.ones((2, 5), bool)),
            ValueError,
            r"has shape \(2, 5\) beside tokens \(2, 5\): give \(2, 4\)",
        ),
        (
            lambda: make_sequences(TOKENS, np.ones((2, 4))),
            TypeError,
            "loss_mask_BS of a batch has dtype float64: give booleans",
        ),
        (
            lambda: make_sequences(TOKENS, None, np.full((2, 4), 3)),
            ValueError,
            "an index below 0 or after its token",
        ),
        (
            lambda: make_sequences(TOKENS, None, np.zeros((2, 4), bool)),
            TypeError,
            "_start_BS of a batch has dtype bool",
        ),
    ],
)
def test_sequences_that_cannot_be_trained_on_are_refused(call, error, message: str):
    with pytest.raises(error, match=message):
        call()
