"""Multi-head latent attention: one vector per token, the latent, is cached for all heads.

A head's key is `k_up` times the latent c, and its value `v_up` times c. Because `q . (k_up c) = (q k_up) . c`, queries
are projected into the space of the latent, and attention runs there with a single key/value head. The projection of
the values is linear, so it is applied after the partials are combined, by each device to the heads that it then owns.

Source: arXiv 2405.04434, section 2.1.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from helix_jax.config import Latent, ModelConfig
from helix_jax.models.attention import Attention, AttentionState
from helix_jax.models.parts import Parameters, rms_norm
from helix_jax.models.rope import rotate, softmax_gain
from helix_jax.numerics import einsum

_LATENT_EPS = 1e-6  # of the norms of latents: the published models do not use the config's value there


class LatentAttention(nnx.Module):
    """The projections and norms around latent attention."""

    def __init__(self, config: ModelConfig, latent: Latent, make: Parameters):
        self.config, self.latent = config, latent
        self.scale = (config.softmax_scale or config.head_width**-0.5) * softmax_gain(config.rope)
        if latent.query_rank:
            self.q_down_DQ = make.matrix("q_down_DQ", "D")
            self.q_norm_Q = make.norm("q_norm_Q")
            self.q_up_QNH = make.matrix("q_up_QNH", "Q")
        else:
            self.q_DNH = make.matrix("q_DNH", "D")
        self.kv_down_DY = make.matrix("kv_down_DY", "D")
        self.kv_norm_Z = make.norm("kv_norm_Z")
        self.k_up_NIZ = make.matrix("k_up_NIZ", "Z")
        self.v_up_NZU = make.matrix("v_up_NZU", "Z")
        self.o_NUD = make.onto_residual("o_NUD", "NU")

    def __call__(
        self, x_BTD: Array, position_BT: Array, attention: Attention, state: AttentionState
    ) -> tuple[Array, AttentionState]:
        q_BTNY = self._queries(x_BTD, position_BT)
        c_BT1Y = self._cached_vector(x_BTD, position_BT)
        o_BTNZ, state = attention(q_BTNY, c_BT1Y, None, state, scale=self.scale, v_width=self.latent.width)
        o_BTNU = einsum("btnz,nzu->btnu", o_BTNZ, self.v_up_NZU[...])
        return einsum("btnu,nud->btd", o_BTNU, self.o_NUD[...]), state

    def _queries(self, x_BTD: Array, position_BT: Array) -> Array:
        """Return queries in the space of the cached vectors: the latent part, then the rotary part."""
        if self.latent.query_rank:
            c_BTQ = rms_norm(einsum("btd,dq->btq", x_BTD, self.q_down_DQ[...]), self.q_norm_Q, self.config, _LATENT_EPS)
            q_BTNH = einsum("btq,qnh->btnh", c_BTQ, self.q_up_QNH[...])
        else:
            q_BTNH = einsum("btd,dnh->btnh", x_BTD, self.q_DNH[...])
        q_BTNI, rotary_BTNX = jnp.split(q_BTNH, [self.latent.nope_width], axis=-1)
        q_BTNZ = einsum("btni,niz->btnz", q_BTNI, self.k_up_NIZ[...])
        return jnp.concatenate([q_BTNZ, rotate(rotary_BTNX, position_BT, self.config.rope)], -1)

    def _cached_vector(self, x_BTD: Array, position_BT: Array) -> Array:
        """Return the vector that is cached: the normed latent, then the rotated key that all heads share."""
        c_BT1Y = einsum("btd,dy->bty", x_BTD, self.kv_down_DY[...])[:, :, None]
        c_BT1Z, rotary_BT1X = jnp.split(c_BT1Y, [self.latent.width], axis=-1)
        c_BT1Z = rms_norm(c_BT1Z, self.kv_norm_Z, self.config, _LATENT_EPS)
        return jnp.concatenate([c_BT1Z, rotate(rotary_BT1X, position_BT, self.config.rope)], -1)
