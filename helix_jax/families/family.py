"""What a family of published models is: the keys of its config.json, and where each of its tensors goes.

A family is a table, read in both directions. `Key` pairs a field of ModelConfig with a key of config.json; what is not
so simple is a part of its own, with the same two methods: `read` fills in fields, `write` fills in keys.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from helix_jax.config import ModelConfig
from helix_jax.parsing import parse_dataclass
from helix_jax.families.keys import HEADS, Fields, Published, RopeKeys, sizes


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
        fields["eos_token_ids"] = _eos_token_ids(published.get("eos_token_id"))
        fields["tokenizer"] = published.get("tokenizer")
        return parse_dataclass(ModelConfig, _nested(fields), "config.json")

    def write_config(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """The config.json from which Hugging Face transformers, and `read_config`, make the same model."""
        published: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            part.write(config, published)
        stop = config.eos_token_ids
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


def _eos_token_ids(stop: Any) -> list[int]:
    ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"config.json: eos_token_id is {stop!r}: give a token id, or a list of them")
    return ids


def _nested(fields: Fields) -> Fields:
    """{"experts.num_experts": 8} -> {"experts": {"count": 8}}."""
    nested: Fields = {}
    for name, value in fields.items():
        *outer, last = name.split(".")
        (nested.setdefault(outer[0], {}) if outer else nested)[last] = value
    return nested
