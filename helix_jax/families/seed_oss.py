"""Seed-OSS models: Llama with biases of queries, keys and values."""

from helix_jax.families.family import LAYER_TENSORS, Family
from helix_jax.families.keys import Key, size_keys
from helix_jax.families.ropes import RopeKeys

SEED_OSS = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    parts=(
        *size_keys(),
        Key("kv_heads", "num_key_value_heads", int, 8),
        Key("head_width", "head_dim", int, 128),
        Key("qkv_bias", "attention_bias", bool, True),
        Key("o_bias", "attention_out_bias", bool, False),
        RopeKeys(),
    ),
    options={"hidden_act": "silu", "mlp_bias": False},
    always={},
    layer_tensors=LAYER_TENSORS,
)
