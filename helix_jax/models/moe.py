"""Mixtures of experts: every token goes to a few of them, and each device computes what was sent to its own.

After attention every device of the flat axis has all the tokens of its rows, so that nothing needs to be sent: each
device picks the pairs (token, expert) of the experts that it holds, and the results are summed over the devices. The
pairs are sorted by expert and worked off in tiles of one expert each. How many tiles there are depends on the routing:
the loop runs as long as it must, and no pair is ever dropped, however uneven the routing is. That is why it stands in
an island: under plain sharding propagation `lax.ragged_dot` did 17 times the routed work, and gathered the weights.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from helix_jax.combine import total
from helix_jax.config import Experts, ModelConfig
from helix_jax.mesh import DP, EXPERT_AXES, EXPERT_WEIGHTS, FLAT, TOKENS_BTD, AnyMesh
from helix_jax.models.parts import FeedForward, Parameters, clamped_gated, gated
from helix_jax.numerics import einsum

_LARGEST_TILE = 256


class ExpertWeights(NamedTuple):
    """Inside the island E and F are this device's share."""

    gate_EDF: Float[Array, "E D F"]
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]
    gate_bias_EF: Float[Array, "E F"] | None = None
    up_bias_EF: Float[Array, "E F"] | None = None


class Choice(NamedTuple):
    """Which experts each token was sent to, of the C that it may have, and what their words weigh."""

    expert_BTC: Int[Array, "B T C"]
    weight_BTC: Float[Array, "B T C"]


@runtime_checkable
class RunExperts(Protocol):
    """The weighted sum, for every token, of what its experts say."""

    def __call__(self, config: ModelConfig, x_BTD: Array, choice: Choice, weights: ExpertWeights) -> Array: ...


class MixtureOfExperts(nnx.Module):
    def __init__(self, config: ModelConfig, experts: Experts, make: Parameters):
        self.config, self.experts = config, experts
        mine = make.of_width(experts.width)
        self.router_DE = mine.matrix("router_DE", "D")
        if experts.router_bias:
            self.router_bias_E = mine.bias("router_bias_E")
        if experts.choice_bias:
            self.choice_bias_E = mine.bias("choice_bias_E")
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
            weight_BTE = _spread(choice, self.down_bias_ED.shape[0]).astype(x_BTD.dtype)
            o_BTD = o_BTD + einsum("bte,ed->btd", weight_BTE, self.down_bias_ED[...])
        return o_BTD + self.shared(x_BTD) if self.experts.shared_width else o_BTD

    def _choose(self, x_BTD: Array) -> Choice:
        """The best experts of each token, and their weights, in float32."""
        logits_BTE = einsum("btd,de->bte", x_BTD, self.router_DE[...], out=jnp.float32)
        if self.experts.router_bias:
            logits_BTE = logits_BTE + self.router_bias_E[...].astype(jnp.float32)
        logits_BTE = logits_BTE[..., : self.experts.count]  # the rest is padding
        score_BTE = (jax.nn.softmax if self.experts.scoring == "softmax" else jax.nn.sigmoid)(logits_BTE)
        rank_BTE = score_BTE
        if self.experts.choice_bias:
            rank_BTE = score_BTE + self.choice_bias_E[...][: self.experts.count].astype(jnp.float32)
        expert_BTC = lax.top_k(_of_best_groups(rank_BTE, self.experts), self.experts.chosen)[1]
        weight_BTC = jnp.take_along_axis(score_BTE, expert_BTC, axis=-1)
        if self.experts.normalised:
            weight_BTC = weight_BTC / weight_BTC.sum(-1, keepdims=True)
        return Choice(expert_BTC, self.experts.scale * weight_BTC)


def _of_best_groups(rank_BTE: Array, experts: Experts) -> Array:
    """Leaves only the experts of the best groups in the race."""
    if experts.chosen_groups == experts.groups:
        return rank_BTE
    rank_BTXe = rank_BTE.reshape(*rank_BTE.shape[:-1], experts.groups, -1)
    best = 2 if experts.group_score == "top2" else 1
    group_BTX = lax.top_k(rank_BTXe, best)[0].sum(-1)
    chosen_BTx = lax.top_k(group_BTX, experts.chosen_groups)[1]
    open_BTX = jax.nn.one_hot(chosen_BTx, experts.groups, dtype=bool).any(-2)
    return jnp.where(open_BTX[..., None], rank_BTXe, -jnp.inf).reshape(rank_BTE.shape)


def _spread(choice: Choice, experts: int) -> Array:
    """The weight of every expert for every token, 0 where it was not chosen."""
    return (jax.nn.one_hot(choice.expert_BTC, experts) * choice.weight_BTC[..., None]).sum(-2)


def on_mesh(mesh: AnyMesh, spread: str, live_BT: Array) -> RunExperts:
    """Runs experts that are spread over `mesh` (a key of EXPERT_WEIGHTS), for the live tokens only: the island."""
    axes, _ = EXPERT_AXES[spread]
    specs = ExpertWeights._make(EXPERT_WEIGHTS[spread][name] for name in ExpertWeights._fields)
    choice_specs = Choice._make((TOKENS_BTD, TOKENS_BTD))

    def run(config: ModelConfig, x_BTD: Array, choice: Choice, weights: ExpertWeights) -> Array:
        size = tile_size(choice.expert_BTC.size // mesh.shape[DP], weights.gate_EDF.shape[0])

        def island(x_BTD: Array, choice: Choice, weights: ExpertWeights) -> Array:
            first = lax.axis_index(axes) * weights.gate_EDF.shape[0]
            return total(_run(config, size, first, x_BTD, choice, weights), FLAT)

        choice = choice._replace(expert_BTC=jnp.where(live_BT[..., None], choice.expert_BTC, -1))
        return jax.shard_map(island, mesh=mesh, in_specs=(TOKENS_BTD, choice_specs, specs), out_specs=TOKENS_BTD)(
            x_BTD, choice, weights
        )

    return run


def on_one_device(config: ModelConfig, x_BTD: Array, choice: Choice, weights: ExpertWeights) -> Array:
    """Runs experts that are all here, without a mesh. Differentiable."""
    weight_BTE = _spread(choice, weights.gate_EDF.shape[0]).astype(x_BTD.dtype)
    gate_BTEF = einsum("btd,edf->btef", x_BTD, weights.gate_EDF)
    up_BTEF = einsum("btd,edf->btef", x_BTD, weights.up_EDF)
    hidden_BTEF = weight_BTE[..., None] * _hidden(config, gate_BTEF, up_BTEF, weights)
    return einsum("btef,efd->btd", hidden_BTEF, weights.down_EFD)


def _hidden(config: ModelConfig, gate: Array, up: Array, weights: ExpertWeights, expert: Array | None = None) -> Array:
    """What an expert's down projection takes; `expert`: of this one alone, all of them otherwise."""
    if weights.gate_bias_EF is not None and weights.up_bias_EF is not None:
        of = slice(None) if expert is None else expert
        gate, up = gate + weights.gate_bias_EF[of], up + weights.up_bias_EF[of]
    if config.swiglu_limit is not None:
        return clamped_gated(gate, up, config.swiglu_limit, config)
    return gated(gate, up, config)


class _Tiles(NamedTuple):
    """The pairs (token, expert) of this device, sorted by expert and cut into tiles of one expert each.

    pair_X: the pairs in that order, those of other devices last. count_E: of each expert. pairs_to_E, tiles_to_E: of
    all experts up to this one.
    """

    size: int
    pair_X: Array
    count_E: Array
    pairs_to_E: Array
    tiles_to_E: Array

    def at(self, index: Array | int) -> tuple[Array, Array, Array]:
        """The expert of a tile, its pairs, and which of them are any."""
        expert = jnp.searchsorted(self.tiles_to_E, index, side="right")
        before = jnp.where(expert > 0, self.tiles_to_E[expert - 1], 0)
        place_X = (index - before) * self.size + jnp.arange(self.size)
        pair_X = jnp.take(self.pair_X, self.pairs_to_E[expert] - self.count_E[expert] + place_X, mode="clip")
        return expert, pair_X, place_X < self.count_E[expert]


def _cut(expert_X: Array, experts: int, size: int) -> _Tiles:
    """expert_X: of each pair its expert among these; anything else is another device's."""
    expert_X = jnp.where((expert_X >= 0) & (expert_X < experts), expert_X, experts)
    count_E = jnp.bincount(expert_X, length=experts + 1)[:experts]
    tiles_to_E = jnp.cumsum(-(-count_E // size))
    return _Tiles(size, jnp.argsort(expert_X, stable=True), count_E, jnp.cumsum(count_E), tiles_to_E)


def tile_size(pairs: int, experts: int) -> int:
    """Half of what an expert gets on average, a power of two: the last tile of an expert wastes half a tile or so."""
    return min(_LARGEST_TILE, 1 << max(0, (pairs // (2 * experts)).bit_length() - 1))


def _run(config: ModelConfig, size: int, first: Array, x_BTD: Array, choice: Choice, weights: ExpertWeights) -> Array:
    """What the experts from number `first` on, whose weights these are, add to each token: tiles of `size` pairs."""
    B, T, D = x_BTD.shape
    x_XD, weight_X = x_BTD.reshape(B * T, D), choice.weight_BTC.reshape(-1)
    tiles = _cut(choice.expert_BTC.reshape(-1) - first, weights.gate_EDF.shape[0], size)

    def work_off(index: Array | int, sum_XD: Array) -> Array:
        e, pair_t, live_t = tiles.at(index)
        token_t = pair_t // choice.expert_BTC.shape[-1]
        x_tD = jnp.take(x_XD, token_t, axis=0)
        gate_tF, up_tF = (einsum("td,df->tf", x_tD, w[e]) for w in (weights.gate_EDF, weights.up_EDF))
        hidden_tF = _hidden(config, gate_tF, up_tF, weights, e)
        o_tD = einsum("tf,fd->td", hidden_tF, weights.down_EFD[e], out=jnp.float32)
        return sum_XD.at[jnp.where(live_t, token_t, B * T)].add(weight_X[pair_t][:, None] * o_tD, mode="drop")

    # The carry takes what it varies over inside shard_map from a real tile, which is never computed.
    nothing_XD = jnp.zeros_like(work_off(0, jnp.zeros((B * T, D), jnp.float32)))
    return lax.fori_loop(0, tiles.tiles_to_E[-1], work_off, nothing_XD).astype(x_BTD.dtype).reshape(B, T, D)
