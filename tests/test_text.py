"""Tests of tokenizers, and that text is returned as soon as it is complete, without splitting characters."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_jax.config import ModelConfig
from helix_jax.text import ByteTokenizer, Detokenizer, chat_ids, open_tokenizer
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
    with pytest.raises(MissingPackageError, match="--chat needs the package jinja2: pip install"):
        chat_ids(tmp_path, "a question")
