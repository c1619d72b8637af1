"""Mixtures of experts: each token is routed to a few experts, and each device computes its own experts.

After attention every device of the flat axis has all tokens of its rows, so no token is sent: each device selects the
pairs of a token and one of its experts, and the results are summed over the devices. This runs under shard_map, because
under automatic sharding `lax.ragged_dot` did 17 times the routed work and gathered the experts' weights.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from helix_jax.combine import sum_over_devices
from helix_jax.config import Experts, ModelConfig
from helix_jax.mesh import DP, EXPERT_AXES, EXPERT_WEIGHTS, FLAT, TOKENS_BTD, AnyMesh
from helix_jax.models.experts import ExpertWeights, Routing, dense_weights, run_local
from helix_jax.models.parts import FeedForward, Parameters
from helix_jax.numerics import einsum


@runtime_checkable
class RunExperts(Protocol):
    """A function that returns, for every token, the weighted sum of the outputs of its experts."""

    def __call__(self, config: ModelConfig, x_BTD: Array, routing: Routing, weights: ExpertWeights) -> Array: ...


class MixtureOfExperts(nnx.Module):
    """The router, the experts, and the shared expert that processes every token."""

    def __init__(self, config: ModelConfig, experts: Experts, make: Parameters):
        self.config, self.experts = config, experts
        make_expert = make.of_width(experts.width)
        self.router_DE = make_expert.matrix("router_DE", "D")
        if experts.router_bias:
            self.router_bias_E = make_expert.bias("router_bias_E")
        if experts.selection_bias:
            self.selection_bias_E = make_expert.bias("selection_bias_E")
        self.gate_EDF = make_expert.matrix("gate_EDF", "D")
        self.up_EDF = make_expert.matrix("up_EDF", "D")
        self.down_EFD = make_expert.onto_residual("down_EFD", "F")
        if experts.bias:
            self.gate_bias_EF = make_expert.bias("gate_bias_EF")
            self.up_bias_EF = make_expert.bias("up_bias_EF")
            self.down_bias_ED = make_expert.bias("down_bias_ED")
        if experts.shared_width:
            self.shared = FeedForward(config, make.of_width(experts.shared_width))
        if experts.shared_gate:
            self.shared_gate_D = make.matrix("shared_gate_D", "D")

    def __call__(self, x_BTD: Array, run_experts: RunExperts) -> Array:
        routing = self._route(x_BTD)
        biases = (self.gate_bias_EF[...], self.up_bias_EF[...]) if self.experts.bias else (None, None)
        weights = ExpertWeights(self.gate_EDF[...], self.up_EDF[...], self.down_EFD[...], *biases)
        o_BTD = run_experts(self.config, x_BTD, routing, weights)
        if self.experts.bias:  # added here once: in run_experts every device would add it
            weight_BTE = dense_weights(routing, self.down_bias_ED.shape[0]).astype(x_BTD.dtype)
            o_BTD = o_BTD + einsum("bte,ed->btd", weight_BTE, self.down_bias_ED[...])
        return o_BTD + self._run_shared(x_BTD) if self.experts.shared_width else o_BTD

    def _run_shared(self, x_BTD: Array) -> Array:
        """Return the output of the shared expert."""
        o_BTD = self.shared(x_BTD)
        if not self.experts.shared_gate:
            return o_BTD
        return o_BTD * jax.nn.sigmoid(einsum("btd,d->bt", x_BTD, self.shared_gate_D[...]))[..., None]

    def _route(self, x_BTD: Array) -> Routing:
        """Select the best experts of each token, and compute their weights, in float32."""
        logits_BTE = einsum("btd,de->bte", x_BTD, self.router_DE[...], out=jnp.float32)
        if self.experts.router_bias:
            logits_BTE = logits_BTE + self.router_bias_E[...].astype(jnp.float32)
        logits_BTE = logits_BTE[..., : self.experts.num_experts]  # the rest is padding
        score_BTE = (jax.nn.softmax if self.experts.scoring == "softmax" else jax.nn.sigmoid)(logits_BTE)
        rank_BTE = score_BTE
        if self.experts.selection_bias:
            rank_BTE = score_BTE + self.selection_bias_E[...][: self.experts.num_experts].astype(jnp.float32)
        expert_BTC = lax.top_k(keep_best_groups(rank_BTE, self.experts), self.experts.top_k)[1]
        weight_BTC = jnp.take_along_axis(score_BTE, expert_BTC, axis=-1)
        if self.experts.normalised:
            weight_BTC = weight_BTC / weight_BTC.sum(-1, keepdims=True)
        return Routing(expert_BTC, self.experts.scale * weight_BTC)


def keep_best_groups(rank_BTE: Array, experts: Experts) -> Array:
    """Set the rank of all experts outside of the best groups to -inf.

    Args:
        rank_BTE: The rank of each expert, for every token.
        experts: The number of groups, how many of them are kept, and how a group is scored.

    Returns:
        The ranks, with which experts outside of the best groups are never selected.
    """
    if experts.top_k_groups == experts.num_groups:
        return rank_BTE
    rank_BTXe = rank_BTE.reshape(*rank_BTE.shape[:-1], experts.num_groups, -1)
    best = 2 if experts.group_score == "top2" else 1
    group_BTX = lax.top_k(rank_BTXe, best)[0].sum(-1)
    best_BTx = lax.top_k(group_BTX, experts.top_k_groups)[1]
    kept_BTX = jax.nn.one_hot(best_BTx, experts.num_groups, dtype=bool).any(-2)
    return jnp.where(kept_BTX[..., None], rank_BTXe, -jnp.inf).reshape(rank_BTE.shape)


def make_run_experts(mesh: AnyMesh, how: str, live_BT: Array) -> RunExperts:
    """Return a function that runs experts that are sharded over a mesh.

    Args:
        mesh: The mesh.
        how: How the experts are sharded: a key of EXPERT_WEIGHTS.
        live_BT: Which tokens count. The others get no expert, and cost nothing.
    """
    axes, _ = EXPERT_AXES[how]
    weight_specs = ExpertWeights._make(EXPERT_WEIGHTS[how][name] for name in ExpertWeights._fields)
    specs = (TOKENS_BTD, Routing._make((TOKENS_BTD, TOKENS_BTD)), weight_specs)

    def run(config: ModelConfig, x_BTD: Array, routing: Routing, weights: ExpertWeights) -> Array:
        mean_tokens = routing.expert_BTC.size // (mesh.shape[DP] * weights.gate_EDF.shape[0])

        def run_shard(x_BTD: Array, routing: Routing, weights: ExpertWeights) -> Array:
            first = lax.axis_index(axes) * weights.gate_EDF.shape[0]
            local = routing._replace(expert_BTC=routing.expert_BTC - first)
            return sum_over_devices(run_local(config, x_BTD, local, weights, mean_tokens), FLAT)

        routing = routing._replace(expert_BTC=jnp.where(live_BT[..., None], routing.expert_BTC, -1))
        sharded = jax.shard_map(run_shard, mesh=mesh, in_specs=specs, out_specs=TOKENS_BTD)
        return sharded(x_BTD, routing, weights)

    return run
