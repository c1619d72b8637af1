"""Experts on a mesh compute the same as all experts on one device, and only the routed work."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.config import Experts, ModelConfig
from helix_jax.mesh import EXPERT_WEIGHTS, make_mesh, weight_sharding
from helix_jax.models.experts import ExpertWeights, Routing, run_dense, run_in_rounds, run_in_tiles, tile_size
from helix_jax.models.moe import keep_best_groups, make_run_experts
from tests.reference import TINY, relative_error

E, D, F = 16, 128, 96
EXPERTS = Experts(num_experts=E, top_k=2, width=F)
CONFIG = dataclasses.replace(TINY, experts=EXPERTS)
CLAMPED = dataclasses.replace(CONFIG, swiglu_limit=0.5)
MESHES = [(1, 1), (1, 8), (2, 4), (8, 1)]
MESHES += [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 2), (1, 4))]


def random_weights(random, *, bias: bool = False) -> ExpertWeights:
    shapes = [(E, D, F), (E, D, F), (E, F, D)] + 2 * bias * [(E, F)]
    return ExpertWeights(*(jnp.asarray(random.normal(size=shape) / 4, jnp.float32) for shape in shapes))


def make_routing(random, B: int, T: int, C: int, kind: str) -> Routing:
    """Route tokens at random, all to the experts of one device ("first"), or all to one expert and others ("one")."""
    if kind == "random":
        expert_BTC = np.stack([random.permutation(E)[:C] for _ in range(B * T)]).reshape(B, T, C)
    elif kind == "first":
        expert_BTC = np.broadcast_to(np.arange(C), (B, T, C))
    else:
        expert_BTC = np.broadcast_to([E - 1, *list(range(C - 1))], (B, T, C))
    return Routing(jnp.asarray(expert_BTC, jnp.int32), jnp.asarray(random.random((B, T, C)), jnp.float32))


def shard_weights(weights: ExpertWeights, mesh, experts: str) -> ExpertWeights:
    named = zip(ExpertWeights._fields, weights, strict=True)
    return ExpertWeights._make(
        None if value is None else jax.device_put(value, weight_sharding(mesh, name, experts)) for name, value in named
    )


@pytest.mark.parametrize("experts", EXPERT_WEIGHTS)
@pytest.mark.parametrize(("tp", "cp"), MESHES)
def test_experts_on_a_mesh_equal_those_on_one_device(tp: int, cp: int, experts: str):
    """No token is dropped, however uneven the routing is. A token that is not live gets no expert."""
    random = np.random.default_rng(tp * 10 + cp)
    mesh = make_mesh(tp, cp)

    def run(config, x, routing, weights, live):
        return make_run_experts(mesh, experts, live)(config, x, routing, weights)

    run = jax.jit(run, static_argnums=0)
    for config, bias in ((CONFIG, False), (CLAMPED, True)):
        weights = random_weights(random, bias=bias)
        live_BT = jnp.asarray(random.random((2, 9)) < 0.8)
        for kind in ("random", "first", "one"):
            x_BTD = jnp.asarray(random.normal(size=(2, 9, D)), jnp.float32)
            routing = make_routing(random, 2, 9, 3, kind)
            ours = run(config, x_BTD, routing, shard_weights(weights, mesh, experts), live_BT)
            reference = jnp.where(live_BT[..., None], run_dense(config, x_BTD, routing, weights), 0)
            assert relative_error(ours, reference) <= 2e-6


@pytest.mark.parametrize("run", [run_in_tiles, run_in_rounds])
@pytest.mark.parametrize("mean_tokens", [1, 8, 100])
def test_tiles_and_rounds_equal_all_experts_on_all_tokens(run, mean_tokens: int):
    """The result does not depend on the expected mean, from which one or very many iterations follow."""
    random = np.random.default_rng(0)
    weights, x_BTD = random_weights(random, bias=True), jnp.asarray(random.normal(size=(3, 20, D)), jnp.float32)
    run = jax.jit(run, static_argnums=(0, 4))
    for kind in ("random", "first", "one"):
        routing = make_routing(random, 3, 20, 3, kind)
        elsewhere = jnp.asarray(random.random((3, 20, 3)) < 0.3)
        expert_BTC = jnp.where(elsewhere, random.choice([-7, -1, E, 99]), routing.expert_BTC)
        routing = routing._replace(expert_BTC=expert_BTC)
        reference = run_dense(CONFIG, x_BTD, routing, weights)
        assert relative_error(run(CONFIG, x_BTD, routing, weights, mean_tokens), reference) <= 2e-6


def test_rows_may_be_sharded_over_dp():
    random, mesh = np.random.default_rng(0), make_mesh(tp=2, cp=2, dp=2)
    weights, x_BTD = random_weights(random), jnp.asarray(random.normal(size=(4, 5, D)), jnp.float32)
    routing = make_routing(random, 4, 5, 2, "random")
    for experts in EXPERT_WEIGHTS:
        run = make_run_experts(mesh, experts, jnp.ones((4, 5), bool))
        ours = jax.jit(run, static_argnums=0)(CONFIG, x_BTD, routing, shard_weights(weights, mesh, experts))
        assert relative_error(ours, run_dense(CONFIG, x_BTD, routing, weights)) <= 2e-6


@pytest.mark.optimized
@pytest.mark.parametrize("experts", EXPERT_WEIGHTS)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (8, 1), (64, 1), (2, 128)])
def test_a_device_does_only_the_routed_work(B: int, T: int, experts: str):
    """The operations of one tile, as XLA counts them in the body of the loop, times the tiles of this routing.

    XLA counts the body of a loop once. The number of its iterations is computed here from the routing.
    """
    random, mesh, C = np.random.default_rng(0), make_mesh(2, 4), EXPERTS.top_k
    weights, routing = random_weights(random), make_routing(random, B, T, C, "random")
    x_BTD = jnp.zeros((B, T, D))
    run = jax.jit(make_run_experts(mesh, experts, jnp.ones((B, T), bool)), static_argnums=0)
    compiled = run.lower(CONFIG, x_BTD, routing, shard_weights(weights, mesh, experts)).compile()
    assert re.findall(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text()) == ["all-reduce"]

    tile, devices = tile_size(B * T * C // E), mesh.size
    width = F if experts == "flat" else F // 2
    tile_flops = 2 * 3 * tile * D * width
    counted = compiled.cost_analysis()["flops"]
    # Besides the products there are routing and activations, whose share is smaller for larger D and F.
    assert tile_flops <= counted <= 1.2 * tile_flops + 200 * B * T * C
    tiles = -(-np.bincount(np.asarray(routing.expert_BTC).ravel(), minlength=E) // tile)
    done = tiles.sum() * tile_flops / (devices if experts == "flat" else devices / 2)
    routed = 2 * 3 * B * T * C * D * F / devices
    assert done <= 1.5 * routed


def test_no_expert_of_a_group_that_is_not_selected_is_kept():
    """An expert of such a group is not kept even if it alone would be among the best."""
    grouped = Experts(num_experts=8, top_k=2, width=4, num_groups=4, top_k_groups=2, group_score="top2")
    rank = jnp.asarray([9.0, 0, 5, 5, 6, 5, 1, 1])  # the sums of the best two are 9, 10, 11, 2
    np.testing.assert_array_equal(jnp.isfinite(keep_best_groups(rank, grouped)), [0, 0, 1, 1, 1, 1, 0, 0])
    best = dataclasses.replace(grouped, group_score="best")  # the best are 9, 5, 6, 1
    np.testing.assert_array_equal(jnp.isfinite(keep_best_groups(rank, best)), [1, 1, 0, 0, 1, 1, 0, 0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "experts num_experts is 0: give at least 1"),
        ({"top_k": 17}, "top_k 17 exceeds the 16 selectable experts"),
        ({"num_groups": 3}, "3 groups do not divide the 16 experts"),
        ({"num_groups": 4, "top_k_groups": 5}, "top_k_groups 5 exceeds num_groups 4"),
        ({"num_groups": 8, "top_k_groups": 1, "top_k": 3}, "top_k 3 exceeds the 2 selectable experts"),
        ({"scoring": "max"}, "experts scoring is 'max': choose one of softmax, sigmoid"),
        ({"num_groups": 16, "top_k_groups": 4, "group_score": "top2"}, "group_score is 'top2', but groups have one"),
    ],
)
def test_impossible_experts_are_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        Experts(**{"num_experts": E, "top_k": 2, "width": F, **values})


def test_a_dense_layer_must_exist():
    with pytest.raises(ValueError, match="layer 5 is not one of the 2 layers: correct the config"):
        ModelConfig(**{**vars(TINY), "experts": Experts(num_experts=4, top_k=1, width=8, dense_layers=(5,))})
