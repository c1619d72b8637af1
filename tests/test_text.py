"""Text comes out as it is completed, never as half a character."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_jax.text import Bytes, Detokenizer, open_tokenizer
from tests.reference import TINY


def streamed(ids: list[int]) -> list[str]:
    stream = Detokenizer(Bytes())
    return [stream.feed(i) for i in ids] + [stream.rest()]


@given(st.text())
def test_pieces_add_up_and_none_is_broken(text: str):
    pieces = streamed(Bytes().encode(text))
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.binary())
def test_broken_bytes_come_out_as_decoding_at_once_gives_them(raw: bytes):
    assert "".join(streamed(list(raw))) == raw.decode(errors="replace")


def test_text_that_never_becomes_characters_comes_out_all_the_same():
    pieces = streamed([0xFF] * 100)
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 100
    assert max(map(len, pieces)) < 10


def test_a_character_waits_for_its_last_byte():
    assert streamed(list("aé€".encode())) == ["a", "", "é", "", "", "€", ""]


def test_a_published_tokenizer_is_opened(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"in": 0, "the": 1, "beginning": 2, "?": 3}, unk_token="?")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path, TINY)
    assert tokenizer is not None
    assert tokenizer.encode("in the beginning") == [0, 1, 2]
    stream = Detokenizer(tokenizer)
    assert "".join([*map(stream.feed, [0, 1, 2]), stream.rest()]) == "in the beginning"


def test_no_tokenizer_is_none_and_an_unknown_one_an_error(tmp_path: Path):
    assert open_tokenizer(tmp_path, TINY) is None
    from helix_jax.config import ModelConfig

    with pytest.raises(ValueError, match="unknown tokenizer 'runes' in config.json: only 'bytes' is built in"):
        open_tokenizer(tmp_path, ModelConfig(**{**vars(TINY), "tokenizer": "runes"}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(ValueError, match=r"tokenizer.json' cannot be read"):
        open_tokenizer(tmp_path, TINY)
