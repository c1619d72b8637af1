"""What the compiled step promises: one trace, a cache written in place, no collective beyond those that are named."""

import re
from collections import Counter
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.arrays import bytes_per_device
from helix_jax import generation
from helix_jax.abstract import abstract_arguments
from helix_jax.cache import CacheSpec, make_cache, per_row
from helix_jax.checkpoint import shard
from helix_jax.combine import COMBINES
from helix_jax.config import ModelConfig
from helix_jax.generation import generate
from helix_jax.layout import PLACEMENTS, BlockLayout
from helix_jax.mesh import make_mesh
from helix_jax.plan import Plan
from helix_jax.sampling import make_sampling
from helix_jax.step import _step, many_steps, step
from tests.reference import TINY, plan_of, tiny_model

# In one layer: the combine's own, and one all-reduce each after the output and the down projection.
PER_LAYER = {
    "psum": {"all-reduce": 4},
    "psum_scatter": {"all-reduce": 3, "reduce-scatter": 1},
    "all_to_all": {"all-reduce": 2, "all-to-all": 1},
}
# Once a step: the embedding of the new tokens, and the logits.
PER_STEP = {"all-reduce": 1, "all-gather": 1}


def collectives(hlo: str) -> Counter:
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", hlo))


def lowered_step(plan: Plan, config: ModelConfig, rows: int, slots: int, T: int):
    """The step on abstract arrays: nothing is allocated. Returns it with the bytes of its cache per device."""
    arguments = abstract_arguments(config, plan, rows=rows, slots=slots, T=T, page=64, dtype=jnp.float32)
    return step.lower(*arguments), bytes_per_device(arguments[3])


def compiled_step(*arguments: Any):
    """As `lowered_step`."""
    lowered, cache_bytes = lowered_step(*arguments)
    return lowered.compile(), cache_bytes


@pytest.mark.parametrize(("rows", "T"), [(3, 1), (1, 1), (3, 8)])
@pytest.mark.parametrize("how", COMBINES)
@pytest.mark.parametrize(("tp", "cp"), [(1, 8), (2, 4)])
def test_the_collectives_are_those_promised(tp: int, cp: int, how: str, rows: int, T: int):
    layers = 3
    config = ModelConfig(
        layers=layers, width=32, heads=8, kv_heads=2, head_width=4, ff_width=52, vocab=61, max_positions=4096
    )
    compiled, _ = compiled_step(plan_of(tp, cp, combine=how), config, rows, 256, T)
    promised = Counter(PER_STEP)
    for kind, count in PER_LAYER[how].items():
        promised[kind] += layers * count
    assert collectives(compiled.as_text()) == promised


def test_no_token_runs_alone():
    """Of a vector times a matrix a GPU makes slow loops, and of one lookup an all-gather of the embedding."""
    config = ModelConfig(
        layers=1, width=32, heads=8, kv_heads=2, head_width=4, ff_width=52, vocab=61, max_positions=4096
    )
    text = lowered_step(Plan(make_mesh(1, 2)), config, 1, 256, 1)[0].as_text()
    assert len(re.findall(r"dot_general.*\(tensor<1x2x32xf32>, tensor<32x", text)) == 5  # q, k, v, gate, up
    assert re.search(r"gather.*\(tensor<62x32xf32>, tensor<1x2x1xi32>\)", text)
    assert not re.search(r"tensor<1x1x32xf32>, tensor<32x", text)


@pytest.mark.parametrize("how", COMBINES)
@pytest.mark.parametrize(("tp", "cp"), [(1, 8), (2, 4)])
def test_the_cache_is_written_in_place(tp: int, cp: int, how: str):
    """64 MB and more a device: all of it aliased, little beside it, and no copy of a pool in the program."""
    config = ModelConfig(
        layers=2, width=64, heads=8, kv_heads=2, head_width=64, ff_width=64, vocab=61, max_positions=10**6
    )
    compiled, cache_bytes = compiled_step(plan_of(tp, cp, combine=how), config, 4, 16384 * tp, 1)
    assert cache_bytes >= 64 * 2**20
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes <= 0.05 * cache_bytes
    pool = rf"f32\[{4 * 16384 * tp // 64},{2 // tp},64,64\]"
    assert re.search(pool, compiled.as_text())
    assert not re.search(rf"= {pool}[^ ]* (copy|transpose)\(", compiled.as_text())


@pytest.mark.parametrize(("tp", "cp", "dp"), [(2, 4, 1), (1, 4, 1), (8, 1, 1), (1, 1, 1), (2, 1, 3)])
def test_one_trace_of_the_decode_step_serves_a_whole_generation(tp: int, cp: int, dp: int, monkeypatch):
    """Every length, every owner, idle and ended rows; one trace more for the prefill chunk."""
    traced = []

    def counted(config, plan, weights, cache, rows, tokens_BT, count_B, sampling):
        traced.append(tokens_BT.shape)
        return _step(config, plan, weights, cache, rows, tokens_BT, count_B, sampling)

    chex.clear_trace_counter()  # it counts by name: the parameters before this one are not ours
    two = chex.assert_max_traces(counted, n=2)
    jitted = jax.jit(two, static_argnums=(0, 1), donate_argnums=3)
    monkeypatch.setattr(generation, "step", jitted)
    mesh = make_mesh(tp, cp, dp)
    plan = Plan(mesh, 2)
    model = shard(tiny_model(), plan)
    for prompts in ([[1, 2, 3], [4] * 20, None], [[5] * 17, [6], [7] * 3]):
        generate(model, prompts, plan, max_new_tokens=40, page=64, chunk=8)
    assert sorted(traced) == [(3, 1), (3, 8)]
    assert jitted._cache_size() == 2  # and one compilation each: no argument's sharding changes on the way


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_many_steps_on_the_device_equal_one_by_one(placement: str):
    mesh = make_mesh(2, 4)
    plan = Plan(mesh, 3, placement)
    model = shard(tiny_model(), plan)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], None]
    one_by_one = generate(model, prompts, plan, max_new_tokens=31, page=4)
    stop = one_by_one[1][12]

    cache, rows = make_cache(plan, CacheSpec.from_config(model.config, model.dtype), [3, 5, 0], [40, 40, 0], page=4)
    weights = model.weights()
    sampling = make_sampling(3)
    tokens_BT = per_row(plan, np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [0] * 5]))
    out = step(model.config, plan, weights, cache, rows, tokens_BT, per_row(plan, [3, 5, 0]), sampling)
    limit_B = per_row(plan, [3 + 20, 40, 0])
    stops = jnp.asarray([stop])
    many = many_steps(TINY, plan, 30, weights, out.cache, out.rows, out.token_B, limit_B, stops, sampling)
    for row, most in ((0, 21), (1, 31)):  # the first token is said already; then as many as the limit leaves room for
        said = [int(out.token_B[row]), *np.asarray(many.tokens_BS[row])[np.asarray(many.live_BS[row])].tolist()]
        end = one_by_one[row].index(stop) + 1 if stop in one_by_one[row] else most
        assert said == one_by_one[row][: min(end, most)]
    assert not many.live_BS[2].any()
    lengths = np.asarray([3, 5, 0]) + np.asarray(many.live_BS).sum(1)
    np.testing.assert_array_equal(many.rows.length_B, lengths)


def test_idle_rows_write_and_move_nothing():
    mesh = make_mesh(1, 4)
    plan = Plan(mesh, 3)
    model = shard(tiny_model(), plan)
    cache, rows = make_cache(plan, CacheSpec.from_config(model.config, model.dtype), [3, 3], [9, 9], page=4)
    cache = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), cache)
    weights = model.weights()
    tokens_BT = per_row(plan, np.ones((2, 3)))
    out = step(model.config, plan, weights, cache, rows, tokens_BT, per_row(plan, [0, 0]), make_sampling(2))
    assert out.rows.length_B.tolist() == [0, 0]
    assert all(np.isnan(pool).all() for pool in jax.tree.leaves(out.cache))


def test_float32_means_float32_wherever_matrices_meet():
    """Every product of the step asks for the highest precision: on a TPU or GPU the default would not be float32."""
    mesh = make_mesh(2, 4)
    plan = Plan(mesh)
    model = shard(tiny_model(), plan)
    cache, rows = make_cache(plan, CacheSpec.from_config(model.config, model.dtype), [3], [9], page=4)
    weights = model.weights()
    new = per_row(plan, [[1]]), per_row(plan, [1])
    text = step.lower(model.config, plan, weights, cache, rows, *new, make_sampling(1)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == TINY.layers * 9 + 1  # q k v o gate up down, scores and values; and the head
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
