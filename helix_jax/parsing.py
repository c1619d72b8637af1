"""Builds configuration dataclasses from mappings, as TOML and JSON files provide them."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args

from helix_jax.validation import check_keys

Config = TypeVar("Config")


def parse_dataclass(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Build the dataclass `cls` from the keys and values of a mapping.

    Args:
        cls: The dataclass. A field whose type is itself a dataclass is built from a nested mapping.
        values: One value per field. Fields with a default may be missing.
        where: The source of the values, as error messages name it, such as "run.toml [model]".

    Raises:
        ValueError: A key is unknown or missing, or a value has the wrong type.
    """
    known = {f.name: f for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    required = [name for name, f in known.items() if f.default is MISSING]
    check_keys(where, values, known=known, required=required)
    return cls(**{key: _convert(value, known[key].type, f"{where}: {key}") for key, value in values.items()})


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: The file is not TOML.
        OSError: The file cannot be read.
    """
    try:
        return tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is not TOML ({error}): correct the file") from None


def _convert(value: Any, annotation: Any, name: str) -> Any:
    """Return `value` as the type with which a dataclass field is annotated."""
    types = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if value is None and NoneType in types:
        return None
    wanted: Any = types[0]  # the other one is None
    if hasattr(wanted, "__dataclass_fields__"):
        if isinstance(value, wanted):
            return value
        if isinstance(value, Mapping):
            return parse_dataclass(wanted, value, name)
    elif wanted is float and type(value) is int:
        return float(value)
    elif wanted in (tuple[int, ...], tuple[str, ...], tuple[float, ...]):
        kind = get_args(wanted)[0]
        accepted = (int, float) if kind is float else (kind,)
        if isinstance(value, list | tuple) and all(type(item) in accepted for item in value):
            return tuple(map(kind, value))
    elif type(value) is wanted:
        return value
    raise ValueError(f"{name} is {value!r}: give a value of type {getattr(wanted, '__name__', wanted)}")
