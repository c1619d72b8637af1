"""One decoder-only transformer for all families. It knows of no mesh and no cache: attention is an argument, its state
passes through, and so is what runs the experts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from helix_jax.config import ModelConfig
from helix_jax.models.attention import Attention, SelfAttention
from helix_jax.models.experts import run_dense
from helix_jax.models.mla import LatentAttention
from helix_jax.models.moe import MixtureOfExperts, RunExperts
from helix_jax.models.parts import FeedForward, Parameters, lookup, rms_norm
from helix_jax.numerics import einsum

# Nested as the modules are; the leaves are arrays.
Weights = dict[Any, Any]


class Layer(nnx.Module):
    """Attention and a feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, make: Parameters):
        self.config = config
        experts = config.experts_of(layer)
        self.attention_norm_D = make.norm("attention_norm_D")
        self.attention = (
            LatentAttention(config, config.latent, make) if config.latent else SelfAttention(config, layer, make)
        )
        self.ff_norm_D = make.norm("ff_norm_D")
        self.ff = MixtureOfExperts(config, experts, make) if experts else FeedForward(config, make)
        if config.post_norms:
            self.attention_post_norm_D = make.norm("attention_post_norm_D")
            self.ff_post_norm_D = make.norm("ff_post_norm_D")

    def __call__(
        self,
        x_BTD: Array,
        position_BT: Array,
        attention: Attention,
        state: Any,
        run_experts: RunExperts,
        drop: Callable[[Array], Array],
    ) -> tuple[Array, Any]:
        normed_BTD = rms_norm(x_BTD, self.attention_norm_D, self.config)
        added_BTD, state = self.attention(normed_BTD, position_BT, attention, state)
        if self.config.post_norms:
            added_BTD = rms_norm(added_BTD, self.attention_post_norm_D, self.config)
        x_BTD = x_BTD + drop(added_BTD)

        normed_BTD = rms_norm(x_BTD, self.ff_norm_D, self.config)
        added_BTD = self.ff(normed_BTD, run_experts) if isinstance(self.ff, MixtureOfExperts) else self.ff(normed_BTD)
        if self.config.post_norms:
            added_BTD = rms_norm(added_BTD, self.ff_post_norm_D, self.config)
        return x_BTD + drop(added_BTD), state


class Transformer(nnx.Module):
    """A language model of the shape that `config` gives. It computes in the type of its parameters.

    devices: how many share the weights; vocabulary, feed-forwards and the number of experts are padded to a multiple of
    it, and the padding neither computes nor is ever predicted or chosen. rngs: None makes a model of shapes alone.
    """

    def __init__(self, config: ModelConfig, *, devices: int = 1, rngs: nnx.Rngs | None):
        self.config = config
        make = Parameters(config, devices, rngs)
        self.embed_VD = make.matrix("embed_VD", "D")
        self.layers = nnx.List([Layer(config, layer, make) for layer in range(config.layers)])
        self.norm_D = make.norm("norm_D")
        if not config.tied_head:
            self.head_VD = make.matrix("head_VD", "D")

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        position_BT: Int[Array, "B T"],
        attention: Attention,
        states: Sequence[Any],
        run_experts: RunExperts = run_dense,
        drop: Callable[[Array], Array] = lambda x_BTD: x_BTD,
        around: Callable[[Layer], Callable[..., tuple[Array, Any]]] = lambda layer: layer,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """The hidden state after the last norm, and what `attention` made of the state of each layer.

        In training `drop` is applied to what each layer adds to the residual stream, dropout, and `around` gives what
        is called in a layer's place.
        """
        x_BTD = lookup(self.embed_VD[...], tokens_BT)
        x_BTD = x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype)
        after = []
        # Unrolled: under a scan over layers the cache is copied, and a decode step took 1.2 to 1.5 times as long.
        for layer, state in zip(self.layers, states, strict=True):
            x_BTD, state = around(layer)(x_BTD, position_BT, attention, state, run_experts, drop)
            after.append(state)
        return rms_norm(x_BTD, self.norm_D, self.config), tuple(after)

    @property
    def dtype(self) -> Any:
        """The type of the weights, in which the model computes."""
        return self.embed_VD[...].dtype

    def head(self) -> Float[Array, "V D"]:
        return self.embed_VD[...] if self.config.tied_head else self.head_VD[...]

    def logits(self, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The next token's logits, in float32; -inf where the vocabulary is padding."""
        return compute_logits(self.config, self.head(), x_BTD)

    def weights(self) -> Weights:
        """Its parameters, as a step takes them. `assemble` is the inverse."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))


def compute_logits(config: ModelConfig, head_VD: Float[Array, "V D"], x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """As `Transformer.logits`."""
    logits_BTV = einsum("...d,vd->...v", x_BTD, head_VD, out=jnp.float32)
    return jnp.where(jnp.arange(head_VD.shape[0]) < config.vocab, logits_BTV, -jnp.inf)


def assemble(config: ModelConfig, weights: Weights) -> Transformer:
    """The Transformer of these weights, inside a trace.

    A step takes config and weights, not the module: hashing and flattening one of 5 layers cost 0.3 ms of host time a
    call, against 0.03 ms for these.
    """
    graph, state = nnx.split(Transformer(config, rngs=None))
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)
