"""Checks how heads are divided among the devices of a mesh, also if neither tp nor cp divides them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helix_jax import generate, load, save, shard
from helix_jax.abstract import abstract_arguments
from helix_jax.arrays import bytes_per_device
from helix_jax.engine import Engine, SamplingParams, TokenEvent, transfer
from helix_jax.heads import PADDING, HeadLayout, first_places, unsupported_tp_reason
from helix_jax.helix import helix_attention
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from tests.reference import TINY, plan_of, relative_error, tiny_model

NINE = replace(TINY, heads=9, kv_heads=3, qkv_bias=True, o_bias=True, sinks=True)  # SmolLM2-135M has so many
MESHES = [(1, 2), (1, 3), (1, 4), (1, 8), (3, 1), (3, 2), (6, 1)]  # tp x cp
IN_FAST_TIER = [(1, 8), (6, 1)]


def random_model(config, seed: int = 0) -> Transformer:
    """Return a model in which all parameters are random, biases, sinks and norms of heads included."""
    model = tiny_model(config)
    for index, (path, parameter) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        if any(word in path[-1] for word in ("bias", "sink", "norm_NH", "norm_KH")):
            parameter[...] = jax.random.normal(jax.random.key(seed + index), parameter.shape)
    return model


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "cp"),
    [
        (*heads, tp, cp)
        for heads in [(9, 3), (28, 4), (4, 1), (8, 8), (16, 2), (8, None)]
        for tp, cp in [*MESHES, (2, 4), (4, 2), (8, 1)]
        if not unsupported_tp_reason(tp, *heads)
    ],
)
def test_every_head_is_once_on_the_device_of_its_keys(heads: int, kv_heads: int | None, tp: int, cp: int):
    layout = HeadLayout(heads, kv_heads, tp, cp)
    for places in (layout.queries_N, layout.outputs_N):
        assert sorted(places[places != PADDING]) == list(range(heads))
    assert len(layout.queries_N) % tp == len(layout.outputs_N) % (tp * cp) == 0
    assert len(layout.queries_N) // tp == -(-heads // tp)  # no device attends for more heads than it must
    of_device = zip(layout.queries_N.reshape(tp, -1), layout.outputs_N.reshape(tp, -1), strict=True)
    assert all(set(queries) - {PADDING} == set(outputs) - {PADDING} for queries, outputs in of_device)
    if kv_heads is not None:
        assert len(layout.keys_K) == max(kv_heads, tp)
        key_of_N = np.repeat(layout.keys_K, len(layout.queries_N) // len(layout.keys_K))
        is_head_N = layout.queries_N != PADDING
        np.testing.assert_array_equal((layout.queries_N // (heads // kv_heads))[is_head_N], key_of_N[is_head_N])
    if heads % (tp * cp) == 0 and (kv_heads is None or kv_heads % tp == 0):
        np.testing.assert_array_equal(layout.outputs_N, np.arange(heads))  # such a mesh costs nothing


def test_the_first_place_of_a_head_is_not_that_of_its_copies():
    assert first_places(HeadLayout(9, 3, 6, 1).keys_K, 3).tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("tp", "cp"), [pytest.param(*m, marks=[] if m in IN_FAST_TIER else pytest.mark.slow) for m in MESHES]
)
def test_tokens_do_not_depend_on_a_mesh_that_divides_no_heads(tp: int, cp: int):
    """Nor do weights that are moved to another mesh. A norm over all heads counts neither padding nor copies."""
    model, alone = random_model(replace(NINE, qk_norm=True, qk_norm_all_heads=True)), plan_of()
    prompts, params = [[1, 2, 3, 4, 5, 6, 7] * 3, [9, 8]], SamplingParams(max_new_tokens=12, logprobs=1)
    [*expected] = Engine(shard(model, alone), alone, rows=2, max_len=64, chunk=32).generate(prompts, params)
    for combine in ("psum", "all_to_all") if cp == 8 else ("psum_scatter",):
        plan = plan_of(tp, cp, combine=combine)
        sharded = shard(model, plan)
        found = Engine(sharded, plan, rows=2, max_len=64, chunk=32).generate(prompts, params)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.tokens == theirs.tokens
            assert relative_error([p for p, _ in ours.logprobs], [p for p, _ in theirs.logprobs]) < 1e-5
    for other in (alone, plan_of(1, 4)):
        moved, expected = shard(sharded, other).weights(), shard(model, other).weights()
        jax.tree.map(np.testing.assert_array_equal, moved, expected)


@pytest.mark.parametrize(("tp", "cp"), [(1, 4), (6, 1)])
def test_padding_and_copies_of_heads_are_not_saved(tp: int, cp: int, tmp_path):
    model, alone = random_model(replace(NINE, sinks=False)), plan_of()
    save(shard(model, plan_of(tp, cp)), tmp_path)
    saved = load(tmp_path, alone, jnp.float32).weights()
    jax.tree.map(np.testing.assert_array_equal, saved, shard(model, alone).weights())


@pytest.mark.slow
def test_a_request_moves_between_meshes_with_and_without_copies_of_heads():
    plans = plan_of(6, 1), plan_of(1, 4)
    source, target = (Engine(shard(random_model(NINE), plan), plan, rows=1, max_len=96, chunk=32) for plan in plans)
    for first, second in ((source, target), (target, source)):
        id = first.submit([1, 2, 3] * 7, SamplingParams(max_new_tokens=50))
        events = [event for _ in range(2) for event in first.step()]
        transfer(id, first, second)
        events += [*first.events(), *second.events()]
        tokens = [event.token for event in events if isinstance(event, TokenEvent)]
        alone = plan_of()
        assert [tokens] == generate(
            shard(random_model(NINE), alone), [[1, 2, 3] * 7], alone, SamplingParams(max_new_tokens=50), chunk=32
        )


@pytest.mark.parametrize(("tp", "cp", "copies"), [(1, 4, 1), (3, 2, 1), (6, 1, 2)])
def test_the_bytes_of_the_cache_are_those_of_its_heads(tp: int, cp: int, copies: int):
    """cp never adds any. With more devices of tp than key/value heads, there are as many copies as the layout says."""
    arguments = abstract_arguments(NINE, plan_of(tp, cp), rows=1, slots=64, page=16, dtype=jnp.float32)
    heads = NINE.kv_heads * copies // tp
    assert bytes_per_device(arguments[3]) == NINE.layers * 2 * 64 * heads * NINE.head_width * 4
    weights = arguments[2]["layers"][0]["attention"]
    assert weights["k_DKH"].shape == (NINE.width, NINE.kv_heads * copies, NINE.head_width)


@pytest.mark.optimized
@pytest.mark.parametrize("how", ["psum", "all_to_all"])
def test_no_attention_is_computed_for_padding(how: str):
    """At cp 4, nine heads are padded to twelve after attention only: the products are those of nine."""

    def flops(config) -> float:
        plan = plan_of(1, 4, combine=how)
        arguments = abstract_arguments(config, plan, rows=1, slots=512, page=64, dtype=jnp.float32)
        return jax.jit(_attend_once(config, plan)).lower(*arguments[3:5]).compile().cost_analysis()["flops"]

    nine, twelve = flops(NINE), flops(replace(NINE, heads=12))
    assert nine < 0.8 * twelve


def _attend_once(config, plan: Plan):
    def attend(caches, rows):
        ones = [jnp.ones((1, 1, heads, config.head_width)) for heads in (config.heads, config.kv_heads)]
        return helix_attention(plan, caches[0], ones[0], ones[1], ones[1], rows, jnp.ones(1, jnp.int32), scale=1.0)

    return attend


@pytest.mark.parametrize(
    ("tp", "cp", "message"),
    [
        (2, 4, "tp 2 neither divides the 3 key/value heads nor is a multiple of them: choose one of these meshes"),
        (4, 2, "of up to 8 devices: 1 x 8, 3 x 2, 6 x 1"),
    ],
)
def test_a_mesh_that_cannot_share_the_heads_is_refused_with_those_that_can(tp: int, cp: int, message: str):
    with pytest.raises(ValueError, match=message):
        shard(tiny_model(NINE), plan_of(tp, cp))
