"""Checks of user input. Each kind of mistake has one wording: `<what is wrong, with the value>: <what to do>`.

A value of the wrong type raises TypeError, a value out of range ValueError, and a missing package ImportError.
"""

import importlib
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Set
from types import ModuleType, UnionType
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike


class MissingPackageError(ImportError):
    """An optional dependency is not installed."""


def check_type(name: str, value: Any, kind: type | UnionType, fix: str) -> None:
    """Check that `value` is of a type.

    Args:
        name: The value, as error messages name it.
        value: The value.
        kind: The type.
        fix: What to give, as the message says, such as "a helix_jax.Plan".

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {_a(value)}: give {fix}")


def check_array(name: str, x: Any, kind: Any) -> None:
    """Check that `x` is an array, and the type of its numbers. Its dimensions are those that the end of its name says.

    Args:
        name: The array, as error messages name it, such as "tokens_BT".
        x: The array, which may be traced.
        kind: `jnp.floating`, `jnp.integer` or `jnp.signedinteger`.

    Raises:
        TypeError: It is not an array, or its numbers are others.
        ValueError: It has another number of dimensions.
    """
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"{name} is {_a(x)}: give an array")
    if not jnp.issubdtype(x.dtype, kind):
        wanted = "floating-point numbers, such as bfloat16" if kind is jnp.floating else "integers, such as int32"
        raise TypeError(f"{name} has type {x.dtype}: give {wanted}")
    letters = name.rpartition("_")[2]
    if len(x.shape) != len(letters):
        raise ValueError(f"{name} has shape {[*x.shape]}: give {len(letters)} dimensions, [{', '.join(letters)}]")


def check_float_type(name: str, dtype: DTypeLike) -> None:
    """Check that `dtype` is a type of floating-point numbers of 16 bits or more.

    Raises:
        TypeError: It is not.
    """
    try:
        known = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.floating) or known.itemsize < 2:
        shown = repr(dtype) if known is None else known.name
        raise TypeError(f"{name} is {shown}: give a type of floating-point numbers, such as 'bfloat16' or 'float32'")


def check_int(name: str, value: Any, least: int | None = None) -> None:
    """Check that `value` is an int (not a bool), and at least `least`.

    Raises:
        TypeError: It is not an int.
        ValueError: It is below `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: give a whole number")
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}: give at least {least}")


def check_number(name: str, value: Any) -> None:
    """Check that `value` is an int or a float (not a bool).

    Raises:
        TypeError: It is neither.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: give a number")


def check_positive(name: str, value: Any) -> None:
    """Check that `value` is a finite number above 0.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not positive, or not finite.
    """
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}: give a positive number")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Check that `value` is one of `choices`.

    Raises:
        ValueError: It is not.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def check_keys(where: str, values: Mapping[str, Any], known: Collection[str], required: Iterable[str] = ()) -> None:
    """Check that a mapping has only known keys, and all required ones.

    Args:
        where: The source of the mapping, as error messages name it, such as a file.
        values: The mapping.
        known: The keys that it may have.
        required: The keys that it must have.

    Raises:
        ValueError: A key is unknown or missing. The message names it.
    """
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key '{key}': choose one of {', '.join(sorted(known))}")
    for key in required:
        if key not in values:
            raise ValueError(f"{where}: '{key}' is missing: add it")


def check_token_ids(name: str, ids: Any, vocab: int) -> list[int]:
    """Return `ids` as a list of ints, each in the vocabulary.

    Args:
        name: The ids, as error messages name them, such as "the prompt".
        ids: An iterable of Python ints or NumPy integers.
        vocab: The size of the vocabulary.

    Raises:
        TypeError: `ids` is not a sequence of integers.
        ValueError: There are no ids, or one is outside the vocabulary.
    """
    if isinstance(ids, str | bytes | Mapping | Set):  # which are iterable, and bytes even as integers
        fix = "encode it with a tokenizer" if isinstance(ids, str) else "give a list of whole numbers"
        raise TypeError(f"{name} is not a sequence of token ids but of type {type(ids).__name__}: {fix}")
    try:
        tokens = list(ids)
        if set(map(type, tokens)) != {int}:  # else there is nothing to convert, which saves 5 ms for 8,192 tokens
            tokens = [_token_id(token) for token in tokens]
    except TypeError:
        shown = f"of type {type(ids).__name__}" if hasattr(ids, "__len__") else repr(ids)
        raise TypeError(f"{name} is not a sequence of token ids but {shown}: give a list of whole numbers") from None
    if not tokens:
        raise ValueError(f"{name} is empty: give at least one token")
    if min(tokens) < 0 or max(tokens) >= vocab:
        check_in_vocabulary(name, tokens, vocab)
    return tokens


def check_in_vocabulary(name: str, ids: Iterable[int], vocab: int) -> None:
    """Check that every id is in the vocabulary.

    Raises:
        ValueError: One is not. The message names the first.
    """
    for token in ids:
        if not 0 <= token < vocab:
            raise ValueError(
                f"{name}: token id {token} is outside the vocabulary of {vocab}: give ids from 0 to {vocab - 1}"
            )


def require_package(package: str, purpose: str, install: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        package: The module to import.
        purpose: The feature that needs it, as error messages name it, such as "--plot".
        install: The argument of `pip install` that provides it.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise MissingPackageError(f"{purpose} needs the package {missing}: pip install {install}") from None


def _a(value: Any) -> str:
    """Return the type of a value with its article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _token_id(token: Any) -> int:
    if isinstance(token, bool):
        raise TypeError("a bool is not a token id")
    return operator.index(token)
