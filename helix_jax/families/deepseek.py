"""DeepSeek V2, V3 and R1: latent attention, grouped and shared experts, and YaRN that also scales the softmax."""

from dataclasses import dataclass
from typing import Any

from helix_jax.config import ModelConfig
from helix_jax.families.family import EXPERT_TENSORS, LAYER_TENSORS, Family, Tensor
from helix_jax.families.keys import Fields, Key, Published, read_value, size_keys
from helix_jax.families.ropes import RopeKeys
from helix_jax.validation import check_choice

_GREEDY, _GROUPED = "greedy", "group_limited_greedy"


class LatentHeads:
    """The heads, which share one latent."""

    def read(self, published: Published, fields: Fields) -> None:
        """Set the fields for heads."""
        fields |= {"kv_heads": 1, "head_width": fields["latent.nope_width"] + fields["latent.rope_width"]}

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Set the key for heads."""
        published["num_key_value_heads"] = config.heads


@dataclass(frozen=True)
class GroupedExperts:
    """The dense layers before those with experts, the shared experts, and the groups of the others.

    Args:
        by_method: Whether `topk_method` decides if experts are selected by group, as in V2.
        dense_layers: The number of dense layers for files without it.
        shared_experts: The number of shared experts for files without it.
    """

    by_method: bool
    dense_layers: int = 0
    shared_experts: int = 0

    def read(self, published: Published, fields: Fields) -> None:
        """Set the fields for dense layers, shared experts and groups."""
        dense = read_value(published, "first_k_dense_replace", int, self.dense_layers, least=0)
        fields["experts.dense_layers"] = tuple(range(dense))
        shared = read_value(published, "n_shared_experts", int, self.shared_experts, least=0)
        fields["experts.shared_width"] = shared * fields["experts.width"]
        method = published.get("topk_method", _GREEDY)
        if self.by_method:
            check_choice("config.json: topk_method", method, (_GREEDY, _GROUPED))
        if not self.by_method or method == _GROUPED:
            fields["experts.num_groups"] = read_value(published, "n_group", int)
            fields["experts.top_k_groups"] = read_value(published, "topk_group", int)

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Set the keys for dense layers, shared experts and groups."""
        experts = config.experts
        assert experts is not None, "the Key of experts.num_experts raises before"
        if experts.dense_layers != tuple(range(len(experts.dense_layers))):
            raise ValueError(
                f"experts dense_layers is {experts.dense_layers}: "
                f"give the first layers, a {published['model_type']} config.json has no others"
            )
        published |= {
            "first_k_dense_replace": len(experts.dense_layers),
            "n_shared_experts": experts.shared_width // experts.width or None,
            "n_group": experts.num_groups,
            "topk_group": experts.top_k_groups,
        }
        if self.by_method:
            published["topk_method"] = _GREEDY if experts.num_groups == 1 else _GROUPED


PARTS = (
    *size_keys(),
    RopeKeys(interleaved=True),
    Key("latent.width", "kv_lora_rank"),
    Key("latent.rope_width", "qk_rope_head_dim"),
    Key("latent.nope_width", "qk_nope_head_dim"),
    Key("latent.value_width", "v_head_dim"),
    Key("latent.query_rank", "q_lora_rank", int, None),
    LatentHeads(),
    Key("experts.num_experts", "n_routed_experts"),
    Key("experts.top_k", "num_experts_per_tok"),
    Key("experts.width", "moe_intermediate_size"),
    Key("experts.scale", "routed_scaling_factor", float),
)

SHARED_EXPERT_TENSORS = {
    "ff.selection_bias_E": Tensor("mlp.gate.e_score_correction_bias", "E"),
    "ff.shared.gate_DF": Tensor("mlp.shared_experts.gate_proj.weight", "F D"),
    "ff.shared.up_DF": Tensor("mlp.shared_experts.up_proj.weight", "F D"),
    "ff.shared.down_FD": Tensor("mlp.shared_experts.down_proj.weight", "D F"),
}
TENSORS = {
    **LAYER_TENSORS,
    **EXPERT_TENSORS,
    **SHARED_EXPERT_TENSORS,
    "attention.q_down_DQ": Tensor("self_attn.q_a_proj.weight", "Q D"),
    "attention.q_norm_Q": Tensor("self_attn.q_a_layernorm.weight", "Q"),
    "attention.q_up_QNH": Tensor("self_attn.q_b_proj.weight", "NH Q"),
    "attention.kv_down_DY": Tensor("self_attn.kv_a_proj_with_mqa.weight", "Y D"),
    "attention.kv_norm_Z": Tensor("self_attn.kv_a_layernorm.weight", "Z"),
    "attention.k_up_NIZ": Tensor("self_attn.kv_b_proj.weight", "N(I*+U) Z"),
    "attention.v_up_NZU": Tensor("self_attn.kv_b_proj.weight", "N(I+U*) Z"),
    "attention.o_NUD": Tensor("self_attn.o_proj.weight", "D NU"),
}
OPTIONS = {"hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1}

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    parts=(*PARTS, GroupedExperts(by_method=True)),
    options={**OPTIONS, "mlp_bias": False, "scoring_func": "softmax", "norm_topk_prob": False},
    always={"experts.normalised": False},
    layer_tensors=TENSORS,
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    parts=(*PARTS, Key("experts.normalised", "norm_topk_prob", bool, True), GroupedExperts(by_method=False)),
    options={**OPTIONS, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
    always={"experts.scoring": "sigmoid", "experts.selection_bias": True, "experts.group_score": "top2"},
    layer_tensors=TENSORS,
    extras=(r"model\.layers\.{layers}\..*",),  # the multi-token prediction layer, which follows the last layer
)
