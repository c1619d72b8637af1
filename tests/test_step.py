"""Tests of the compiled step: one trace, a cache written in place, and only the documented collectives."""

import re
import sys
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.typing import DTypeLike

from helix_jax.abstract import abstract_arguments
from helix_jax.arrays import bytes_per_device, put
from helix_jax.cache import KVCache, Rows, cache_specs, make_caches, per_row
from helix_jax.checkpoint import shard
from helix_jax.combine import COMBINES
from helix_jax.config import ModelConfig
from helix_jax.decoding import DEFAULT_STEPS, DecodeState, _decode, decode, decode_program, decode_steps
from helix_jax.drafting import Drafter, DraftOptions, Drafts
from helix_jax.engine import SamplingParams, programs, runner
from helix_jax.generation import generate
from helix_jax.layout import PLACEMENTS
from helix_jax.mesh import DP, ROWS_B, make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.sampling import RowSampling, make_sampling
from helix_jax.step import advance, step
from tests.reference import TINY, naive_logits, plan_of, tiny_model

# In one layer: the collectives of the combine, and an all-reduce each after the output and the down projection.
PER_LAYER = {
    "psum": {"all-reduce": 4},
    "psum_scatter": {"all-reduce": 3, "reduce-scatter": 1},
    "all_to_all": {"all-reduce": 2, "all-to-all": 1},
}
# Once in a step: the embedding of the new tokens, and the logits.
PER_STEP = {"all-reduce": 1, "all-gather": 1}

MESHES = [(1, 8), (2, 4)]
SMALL = {"width": 32, "heads": 8, "kv_heads": 2, "head_width": 4, "ff_width": 52, "vocab": 61, "max_positions": 4096}


@pytest.fixture(scope="module")
def tiny() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="module")
def small() -> Transformer:
    return tiny_model(ModelConfig(layers=1, **SMALL))


def collectives(hlo: str) -> Counter:
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", hlo))


def documented_collectives(plan: Plan, layers: int) -> Counter:
    """Return the collectives of a step. On a single rank there is nothing to combine."""
    per_layer = PER_LAYER[plan.combine] if plan.layout.ranks > 1 else {"all-reduce": 2}
    return Counter(PER_STEP) + Counter({kind: layers * count for kind, count in per_layer.items()})


def check_decode_program(plan: Plan, slots: int = 32768, dtype: DTypeLike = jnp.float32) -> None:
    """Check the program that an engine decodes with: it has the collectives of a step, and writes the cache in place.

    All of the cache is aliased, at least 64 MB per device, and little memory is temporary.
    """
    config = ModelConfig(layers=2, **(SMALL | {"head_width": 64, "max_positions": 10**6}))
    arguments = abstract_arguments(config, plan, rows=4, slots=slots, page=64, dtype=dtype)
    _, _, weights, cache, rows, _, count_B, _ = arguments
    running_B = jax.ShapeDtypeStruct((4,), bool, sharding=count_B.sharding)
    state = DecodeState(cache, rows, count_B, running_B)
    compiled = decode_program(plan).lower(config, plan, weights, state, count_B).compile()
    assert collectives(compiled.as_text()) == documented_collectives(plan, config.layers)
    memory, cache_bytes = compiled.memory_analysis(), bytes_per_device(cache)
    assert memory.alias_size_in_bytes >= cache_bytes >= 64 * 2**20
    assert memory.temp_size_in_bytes <= 0.05 * cache_bytes


def check_traces(model: Transformer, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that whole generations trace each program once, and launch none per token.

    It serves every length, owner and number of steps, and rows that are idle or have ended.
    """
    traced, calls = [], []

    def counted(name: str, function, **jit):
        def trace(*arguments):
            traced.append(name)
            return function(*arguments)

        program = jax.jit(trace, donate_argnums=3, **jit)
        return lambda *arguments: calls.append(name) or program(*arguments)

    counted_decode = counted("decode", _decode, static_argnums=(0, 1, 5, 6))
    monkeypatch.setattr(runner, "decode_program", lambda plan: counted_decode)
    monkeypatch.setattr(programs, "prefill", counted("prefill", programs._prefill, static_argnums=(0, 1)))
    sharded, options = shard(model, plan), {"max_len": 64, "page": 64, "chunk": 8, "rows": 3}
    for prompts in ([[1, 2, 3], [4] * 20], [[5] * 17, [6], [7] * 3]):
        generate(sharded, prompts, plan, SamplingParams(max_new_tokens=41), **options)
    # A dp group with several rows also prefills two chunks of 4 in place of one of 8.
    prefills = 2 if plan.mesh.shape[DP] == 1 else 1
    decodes = len(decode_steps(plan, DEFAULT_STEPS, rows=options["rows"], drafts=False))
    assert Counter(traced) == {"decode": decodes, "prefill": prefills}
    assert calls.count("decode") <= 2 * 4  # for 40 tokens per row: no program is launched per token


def lower_step(plan: Plan, config: ModelConfig, rows: int, slots: int, T: int, *, sampler: bool) -> tuple[Any, int]:
    """Lower the step on abstract arrays, which allocates nothing. Return it and the bytes of its cache per device."""
    *arguments, sampling = abstract_arguments(config, plan, rows=rows, slots=slots, T=T, page=64, dtype=jnp.float32)
    return step.lower(*arguments, sampling if sampler else None), bytes_per_device(arguments[3])


def empty_cache(
    plan: Plan, model: Transformer, prompt_lens: list[int], max_lens: list[int]
) -> tuple[tuple[KVCache, ...], Rows]:
    return make_caches(plan, cache_specs(model.config, model.dtype), prompt_lens, max_lens, page=4)


def collective_cases() -> list:
    """Return every combination of mesh, combine and shape. A few of them, with every setting, are not slow."""
    cases = []
    for m, mesh in enumerate(MESHES):
        for c, how in enumerate(COMBINES):
            for s, (rows, T) in enumerate([(3, 1), (1, 1), (3, 8)]):
                marks = () if c == s and m == c % 2 else pytest.mark.slow
                cases.append(pytest.param(*mesh, how, rows, T, marks=marks))
    return cases


@pytest.mark.optimized
@pytest.mark.parametrize(("tp", "cp", "how", "rows", "T"), collective_cases())
def test_the_collectives_are_the_documented_ones(tp: int, cp: int, how: str, rows: int, T: int):
    config, plan = ModelConfig(layers=2, **SMALL), plan_of(tp, cp, combine=how)
    with_sampler = (how, T) == ("psum", 1)  # it adds none
    lowered, _ = lower_step(plan, config, rows, 256, T, sampler=with_sampler)
    assert collectives(lowered.compile().as_text()) == documented_collectives(plan, config.layers)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_norm_over_all_heads_adds_one_all_reduce_per_layer():
    """It is over tp, for the sums of queries and keys together."""
    config = ModelConfig(layers=2, **SMALL, qk_norm=True, qk_norm_all_heads=True)
    lowered, _ = lower_step(plan_of(2, 4, combine="all_to_all"), config, 3, 256, 1, sampler=False)
    expected = Counter(PER_STEP) + Counter({"all-reduce": 2 * 3, "all-to-all": 2})
    assert collectives(lowered.compile().as_text()) == expected


def test_a_single_token_is_padded():
    """On a GPU, XLA makes slow loops of vector-matrix products, and gathers the embedding for a single lookup."""
    lowered, _ = lower_step(Plan(make_mesh(1, 2)), ModelConfig(layers=1, **SMALL), 1, 256, 1, sampler=True)
    text = lowered.as_text()
    assert len(re.findall(r"dot_general.*\(tensor<1x2x32xf32>, tensor<32x", text)) == 5  # q, k, v, gate, up
    assert re.search(r"gather.*\(tensor<62x32xf32>, tensor<1x2x1xi32>\)", text)
    assert not re.search(r"tensor<1x1x32xf32>, tensor<32x", text)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("tp", "cp", "how"),
    [
        pytest.param(*mesh, how, marks=() if (mesh, how) == ((1, 8), "all_to_all") else pytest.mark.slow)
        for mesh in MESHES
        for how in COMBINES
    ],
)
def test_the_cache_is_written_in_place(tp: int, cp: int, how: str):
    """At least 64 MB per device: all of it is aliased, little is temporary, and no pool is copied in the program."""
    config = ModelConfig(
        layers=2, width=64, heads=8, kv_heads=2, head_width=64, ff_width=64, vocab=61, max_positions=10**6
    )
    lowered, cache_bytes = lower_step(plan_of(tp, cp, combine=how), config, 4, 16384 * tp, 1, sampler=False)
    compiled = lowered.compile()
    assert cache_bytes >= 64 * 2**20
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes <= 0.05 * cache_bytes
    pool = rf"f32\[{2 * 2 * 4 * 16384 * tp // 64},{2 // tp},64,64\]"
    assert re.search(pool, compiled.as_text())
    assert not re.search(rf"= {pool}[^ ]* (copy|transpose)\(", compiled.as_text())


@pytest.mark.optimized
@pytest.mark.parametrize(("tp", "cp", "how"), [*((2, 4, how) for how in COMBINES), (4, 1, "psum")])
def test_decoding_several_steps_has_the_collectives_and_the_memory_of_one(tp: int, cp: int, how: str):
    check_decode_program(plan_of(tp, cp, combine=how))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("kind", "drafts"), [("bf16", False), ("f32", True), pytest.param("f8e4m3fn", True, marks=pytest.mark.slow)]
)
def test_decoding_neither_copies_nor_converts_the_pool(kind: str, drafts: bool):
    """XLA's CPU backend copies a pool into branches of a conditional, and indexes narrow numbers in a wider type."""
    config = ModelConfig(layers=2, **(SMALL | {"max_positions": 10**6}))
    plan = plan_of(2, 4, cache_dtype={"bf16": "bfloat16", "f32": "float32", "f8e4m3fn": "fp8"}[kind])
    arguments = abstract_arguments(config, plan, rows=3, slots=4096, page=64, dtype=jnp.float32)
    _, _, weights, cache, rows, _, count_B, _ = arguments
    like = partial(jax.ShapeDtypeStruct, sharding=count_B.sharding)
    state = DecodeState(cache, rows, count_B, like((3,), bool), drafts=Drafts(like((3, 99), jnp.int32), count_B))
    drafter = Drafter(DraftOptions(7))
    state, drafter = (state, drafter) if drafts else (state._replace(drafts=None), None)
    text = decode.lower(config, plan, weights, state, count_B, drafter=drafter).compile().as_text()
    pool = rf"\[{2 * 2 * 3 * 4096 // 64},1,64,4\]"
    kinds = set(re.findall(rf"= (\w+){pool}", text))
    assert kind in kinds
    assert kinds <= {kind, "u8", "u16"}
    assert not re.search(rf"{pool}[^ ]* (copy|transpose)\(", text)


@pytest.mark.parametrize(
    ("tp", "cp", "dp"),
    [
        *((2, 4, 1), (2, 1, 3)),
        *(pytest.param(tp, cp, 1, marks=pytest.mark.slow) for tp, cp in ((1, 1), (1, 4), (8, 1))),
    ],
)
def test_one_trace_of_each_program_serves_a_whole_generation(tp: int, cp: int, dp: int, tiny, monkeypatch):
    check_traces(tiny, Plan(make_mesh(tp, cp, dp), 2), monkeypatch)


def test_several_gpus_have_a_program_of_their_own_if_xla_knows_its_options(monkeypatch):
    module, plan = sys.modules["helix_jax.decoding"], plan_of(1, 2)
    assert decode_program(plan) is decode
    monkeypatch.setattr(module, "_has_fixed_length", lambda plan: True)
    for version, expected in (((0, 10, 2), decode), ((0, 11, 0), module._decode_on_several_gpus)):
        monkeypatch.setattr(jax, "__version_info__", version)
        assert decode_program(plan) is expected


@pytest.mark.parametrize(
    ("placement", "temperature", "fixed"),
    [
        ("helix", 1.0, False),
        ("striped", 0.0, True),
        *(pytest.param(placement, 0.0, False, marks=pytest.mark.slow) for placement in PLACEMENTS),
    ],
)
def test_several_steps_in_one_call_equal_single_steps(
    placement: str, temperature: float, fixed: bool, tiny, monkeypatch
):
    """Also if a call takes all of its steps, as on several GPUs."""
    monkeypatch.setattr(sys.modules["helix_jax.decoding"], "_has_fixed_length", lambda plan: fixed)
    plan = Plan(make_mesh(2, 4), 3, placement)
    model = shard(tiny, plan)
    V = model.embed_VD.shape[0]
    sampling = put(make_sampling(3, temperature), plan.mesh, ROWS_B) if temperature else None
    cache, rows = empty_cache(plan, tiny, [3, 5, 0], [40, 40, 0])
    new = per_row(plan, [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [0] * 5]), per_row(plan, [3, 5, 0])
    weights, tokens = model.weights(), []
    out = step(model.config, plan, weights, cache, rows, *new, sampling)
    for _ in range(12):
        tokens.append(np.asarray(out.token_B))
        new = per_row(plan, tokens[-1][:, None]), per_row(plan, [1, 1, 0])
        out = step(model.config, plan, weights, out.caches, out.rows, *new, sampling)
    expected_BS = np.stack(tokens, 1)

    count_B, end = [9, 11, 0], int(expected_BS[1, 7])  # row 1 ends where the token `end` first occurs
    cache, rows = empty_cache(plan, tiny, [3, 5, 0], [40, 40, 0])
    new = per_row(plan, [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [0] * 5]), per_row(plan, [3, 5, 0])
    out = step(model.config, plan, weights, cache, rows, *new, sampling)
    stop_BV = np.zeros((3, V), bool)
    stop_BV[1, end] = True
    no_B, no_BV = np.zeros(3, bool), np.zeros((3, V), bool)
    row_sampling = sampling and RowSampling(sampling, np.ones(3, np.float32), no_B, no_BV)
    state = DecodeState(out.caches, out.rows, out.token_B, *put((no_B, stop_BV, row_sampling), plan.mesh, ROWS_B))
    found, state = decode(
        model.config, plan, weights, state, per_row(plan, count_B), max_steps=12 + fixed, greedy=sampling is None
    )
    decoded_BS = expected_BS[:, 1:]
    ends_after = int(np.flatnonzero(decoded_BS[1] == end)[0]) + 1
    assert found.count_B.tolist() == [9, min(11, ends_after), 0]
    for row, count in enumerate(found.count_B.tolist()):
        np.testing.assert_array_equal(found.tokens_BS[row, :count], decoded_BS[row, :count])
    np.testing.assert_array_equal(state.rows.length_B, np.add([3, 5, 0], found.count_B))
    assert state.finished_B.tolist() == [False, ends_after <= 11, False]


@pytest.mark.parametrize(("tp", "cp"), [(2, 2), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_advance_returns_the_logits_of_the_last_or_of_all_new_tokens(tp: int, cp: int, tiny):
    """In chunks, with rows of different lengths, also after tokens are undone: those of one pass without a cache."""
    plan, texts = Plan(make_mesh(tp, cp), 2), [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2]]
    model, expected_BSV = shard(tiny, plan), naive_logits(tiny, texts, 8)
    caches, rows = empty_cache(plan, model, [8, 5], [8, 8])
    tokens_BS = np.asarray([texts[0], [*texts[1], 0, 0, 0]])

    def run(first_B: list[int], count_B: list[int], logits: str) -> np.ndarray:
        nonlocal caches, rows
        tokens_BT = [row[first : first + 3] for row, first in zip(tokens_BS, first_B, strict=True)]
        new = per_row(plan, tokens_BT), per_row(plan, count_B)
        rows = rows._replace(length_B=per_row(plan, first_B))
        out, caches, rows = advance(model.config, plan, model.weights(), caches, rows, *new, logits)
        assert rows.length_B.tolist() == np.add(first_B, count_B).tolist()
        return np.asarray(out)

    V = tiny.config.vocab
    for first_B, count_B in (([0, 0], [3, 2]), ([3, 2], [3, 3]), ([5, 2], [3, 1])):  # the last ones undo 1 and 3 tokens
        all_BTV = run(first_B, count_B, "all")
        last_BV = run(first_B, count_B, "last")
        assert (all_BTV.shape[:2], last_BV.shape) == ((2, 3), (2, all_BTV.shape[2]))
        for row, (first, count) in enumerate(zip(first_B, count_B, strict=True)):
            expected_TV = expected_BSV[row, first : first + count, :V]
            np.testing.assert_allclose(all_BTV[row, :count, :V], expected_TV, rtol=2e-4, atol=2e-5)
            np.testing.assert_allclose(last_BV[row, :V], expected_TV[-1], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": "first"}, ValueError, "logits is 'first': choose one of last, all"),
        ({"count_B": [1, 1, 1]}, ValueError, r"count_B has shape \[3\]: give \[2\]"),
        ({"tokens_BT": [1, 2]}, ValueError, r"tokens_BT has shape \[2\]: give 2 dimensions, \[B, T\]"),
    ],
)
def test_a_wrong_use_of_advance_is_refused(change, error, message, tiny, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    plan = Plan(make_mesh(1, 1), 2)
    model = shard(tiny, plan)
    new = {"tokens_BT": [[1], [2]], "count_B": [1, 1]} | change
    logits = new.pop("logits", "last")
    arrays = (per_row(plan, x) for x in new.values())
    with pytest.raises(error, match=message):
        advance(model.config, plan, model.weights(), *empty_cache(plan, model, [1, 1], [4, 4]), *arrays, logits)


def test_idle_rows_write_nothing(tiny):
    plan = Plan(make_mesh(1, 4), 3)
    model = shard(tiny, plan)
    cache, rows = empty_cache(plan, model, [3, 3], [9, 9])
    cache = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), cache)
    tokens_BT, count_B = per_row(plan, np.ones((2, 3))), per_row(plan, [0, 0])
    out = step(model.config, plan, model.weights(), cache, rows, tokens_BT, count_B, None)
    assert out.rows.length_B.tolist() == [0, 0]
    assert all(np.isnan(pool).all() for pool in jax.tree.leaves(out.caches))


@pytest.mark.optimized
def test_the_greedy_program_has_no_sampler_and_computes_the_same_bits(small):
    plan = Plan(make_mesh(1, 2), 3)
    model = shard(small, plan)
    outputs, texts = [], []
    for sampling in (None, make_sampling(2)):
        arguments = (model.config, plan, model.weights(), *empty_cache(plan, model, [3, 2], [9, 9]))
        new = per_row(plan, [[1, 2, 3], [4, 5, 0]]), per_row(plan, [3, 2])
        lowered = step.lower(*arguments, *new, sampling)
        texts.append(lowered.as_text())
        outputs.append(lowered.compile()(*arguments[2:], *new, sampling))
    assert ["stablehlo.sort" in text for text in texts] == [False, True]
    for greedy, sampled in zip(jax.tree.leaves(outputs[0]), jax.tree.leaves(outputs[1]), strict=True):
        np.testing.assert_array_equal(greedy, sampled)


def test_every_product_of_a_float32_step_has_the_highest_precision(tiny):
    """On a TPU or GPU the default precision would not be float32."""
    plan = Plan(make_mesh(2, 4))
    model = shard(tiny, plan)
    new = per_row(plan, [[1]]), per_row(plan, [1])
    cache, rows = empty_cache(plan, model, [3], [9])
    text = step.lower(model.config, plan, model.weights(), cache, rows, *new, make_sampling(1)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == TINY.layers * 9 + 1  # q k v o gate up down, scores and values; and the head
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
