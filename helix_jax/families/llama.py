"""Llama and Mistral models."""

from helix_jax.families.family import LAYER_TENSORS, Family
from helix_jax.families.keys import HEADS, Key, Windows, all_layers, size_keys
from helix_jax.families.ropes import RopeKeys

# Either all of the q, k, v and o projections have a bias, or none of them.
BIASES = (Key("qkv_bias", "attention_bias", bool, False), Key("o_bias", "attention_bias", bool, False))

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    parts=(*size_keys(), *HEADS, *BIASES, RopeKeys()),
    options={"hidden_act": "silu", "mlp_bias": False},
    always={},
    layer_tensors=LAYER_TENSORS,
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    parts=(*size_keys(), *HEADS, RopeKeys(), Windows(all_layers, layer_types=False)),
    options={"hidden_act": "silu"},
    always={},
    layer_tensors=LAYER_TENSORS,
)
