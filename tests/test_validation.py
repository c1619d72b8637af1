"""Checks the wording and the types of errors about user input, and the parser of configuration files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from helix_jax.parsing import parse_dataclass, read_toml
from helix_jax.validation import (
    MissingPackageError,
    check_choice,
    check_in_vocabulary,
    check_int,
    check_keys,
    check_number,
    check_positive,
    check_token_ids,
    require_package,
)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: check_int("rows", "3"), TypeError, "rows is '3': give a whole number"),
        (lambda: check_int("rows", True), TypeError, "rows is True: give a whole number"),
        (lambda: check_int("rows", 0, least=1), ValueError, "rows is 0: give at least 1"),
        (lambda: check_number("scale", None), TypeError, "scale is None: give a number"),
        (lambda: check_positive("scale", False), TypeError, "scale is False: give a number"),
        (lambda: check_positive("scale", float("nan")), ValueError, "scale is nan: give a positive number"),
        (lambda: check_choice("kind", "c", ("a", "b")), ValueError, "kind is 'c': choose one of a, b"),
        (lambda: check_keys("x.toml", {"c": 1}, ("b", "a")), ValueError, "x.toml: unknown key 'c': choose one of a, b"),
        (lambda: check_keys("x.toml", {}, ("a",), ["a"]), ValueError, "x.toml: 'a' is missing: add it"),
        (lambda: check_token_ids("prompt 0", 3, 9), TypeError, "prompt 0 is not a sequence of token ids"),
        (lambda: check_token_ids("prompt 0", [1, True], 9), TypeError, "prompt 0 is not a sequence of token ids"),
        (lambda: check_token_ids("prompt 0", [1.0], 9), TypeError, "prompt 0 is not a sequence of token ids"),
        (lambda: check_token_ids("prompt 0", [], 9), ValueError, "prompt 0 is empty: give at least one token"),
        (
            lambda: check_in_vocabulary("prompt 0", [3, 9], 9),
            ValueError,
            "prompt 0: token id 9 is outside the vocabulary of 9: give ids from 0 to 8",
        ),
        (
            lambda: require_package("helix_jax_plots", "--plot", "'.[plot]'"),
            MissingPackageError,
            r"--plot needs the package helix_jax_plots: pip install '\.\[plot\]'",
        ),
    ],
)
def test_each_kind_of_error_has_one_wording(check, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        check()


def test_valid_values_pass():
    check_int("rows", 3, least=3)
    check_number("scale", 0)
    check_positive("scale", 1e-30)
    check_choice("kind", "a", ("a", "b"))
    check_keys("x.toml", {"a": 1}, ("a", "b"), ["a"])
    assert check_token_ids("prompt 0", np.asarray([0, 8]), 9) == [0, 8]
    assert require_package("json", "--json", "json").loads("1") == 1


def test_a_missing_package_is_an_import_error():
    assert issubclass(MissingPackageError, ImportError)


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    count: int
    rate: float = 1.0
    name: str | None = None
    inner: Inner = Inner()


def test_a_mapping_becomes_a_dataclass():
    values = {"count": 3, "rate": 2, "name": None, "inner": {"sizes": [1, 2]}}
    assert parse_dataclass(Outer, values, "x.toml") == Outer(3, 2.0, None, Inner((1, 2)))
    assert parse_dataclass(Outer, {"count": 3, "inner": Inner((1,))}, "x.toml") == Outer(3, inner=Inner((1,)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "x.toml: 'count' is missing: add it"),
        ({"count": 1, "size": 2}, "x.toml: unknown key 'size': choose one of count, inner, name, rate"),
        ({"count": True}, "x.toml: count is True: give a value of type int"),
        ({"count": None}, "x.toml: count is None: give a value of type int"),
        ({"count": 1, "rate": "2"}, "x.toml: rate is '2': give a value of type float"),
        ({"count": 1, "inner": 2}, "x.toml: inner is 2: give a value of type Inner"),
        ({"count": 1, "inner": {"sizes": [1, "2"]}}, r"x.toml: inner: sizes is \[1, '2'\]: give a value of type tuple"),
    ],
)
def test_values_of_a_file_that_do_not_fit_are_value_errors(values, message: str):
    with pytest.raises(ValueError, match=message):
        parse_dataclass(Outer, values, "x.toml")


def test_a_file_that_is_not_toml_is_rejected(tmp_path: Path):
    file = tmp_path / "x.toml"
    file.write_text("a = ")
    with pytest.raises(ValueError, match="x.toml' is not TOML .*: correct the file"):
        read_toml(file)
    file.write_text("a = 1")
    assert read_toml(file) == {"a": 1}
