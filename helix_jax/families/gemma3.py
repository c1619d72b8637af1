"""Gemma 3 for text: norms before and after each block, local and global layers with different rotary embeddings."""

from typing import Any

from helix_jax.config import ModelConfig
from helix_jax.families.family import LAYER_TENSORS, Family, Tensor
from helix_jax.families.keys import Fields, Key, Published, Windows, read_value, size_keys
from helix_jax.families.llama import BIASES
from helix_jax.families.ropes import TwoRopes


def all_but_every_sixth(published: Published, layers: int) -> tuple[int, ...]:
    """Return the layers with a window: all but every sixth, or what the file has as the pattern."""
    pattern = read_value(published, "sliding_window_pattern", int, published.get("_sliding_window_pattern", 6))
    return tuple(layer for layer in range(layers) if (layer + 1) % pattern)


class Scales:
    """The scales of the embedding, the square root of its width, and of the softmax, which has its own width."""

    def read(self, published: Published, fields: Fields) -> None:
        """Set both scales."""
        fields["embed_scale"] = fields["width"] ** 0.5
        fields["softmax_scale"] = read_value(published, "query_pre_attn_scalar", int, 256) ** -0.5

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Set the width from which the softmax scale follows."""
        published["query_pre_attn_scalar"] = round((config.softmax_scale or config.head_width**-0.5) ** -2)


GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    parts=(
        *size_keys(tied_head=True),
        Key("kv_heads", "num_key_value_heads"),
        Key("head_width", "head_dim", int, 256),
        *(*BIASES, TwoRopes(1_000_000.0, 10_000.0, "rope_local_base_freq"), Windows(all_but_every_sixth), Scales()),
    ),
    options={
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    always={"activation": "gelu_tanh", "qk_norm": True, "norm_offset": True, "post_norms": True},
    layer_tensors={
        **LAYER_TENSORS,
        "attention_post_norm_D": Tensor("post_attention_layernorm.weight", "D"),
        "ff_norm_D": Tensor("pre_feedforward_layernorm.weight", "D"),
        "ff_post_norm_D": Tensor("post_feedforward_layernorm.weight", "D"),
    },
)
