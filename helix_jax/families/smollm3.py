"""SmolLM3 models: Llama in which some layers have no position embeddings."""

from typing import Any

from helix_jax.config import ModelConfig
from helix_jax.families.family import LAYER_TENSORS, Family
from helix_jax.families.keys import Fields, Key, Published, Windows, read_value, size_keys
from helix_jax.families.llama import BIASES
from helix_jax.families.ropes import RopeKeys


def layers_without_rope(published: Published, layers: int) -> tuple[int, ...]:
    """Return the layers that `no_rope_layers` marks with 0, or without that key every fourth."""
    has_rope = published.get("no_rope_layers")
    if has_rope is None:
        interval = read_value(published, "no_rope_layer_interval", int, 4)
        return tuple(layer for layer in range(layers) if (layer + 1) % interval == 0)
    if not isinstance(has_rope, list) or len(has_rope) != layers or not all(mark in (0, 1) for mark in has_rope):
        raise ValueError(f"config.json: no_rope_layers is {has_rope!r}: give {layers} of 0 and 1")
    return tuple(layer for layer, mark in enumerate(has_rope) if not mark)


class LayersWithoutRope:
    """The layers without position embeddings."""

    def read(self, published: Published, fields: Fields) -> None:
        """Set the layers."""
        fields["nope_layers"] = layers_without_rope(published, fields["layers"])

    def write(self, config: ModelConfig, published: dict[str, Any]) -> None:
        """Mark the layers."""
        published["no_rope_layers"] = [int(layer not in config.nope_layers) for layer in range(config.layers)]


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    parts=(
        *size_keys(tied_head=True),
        Key("kv_heads", "num_key_value_heads", int, 4),
        Key("head_width", "head_dim", int, lambda fields: fields["width"] // fields["heads"]),
        *(*BIASES, RopeKeys(theta=2_000_000.0), LayersWithoutRope()),
        Windows(layers_without_rope, default=None, switched=True),
    ),
    options={"hidden_act": "silu", "mlp_bias": False},
    always={},
    layer_tensors=LAYER_TENSORS,
)
