"""Phi-3 and Phi-4 models: merged projections, and LongRoPE."""

from collections.abc import Mapping
from typing import Any

from helix_jax.config import ModelConfig
from helix_jax.families.family import LAYER_TENSORS, MERGED_GATE_TENSORS, Family, Tensor
from helix_jax.families.keys import HEADS, Fields, Published, Windows, all_layers, read_value, size_keys
from helix_jax.families.ropes import RopeKeys, rope_type
from helix_jax.validation import check_choice

_ORIGINAL = "original_max_position_embeddings"
_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}  # with older names


class Phi3Rope(RopeKeys):
    """A rope without scaling or LongRoPE, whose original context is beside the table."""

    def read(self, published: Published, fields: Fields) -> None:
        """Set the rope."""
        for key in ("rope_scaling", "rope_parameters"):
            table = published.get(key)
            if isinstance(table, Mapping) and table:
                kind = rope_type(table) or "default"
                check_choice(f"config.json: {key}: rope_type", kind, _TYPES)
                published = {**published, key: {**table, "rope_type": _TYPES[kind]}}
                if _TYPES[kind] == "longrope":
                    read_value(published, _ORIGINAL, int)  # transformers ignores that in the table
        super().read(published, fields)

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Set the keys of the rope, and the original context."""
        super().write(config, published)
        published[_ORIGINAL] = config.rope.original_positions or config.max_positions


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    parts=(
        *(*size_keys(norm_eps=1e-5), *HEADS, Phi3Rope(partial=1.0)),
        Windows(all_layers, default=None, layer_types=False),
    ),
    options={"hidden_act": "silu"},
    always={},
    layer_tensors={
        **LAYER_TENSORS,
        **MERGED_GATE_TENSORS,
        "attention.q_DNH": Tensor("self_attn.qkv_proj.weight", "(NH*+KH+KH) D"),
        "attention.k_DKH": Tensor("self_attn.qkv_proj.weight", "(NH+KH*+KH) D"),
        "attention.v_DKH": Tensor("self_attn.qkv_proj.weight", "(NH+KH+KH*) D"),
    },
)
