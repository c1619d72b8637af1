"""What a family of published models is: the keys of its config.json, and where each of its tensors goes.

A family is a table, read in both directions. `Key` pairs a field of ModelConfig with a key of config.json; what is not
so simple is a part of its own, with the same two methods: `read` fills in fields, `write` fills in keys.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, runtime_checkable

from helix_jax.config import ModelConfig, Rope, from_mapping

# Fields of ModelConfig by name, those of its parts with a dot: "experts.count". Keys of a config.json.
Fields = dict[str, Any]
Published = Mapping[str, Any]

REQUIRED = object()


@runtime_checkable
class Part(Protocol):
    def read(self, published: Published, fields: Fields) -> None: ...

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None: ...


class Tensor(NamedTuple):
    """A published tensor, and the letters of its axes in their order.

    Letters side by side are one merged axis. `(I+U)` are parts that lie one after the other, of which ours is the one
    whose letter our name has; `(*+1)` are parts of one, of which ours is the star. `{e}` in the name: one per expert.
    """

    name: str
    axes: str


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

TENSORS = {
    "embed_VD": Tensor("model.embed_tokens.weight", "V D"),
    "norm_D": Tensor("model.norm.weight", "D"),
    "head_VD": Tensor("lm_head.weight", "V D"),
}
LAYER_TENSORS = {
    "attention_norm_D": Tensor("input_layernorm.weight", "D"),
    "attention.q_DNH": Tensor("self_attn.q_proj.weight", "NH D"),
    "attention.k_DKH": Tensor("self_attn.k_proj.weight", "KH D"),
    "attention.v_DKH": Tensor("self_attn.v_proj.weight", "KH D"),
    "attention.o_NHD": Tensor("self_attn.o_proj.weight", "D NH"),
    "attention.q_bias_NH": Tensor("self_attn.q_proj.bias", "NH"),
    "attention.k_bias_KH": Tensor("self_attn.k_proj.bias", "KH"),
    "attention.v_bias_KH": Tensor("self_attn.v_proj.bias", "KH"),
    "attention.o_bias_D": Tensor("self_attn.o_proj.bias", "D"),
    "attention.q_norm_H": Tensor("self_attn.q_norm.weight", "H"),
    "attention.k_norm_H": Tensor("self_attn.k_norm.weight", "H"),
    "ff_norm_D": Tensor("post_attention_layernorm.weight", "D"),
    "ff.gate_DF": Tensor("mlp.gate_proj.weight", "F D"),
    "ff.up_DF": Tensor("mlp.up_proj.weight", "F D"),
    "ff.down_FD": Tensor("mlp.down_proj.weight", "D F"),
}
EXPERT_TENSORS = {
    "ff.router_DE": Tensor("mlp.gate.weight", "E D"),
    "ff.gate_EDF": Tensor("mlp.experts.{e}.gate_proj.weight", "F D"),
    "ff.up_EDF": Tensor("mlp.experts.{e}.up_proj.weight", "F D"),
    "ff.down_EFD": Tensor("mlp.experts.{e}.down_proj.weight", "D F"),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`.

    parts: what is read from config.json, in this order. options: keys that would change the numbers, with the only
    value that is computed here. always: fields that every model of the family has. layer_tensors: our parameter within
    a layer -> theirs. extras: patterns of tensors that some folders hold although nothing needs them; `{layers}` is the
    number of layers.
    """

    model_type: str
    architecture: str
    parts: tuple[Part, ...] = (*sizes(), *HEADS, RopeKeys())
    options: Mapping[str, Any]
    always: Mapping[str, Any]
    layer_tensors: Mapping[str, Tensor]
    extras: tuple[str, ...] = ()

    def read_config(self, published: Published) -> ModelConfig:
        """The ModelConfig that a config.json describes.

        Raises:
            ValueError: a size that is missing or no number, or an option that this transformer does not compute.
        """
        for key, value in {"partial_rotary_factor": 1.0, **self.options}.items():
            if published.get(key) not in (value, None):
                raise ValueError(f"config.json: {key} {published[key]!r} is not supported, only {value!r}")
        fields = {"family": self.model_type, **self.always}
        for part in self.parts:
            part.read(published, fields)
        fields["stop_ids"] = _stop_ids(published.get("eos_token_id"))
        fields["tokenizer"] = published.get("tokenizer")
        return from_mapping(ModelConfig, _nested(fields), "config.json")

    def write_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """The config.json from which Hugging Face transformers, and `read_config`, make the same model."""
        published: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            part.write(config, published)
        stop = config.stop_ids
        published |= {**self.options, "bos_token_id": None, "torch_dtype": dtype}
        published["eos_token_id"] = stop[0] if len(stop) == 1 else list(stop) or None
        return {**published, "tokenizer": config.tokenizer} if config.tokenizer else published

    def tensor_of(self, path: tuple[str | int, ...]) -> Tensor:
        """The published tensor of the parameter at `path` of a Transformer."""
        if path[0] == "layers":
            name, axes = self.layer_tensors[".".join(map(str, path[2:]))]
            return Tensor(f"model.layers.{path[1]}.{name}", axes)
        return TENSORS[".".join(map(str, path))]

    def is_extra(self, name: str, config: ModelConfig) -> bool:
        """Whether some folders hold the tensor `name` although nothing needs it."""
        if name == TENSORS["head_VD"].name:
            return config.tied_head  # written out all the same
        patterns = (r".*\.rotary_emb\.inv_freq", *self.extras)  # rotary tables, of old folders
        return any(re.fullmatch(pattern.format(layers=config.layers), name) for pattern in patterns)


def _stop_ids(stop: Any) -> list[int]:
    ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"config.json: eos_token_id is {stop!r}: give a token id, or a list of them")
    return ids


def _nested(fields: Fields) -> Fields:
    """{"experts.count": 8} -> {"experts": {"count": 8}}."""
    nested: Fields = {}
    for name, value in fields.items():
        *outer, last = name.split(".")
        (nested.setdefault(outer[0], {}) if outer else nested)[last] = value
    return nested
