"""gpt-oss: attention sinks, a window in every other layer, clamped gates, biases, and YaRN."""

from helix_jax.families.family import LAYER_TENSORS, Family, Tensor
from helix_jax.families.keys import HEADS, Key, Published, Windows, size_keys
from helix_jax.families.llama import BIASES
from helix_jax.families.ropes import RopeKeys


def every_other(published: Published, layers: int) -> tuple[int, ...]:
    """Return every other layer, from the first one on."""
    return tuple(range(0, layers, 2))


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    parts=(
        *(*size_keys(norm_eps=1e-5), *HEADS, *BIASES),
        *(RopeKeys(theta=150_000.0, required=True), Windows(every_other, default=128)),
        Key("swiglu_limit", "swiglu_limit", float, 7.0),
        Key("swiglu_alpha", "swiglu_alpha", float, 1.702),
        Key("experts.num_experts", ("num_local_experts", "num_experts")),
        Key("experts.top_k", ("num_experts_per_tok", "experts_per_token")),
        Key("experts.width", "intermediate_size"),
    ),
    options={"hidden_act": "silu"},
    always={"sinks": True, "experts.bias": True, "experts.router_bias": True},
    layer_tensors={
        **LAYER_TENSORS,
        "attention.sink_N": Tensor("self_attn.sinks", "N"),
        "ff.router_DE": Tensor("mlp.router.weight", "E D"),
        "ff.router_bias_E": Tensor("mlp.router.bias", "E"),
        # The columns of gate and up alternate.
        "ff.gate_EDF": Tensor("mlp.experts.gate_up_proj", "E D F(*+1)"),
        "ff.up_EDF": Tensor("mlp.experts.gate_up_proj", "E D F(1+*)"),
        "ff.gate_bias_EF": Tensor("mlp.experts.gate_up_proj_bias", "E F(*+1)"),
        "ff.up_bias_EF": Tensor("mlp.experts.gate_up_proj_bias", "E F(1+*)"),
        "ff.down_EFD": Tensor("mlp.experts.down_proj", "E F D"),
        "ff.down_bias_ED": Tensor("mlp.experts.down_proj_bias", "E D"),
    },
)
