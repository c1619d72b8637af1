"""Granite models: Llama with factors on embeddings, attention, residuals and logits."""

from helix_jax.families.family import LAYER_TENSORS, Family
from helix_jax.families.keys import HEADS, Key, size_keys
from helix_jax.families.llama import BIASES
from helix_jax.families.ropes import RopeKeys

SCALES = (
    Key("embed_scale", "embedding_multiplier", float, 1.0),
    Key("softmax_scale", "attention_multiplier", float, 1.0),
    Key("residual_scale", "residual_multiplier", float, 1.0),
    Key("logits_scaling", "logits_scaling", float, 1.0),
)

GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    parts=(*size_keys(), *HEADS, *BIASES, RopeKeys(), *SCALES),
    options={"hidden_act": "silu", "mlp_bias": False},
    always={},
    layer_tensors=LAYER_TENSORS,
)
