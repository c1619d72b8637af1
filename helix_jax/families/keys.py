"""The keys of a config.json, read and written: sizes, rotary positions, sliding windows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from helix_jax.config import ModelConfig, Rope

# Fields of ModelConfig by name, those of its parts with a dot: "experts.num_experts". Keys of a config.json.
Fields = dict[str, Any]
Published = Mapping[str, Any]

REQUIRED = object()


def value_of(published: Published, name: str, kind: type, default: Any = REQUIRED, least: int = 1) -> Any:
    """The value of a key, null counting as left out.

    Raises:
        ValueError: it is needed and not there, not of its kind, or a whole number below `least`.
    """
    value = published.get(name)
    if value is None:
        if default is REQUIRED:
            raise ValueError(f"config.json: '{name}' is missing: complete the file")
        return default
    if kind is int and (type(value) is not int or value < least):
        raise ValueError(f"config.json: {name} is {value!r}: give a whole number of at least {least}")
    if kind is float and (type(value) not in (int, float) or not abs(value) < 1e30):
        raise ValueError(f"config.json: {name} is {value!r:.40}: give a number")
    if kind is not float and type(value) is not kind:
        raise ValueError(f"config.json: {name} is {value!r}: give a value of type {kind.__name__}")
    return float(value) if kind is float else value


@dataclass(frozen=True)
class Key:
    """A field that is a key. `names`: the first is written; a file may have any of them.

    default: for files without it, as the publishers' own code has it; may be a function of the fields read so far.
    """

    field: str
    names: str | tuple[str, ...]
    kind: type = int
    default: Any = REQUIRED

    def read(self, published: Published, fields: Fields) -> None:
        names = (self.names,) if isinstance(self.names, str) else self.names
        name = next((name for name in names if published.get(name) is not None), names[0])
        default = self.default(fields) if callable(self.default) else self.default
        fields[self.field] = value_of(published, name, self.kind, default)

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        outer, nested, _ = self.field.partition(".")
        if nested and getattr(config, outer) is None:
            raise ValueError(f"a '{config.family}' folder needs {outer}, which this model has not: not written")
        name = self.names if isinstance(self.names, str) else self.names[0]
        published[name] = attrgetter(self.field)(config)


_ROPE_KEYS = {
    "rope_theta": "theta",
    "factor": "factor",
    "original_max_position_embeddings": "original_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
# Of each type: the keys that it must have, and those that it may have.
_SCALING_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    ),
}
_OF_NO_EFFECT = ("type", "finetuned")


@dataclass(frozen=True)
class RopeKeys:
    """Rotary positions, as published (`rope_theta`, `rope_scaling`) or as transformers 5 writes them.

    needed: a file without either would be another model.
    """

    theta: float = 10_000.0
    interleaved: bool = False
    needed: bool = False

    def read(self, published: Published, fields: Fields) -> None:
        key = "rope_scaling" if published.get("rope_scaling") else "rope_parameters"
        if self.needed and published.get(key) is None:
            raise ValueError("config.json: 'rope_scaling' is missing: complete the file")
        theta = value_of(published, "rope_theta", float, self.theta)
        fields["rope"] = read_rope(published.get(key), key, theta, self.interleaved)

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        published["rope_theta"] = config.rope.theta
        published["rope_scaling"] = write_scaling(config.rope)


def read_rope(given: Any, where: str, theta: float, interleaved: bool = False) -> Fields:
    """The fields of Rope in the table `given`, which a file has under the key `where`; `theta` if it has none there.

    A known key that its type has no use for counts for nothing, as in transformers.
    """
    where = f"config.json: {where}"
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{where} is {given!r}: give a table")
    given = {key: value for key, value in (given or {}).items() if value is not None}
    kind = given.pop("rope_type", given.get("type", "default"))
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor is not supported, only 1.0")
    if not isinstance(kind, str) or kind not in _SCALING_KEYS:
        raise ValueError(f"{where} of type {kind!r} is not supported: known are {', '.join(_SCALING_KEYS)}")
    for key in set(given) - set(_ROPE_KEYS) - set(_OF_NO_EFFECT):
        why = "transformers ignores it, others scale by it: take it out" if key == "attn_factor" else "it is not known"
        raise ValueError(f"{where}: '{key}' is not supported: {why}")
    needed, optional = _SCALING_KEYS[kind]
    for key in needed:
        if key not in given:
            raise ValueError(f"{where} of type '{kind}' has no {key}: complete the file")
    fields = {_ROPE_KEYS[key]: given[key] for key in ("rope_theta", *needed, *optional) if key in given}
    return {"theta": theta, **fields, "kind": kind, "interleaved": interleaved}


def write_scaling(rope: Rope) -> dict[str, Any] | None:
    """`rope_scaling` of a config.json."""
    if rope.kind == "default":
        return None
    needed, optional = _SCALING_KEYS[rope.kind]
    values = {key: getattr(rope, _ROPE_KEYS[key]) for key in (*needed, *optional)}
    return {"rope_type": rope.kind, **{key: value for key, value in values.items() if value is not None}}


@dataclass(frozen=True)
class Windows:
    """Sliding windows. `rule`: from a file without `layer_types`, and how many layers, which ones have the window.

    default: the window of a file that does not have the key; null is none. layer_types: the family knows that key.
    switched: it has `use_sliding_window`, without which there is no window.
    """

    rule: Callable[[Published, int], tuple[int, ...]]
    default: int | None = 4096
    layer_types: bool = True
    switched: bool = False

    def read(self, published: Published, fields: Fields) -> None:
        types = published.get("layer_types")
        if types is not None and not self.layer_types:
            raise ValueError("config.json: layer_types are not supported for this model_type")
        if self.switched and not value_of(published, "use_sliding_window", bool, False):
            return
        window = value_of(published, "sliding_window", int, None) if "sliding_window" in published else self.default
        sliding = None if types is None else _sliding(types, fields["layers"])
        if window is None:
            if sliding:
                raise ValueError("config.json: layer_types has sliding_attention, but sliding_window is null: mend it")
            return
        layers = self.rule(published, fields["layers"]) if sliding is None else sliding
        if layers:
            fields |= {"window": window, "windowed_layers": layers}

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        published["sliding_window"] = config.window
        if self.switched:
            published["use_sliding_window"] = config.window is not None
        if self.layer_types:
            kinds = ("full_attention", "sliding_attention")
            published["layer_types"] = [kinds[layer in config.windowed_layers] for layer in range(config.layers)]


def _sliding(types: Any, layers: int) -> tuple[int, ...]:
    kinds = {"full_attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= kinds:
        raise ValueError(f"config.json: layer_types {types!r} are not {layers} of {' and '.join(sorted(kinds))}")
    return tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")


def all_layers(published: Published, layers: int) -> tuple[int, ...]:
    return tuple(range(layers))


def sizes(norm_eps: float = 1e-6, tied_head: bool = False) -> tuple[Key, ...]:
    """What every family has, with the defaults of its own."""
    return (
        Key("layers", "num_hidden_layers"),
        Key("width", "hidden_size"),
        Key("heads", "num_attention_heads"),
        Key("ff_width", "intermediate_size"),
        Key("vocab", "vocab_size"),
        Key("max_positions", "max_position_embeddings"),
        Key("norm_eps", "rms_norm_eps", float, norm_eps),
        Key("tied_head", "tie_word_embeddings", bool, tied_head),
    )


HEADS = (
    Key("kv_heads", "num_key_value_heads", int, lambda fields: fields["heads"]),
    Key("head_width", "head_dim", int, lambda fields: fields["width"] // fields["heads"]),
)
