"""The shapes in configs/ are the publishers'; a decode step of each over a million tokens is as large as reckoned."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from helix_jax.arrays import bytes_per_device
from helix_jax.abstract import abstract_arguments
from helix_jax.config import ModelConfig
from helix_jax.layout import BlockLayout
from helix_jax.mesh import (
    CP,
    DP,
    TP,
)
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.step import step
from tests.conftest import ROOT
from tests.reference import shape_in

BATCH, TOKENS, PAGE, BYTES = 1, 2**20, 64, 2

# name -> parameters as published, and the mesh (tp, cp) on which it is traced.
MODELS = {
    "llama-3.1-8b": (8_030_261_248, (2, 4)),
    "llama-3.1-70b": (70_553_706_496, (4, 8)),
    "llama-3.1-405b": (405_853_388_800, (8, 8)),
    "qwen3-8b": (8_190_735_360, (2, 4)),
    "qwen3-235b-a22b": (235_093_634_560, (4, 16)),
    "gpt-oss-20b": (20_914_757_184, (2, 4)),
    "gpt-oss-120b": (116_829_156_672, (8, 8)),
    "deepseek-v2-lite": (15_706_484_224, (2, 8)),
    "deepseek-v3": (671_026_419_200, (1, 64)),
    "deepseek-r1": (671_026_419_200, (2, 32)),
}


def config_of(name: str) -> ModelConfig:
    return shape_in(ROOT / "configs" / f"{name}.toml")


def test_every_config_is_here():
    assert {file.stem for file in (ROOT / "configs").glob("*.toml")} == {"demo", *MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_has_as_many_parameters_as_published(name: str):
    leaves = jax.tree.leaves(nnx.state(Transformer(config_of(name), rngs=None), nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == MODELS[name][0]


def two_of_each_kind(config: ModelConfig) -> ModelConfig:
    """Two dense layers and two with experts, or two windowed ones and two that see all, or just two."""
    if config.experts and config.experts.dense_layers:
        few = min(2, len(config.experts.dense_layers))
        experts = dataclasses.replace(config.experts, dense_layers=tuple(range(few)))
        return dataclasses.replace(config, layers=few + 2, experts=experts)
    if config.windowed_layers:
        return dataclasses.replace(config, layers=4, windowed_layers=(0, 2))
    return dataclasses.replace(config, layers=2)


def weights_by_arithmetic(config: ModelConfig, tp: int, flat: int) -> int:
    """Bytes per device: what is before attention is shared by tp, the rest by all, norms and routers by none."""

    def share(size: int) -> int:
        return -(-size // flat)

    D, H, N, K = config.width, config.head_width, config.heads, config.kv_heads
    small = 2 * D
    if config.latent:
        c = config.latent
        up, queries = N // tp * c.nope_width * c.width, N // tp * H
        small += c.width + D * (c.width + c.rope_width)
        small += (D + 1) * c.query_rank + c.query_rank * queries if c.query_rank else D * queries
        attention = small + up + N // flat * c.value_width * (c.width + D)
    else:
        small += 2 * H * config.qk_norm + D * config.o_bias
        attention = small + D * (N + 2 * K) // tp * H + N // flat * H * D
        attention += (N + 2 * K) // tp * H * config.qkv_bias + N // flat * config.sinks
    total = 2 * share(config.vocab) * D + D + config.layers * attention
    for layer in range(config.layers):
        experts = config.experts_of(layer)
        if experts is None:
            total += 3 * D * share(config.ff_width)
            continue
        held, width = share(experts.num_experts), -(-experts.width // flat) * flat
        total += held * 3 * D * width + 3 * D * share(experts.shared_width)
        padded = held * flat
        total += padded * (D + experts.router_bias) + experts.bias * (held * 2 * width + padded * D)
        total += 2 * padded * experts.selection_bias  # float32
    return BYTES * total


@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_over_a_million_tokens_takes_what_arithmetic_says(name: str):
    """Traced on abstract arrays over the mesh that stands above; nothing is allocated."""
    config, (tp, cp) = two_of_each_kind(config_of(name)), MODELS[name][1]
    axes = {DP: 1, TP: tp, CP: cp}
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 3)
    plan = Plan(mesh, 16, experts="flat")
    plan.check_model(config)

    slots = plan.layout.max_filled(TOKENS, TOKENS - 1000)
    arguments = abstract_arguments(config, plan, rows=BATCH, slots=slots, page=PAGE, dtype=jnp.bfloat16)
    weights, cache, M = arguments[2], arguments[3], -(-slots // PAGE)
    traced = step.trace(*arguments)
    assert traced.out_info.logits_BV.shape == (BATCH, -(-config.vocab // (tp * cp)) * tp * cp)

    per_slot = config.cache_width if config.latent else 2 * config.kv_heads // tp * config.head_width
    assert bytes_per_device(cache) == BYTES * config.layers * M * PAGE * per_slot
    # A rank has its share of a million tokens, and at most three blocks and a page more.
    assert TOKENS / cp <= M * PAGE <= TOKENS / cp + 3 * 16 + PAGE
    assert bytes_per_device(weights) == weights_by_arithmetic(config, tp, tp * cp)
