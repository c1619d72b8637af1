"""Llama as Hugging Face publishes it: its config.json, and where each of its tensors goes."""

from collections.abc import Mapping
from typing import Any

from helix_jax.config import ModelConfig, from_mapping

# Ours -> (theirs, the letters of their axes in their order; letters side by side are one merged axis).
TENSORS = {
    "embed_VD": ("model.embed_tokens.weight", "V D"),
    "norm.norm_D": ("model.norm.weight", "D"),
    "head_VD": ("lm_head.weight", "V D"),
}
LAYER_TENSORS = {
    "attention_norm.norm_D": ("input_layernorm.weight", "D"),
    "attention.q_DNH": ("self_attn.q_proj.weight", "NH D"),
    "attention.k_DKH": ("self_attn.k_proj.weight", "KH D"),
    "attention.v_DKH": ("self_attn.v_proj.weight", "KH D"),
    "attention.o_NHD": ("self_attn.o_proj.weight", "D NH"),
    "ff_norm.norm_D": ("post_attention_layernorm.weight", "D"),
    "ff.gate_DF": ("mlp.gate_proj.weight", "F D"),
    "ff.up_DF": ("mlp.up_proj.weight", "F D"),
    "ff.down_FD": ("mlp.down_proj.weight", "D F"),
}

# ModelConfig's field -> the key of config.json.
_SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ff_width": "intermediate_size",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}

# What would change the numbers if it were another: key, and the only values that are computed here.
_FIXED = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


def tensor_of(path: tuple[str | int, ...]) -> tuple[str, str]:
    """Name and axes, in the published files, of the parameter at `path` of a Transformer."""
    if path[0] == "layers":
        name, axes = LAYER_TENSORS[".".join(map(str, path[2:]))]
        return f"model.layers.{path[1]}.{name}", axes
    return TENSORS[".".join(map(str, path))]


def is_extra(name: str, config: ModelConfig) -> bool:
    """Whether some folders hold the tensor `name` although nothing needs it: a tied head written out, rotary tables."""
    return (name == TENSORS["head_VD"][0] and config.tied_head) or name.endswith(".rotary_emb.inv_freq")


def read_config(published: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that a published config.json describes.

    Raises:
        ValueError: a size that is missing or no number, or an option that this transformer does not compute.
    """
    for key, values in _FIXED.items():
        if published.get(key) not in (*values, None):
            raise ValueError(f"config.json: {key} {published[key]!r} is not supported, only {values[0]!r}")
    sizes = {field: _size(published, key) for field, key in _SIZES.items()}
    stop = published.get("eos_token_id")
    values = {
        **sizes,
        "kv_heads": _size(published, "num_key_value_heads", sizes["heads"]),
        "head_width": _size(published, "head_dim", sizes["width"] // sizes["heads"]),
        "rope_theta": _rope_theta(published),
        "norm_eps": published.get("rms_norm_eps", 1e-6),
        "tied_head": published.get("tie_word_embeddings", False),
        "stop_ids": [] if stop is None else stop if isinstance(stop, list) else [stop],
        "tokenizer": published.get("tokenizer"),
    }
    return from_mapping(ModelConfig, values, "config.json")


def _size(published: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if published.get(key) is None else published[key]
    if value is None:
        raise ValueError(f"config.json: '{key}' is missing: complete the file")
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}: give a whole number of at least 1")
    return value


def _rope_theta(published: Mapping[str, Any]) -> Any:
    """As published (`rope_theta`, `rope_scaling`), or as transformers 5 writes it (`rope_parameters`)."""
    theta = published.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = published.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default":
            raise ValueError(f"config.json: {key} of type {kind!r} is not supported, only 'default'")
        theta = rope.get("rope_theta", theta)
    return 10_000.0 if theta is None else theta


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json from which Hugging Face transformers, and `read_config`, make the same model."""
    stop = config.stop_ids
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, field) for field, key in _SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": None,
        "eos_token_id": stop[0] if len(stop) == 1 else list(stop) or None,
        "torch_dtype": dtype,
        **({"tokenizer": config.tokenizer} if config.tokenizer else {}),
    }
