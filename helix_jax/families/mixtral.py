"""Mixtral models."""

from helix_jax.families.family import LAYER_TENSORS, Family, Tensor
from helix_jax.families.keys import HEADS, Key, Windows, all_layers, size_keys
from helix_jax.families.ropes import RopeKeys

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    parts=(
        *(*size_keys(norm_eps=1e-5), *HEADS, RopeKeys(theta=1_000_000.0), Windows(all_layers, None, layer_types=False)),
        Key("experts.num_experts", "num_local_experts"),
        Key("experts.top_k", "num_experts_per_tok"),
        Key("experts.width", "intermediate_size"),
    ),
    options={"hidden_act": "silu"},
    always={},
    layer_tensors={
        **LAYER_TENSORS,
        "ff.router_DE": Tensor("block_sparse_moe.gate.weight", "E D"),
        "ff.gate_EDF": Tensor("block_sparse_moe.experts.{e}.w1.weight", "F D"),
        "ff.up_EDF": Tensor("block_sparse_moe.experts.{e}.w3.weight", "F D"),
        "ff.down_EFD": Tensor("block_sparse_moe.experts.{e}.w2.weight", "D F"),
    },
)
