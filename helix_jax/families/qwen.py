"""Qwen 2 and 3, dense and with experts."""

from typing import Any

from helix_jax.config import ModelConfig
from helix_jax.families.family import EXPERT_TENSORS, LAYER_TENSORS, Family
from helix_jax.families.keys import HEADS, Fields, Key, Published, RopeKeys, Windows, all_layers, sizes, value_of
from helix_jax.families.llama import BIASES

# The 1M variants attend in chunks beyond their first positions: another function, which is not computed here.
OPTIONS = {"hidden_act": "silu", "dual_chunk_attention_config": None}


def upper_layers(published: Published, layers: int) -> tuple[int, ...]:
    return tuple(range(value_of(published, "max_window_layers", int, 28, least=0), layers))


class DenseLayers:
    """Which layers have no experts: those named, and those between every `decoder_sparse_step`."""

    def read(self, published: Published, fields: Fields) -> None:
        step = value_of(published, "decoder_sparse_step", int, 1)
        named = value_of(published, "mlp_only_layers", list, [])
        if not all(type(layer) is int for layer in named):
            raise ValueError(f"config.json: mlp_only_layers is {named!r}: give a list of layers")
        layers = range(fields["layers"])
        fields["experts.dense_layers"] = tuple(i for i in layers if i in named or (i + 1) % step)

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        dense = config.experts.dense_layers if config.experts else ()
        published |= {"decoder_sparse_step": 1, "mlp_only_layers": list(dense)}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    parts=(*sizes(), *HEADS, RopeKeys(), Windows(upper_layers, switched=True)),
    options=OPTIONS,
    always={"qkv_bias": True},
    layer_tensors=LAYER_TENSORS,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    parts=(*sizes(), *HEADS, *BIASES, RopeKeys(), Windows(upper_layers, switched=True)),
    options=OPTIONS,
    always={"qk_norm": True},
    layer_tensors=LAYER_TENSORS,
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    parts=(
        *(*sizes(), *HEADS, *BIASES, RopeKeys()),
        Windows(all_layers, layer_types=False, switched=True),
        Key("experts.num_experts", ("num_experts", "num_local_experts")),
        Key("experts.top_k", "num_experts_per_tok"),
        Key("experts.width", "moe_intermediate_size"),
        Key("experts.normalised", "norm_topk_prob", bool, False),
        DenseLayers(),
    ),
    options=OPTIONS,
    always={"qk_norm": True},
    layer_tensors={**LAYER_TENSORS, **EXPERT_TENSORS},
)
