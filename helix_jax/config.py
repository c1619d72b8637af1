"""The shape of a model, as data: frozen, and validated before anything runs. Families differ here, not in code."""

import math
from dataclasses import dataclass, fields
from typing import Any

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu_tanh")


def _check_numbers(config: Any, what: str, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a size below 1 or a number that is not positive; None, where it may stand, is neither."""
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None or (value == 0 and f.name in may_be_zero):
            continue
        if f.type in (int, int | None) and value < 1:
            raise ValueError(f"{what}{f.name} is {value}: give a whole number of at least 1")
        if f.type in (float, float | None) and not 0 < value < math.inf:
            raise ValueError(f"{what}{f.name} is {value}: give a positive number")


def _check_even(name: str, width: int) -> None:
    if width % 2:
        raise ValueError(f"{name} is {width}: rotary positions need an even one")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions, under the names that config.json files have for them.

    kind: how the rates were stretched to reach further than at first: 'default' (not at all), 'linear', 'llama3' or
    'yarn'. original_positions: how far the model reached before. interleaved: the pairs that turn together are
    neighbours, not half a head apart.

    Raises:
        ValueError: an unknown kind, a number that is not positive, a stretched kind without its original positions.
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
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope type {self.kind!r} is not supported: known are {', '.join(ROPE_KINDS)}")
        _check_numbers(self, "rope ", may_be_zero=("original_positions",))
        if self.theta <= 1:
            raise ValueError(f"rope theta is {self.theta}: give a number above 1")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"rope high_freq_factor {high} is not above low_freq_factor {low}: mend the config")
        if self.kind in ("llama3", "yarn") and not self.original_positions:
            raise ValueError(f"rope type '{self.kind}' needs original_max_position_embeddings: mend the config")


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: one vector per token is cached for all heads, `width` + `rope_width` numbers.

    query_rank: the queries come through a latent of this width too; None: straight from the residual stream.
    nope_width: what of a query and key is not rotated. value_width: of each head.

    Source: arXiv 2405.04434, section 2.1.
    """

    width: int
    rope_width: int
    nope_width: int
    value_width: int
    query_rank: int | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, "latent ")
        _check_even("latent rope_width", self.rope_width)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in every layer but the `dense_layers`: each token is sent to the `chosen` best of `count`.

    width: of one expert. shared_width: of an expert that every token passes as well (0: none). scoring: 'softmax' or
    'sigmoid' of the router's logits. normalised: the weights of the chosen sum to one, before `scale`.
    groups, top_k_groups: only experts of the best groups can be chosen; group_score: a group's score is that of its
    'best' expert, or the sum of its best two ('top2'). selection_bias: a bias that counts in choosing, not in weighing.
    router_bias, bias: whether the router, and the experts themselves, have biases.

    Raises:
        ValueError: more chosen than there are, groups that do not divide the experts, an unknown word.
    """

    count: int
    chosen: int
    width: int
    dense_layers: tuple[int, ...] = ()
    shared_width: int = 0
    scoring: str = "softmax"
    normalised: bool = True
    scale: float = 1.0
    groups: int = 1
    top_k_groups: int = 1
    group_score: str = "best"
    selection_bias: bool = False
    router_bias: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self, "experts ", may_be_zero=("shared_width",))
        if self.groups > self.count or self.count % self.groups or self.top_k_groups > self.groups:
            raise ValueError(
                f"{self.count} experts in {self.groups} groups, of which {self.top_k_groups} are chosen, do not "
                f"divide: mend the config"
            )
        if self.chosen > self.count // self.groups * self.top_k_groups:
            raise ValueError(f"{self.chosen} experts are chosen of too few ({self.count}): mend the config")
        for name, known in (("scoring", ("softmax", "sigmoid")), ("group_score", ("best", "top2"))):
            if getattr(self, name) not in known:
                raise ValueError(f"experts {name} is {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.group_score == "top2" and self.count // self.groups < 2:
            raise ValueError(f"{self.groups} groups of {self.count} experts have no best two: mend the config")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer. Families differ in these values, not in code.

    The defaults are Llama's. window: how many positions, its own included, a query of `windowed_layers` sees.
    rope_local: the rotary positions of these layers, if they have their own. softmax_scale: None is 1 / sqrt(width of a
    query). swiglu_limit: the experts' gates are clamped to it. norm_offset: norms multiply by 1 + weight. post_norms:
    what attention and feed-forward add is normed too. sinks: every head has a logit that takes part in the softmax and
    has no value. latent: attention caches a latent; kv_heads is then 1, head_width that of a query.

    Raises:
        ValueError: a size below 1, a stop id outside of the vocabulary, query heads that the key/value heads do not
            divide, a layer that is not there, parts that do not fit each other.
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
    sinks: bool = False
    norm_eps: float = 1e-5
    norm_offset: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    tied_head: bool = False
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: str | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        _check_numbers(self, "")
        for stop in self.eos_token_ids:
            if not 0 <= stop < self.vocab:
                raise ValueError(f"stop id {stop} is outside of the vocabulary of {self.vocab}: mend the config")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: mend the config")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not known: choose one of {', '.join(ACTIVATIONS)}")
        for layer in (*self.windowed_layers, *(self.experts.dense_layers if self.experts else ())):
            if not 0 <= layer < self.layers:
                raise ValueError(f"layer {layer} is not one of the {self.layers}: mend the config")
        if bool(self.windowed_layers) != (self.window is not None):
            raise ValueError(f"window {self.window} with windowed_layers {self.windowed_layers}: give both or neither")
        if self.latent:
            self._check_latent(self.latent)
        else:
            _check_even("head_width", self.head_width)

    def _check_latent(self, latent: Latent) -> None:
        wanted = latent.nope_width + latent.rope_width
        if self.kv_heads != 1 or self.head_width != wanted:
            raise ValueError(
                f"latent attention has kv_heads 1 and head_width {wanted}, not {self.kv_heads} and {self.head_width}"
            )
        unknown = [name for name in ("window", "qkv_bias", "o_bias", "qk_norm", "sinks") if getattr(self, name)]
        if unknown:
            raise ValueError(f"latent attention has no {unknown[0]}: leave it out")

    @property
    def cache_width(self) -> int:
        """Numbers that are cached per token and key/value head, of keys, or of what stands for keys and values."""
        return self.latent.width + self.latent.rope_width if self.latent else self.head_width

    def window_of(self, layer: int) -> int | None:
        return self.window if layer in self.windowed_layers else None

    def experts_of(self, layer: int) -> Experts | None:
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    def rope_of(self, layer: int) -> Rope:
        return self.rope_local if self.rope_local and layer in self.windowed_layers else self.rope

    def dims(self, devices: int = 1, ff_width: int | None = None) -> dict[str, int]:
        """The size of each letter of the shape key; E, F and V rounded up to what `devices` can share evenly.

        ff_width: of which feed-forward F is to be; an expert's is not that of a dense layer.
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
