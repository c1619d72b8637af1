"""Qwen 2 and 3, dense and with experts."""

from typing import Any

from helix_jax.config import ModelConfig
from helix_jax.families.family import (
    EXPERT_TENSORS,
    HEADS,
    LAYER_TENSORS,
    SIZES,
    Family,
    Fields,
    Key,
    Published,
    RopeKeys,
    Windows,
    all_layers,
)
from helix_jax.families.llama import BIASES


def upper_layers(published: Published, layers: int) -> tuple[int, ...]:
    return tuple(range(published.get("max_window_layers", 28), layers))


class DenseLayers:
    """Which layers have no experts: those named, and those between every `decoder_sparse_step`."""

    def read(self, published: Published, fields: Fields) -> None:
        step, named = published.get("decoder_sparse_step", 1), published.get("mlp_only_layers") or ()
        layers = range(fields["layers"])
        fields["experts.dense_layers"] = tuple(i for i in layers if i in named or (i + 1) % step)

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        dense = config.experts.dense_layers if config.experts else ()
        published |= {"decoder_sparse_step": 1, "mlp_only_layers": list(dense)}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    parts=(*SIZES, *HEADS, RopeKeys(), Windows(upper_layers, switched=True)),
    options={"hidden_act": "silu"},
    always={"qkv_bias": True},
    layer_tensors=LAYER_TENSORS,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    parts=(*SIZES, *HEADS, *BIASES, RopeKeys(), Windows(upper_layers, switched=True)),
    options={"hidden_act": "silu"},
    always={"qk_norm": True},
    layer_tensors=LAYER_TENSORS,
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    parts=(
        *(*SIZES, *HEADS, *BIASES, RopeKeys()),
        Windows(all_layers, layer_types=False, switched=True),
        Key("experts.count", ("num_experts", "num_local_experts")),
        Key("experts.chosen", "num_experts_per_tok"),
        Key("experts.width", "moe_intermediate_size"),
        Key("experts.normalised", "norm_topk_prob", bool, False),
        DenseLayers(),
    ),
    options={"hidden_act": "silu"},
    always={"qk_norm": True},
    layer_tensors={**LAYER_TENSORS, **EXPERT_TENSORS},
)
