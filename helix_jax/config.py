"""Describes the shape of a model as data: frozen dataclasses, validated before anything runs."""

import math
from dataclasses import dataclass, fields
from typing import Any

from helix_jax.validation import check_choice, check_in_vocabulary, check_int, check_positive

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu_tanh")
SCORINGS = ("softmax", "sigmoid")
GROUP_SCORES = ("best", "top2")


def _check_numbers(config: Any, prefix: str, may_be_zero: tuple[str, ...] = ()) -> None:
    """Check that the ints of a dataclass are at least 1, and its floats positive and finite."""
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if value is None and field.type in (int | None, float | None):
            continue
        if field.type in (int, int | None):
            check_int(name, value, least=0 if field.name in may_be_zero else 1)
        if field.type in (float, float | None):
            check_positive(name, value)
        if isinstance(value, tuple) and field.type == tuple[float, ...]:
            for number in value:
                check_positive(name, number)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings. The fields have the names of the keys in config.json files where they agree.

    Args:
        theta: The base of the frequencies.
        kind: How the frequencies were scaled to extend the context: "default" (not at all), "linear", "dynamic" (not
            up to `max_positions` of the model, and longer texts are rejected), "llama3", "yarn" or "longrope".
        factor: By how much the context was extended.
        original_positions: The context length before it was extended.
        low_freq_factor: For "llama3": frequencies below this many turns per original context are divided by `factor`.
        high_freq_factor: For "llama3": frequencies above this many turns per original context are kept.
        beta_fast: For "yarn": frequencies above this many turns per original context are kept.
        beta_slow: For "yarn": frequencies below this many turns per original context are divided by `factor`.
        truncate: For "yarn": round the bounds that follow from `beta_fast` and `beta_slow` to whole dimensions.
        short_factor: For "longrope": a divisor per frequency, used if the context was not extended (`factor` 1).
        long_factor: For "longrope": a divisor per frequency, used for all lengths if the context was extended, because
            the keys in a cache are rotated once.
        attention_factor: For "yarn" and "longrope": the factor on the rotated queries and keys. None: it follows from
            `factor`.
        mscale: For "yarn" in DeepSeek models: a parameter of that factor.
        mscale_all_dim: For "yarn" in DeepSeek models: a parameter of that factor, and of the softmax scale.
        interleaved: Rotate neighbouring dimensions as pairs. Otherwise the two of a pair are half of the rotated
            dimensions apart.
        partial_rotary_factor: The share of a head's dimensions, the first ones, that are rotated.

    Raises:
        TypeError: A number has the wrong type.
        ValueError: The kind is unknown, a number is not positive, a share is above 1, or a kind that depends on
            `original_positions` lacks it.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    interleaved: bool = False
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rope kind", self.kind, ROPE_KINDS)
        _check_numbers(self, "rope ", may_be_zero=("original_positions",))
        if self.theta <= 1:
            raise ValueError(f"rope theta is {self.theta}: give a number above 1")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"rope high_freq_factor {high} is not above low_freq_factor {low}: correct the config")
        if self.kind in ("llama3", "yarn", "longrope") and self.original_positions < 2:
            raise ValueError(
                f"rope kind '{self.kind}' needs original_max_position_embeddings above 1, it is "
                f"{self.original_positions}: add it to the config"
            )
        if self.partial_rotary_factor > 1:
            raise ValueError(f"rope partial_rotary_factor is {self.partial_rotary_factor}: give at most 1")

    def rotated_width(self, head_width: int) -> int:
        """Return how many dimensions of a head are rotated."""
        return int(head_width * self.partial_rotary_factor)

    def check_width(self, name: str, head_width: int) -> None:
        """Check that heads of this width can be rotated.

        Raises:
            ValueError: An odd number of dimensions would be rotated, or "longrope" has factors for another number.
        """
        width = self.rotated_width(head_width)
        if width % 2 or not width:
            share = "" if width == head_width else f", of which {width} are rotated"
            raise ValueError(
                f"{name} is {head_width}{share}: give an even number, because rotary embeddings rotate pairs"
            )
        for factor in ("short_factor", "long_factor"):
            count = len(getattr(self, factor))
            if self.kind == "longrope" and count != width // 2:
                raise ValueError(f"rope {factor} has {count} numbers: give {width // 2}, one per rotated pair")


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: one vector per token is cached for all heads, `width + rope_width` numbers.

    Args:
        width: The width of the latent from which keys and values are computed.
        rope_width: The width of the rotated part of queries and keys, which all heads share.
        nope_width: The width of the part of queries and keys that is not rotated, per head.
        value_width: The width of values, per head.
        query_rank: The width of the latent from which queries are computed. None: they are projected directly.

    Raises:
        TypeError: A width is not an int.
        ValueError: A width is below 1, or `rope_width` is odd.

    Source: arXiv 2405.04434, section 2.1.
    """

    width: int
    rope_width: int
    nope_width: int
    value_width: int
    query_rank: int | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, "latent ")
        Rope().check_width("latent rope_width", self.rope_width)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts: each token is routed to the `top_k` best of `num_experts` experts.

    Args:
        num_experts: The number of experts.
        top_k: How many experts each token is routed to.
        width: The feed-forward width of one expert.
        dense_layers: The layers that have an ordinary feed-forward network instead.
        shared_width: The feed-forward width of an expert that processes every token. 0: there is none.
        shared_gate: Whether the output of that expert is multiplied by a sigmoid of the token.
        scoring: How router logits become scores: "softmax" or "sigmoid".
        normalised: Whether the weights of a token's experts are divided by their sum, before `scale`.
        scale: A factor on the weights.
        num_groups: The number of groups into which the experts are divided.
        top_k_groups: How many groups a token's experts may come from.
        group_score: The score of a group: that of its best expert ("best"), or the sum of its best two ("top2").
        selection_bias: Whether the router has a bias that influences which experts are selected, but not their weights.
        router_bias: Whether the router logits have a bias.
        bias: Whether the experts have biases.

    Raises:
        TypeError: A number has the wrong type.
        ValueError: The groups do not divide the experts, `top_k` exceeds the experts that can be selected, there is a
            gate without a shared expert, a number is out of range, or a choice is unknown.
    """

    num_experts: int
    top_k: int
    width: int
    dense_layers: tuple[int, ...] = ()
    shared_width: int = 0
    shared_gate: bool = False
    scoring: str = "softmax"
    normalised: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: str = "best"
    selection_bias: bool = False
    router_bias: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self, "experts ", may_be_zero=("shared_width",))
        if self.shared_gate and not self.shared_width:
            raise ValueError("experts shared_gate is True, but shared_width is 0: give its width")
        check_choice("experts scoring", self.scoring, SCORINGS)
        check_choice("experts group_score", self.group_score, GROUP_SCORES)
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"{self.num_groups} groups do not divide the {self.num_experts} experts: correct the config"
            )
        if self.top_k_groups > self.num_groups:
            raise ValueError(
                f"top_k_groups {self.top_k_groups} exceeds num_groups {self.num_groups}: correct the config"
            )
        per_group = self.num_experts // self.num_groups
        selectable = per_group * self.top_k_groups
        if self.top_k > selectable:
            raise ValueError(f"top_k {self.top_k} exceeds the {selectable} selectable experts: correct the config")
        if self.group_score == "top2" and per_group < 2:
            raise ValueError("group_score is 'top2', but groups have one expert: correct the config")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer. Families differ in these values, not in code; the defaults are Llama's.

    Args:
        layers: The number of layers.
        width: The width of the residual stream.
        heads: Query heads.
        kv_heads: Key/value heads. 1 for latent attention.
        head_width: The width of a query and key head.
        ff_width: The feed-forward width of layers without experts.
        vocab: The size of the vocabulary.
        max_positions: The longest context.
        rope: Rotary position embeddings.
        rope_local: Those of the `windowed_layers`, if they differ.
        nope_layers: The layers without position embeddings.
        window: How many positions a query of the `windowed_layers` sees, its own included.
        windowed_layers: The layers with sliding-window attention.
        softmax_scale: The factor on attention logits. None: 1 / sqrt(head_width).
        latent: The widths of latent attention. None: keys and values are cached per head.
        experts: The mixture of experts. None: all layers are dense.
        activation: The activation of the feed-forward gates: "silu" or "gelu_tanh".
        swiglu_limit: The bound to which the gate and up projections of experts are clamped (gpt-oss).
        swiglu_alpha: The factor in the sigmoid of the clamped gates.
        qkv_bias: Whether the query, key and value projections have biases.
        o_bias: Whether the output projection has a bias.
        qk_norm: Whether queries and keys are normalised.
        qk_norm_all_heads: Whether all heads of a token are normalised together. If not, each by itself.
        sinks: Whether every head has a logit that takes part in the softmax and has no value.
        norm_eps: The epsilon of all norms.
        norm_offset: Whether norms multiply by 1 + weight.
        pre_norms: Whether the inputs of attention and feed-forward are normalised.
        post_norms: Whether the outputs of attention and feed-forward are normalised before they are added.
        embed_scale: A factor on the embeddings.
        residual_scale: A factor on the outputs of attention and feed-forward before they are added.
        logits_scaling: The logits are divided by it.
        tied_head: Whether the output head is the embedding.
        eos_token_ids: The tokens that end a sequence.
        tokenizer: The kind of tokenizer if no tokenizer.json is needed: "bytes".
        family: The `model_type` of config.json files.

    Raises:
        TypeError: A number has the wrong type.
        ValueError: A size is below 1, an end token is outside the vocabulary, `kv_heads` does not divide `heads`, a
            layer does not exist, or two fields contradict each other.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    vocab: int
    max_positions: int
    rope: Rope = Rope()
    rope_local: Rope | None = None
    nope_layers: tuple[int, ...] = ()
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    softmax_scale: float | None = None
    latent: Latent | None = None
    experts: Experts | None = None
    activation: str = "silu"
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    qk_norm_all_heads: bool = False
    sinks: bool = False
    norm_eps: float = 1e-5
    norm_offset: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scaling: float = 1.0
    tied_head: bool = False
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: str | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        _check_numbers(self, "")
        check_in_vocabulary("eos_token_ids", self.eos_token_ids, self.vocab)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}: correct the config")
        for layer in (*self.windowed_layers, *self.nope_layers, *(self.experts.dense_layers if self.experts else ())):
            if not 0 <= layer < self.layers:
                raise ValueError(f"layer {layer} is not one of the {self.layers} layers: correct the config")
        if bool(self.windowed_layers) != (self.window is not None):
            raise ValueError(
                f"window is {self.window}, but windowed_layers is {self.windowed_layers}: give both or neither"
            )
        if self.qk_norm_all_heads and not self.qk_norm:
            raise ValueError("qk_norm_all_heads is True, but qk_norm is False: set it too")
        if not self.pre_norms and not self.post_norms:
            raise ValueError("pre_norms and post_norms are False: set one of them")
        if self.latent:
            self._check_latent(self.latent)
        name, width = ("latent rope_width", self.latent.rope_width) if self.latent else ("head_width", self.head_width)
        for rope in filter(None, (self.rope, self.rope_local)):
            rope.check_width(name, width)

    def _check_latent(self, latent: Latent) -> None:
        expected = latent.nope_width + latent.rope_width
        if self.kv_heads != 1 or self.head_width != expected:
            raise ValueError(
                f"kv_heads is {self.kv_heads} and head_width {self.head_width}: "
                f"give 1 and {expected} for latent attention"
            )
        for name in ("window", "nope_layers", "qkv_bias", "o_bias", "qk_norm", "sinks"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}: leave it out, latent attention does not support it")

    @property
    def cache_width(self) -> int:
        """The numbers that are cached per token and key/value head, for keys, or for keys and values of a latent."""
        return self.latent.width + self.latent.rope_width if self.latent else self.head_width

    def window_of(self, layer: int) -> int | None:
        """Return the window of a layer, or None if its queries see all positions before them."""
        return self.window if layer in self.windowed_layers else None

    def experts_of(self, layer: int) -> Experts | None:
        """Return the experts of a layer, or None if it is dense."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary position embeddings of a layer, or None if it has none."""
        if layer in self.nope_layers:
            return None
        return self.rope_local if self.rope_local and layer in self.windowed_layers else self.rope

    def dims(self, devices: int = 1, ff_width: int | None = None) -> dict[str, int]:
        """Return the size of each dimension letter of the parameters.

        Args:
            devices: E, F and V are rounded up to a multiple of this.
            ff_width: The size of F, if it is not that of a dense layer.
        """
        dims = {
            "D": self.width,
            "N": self.heads,
            "K": self.kv_heads,
            "H": self.head_width,
            "F": _round_up(ff_width or self.ff_width, devices),
            "V": _round_up(self.vocab, devices),
        }
        if self.experts:
            dims["E"] = _round_up(self.experts.num_experts, devices)
        if self.latent:
            latent = self.latent
            dims |= {"Z": latent.width, "I": latent.nope_width, "U": latent.value_width, "Y": self.cache_width}
            dims |= {"Q": latent.query_rank} if latent.query_rank else {}
        return dims


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
