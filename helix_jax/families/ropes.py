"""Keys of config.json files for rotary embeddings, for reading and for writing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helix_jax.config import ModelConfig, Rope
from helix_jax.families.keys import LAYER_TYPES, Fields, Published, read_value
from helix_jax.validation import check_choice, check_keys

_ROPE_KEYS = {
    "rope_theta": "theta",
    "factor": "factor",
    "original_max_position_embeddings": "original_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "partial_rotary_factor": "partial_rotary_factor",
}
# The required and the optional keys of each type.
_SCALING_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    ),
    "longrope": (("short_factor", "long_factor", "factor", "original_max_position_embeddings"), ("attention_factor",)),
}
_ORIGINAL, _PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"
_EXTENDED = ("llama3", "yarn", "longrope")  # types that depend on the original context
_IGNORED_KEYS = ("type", "finetuned")


@dataclass(frozen=True)
class RopeKeys:
    """Rotary embeddings, as published (`rope_theta`, `rope_scaling`) or as transformers 5 writes them.

    Args:
        theta: The base for files without `rope_theta`.
        interleaved: Whether neighbouring dimensions are rotated as pairs.
        required: Whether a file without scaling is an error, because all models of the family have it.
        partial: The share of a head that is rotated, for files without `partial_rotary_factor`. None: the family
            rotates whole heads.
    """

    theta: float = 10_000.0
    interleaved: bool = False
    required: bool = False
    partial: float | None = None

    def read(self, published: Published, fields: Fields) -> None:
        """Set the rope."""
        key = "rope_scaling" if published.get("rope_scaling") else "rope_parameters"
        if self.required and published.get(key) is None:
            raise ValueError("config.json: 'rope_scaling' is missing: add it")
        theta = read_value(published, "rope_theta", float, self.theta)
        table = published.get(key)
        if isinstance(table, Mapping) and rope_type(table) in _EXTENDED:
            table = _complete(table, published, fields["max_positions"])
        share = read_value(published, _PARTIAL, float, self.partial or 1.0)
        fields["rope"] = read_rope(table, key, theta, self.interleaved, share)
        if self.partial is None:
            check_whole_heads(fields["rope"])

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Set both keys of the rope."""
        published["rope_theta"] = config.rope.theta
        published["rope_scaling"] = write_scaling(config.rope)
        if self.partial is not None:
            published[_PARTIAL] = config.rope.partial_rotary_factor


def rope_type(table: Mapping[str, Any]) -> Any:
    """Return the type of a table of a rope."""
    return table.get("rope_type", table.get("type"))


def _complete(table: Mapping[str, Any], published: Published, max_positions: int) -> Fields:
    """Return the table of an extended context with the numbers that a file may have beside it, or leave out.

    As in transformers, the original context beside the table has priority, and without any the context counts.
    """
    original = read_value(published, _ORIGINAL, int, table.get(_ORIGINAL) or max_positions)
    table = {**table, _ORIGINAL: original}
    if rope_type(table) == "longrope" and table.get("factor") is None and type(original) is int:
        table["factor"] = max_positions / original
    return table


def check_whole_heads(*ropes: Fields) -> None:
    """Check that whole heads are rotated, for families in which this is so."""
    for rope in ropes:
        if rope[_PARTIAL] != 1:
            raise ValueError(f"config.json: {_PARTIAL} is {rope[_PARTIAL]!r}: only 1.0 is supported")


def read_rope(table: Any, where: str, theta: float, interleaved: bool = False, partial: float = 1.0) -> Fields:
    """Return the fields of Rope that a table of config.json describes.

    A known key that has no meaning for the table's type is ignored, as in transformers.

    Args:
        table: The table. None is a rope without scaling.
        where: The key of the table, as error messages name it.
        theta: The base, if the table has none.
        interleaved: Whether neighbouring dimensions are rotated as pairs.
        partial: The share of a head that is rotated, if the table has none.

    Raises:
        ValueError: The type is not supported, a key is unknown, or a required key is missing.
    """
    where = f"config.json: {where}"
    if table is not None and not isinstance(table, Mapping):
        raise ValueError(f"{where} is {table!r}: give a table")
    values = {key: value for key, value in (table or {}).items() if value is not None}
    kind = values.pop("rope_type", values.get("type", "default"))
    check_choice(f"{where}: rope_type", kind, _SCALING_KEYS)
    required, optional = _SCALING_KEYS[kind]
    _check_rope_keys(where, values, required)
    used = ("rope_theta", _PARTIAL, *required, *optional)
    fields = {_ROPE_KEYS[key]: values[key] for key in used if key in values}
    return {"theta": theta, _PARTIAL: partial, **fields, "kind": kind, "interleaved": interleaved}


def _check_rope_keys(where: str, values: dict[str, Any], required: tuple[str, ...]) -> None:
    if "attn_factor" in values:
        raise ValueError(f"{where}: attn_factor is ambiguous, transformers ignores it and others use it: remove it")
    check_keys(where, values, known={*_ROPE_KEYS, *_IGNORED_KEYS}, required=required)


def write_scaling(rope: Rope) -> dict[str, Any] | None:
    """Return the value of `rope_scaling` that describes a rope."""
    return None if rope.kind == "default" else _written(rope)


def _written(rope: Rope) -> dict[str, Any]:
    required, optional = _SCALING_KEYS[rope.kind]
    values = {key: getattr(rope, _ROPE_KEYS[key]) for key in (*required, *optional)}
    return {"rope_type": rope.kind, **{key: value for key, value in values.items() if value is not None}}


@dataclass(frozen=True)
class TwoRopes:
    """Two rotary embeddings: one for the layers with a window, and one, possibly scaled, for the others.

    Args:
        theta: The base for files without `rope_theta`.
        local_theta: The base of the layers with a window, for files without it.
        local_key: The key of that base in the older form of a file. None: there was one base for all layers.
    """

    theta: float
    local_theta: float
    local_key: str | None = None

    def read(self, published: Published, fields: Fields) -> None:
        """Set both ropes."""
        both = published.get("rope_parameters")
        share = read_value(published, _PARTIAL, float, 1.0)
        if both is None:
            theta = read_value(published, "rope_theta", float, self.theta)
            whole, name = published.get("rope_scaling"), "rope_scaling"
            local: Any = {"rope_theta": self._read_local_theta(published, theta)}
        else:
            if not isinstance(both, dict) or set(both) - set(LAYER_TYPES):
                raise ValueError(
                    f"config.json: rope_parameters is {both!r}: give a table of {' and '.join(LAYER_TYPES)}"
                )
            (whole, local), name, theta = (both.get(kind) for kind in LAYER_TYPES), "rope_parameters", self.theta
        fields["rope"] = read_rope(whole, name, theta, partial=share)
        fields["rope_local"] = read_rope(local, "rope_parameters", self.local_theta, partial=share)
        check_whole_heads(fields["rope"], fields["rope_local"])

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Set the keys of both ropes."""
        local = config.rope_local or config.rope
        published |= {"rope_theta": config.rope.theta, "rope_scaling": write_scaling(config.rope)}
        if self.local_key is not None:
            published[self.local_key] = local.theta
        else:
            tables = [{"rope_theta": rope.theta, **_written(rope)} for rope in (config.rope, local)]
            published["rope_parameters"] = dict(zip(LAYER_TYPES, tables, strict=True))

    def _read_local_theta(self, published: Published, theta: float) -> float:
        if self.local_key is not None:
            return read_value(published, self.local_key, float, self.local_theta)
        if theta != self.local_theta:
            raise ValueError(
                f"config.json: rope_theta is {theta}, but versions of transformers differ on whether layers with a "
                f"window have it: give rope_parameters of {' and '.join(LAYER_TYPES)}"
            )
        return theta
