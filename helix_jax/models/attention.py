"""Grouped-query attention. The function that attends is an argument, so this module depends on no cache."""

from typing import Any, Protocol, runtime_checkable

from flax import nnx
from jax import Array

from helix_jax.config import ModelConfig
from helix_jax.models.parts import Parameters, rms_norm, rms_norm_heads
from helix_jax.models.rope import rotate
from helix_jax.numerics import einsum

# Whatever an Attention reads and replaces, such as the cache.
AttentionState = Any


@runtime_checkable
class Attention(Protocol):
    """A function by which new tokens attend to the tokens of their rows."""

    def __call__(
        self,
        q_BTNH: Array,
        k_BTKH: Array,
        v_BTKH: Array | None,
        state: AttentionState,
        *,
        scale: float,
        window: int | None = None,
        sink_N: Array | None = None,
        v_width: int | None = None,
    ) -> tuple[Array, AttentionState]:
        """Attend.

        Args:
            q_BTNH: The queries of the new tokens.
            k_BTKH: The keys of the new tokens.
            v_BTKH: Their values. None: the values are the first `v_width` numbers of the keys.
            state: The state before this layer.
            scale: The factor on the products of queries and keys.
            window: The number of positions that a query sees. None: all before it, and its own.
            sink_N: A logit per head that takes part in the softmax and has no value.
            v_width: The width of the values, if `v_BTKH` is None.

        Returns:
            The output of every head, and the state after this layer.
        """
        ...


class SelfAttention(nnx.Module):
    """The projections and norms around grouped-query attention."""

    def __init__(self, config: ModelConfig, layer: int, make: Parameters):
        self.config, self.rope, self.window = config, config.rope_of(layer), config.window_of(layer)
        self.scale = config.softmax_scale or config.head_width**-0.5
        self.q_DNH = make.matrix("q_DNH", "D")
        self.k_DKH = make.matrix("k_DKH", "D")
        self.v_DKH = make.matrix("v_DKH", "D")
        self.o_NHD = make.onto_residual("o_NHD", "NH")
        if config.qkv_bias:
            self.q_bias_NH = make.bias("q_bias_NH")
            self.k_bias_KH = make.bias("k_bias_KH")
            self.v_bias_KH = make.bias("v_bias_KH")
        if config.o_bias:
            self.o_bias_D = make.bias("o_bias_D")
        if config.qk_norm_all_heads:
            self.q_norm_NH = make.norm("q_norm_NH")
            self.k_norm_KH = make.norm("k_norm_KH")
        elif config.qk_norm:
            self.q_norm_H = make.norm("q_norm_H")
            self.k_norm_H = make.norm("k_norm_H")
        if config.sinks:
            self.sink_N = make.bias("sink_N")

    def __call__(
        self, x_BTD: Array, position_BT: Array, attention: Attention, state: AttentionState
    ) -> tuple[Array, AttentionState]:
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        if self.rope:
            q_BTNH, k_BTKH = (rotate(x, position_BT, self.rope) for x in (q_BTNH, k_BTKH))
        sink_N = self.sink_N[...] if self.config.sinks else None
        o_BTNH, state = attention(q_BTNH, k_BTKH, v_BTKH, state, scale=self.scale, window=self.window, sink_N=sink_N)
        o_BTD = einsum("btnh,nhd->btd", o_BTNH, self.o_NHD[...])
        return o_BTD + self.o_bias_D[...] if self.config.o_bias else o_BTD, state

    def _project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        """Return queries, keys and values, before they are rotated."""
        q_BTNH = einsum("btd,dnh->btnh", x_BTD, self.q_DNH[...])
        k_BTKH = einsum("btd,dkh->btkh", x_BTD, self.k_DKH[...])
        v_BTKH = einsum("btd,dkh->btkh", x_BTD, self.v_DKH[...])
        if self.config.qkv_bias:
            q_BTNH, k_BTKH = q_BTNH + self.q_bias_NH[...], k_BTKH + self.k_bias_KH[...]
            v_BTKH = v_BTKH + self.v_bias_KH[...]
        if self.config.qk_norm_all_heads:
            q_BTNH = rms_norm_heads(q_BTNH, self.q_norm_NH, self.config, self.config.heads)
            k_BTKH = rms_norm_heads(k_BTKH, self.k_norm_KH, self.config, k_BTKH.shape[2])
        elif self.config.qk_norm:
            q_BTNH = rms_norm(q_BTNH, self.q_norm_H, self.config)
            k_BTKH = rms_norm(k_BTKH, self.k_norm_H, self.config)
        return q_BTNH, k_BTKH, v_BTKH
