"""Qwen 2 and 3 models, dense and with experts, of which one may be shared."""

from typing import Any

from helix_jax.config import ModelConfig
from helix_jax.families.family import EXPERT_TENSORS, LAYER_TENSORS, Family, Tensor
from helix_jax.families.keys import HEADS, Fields, Key, Published, Windows, all_layers, read_value, size_keys
from helix_jax.families.llama import BIASES
from helix_jax.families.ropes import RopeKeys

# The variants with 1M positions attend in chunks beyond their original positions, which is not supported.
OPTIONS = {"hidden_act": "silu", "dual_chunk_attention_config": None}


def upper_layers(published: Published, layers: int) -> tuple[int, ...]:
    """Return the layers from `max_window_layers` on."""
    return tuple(range(read_value(published, "max_window_layers", int, 28, least=0), layers))


def lower_even_layers(published: Published, layers: int) -> tuple[int, ...]:
    """Return every other layer before `max_window_layers`, from the first one on."""
    end = read_value(published, "max_window_layers", int, 28, least=0)
    return tuple(range(0, min(end, layers), 2))


class DenseLayers:
    """The layers without experts: the ones in `mlp_only_layers`, and the ones that `decoder_sparse_step` skips."""

    def read(self, published: Published, fields: Fields) -> None:
        """Set the dense layers."""
        step = read_value(published, "decoder_sparse_step", int, 1)
        listed = read_value(published, "mlp_only_layers", list, [])
        if not all(type(layer) is int for layer in listed):
            raise ValueError(f"config.json: mlp_only_layers is {listed!r}: give a list of layers")
        layers = range(fields["layers"])
        fields["experts.dense_layers"] = tuple(i for i in layers if i in listed or (i + 1) % step)

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """List the dense layers."""
        dense = config.experts.dense_layers if config.experts else ()
        published |= {"decoder_sparse_step": 1, "mlp_only_layers": list(dense)}


EXPERTS = (
    Key("experts.num_experts", ("num_experts", "num_local_experts")),
    Key("experts.top_k", "num_experts_per_tok"),
    Key("experts.width", "moe_intermediate_size"),
    Key("experts.normalised", "norm_topk_prob", bool, False),
    DenseLayers(),
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    parts=(*size_keys(), *HEADS, RopeKeys(), Windows(upper_layers, switched=True)),
    options=OPTIONS,
    always={"qkv_bias": True},
    layer_tensors=LAYER_TENSORS,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    parts=(*size_keys(), *HEADS, *BIASES, RopeKeys(), Windows(upper_layers, switched=True)),
    options=OPTIONS,
    always={"qk_norm": True},
    layer_tensors=LAYER_TENSORS,
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    parts=(
        *(*size_keys(), *HEADS, *BIASES, RopeKeys()),
        *(Windows(all_layers, layer_types=False, switched=True), *EXPERTS),
    ),
    options=OPTIONS,
    always={"qk_norm": True},
    layer_tensors={**LAYER_TENSORS, **EXPERT_TENSORS},
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    parts=(
        *size_keys(),
        Key("kv_heads", "num_key_value_heads", int, 16),
        Key("head_width", "head_dim", int, lambda fields: fields["width"] // fields["heads"]),
        Key("qkv_bias", "qkv_bias", bool, True),
        *(RopeKeys(), Windows(lower_even_layers, switched=True), *EXPERTS),
        Key("experts.shared_width", "shared_expert_intermediate_size", int, 5632),
    ),
    options=OPTIONS,
    always={"experts.shared_gate": True},
    layer_tensors={
        **LAYER_TENSORS,
        **EXPERT_TENSORS,
        "ff.shared.gate_DF": Tensor("mlp.shared_expert.gate_proj.weight", "F D"),
        "ff.shared.up_DF": Tensor("mlp.shared_expert.up_proj.weight", "F D"),
        "ff.shared.down_FD": Tensor("mlp.shared_expert.down_proj.weight", "D F"),
        "ff.shared_gate_D": Tensor("mlp.shared_expert_gate.weight", "1 D"),
    },
)
