"""The table that describes a family of published models: the keys of its config.json, and the names of its tensors.

Every entry works in both directions. A `Key` pairs a field of ModelConfig with a key of config.json. Where that is not
enough, another `Part` has the same two methods: `read` sets fields, `write` sets keys.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from helix_jax.config import ModelConfig
from helix_jax.families.keys import HEADS, Fields, Published, size_keys
from helix_jax.families.ropes import RopeKeys
from helix_jax.parsing import parse_dataclass


@runtime_checkable
class Part(Protocol):
    """A part of a config.json."""

    def read(self, published: Published, fields: Fields) -> None:
        """Set the fields of ModelConfig that follow from a config.json."""
        ...

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Set the keys of config.json that follow from a ModelConfig."""
        ...


class Tensor(NamedTuple):
    """A published tensor that contains one of our parameters.

    Attributes:
        name: Its name. With `{e}` in it, there is one tensor per expert.
        axes: The letters of its axes, in their order. Adjacent letters are one merged axis. `(I*+U)` are consecutive
            parts, of which the parameter is the one with the `*`. `(*+1)` are parts of size 1.
    """

    name: str
    axes: str


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
MERGED_GATE_TENSORS = {
    "ff.gate_DF": Tensor("mlp.gate_up_proj.weight", "(F*+F) D"),
    "ff.up_DF": Tensor("mlp.gate_up_proj.weight", "(F+F*) D"),
}
EXPERT_TENSORS = {
    "ff.router_DE": Tensor("mlp.gate.weight", "E D"),
    "ff.gate_EDF": Tensor("mlp.experts.{e}.gate_proj.weight", "F D"),
    "ff.up_EDF": Tensor("mlp.experts.{e}.up_proj.weight", "F D"),
    "ff.down_EFD": Tensor("mlp.experts.{e}.down_proj.weight", "D F"),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The models of one `model_type`.

    Args:
        model_type: The value of that key in config.json.
        architecture: The class of transformers that computes these models.
        parts: The parts of config.json, in the order in which they are read.
        options: Keys that change results, with the only value that is supported.
        always: Fields of ModelConfig that all models of the family have.
        layer_tensors: The published tensor of each of our parameters within a layer.
        extras: Patterns of tensors that some folders contain although decoding does not need them. `{layers}` is the
            number of layers.
    """

    model_type: str
    architecture: str
    parts: tuple[Part, ...] = (*size_keys(), *HEADS, RopeKeys())
    options: Mapping[str, Any]
    always: Mapping[str, Any]
    layer_tensors: Mapping[str, Tensor]
    extras: tuple[str, ...] = ()

    def read_config(self, published: Published) -> ModelConfig:
        """Return the ModelConfig that a config.json describes.

        Args:
            published: The content of the file.

        Raises:
            ValueError: A size is missing or not a number, or an option is not supported.
        """
        for key, value in self.options.items():
            if published.get(key) not in (value, None):
                raise ValueError(f"config.json: {key} is {published[key]!r}: only {value!r} is supported")
        fields = {"family": self.model_type, **self.always}
        for part in self.parts:
            part.read(published, fields)
        fields["eos_token_ids"] = _eos_token_ids(published.get("eos_token_id"), fields["vocab"])
        fields["tokenizer"] = published.get("tokenizer")
        return parse_dataclass(ModelConfig, _nested(fields), "config.json")

    def write_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """Return the config.json from which Hugging Face transformers and `read_config` make the same model.

        Args:
            config: The config of the model.
            dtype: The type of the weights that are written beside it.

        Raises:
            ValueError: The family has no key for a field of the model.
        """
        published: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            part.write(config, published)
        ids = config.eos_token_ids
        # Without these keys transformers takes ids of the published models, which a smaller vocabulary does not have.
        published |= {**self.options, "bos_token_id": None, "pad_token_id": None, "torch_dtype": dtype}
        published["eos_token_id"] = ids[0] if len(ids) == 1 else list(ids) or None
        return {**published, "tokenizer": config.tokenizer} if config.tokenizer else published

    def tensor_of(self, path: tuple[str | int, ...]) -> Tensor:
        """Return the published tensor that contains the parameter at `path` of a Transformer."""
        if path[0] == "layers":
            name, axes = self.layer_tensors[".".join(map(str, path[2:]))]
            return Tensor(f"model.layers.{path[1]}.{name}", axes)
        return TENSORS[".".join(map(str, path))]

    def is_extra(self, name: str, config: ModelConfig) -> bool:
        """Return whether some folders contain the tensor `name` although decoding does not need it."""
        if name == TENSORS["head_VD"].name:
            return config.tied_head  # some folders contain it although it is the embedding
        patterns = (r".*\.rotary_emb\.inv_freq", *self.extras)  # old folders contain tables of rotary frequencies
        return any(re.fullmatch(pattern.format(layers=config.layers), name) for pattern in patterns)


def _eos_token_ids(value: Any, vocab: int) -> list[int]:
    """Return `eos_token_id`, which is null, an id or a list of ids, as a list.

    Published models have -1 for none, and ids beyond a vocabulary that was cut. The model never produces these, so
    leaving them out changes nothing.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"config.json: eos_token_id is {value!r}: give a token id, or a list of them")
    return [i for i in ids if 0 <= i < vocab]


def _nested(fields: Fields) -> Fields:
    """Return {"experts": {"num_experts": 8}} for {"experts.num_experts": 8}."""
    nested: Fields = {}
    for name, value in fields.items():
        *outer, last = name.split(".")
        (nested.setdefault(outer[0], {}) if outer else nested)[last] = value
    return nested
