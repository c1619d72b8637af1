"""GLM-4 models: partial rotary embeddings, and either norms before and after, or grouped and shared experts."""

from helix_jax.families.deepseek import SHARED_EXPERT_TENSORS, GroupedExperts
from helix_jax.families.family import EXPERT_TENSORS, LAYER_TENSORS, MERGED_GATE_TENSORS, Family, Tensor
from helix_jax.families.keys import Key, size_keys
from helix_jax.families.ropes import RopeKeys

GLM4 = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    parts=(
        *size_keys(norm_eps=1.5625e-7),
        Key("kv_heads", "num_key_value_heads", int, 2),
        Key("head_width", "head_dim", int, 128),
        Key("qkv_bias", "attention_bias", bool, True),
        RopeKeys(interleaved=True, partial=0.5),
    ),
    options={"hidden_act": "silu"},
    always={"post_norms": True},
    layer_tensors={
        **LAYER_TENSORS,
        **MERGED_GATE_TENSORS,
        "attention_post_norm_D": Tensor("post_self_attn_layernorm.weight", "D"),
        "ff_post_norm_D": Tensor("post_mlp_layernorm.weight", "D"),
    },
)

GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    parts=(
        *size_keys(norm_eps=1e-5),
        Key("kv_heads", "num_key_value_heads", int, 8),
        Key("head_width", "head_dim", int, lambda fields: fields["width"] // fields["heads"]),
        Key("qkv_bias", "attention_bias", bool, False),
        Key("qk_norm", "use_qk_norm", bool, False),
        RopeKeys(partial=0.5),
        Key("experts.num_experts", ("n_routed_experts", "num_local_experts")),
        Key("experts.top_k", "num_experts_per_tok"),
        Key("experts.width", "moe_intermediate_size"),
        Key("experts.scale", "routed_scaling_factor", float, 1.0),
        Key("experts.normalised", "norm_topk_prob", bool, True),
        GroupedExperts(by_method=False, dense_layers=1, shared_experts=1),
    ),
    options={"hidden_act": "silu"},
    always={"experts.scoring": "sigmoid", "experts.selection_bias": True, "experts.group_score": "top2"},
    layer_tensors={**LAYER_TENSORS, **EXPERT_TENSORS, **SHARED_EXPERT_TENSORS},
    extras=(r"model\.layers\.{layers}\..*",),  # the multi-token prediction layer, which follows the last layer
)
