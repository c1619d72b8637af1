"""One decoder-only transformer for all families, without a mesh or a cache.

The functions that attend and that run the experts are arguments. A state, such as the cache, is passed through the
former from layer to layer.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from helix_jax.config import ModelConfig
from helix_jax.models.attention import Attention, AttentionState, SelfAttention
from helix_jax.models.experts import run_dense
from helix_jax.models.mla import LatentAttention
from helix_jax.models.moe import MixtureOfExperts, RunExperts
from helix_jax.models.parts import FeedForward, Parameters, lookup, rms_norm
from helix_jax.numerics import einsum

# Nested like the modules. The leaves are arrays.
Weights = dict[Any, Any]


class Layer(nnx.Module):
    """Attention and a feed-forward network, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, make: Parameters):
        self.config = config
        experts = config.experts_of(layer)
        self.attention = (
            LatentAttention(config, config.latent, make) if config.latent else SelfAttention(config, layer, make)
        )
        self.ff = MixtureOfExperts(config, experts, make) if experts else FeedForward(config, make)
        if config.pre_norms:
            self.attention_norm_D = make.norm("attention_norm_D")
            self.ff_norm_D = make.norm("ff_norm_D")
        if config.post_norms:
            self.attention_post_norm_D = make.norm("attention_post_norm_D")
            self.ff_post_norm_D = make.norm("ff_post_norm_D")

    def __call__(
        self,
        x_BTD: Array,
        position_BT: Array,
        attention: Attention,
        state: AttentionState,
        run_experts: RunExperts,
        dropout: Callable[[Array], Array],
    ) -> tuple[Array, AttentionState]:
        normed_BTD = rms_norm(x_BTD, self.attention_norm_D, self.config) if self.config.pre_norms else x_BTD
        added_BTD, state = self.attention(normed_BTD, position_BT, attention, state)
        if self.config.post_norms:
            added_BTD = rms_norm(added_BTD, self.attention_post_norm_D, self.config)
        x_BTD = x_BTD + dropout(self._scale(added_BTD))

        normed_BTD = rms_norm(x_BTD, self.ff_norm_D, self.config) if self.config.pre_norms else x_BTD
        added_BTD = self.ff(normed_BTD, run_experts) if isinstance(self.ff, MixtureOfExperts) else self.ff(normed_BTD)
        if self.config.post_norms:
            added_BTD = rms_norm(added_BTD, self.ff_post_norm_D, self.config)
        return x_BTD + dropout(self._scale(added_BTD)), state

    def _scale(self, added_BTD: Array) -> Array:
        scale = self.config.residual_scale
        return added_BTD if scale == 1 else added_BTD * jnp.asarray(scale, added_BTD.dtype)


class Transformer(nnx.Module):
    """A decoder-only language model. It computes in the type of its parameters.

    Args:
        config: The shape of the model.
        devices: How many devices share the weights. The vocabulary, the feed-forward widths and the number of experts
            are padded to a multiple of it. The padding changes no result, and is never predicted or routed to.
        rngs: The source of random parameters. None makes a model of shapes without values.
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
        state: AttentionState,
        run_experts: RunExperts = run_dense,
        dropout: Callable[[Array], Array] = lambda x_BTD: x_BTD,
        wrap_layer: Callable[[Layer], Callable[..., tuple[Array, AttentionState]]] = lambda layer: layer,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        """Return the hidden state after the last norm, and the state after the last layer.

        Args:
            tokens_BT: The tokens.
            position_BT: The position of each token in its row.
            attention: The function that attends.
            state: What `attention` of the first layer receives. Each layer receives what the previous one returned.
            run_experts: The function that runs the experts.
            dropout: A function applied to each term before it is added to the residual stream, for training.
            wrap_layer: Returns the function that is called in place of a layer, for training.
        """
        x_BTD = lookup(self.embed_VD[...], tokens_BT)
        x_BTD = x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype)
        # The loop is unrolled: a scan over layers copies the cache, and a decode step took 1.2 to 1.5 times as long.
        for layer in self.layers:
            x_BTD, state = wrap_layer(layer)(x_BTD, position_BT, attention, state, run_experts, dropout)
        return rms_norm(x_BTD, self.norm_D, self.config), state

    @property
    def dtype(self) -> Any:
        """The type of the weights, in which the model computes."""
        return self.embed_VD[...].dtype

    def head(self) -> Float[Array, "V D"]:
        """Return the output head: the embedding if they are tied."""
        return self.embed_VD[...] if self.config.tied_head else self.head_VD[...]

    def logits(self, x_BTD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return the logits of the next token in float32, -inf for the padding of the vocabulary."""
        return compute_logits(self.config, self.head(), x_BTD)

    def weights(self) -> Weights:
        """Return the parameters as the arguments of a jitted step. `assemble` is the inverse."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))


def compute_logits(
    config: ModelConfig, head_VD: Float[Array, "V D"], x_BTD: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Return the logits like `Transformer.logits`, for a head that is given as an array."""
    logits_BTV = einsum("...d,vd->...v", x_BTD, head_VD, out=jnp.float32)
    if config.logits_scaling != 1:
        logits_BTV = logits_BTV / config.logits_scaling
    return jnp.where(jnp.arange(head_VD.shape[0]) < config.vocab, logits_BTV, -jnp.inf)


def assemble(config: ModelConfig, weights: Weights) -> Transformer:
    """Return the Transformer with these weights, inside a trace.

    A jitted step takes the config and the weights instead of the module: hashing and flattening a module of 5 layers
    took 0.3 ms of host time per call, config and weights take 0.03 ms.
    """
    graph, state = nnx.split(Transformer(config, rngs=None))
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)
