"""Mixtures of experts: every token goes to a few of them, and each device computes what was sent to its own.

After attention every device of the flat axis has all the tokens of its rows, so that nothing needs to be sent: each
device picks the pairs (token, expert) of the experts that it holds, and the results are summed over the devices. That
stands in an island: under plain sharding propagation `lax.ragged_dot` did 17 times the routed work, and gathered the
experts' weights.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from helix_jax.combine import sum_over_devices
from helix_jax.config import Experts, ModelConfig
from helix_jax.mesh import DP, EXPERT_AXES, EXPERT_WEIGHTS, FLAT, TOKENS_BTD, AnyMesh
from helix_jax.models.experts import Routing, ExpertWeights, run_local, dense_weights
from helix_jax.models.parts import FeedForward, Parameters
from helix_jax.numerics import einsum


@runtime_checkable
class RunExperts(Protocol):
    """The weighted sum, for every token, of what its experts say."""

    def __call__(self, config: ModelConfig, x_BTD: Array, choice: Routing, weights: ExpertWeights) -> Array: ...


class MixtureOfExperts(nnx.Module):
    def __init__(self, config: ModelConfig, experts: Experts, make: Parameters):
        self.config, self.experts = config, experts
        mine = make.of_width(experts.width)
        self.router_DE = mine.matrix("router_DE", "D")
        if experts.router_bias:
            self.router_bias_E = mine.bias("router_bias_E")
        if experts.selection_bias:
            self.selection_bias_E = mine.bias("selection_bias_E")
        self.gate_EDF = mine.matrix("gate_EDF", "D")
        self.up_EDF = mine.matrix("up_EDF", "D")
        self.down_EFD = mine.onto_residual("down_EFD", "F")
        if experts.bias:
            self.gate_bias_EF = mine.bias("gate_bias_EF")
            self.up_bias_EF = mine.bias("up_bias_EF")
            self.down_bias_ED = mine.bias("down_bias_ED")
        if experts.shared_width:
            self.shared = FeedForward(config, make.of_width(experts.shared_width))

    def __call__(self, x_BTD: Array, run_experts: RunExperts) -> Array:
        choice = self._choose(x_BTD)
        biases = (self.gate_bias_EF[...], self.up_bias_EF[...]) if self.experts.bias else (None, None)
        weights = ExpertWeights(self.gate_EDF[...], self.up_EDF[...], self.down_EFD[...], *biases)
        o_BTD = run_experts(self.config, x_BTD, choice, weights)
        if self.experts.bias:  # outside of the island, where it is added once
            weight_BTE = dense_weights(choice, self.down_bias_ED.shape[0]).astype(x_BTD.dtype)
            o_BTD = o_BTD + einsum("bte,ed->btd", weight_BTE, self.down_bias_ED[...])
        return o_BTD + self.shared(x_BTD) if self.experts.shared_width else o_BTD

    def _choose(self, x_BTD: Array) -> Routing:
        """The best experts of each token, and their weights, in float32."""
        logits_BTE = einsum("btd,de->bte", x_BTD, self.router_DE[...], out=jnp.float32)
        if self.experts.router_bias:
            logits_BTE = logits_BTE + self.router_bias_E[...].astype(jnp.float32)
        logits_BTE = logits_BTE[..., : self.experts.num_experts]  # the rest is padding
        score_BTE = (jax.nn.softmax if self.experts.scoring == "softmax" else jax.nn.sigmoid)(logits_BTE)
        rank_BTE = score_BTE
        if self.experts.selection_bias:
            rank_BTE = score_BTE + self.selection_bias_E[...][: self.experts.num_experts].astype(jnp.float32)
        expert_BTC = lax.top_k(_of_best_groups(rank_BTE, self.experts), self.experts.top_k)[1]
        weight_BTC = jnp.take_along_axis(score_BTE, expert_BTC, axis=-1)
        if self.experts.normalised:
            weight_BTC = weight_BTC / weight_BTC.sum(-1, keepdims=True)
        return Routing(expert_BTC, self.experts.scale * weight_BTC)


def _of_best_groups(rank_BTE: Array, experts: Experts) -> Array:
    """Leaves only the experts of the best groups in the race."""
    if experts.top_k_groups == experts.num_groups:
        return rank_BTE
    rank_BTXe = rank_BTE.reshape(*rank_BTE.shape[:-1], experts.num_groups, -1)
    best = 2 if experts.group_score == "top2" else 1
    group_BTX = lax.top_k(rank_BTXe, best)[0].sum(-1)
    chosen_BTx = lax.top_k(group_BTX, experts.top_k_groups)[1]
    open_BTX = jax.nn.one_hot(chosen_BTx, experts.num_groups, dtype=bool).any(-2)
    return jnp.where(open_BTX[..., None], rank_BTXe, -jnp.inf).reshape(rank_BTE.shape)


def on_mesh(mesh: AnyMesh, how: str, live_BT: Array) -> RunExperts:
    """Runs experts that are dense_weights over `mesh` (a key of EXPERT_WEIGHTS), for the live tokens only: the island."""
    axes, _ = EXPERT_AXES[how]
    specs = ExpertWeights._make(EXPERT_WEIGHTS[how][name] for name in ExpertWeights._fields)
    choice_specs = Routing._make((TOKENS_BTD, TOKENS_BTD))

    def run(config: ModelConfig, x_BTD: Array, choice: Routing, weights: ExpertWeights) -> Array:
        average = choice.expert_BTC.size // (mesh.shape[DP] * weights.gate_EDF.shape[0])

        def sharded(x_BTD: Array, choice: Routing, weights: ExpertWeights) -> Array:
            first = lax.axis_index(axes) * weights.gate_EDF.shape[0]
            mine = choice._replace(expert_BTC=choice.expert_BTC - first)
            return sum_over_devices(run_local(config, x_BTD, mine, weights, average), FLAT)

        choice = choice._replace(expert_BTC=jnp.where(live_BT[..., None], choice.expert_BTC, -1))
        return jax.shard_map(sharded, mesh=mesh, in_specs=(TOKENS_BTD, choice_specs, specs), out_specs=TOKENS_BTD)(
            x_BTD, choice, weights
        )

    return run
