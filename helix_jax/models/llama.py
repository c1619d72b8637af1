"""Llama as Hugging Face publishes it: its config.json, and where each of its tensors goes."""

from collections.abc import Mapping
from typing import Any

from helix_jax.config import ModelConfig

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

# What would change the numbers if it were another: key, the only values that are computed here.
_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
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
        ValueError: a size that is missing, or an option that this transformer does not compute.
    """
    for key, values in _FIXED.items():
        if published.get(key, values[0]) not in values:
            raise ValueError(f"config.json: {key} {published[key]!r} is not supported, only {values[0]!r}")
    missing = [key for key in _SIZES.values() if key not in published]
    if missing:
        raise ValueError(f"config.json: '{missing[0]}' is missing: complete the file")
    heads, stop = published["num_attention_heads"], published.get("eos_token_id")
    return ModelConfig(
        **{field: published[key] for field, key in _SIZES.items()},
        kv_heads=published.get("num_key_value_heads", heads),
        head_width=published.get("head_dim") or published["hidden_size"] // heads,
        rope_theta=_rope_theta(published),
        norm_eps=published.get("rms_norm_eps", 1e-6),
        tied_head=published.get("tie_word_embeddings", False),
        stop_ids=() if stop is None else tuple(stop) if isinstance(stop, list) else (stop,),
        tokenizer=published.get("tokenizer"),
    )


def _rope_theta(published: Mapping[str, Any]) -> float:
    """As published (`rope_theta`), or as transformers 5 writes it (`rope_parameters`)."""
    rope = published.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"config.json: rope_type '{kind}' is not supported, only 'default'")
    return float(rope.get("rope_theta", published.get("rope_theta", 10_000.0)))


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
