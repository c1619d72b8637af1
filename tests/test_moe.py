"""Experts spread over a mesh say what all of them say on one device, and do the routed work, not all of it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.config import Experts, ModelConfig
from helix_jax.mesh import EXPERT_WEIGHTS, make_mesh, weight_sharding
from helix_jax.models.experts import Routing, ExpertWeights, run_in_rounds, run_in_tiles, run_dense, tile_size
from helix_jax.models.moe import make_run_experts
from tests.reference import TINY, relative_error

E, D, F = 16, 128, 96
EXPERTS = Experts(num_experts=E, top_k=2, width=F)
CONFIG = dataclasses.replace(TINY, experts=EXPERTS)
MESHES = [(1, 1), (1, 8), (2, 4), (8, 1), (2, 2), (1, 4)]


def weights_of(random, *, bias: bool = False, experts: int = E, width: int = F) -> ExpertWeights:
    shapes = [(experts, D, width), (experts, D, width), (experts, width, D)] + 2 * bias * [(experts, width)]
    return ExpertWeights(*(jnp.asarray(random.normal(size=shape) / 4, jnp.float32) for shape in shapes))


def choices(random, B: int, T: int, C: int, kind: str) -> Routing:
    """Whom the tokens are sent to: at random, all to one device's experts, or all to one and the same expert."""
    if kind == "random":
        expert_BTC = np.stack([random.permutation(E)[:C] for _ in range(B * T)]).reshape(B, T, C)
    elif kind == "first":
        expert_BTC = np.broadcast_to(np.arange(C), (B, T, C))
    else:
        expert_BTC = np.broadcast_to([E - 1, *list(range(C - 1))], (B, T, C))
    return Routing(jnp.asarray(expert_BTC, jnp.int32), jnp.asarray(random.random((B, T, C)), jnp.float32))


def placed(weights: ExpertWeights, mesh, spread: str) -> ExpertWeights:
    named = zip(ExpertWeights._fields, weights, strict=True)
    return ExpertWeights._make(
        None if value is None else jax.device_put(value, weight_sharding(mesh, name, spread)) for name, value in named
    )


@pytest.mark.parametrize("spread", EXPERT_WEIGHTS)
@pytest.mark.parametrize(("tp", "cp"), MESHES)
def test_experts_on_a_mesh_equal_those_on_one_device(tp: int, cp: int, spread: str):
    """However uneven the routing, nothing is dropped; a dead token gets nothing and costs nothing."""
    random = np.random.default_rng(tp * 10 + cp)
    mesh = make_mesh(tp, cp)
    for config, bias in ((CONFIG, False), (dataclasses.replace(CONFIG, swiglu_limit=0.5), True)):
        weights = weights_of(random, bias=bias)
        live_BT = jnp.asarray(random.random((2, 9)) < 0.8)
        run = jax.jit(
            lambda x, choice, weights, live, config=config: make_run_experts(mesh, spread, live)(config, x, choice, weights)
        )
        for kind in ("random", "first", "one"):
            x_BTD = jnp.asarray(random.normal(size=(2, 9, D)), jnp.float32)
            choice = choices(random, 2, 9, 3, kind)
            ours = run(x_BTD, choice, placed(weights, mesh, spread), live_BT)
            theirs = jnp.where(live_BT[..., None], run_dense(config, x_BTD, choice, weights), 0)
            assert relative_error(ours, theirs) <= 2e-6


@pytest.mark.parametrize("form", [run_in_tiles, run_in_rounds])
@pytest.mark.parametrize("average", [1, 8, 100])
def test_both_forms_equal_all_experts_on_all_tokens(form, average: int):
    """Whatever average they were told to reckon with: one tile or round, or very many."""
    random = np.random.default_rng(0)
    weights, x_BTD = weights_of(random, bias=True), jnp.asarray(random.normal(size=(3, 20, D)), jnp.float32)
    run = jax.jit(form, static_argnums=(0, 4))
    for kind in ("random", "first", "one"):
        choice = choices(random, 3, 20, 3, kind)
        elsewhere = jnp.asarray(random.random((3, 20, 3)) < 0.3)
        choice = Routing(jnp.where(elsewhere, random.choice([-7, -1, E, 99]), choice.expert_BTC), choice.weight_BTC)
        theirs = run_dense(CONFIG, x_BTD, choice, weights)
        assert relative_error(run(CONFIG, x_BTD, choice, weights, average), theirs) <= 2e-6


def test_rows_may_lie_on_dp():
    random, mesh = np.random.default_rng(0), make_mesh(tp=2, cp=2, dp=2)
    weights, x_BTD = weights_of(random), jnp.asarray(random.normal(size=(4, 5, D)), jnp.float32)
    choice = choices(random, 4, 5, 2, "random")
    for spread in EXPERT_WEIGHTS:
        run = make_run_experts(mesh, spread, jnp.ones((4, 5), bool))
        ours = jax.jit(run, static_argnums=0)(CONFIG, x_BTD, choice, placed(weights, mesh, spread))
        assert relative_error(ours, run_dense(CONFIG, x_BTD, choice, weights)) <= 2e-6


@pytest.mark.parametrize("spread", EXPERT_WEIGHTS)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (8, 1), (64, 1), (2, 128)])
def test_the_work_of_a_device_is_the_routed_work(B: int, T: int, spread: str):
    """Products of one tile, as XLA counts them in the loop's body, times the tiles that the routing makes.

    XLA counts the body of a loop once, however often it runs: how often is counted here, expert by expert.
    """
    random, mesh, C = np.random.default_rng(0), make_mesh(2, 4), EXPERTS.chosen
    weights, choice = weights_of(random), choices(random, B, T, C, "random")
    x_BTD = jnp.zeros((B, T, D))
    run = jax.jit(make_run_experts(mesh, spread, jnp.ones((B, T), bool)), static_argnums=0)
    compiled = run.lower(CONFIG, x_BTD, choice, placed(weights, mesh, spread)).compile()
    assert re.findall(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text()) == ["all-reduce"]

    tile, devices = tile_size(B * T * C // E), mesh.size
    width = F if spread == "flat" else F // 2
    tile_flops = 2 * 3 * tile * D * width
    counted = compiled.cost_analysis()["flops"]
    # Besides the products: routing and activations, whose share falls as D and F grow past those of this test.
    assert tile_flops <= counted <= 1.2 * tile_flops + 200 * B * T * C
    tiles = -(-np.bincount(np.asarray(choice.expert_BTC).ravel(), minlength=E) // tile)
    done = tiles.sum() * tile_flops / (devices if spread == "flat" else devices / 2)
    routed = 2 * 3 * B * T * C * D * F / devices
    assert done <= 1.5 * routed


def test_a_group_that_is_not_chosen_gives_no_expert():
    """Also where its experts alone would be the best."""
    from helix_jax.models.moe import keep_best_groups

    grouped = Experts(num_experts=8, top_k=2, width=4, num_groups=4, top_k_groups=2, group_score="top2")
    rank = jnp.asarray([9.0, 0, 5, 5, 6, 5, 1, 1])  # sums of the best two: 9, 10, 11, 2
    np.testing.assert_array_equal(jnp.isfinite(keep_best_groups(rank, grouped)), [0, 0, 1, 1, 1, 1, 0, 0])
    best = dataclasses.replace(grouped, group_score="best")  # 9, 5, 6, 1
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
def test_experts_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Experts(**{"num_experts": E, "top_k": 2, "width": F, **values})


def test_a_layer_that_is_not_there_cannot_be_dense():
    with pytest.raises(ValueError, match="layer 5 is not one of the 2 layers: correct the config"):
        ModelConfig(**{**vars(TINY), "experts": Experts(num_experts=4, top_k=1, width=8, dense_layers=(5,))})
