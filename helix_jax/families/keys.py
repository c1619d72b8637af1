"""Keys of config.json files, for reading and for writing: sizes and sliding windows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from helix_jax.config import ModelConfig

# The fields of a ModelConfig by name, those of nested configs with a dot, such as "experts.num_experts".
Fields = dict[str, Any]
# The content of a config.json.
Published = Mapping[str, Any]

REQUIRED = object()
LAYER_TYPES = ("full_attention", "sliding_attention")  # without and with a window


def read_value(published: Published, name: str, kind: type, default: Any = REQUIRED, least: int = 1) -> Any:
    """Return the value of a key of config.json. A key that is null counts as missing.

    Args:
        published: The content of the file.
        name: The key.
        kind: The type of the value.
        default: The value if the key is missing. REQUIRED: it may not be missing.
        least: The least value of an int.

    Raises:
        ValueError: The key is required and missing, or its value has the wrong type or is below `least`.
    """
    value = published.get(name)
    if value is None:
        if default is REQUIRED:
            raise ValueError(f"config.json: '{name}' is missing: add it")
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
    """A field of ModelConfig that is one key of config.json.

    Args:
        field: The field.
        names: The key, or several keys of which a file may have any. The first is written.
        kind: The type of the value.
        default: The value for files without the key, as in the published code, or a function of the fields read so far.
    """

    field: str
    names: str | tuple[str, ...]
    kind: type = int
    default: Any = REQUIRED

    def read(self, published: Published, fields: Fields) -> None:
        """Set the field."""
        names = (self.names,) if isinstance(self.names, str) else self.names
        name = next((name for name in names if published.get(name) is not None), names[0])
        default = self.default(fields) if callable(self.default) else self.default
        fields[self.field] = read_value(published, name, self.kind, default)

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Set the key."""
        outer, nested, _ = self.field.partition(".")
        if nested and getattr(config, outer) is None:
            raise ValueError(f"{outer} is None: a '{config.family}' config.json needs it, choose another family")
        name = self.names if isinstance(self.names, str) else self.names[0]
        published[name] = attrgetter(self.field)(config)


@dataclass(frozen=True)
class Windows:
    """Sliding windows.

    Args:
        rule: Returns the layers that have the window, for a file without `layer_types` and the number of layers.
        default: The window of a file without `sliding_window`. Null in a file means no window.
        layer_types: Whether the family has the key `layer_types`.
        switched: Whether it has `use_sliding_window`, without which there is no window.
    """

    rule: Callable[[Published, int], tuple[int, ...]]
    default: int | None = 4096
    layer_types: bool = True
    switched: bool = False

    def read(self, published: Published, fields: Fields) -> None:
        """Set the window and the layers that have it."""
        types = published.get("layer_types")
        if types is not None and not self.layer_types:
            raise ValueError(f"config.json: layer_types is {types!r}: remove it, this model_type does not support it")
        if self.switched and not read_value(published, "use_sliding_window", bool, False):
            return
        window = read_value(published, "sliding_window", int, None) if "sliding_window" in published else self.default
        sliding = None if types is None else _sliding_layers(types, fields["layers"])
        if window is None:
            if sliding:
                raise ValueError(
                    "config.json: layer_types has sliding_attention, but sliding_window is null: correct one"
                )
            return
        layers = self.rule(published, fields["layers"]) if sliding is None else sliding
        if layers:
            fields |= {"window": window, "windowed_layers": layers}

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Set the keys of the window."""
        published["sliding_window"] = config.window
        if self.switched:
            published["use_sliding_window"] = config.window is not None
        if self.layer_types:
            types = [LAYER_TYPES[layer in config.windowed_layers] for layer in range(config.layers)]
            published["layer_types"] = types


def _sliding_layers(types: Any, layers: int) -> tuple[int, ...]:
    """Return the layers whose type is sliding attention."""
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= set(LAYER_TYPES):
        raise ValueError(f"config.json: layer_types is {types!r}: give {layers} of {' and '.join(LAYER_TYPES)}")
    return tuple(layer for layer, kind in enumerate(types) if kind == LAYER_TYPES[True])


def all_layers(published: Published, layers: int) -> tuple[int, ...]:
    """Return all layers."""
    return tuple(range(layers))


def size_keys(norm_eps: float = 1e-6, tied_head: bool = False) -> tuple[Key, ...]:
    """Return the keys that every family has, with the defaults of one."""
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
