"""Tests of tokenizers, and that text is returned as soon as it is complete, without splitting characters."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_jax.chat import ChatTemplate
from helix_jax.config import ModelConfig
from helix_jax.text import ByteTokenizer, Detokenizer, check_stop_string, encode_text, open_tokenizer
from helix_jax.validation import MissingPackageError
from tests.reference import TINY

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def pieces_of(ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(ByteTokenizer())
    return [detokenizer.append(i) for i in ids] + [detokenizer.flush()]


@given(st.text())
def test_pieces_add_up_to_the_text_and_contain_no_broken_character(text: str):
    pieces = pieces_of(ByteTokenizer().encode(text))
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.binary())
def test_invalid_bytes_give_the_text_of_decoding_them_at_once(raw: bytes):
    assert "".join(pieces_of(list(raw))) == raw.decode(errors="replace")


def test_bytes_that_never_become_characters_are_returned_in_time():
    pieces = pieces_of([0xFF] * 100)
    assert "".join(pieces) == REPLACEMENT * 100
    assert max(map(len, pieces)) < 10


def test_a_character_waits_for_its_last_byte():
    assert pieces_of(list("aé€".encode())) == ["a", "", "é", "", "", "€", ""]


def test_a_published_tokenizer_is_opened(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"in": 0, "the": 1, "beginning": 2, "?": 3}, unk_token="?")
    published = tokenizers.Tokenizer(words)
    published.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    published.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path, TINY)
    assert tokenizer is not None
    assert tokenizer.encode("in the beginning") == [0, 1, 2]
    detokenizer = Detokenizer(tokenizer)
    assert "".join([*map(detokenizer.append, [0, 1, 2]), detokenizer.flush()]) == "in the beginning"


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path):
    assert open_tokenizer(tmp_path, TINY) is None


def test_an_unknown_or_unreadable_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="tokenizer is 'runes': choose bytes"):
        open_tokenizer(tmp_path, ModelConfig(**{**vars(TINY), "tokenizer": "runes"}))
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(ValueError, match=r"tokenizer.json' cannot be read"):
        open_tokenizer(tmp_path, TINY)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    for package in ("tokenizers", "jinja2"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match="tokenizer.json' needs the package tokenizers: pip install"):
        open_tokenizer(tmp_path, TINY)
    with pytest.raises(MissingPackageError, match="a chat needs the package jinja2: pip install"):
        ChatTemplate(tmp_path)


def test_half_of_a_character_is_named_whatever_the_tokenizer_does(tmp_path: Path):
    tokenizer, _ = open_kind("byte-level", tmp_path)
    for one in (tokenizer, ByteTokenizer()):
        with pytest.raises(ValueError, match=r"the prompt contains '\\ud800', half of a character: give valid Unicode"):
            encode_text("the prompt", "a\ud800", one)


def byte_level():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer, tokenizer.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["In the beginning 你好 \N{REPLACEMENT CHARACTER}"] * 9, trainer)
    return tokenizer


def byte_fallback(*, strip: bool):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "é", "▁▁", "▁\ufffd"]
    model = tokenizers.models.BPE(
        {word: id for id, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer, decoders = tokenizers.Tokenizer(model), tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    tokenizer.add_special_tokens(words[:3])
    return tokenizer


def metaspace():
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁b", "c", "▁▁", "é"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(words[:3])
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "byte fallback": partial(byte_fallback, strip=False),
    "byte fallback, stripped": partial(byte_fallback, strip=True),
    "metaspace": metaspace,
}


def open_kind(kind: str, folder: Path):
    """Return a tokenizer of a kind as it is read from a file, and the size of its vocabulary."""
    published = KINDS[kind]()
    published.save(str(folder / "tokenizer.json"))
    return open_tokenizer(folder, TINY), published.get_vocab_size()


@pytest.mark.parametrize("sequences", [150, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_pieces_add_up_to_the_decoded_text(kind: str, sequences: int, tmp_path: Path):
    """For random ids, with invalid bytes, special tokens and replacement characters, after a prompt or none."""
    tokenizer, vocab = (ByteTokenizer(), 260) if kind == "bytes" else open_kind(kind, tmp_path)
    random = np.random.default_rng(sequences)
    for _ in range(sequences):
        ids = random.integers(0, vocab, random.integers(1, 40)).tolist()
        if random.random() < 0.3:  # few distinct ids: runs of the same
            ids = random.choice(ids[:3], 150).tolist()
        detokenizer = Detokenizer(tokenizer)
        pieces = [*map(detokenizer.append, ids), detokenizer.flush()]
        assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_text_are_what_both_decode_to(kind: str, tmp_path: Path):
    """Above all the space between them."""
    tokenizer, vocab = open_kind(kind, tmp_path)
    random = np.random.default_rng(1)
    for _ in range(100):
        prompt, ids = random.integers(0, vocab, (2, random.integers(1, 50))).tolist()
        decoded = tokenizer.decode(prompt)
        if decoded.endswith(REPLACEMENT) or re.fullmatch("<0x..>", tokenizer.token_of(prompt[-1])):
            continue  # the prompt ends inside of a character
        detokenizer = Detokenizer(tokenizer, prompt)
        text = "".join([*map(detokenizer.append, ids), detokenizer.flush()])
        assert decoded + text == tokenizer.decode(prompt + ids)


@pytest.mark.parametrize(("kind", "textless", "letter"), [("byte-level", [0, 1], 5), ("bytes", [256, 259], 65)])
def test_a_token_costs_the_same_after_many_without_text(kind: str, textless: list[int], letter: int, tmp_path: Path):
    """Counted as the ids that the tokenizer decodes."""
    inner = ByteTokenizer() if kind == "bytes" else open_kind(kind, tmp_path)[0]
    decoded = 0

    class Counting:
        def encode(self, text: str) -> list[int]:
            return inner.encode(text)

        def decode(self, ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return inner.decode(ids)

    costs = []
    for before in (100, 9000):
        detokenizer = Detokenizer(Counting())
        assert not any(detokenizer.append(textless[i % 2]) for i in range(before))
        decoded = 0
        assert detokenizer.append(letter) == inner.decode([letter])
        costs.append(decoded)
    assert costs[0] == costs[1] < 20


def test_settings_to_truncate_and_to_pad_are_ignored(tmp_path: Path):
    """As in transformers: a prompt is never changed silently."""
    published = byte_level()
    published.enable_truncation(4)
    published.enable_padding(length=64)
    published.save(str(tmp_path / "tokenizer.json"))
    text = "In the beginning God created the heaven and the earth."
    tokenizer = open_tokenizer(tmp_path, TINY)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(text)) == text


ADDED = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def add_tokens(folder: Path, first: int) -> None:
    """Write a tokenizer_config.json with two tokens that tokenizer.json lacks."""
    entries = (("<|im_end|>", True), ("<tool>", False))
    listed = {first + i: {"content": text, "special": special, **ADDED} for i, (text, special) in enumerate(entries)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))


def test_tokens_of_the_tokenizer_config_are_added(tmp_path: Path):
    """With their ids. Special ones are left out of text, so they are refused as stop strings."""
    _, vocab = open_kind("byte-level", tmp_path)
    add_tokens(tmp_path, vocab)
    tokenizer = open_tokenizer(tmp_path, TINY)
    assert tokenizer is not None
    assert tokenizer.encode("<|im_end|><tool>")[:2] == [vocab, vocab + 1]
    assert tokenizer.decode([vocab, vocab + 1]) == "<tool>"
    check_stop_string(tokenizer, "<tool>")
    for stop in ("<|im_end|>", "so <|im_end|>"):
        with pytest.raises(ValueError, match=rf"special token '<\|im_end\|>', .* give stop_token_ids=\({vocab},\)"):
            check_stop_string(tokenizer, stop)
    add_tokens(tmp_path, vocab + 7)
    with pytest.raises(ValueError, match=rf"token '<\|im_end\|>' has id {vocab + 7} in .*, but {vocab} in tokenizer"):
        open_tokenizer(tmp_path, TINY)
