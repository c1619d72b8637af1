"""OLMo 2 and 3 models: norms after attention and feed-forward only, and norms of queries and keys over all heads."""

from helix_jax.families.family import LAYER_TENSORS, Family, Tensor
from helix_jax.families.keys import HEADS, Published, Windows, size_keys
from helix_jax.families.llama import BIASES
from helix_jax.families.ropes import RopeKeys, TwoRopes


def all_but_every_fourth(published: Published, layers: int) -> tuple[int, ...]:
    """Return all layers but every fourth."""
    return tuple(layer for layer in range(layers) if (layer + 1) % 4)


SIZES = (*size_keys(norm_eps=1e-5), *HEADS, *BIASES)
ALWAYS = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_all_heads": True}
TENSORS = {
    **LAYER_TENSORS,
    "attention.q_norm_NH": Tensor("self_attn.q_norm.weight", "NH"),
    "attention.k_norm_KH": Tensor("self_attn.k_norm.weight", "KH"),
    "attention_post_norm_D": Tensor("post_attention_layernorm.weight", "D"),
    "ff_post_norm_D": Tensor("post_feedforward_layernorm.weight", "D"),
}

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    parts=(*SIZES, RopeKeys()),
    options={"hidden_act": "silu"},
    always=ALWAYS,
    layer_tensors=TENSORS,
)

OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    parts=(*SIZES, TwoRopes(500_000.0, 500_000.0), Windows(all_but_every_fourth)),
    options={"hidden_act": "silu"},
    always=ALWAYS,
    layer_tensors=TENSORS,
)
