"""Checks the shapes in configs/ against published parameter counts, and the memory of a decode step of each."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from helix_jax.abstract import abstract_arguments
from helix_jax.arrays import bytes_per_device
from helix_jax.cache import pages_needed
from helix_jax.config import Experts, Latent, ModelConfig, Rope
from helix_jax.mesh import CP, DP, TP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.step import step
from tests.conftest import ROOT
from tests.reference import BYTES_SHAPE, shape_in

BATCH, TOKENS, PAGE, BYTES = 1, 2**20, 64, 2

# name -> the published number of parameters, and the mesh (tp, cp) on which a step is traced.
MODELS = {
    "llama-3.1-8b": (8_030_261_248, (2, 4)),
    "llama-3.1-70b": (70_553_706_496, (4, 8)),
    "llama-3.1-405b": (405_853_388_800, (8, 8)),
    "qwen3-8b": (8_190_735_360, (2, 4)),
    "qwen3-235b-a22b": (235_093_634_560, (4, 16)),
    "gpt-oss-20b": (20_914_757_184, (2, 4)),
    "gpt-oss-120b": (116_829_156_672, (8, 8)),
    "gemma-3-1b": (999_885_952, (1, 4)),
    "deepseek-v2-lite": (15_706_484_224, (2, 8)),
    "deepseek-v3": (671_026_419_200, (1, 64)),
    "deepseek-r1": (671_026_419_200, (2, 32)),
}


def config_of(name: str) -> ModelConfig:
    return shape_in(ROOT / "configs" / f"{name}.toml")


def test_every_config_is_tested():
    """Those of training runs are tested with training."""
    assert {file.stem for file in (ROOT / "configs").glob("*.toml")} == {"demo", "tiny", *MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_has_the_published_number_of_parameters(name: str):
    leaves = jax.tree.leaves(nnx.state(Transformer(config_of(name), rngs=None), nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == MODELS[name][0]


def two_of_each_kind(config: ModelConfig) -> ModelConfig:
    """Return the config with few layers: two dense and two with experts, two with a window and two without, or two."""
    if config.experts and config.experts.dense_layers:
        few = min(2, len(config.experts.dense_layers))
        experts = dataclasses.replace(config.experts, dense_layers=tuple(range(few)))
        return dataclasses.replace(config, layers=few + 2, experts=experts)
    if config.windowed_layers:
        return dataclasses.replace(config, layers=4, windowed_layers=(0, 2))
    return dataclasses.replace(config, layers=2)


def weights_by_arithmetic(config: ModelConfig, tp: int, flat: int) -> int:
    """Return bytes per device: tp shards the projections before attention, (tp, cp) the rest, norms are replicated."""

    def share(size: int) -> int:
        return -(-size // flat)

    D, H, N, K = config.width, config.head_width, config.heads, config.kv_heads
    small = 2 * D * (1 + config.post_norms)
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
    total = (1 if config.tied_head else 2) * share(config.vocab) * D + D + config.layers * attention
    for layer in range(config.layers):
        experts = config.experts_of(layer)
        if experts is None:
            total += 3 * D * share(config.ff_width)
            continue
        own, width = share(experts.num_experts), -(-experts.width // flat) * flat
        total += own * 3 * D * width + 3 * D * share(experts.shared_width)
        padded = own * flat
        total += padded * (D + experts.router_bias) + experts.bias * (own * 2 * width + padded * D)
        total += 2 * padded * experts.selection_bias  # float32
    return BYTES * total


# Others of the same family stand for these.
SLOW = dict.fromkeys(("llama-3.1-70b", "gpt-oss-120b", "deepseek-r1"), pytest.mark.slow)


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in MODELS])
def test_a_decode_step_over_a_million_tokens_needs_the_expected_memory(name: str):
    """The step is traced on abstract arrays; nothing is allocated."""
    config, (tp, cp) = two_of_each_kind(config_of(name)), MODELS[name][1]
    axes = {DP: 1, TP: tp, CP: cp}
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 3)
    plan = Plan(mesh, 16, experts="flat")
    plan.check_model(config)

    slots = plan.layout.max_filled(TOKENS, TOKENS - 1000)
    arguments = abstract_arguments(config, plan, rows=BATCH, slots=slots, page=PAGE, dtype=jnp.bfloat16)
    weights, caches, M = arguments[2], arguments[3], pages_needed(slots, PAGE)
    traced = step.trace(*arguments)
    assert traced.out_info.logits_BV.shape == (BATCH, -(-config.vocab // (tp * cp)) * tp * cp)

    per_slot = config.cache_width if config.latent else 2 * config.kv_heads // tp * config.head_width
    windowed = len(config.windowed_layers)
    # A window with one new token may be on one rank, and begin inside of a page.
    window_pages = -(-(config.window - 1) // PAGE) + 1 if config.window else 0
    pages = (config.layers - windowed) * M + windowed * window_pages
    assert bytes_per_device(caches) == BYTES * pages * PAGE * per_slot
    # A rank stores its share of a million tokens, and at most three blocks and a page more.
    assert TOKENS / cp <= M * PAGE <= TOKENS / cp + plan.layout.max_skew + 1 + PAGE
    assert bytes_per_device(weights) == weights_by_arithmetic(config, tp, tp * cp)


@pytest.mark.parametrize(("name", "scales", "exact"), [("llama-3.1-8b", 2 * 8, 0), ("deepseek-v2-lite", 4, 64)])
def test_an_fp8_cache_has_the_expected_size(name: str, scales: int, exact: int):
    """A byte per number, four per scale, and two per number of the rotary part of latents."""
    config = config_of(name)
    mesh = AbstractMesh((1, 1, 4), (DP, TP, CP), axis_types=(AxisType.Auto,) * 3)
    options = {"rows": 1, "slots": TOKENS // 4, "T": 1, "page": PAGE, "dtype": jnp.bfloat16}
    size, unquantised = (
        bytes_per_device(abstract_arguments(config, Plan(mesh, cache_dtype=dtype), **options)[3])
        for dtype in ("fp8", "auto")
    )
    numbers = config.cache_width - exact if config.latent else 2 * config.kv_heads * config.head_width
    assert size == config.layers * TOKENS // 4 * (numbers + 4 * scales + 2 * exact)
    assert 0.5 < size / unquantised < 0.58


@pytest.mark.parametrize(("name", "most"), [("gemma-3-1b", 0.22), ("gpt-oss-20b", 0.55)])
def test_layers_with_windows_keep_little_of_a_million_tokens(name: str, most: float):
    """Compared with the same model without windows. Prompts are prefilled in chunks of 2,048."""
    config = config_of(name)
    mesh = AbstractMesh((1, 1, 4), (DP, TP, CP), axis_types=(AxisType.Auto,) * 3)
    options = {"rows": 1, "slots": TOKENS // 4, "T": 2048, "page": PAGE, "dtype": jnp.bfloat16}
    sizes = [
        bytes_per_device(abstract_arguments(model, Plan(mesh), **options)[3])
        for model in (config, dataclasses.replace(config, window=None, windowed_layers=(), rope_local=None))
    ]
    assert sizes[0] / sizes[1] < most


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Rope(kind="ntk"), ValueError, "rope kind is 'ntk': choose one of default, linear, dynamic, llama3"),
        (lambda: Rope(theta=1.0), ValueError, "rope theta is 1.0: give a number above 1"),
        (lambda: Rope(factor=math.inf), ValueError, "rope factor is inf: give a positive number"),
        (
            lambda: Rope(kind="yarn", factor=4.0),
            ValueError,
            "position_embeddings above 1, it is 0: add it",
        ),
        (lambda: Latent(**LATENT | {"rope_width": 7}), ValueError, "latent rope_width is 7: give an even number"),
        (lambda: Experts(num_experts=True, top_k=1, width=8), TypeError, "experts num_experts is True: give a whole"),
        (lambda: Experts(num_experts=4, top_k=1, width=8, num_groups=3), ValueError, "3 groups do not divide the 4"),
        (lambda: Experts(num_experts=4, top_k=1, width=8, shared_gate=True), ValueError, "but shared_width is 0: give"),
        (lambda: shape(vocab=0), ValueError, "vocab is 0: give at least 1"),
        (lambda: shape(heads=3), ValueError, "kv_heads 2 does not divide heads 3: correct the config"),
        (lambda: shape(head_width=5), ValueError, "head_width is 5: give an even number"),
        (lambda: shape(activation="relu"), ValueError, "activation is 'relu': choose one of silu, gelu_tanh"),
        (lambda: shape(qk_norm_all_heads=True), ValueError, "qk_norm_all_heads is True, but qk_norm is False: set it"),
        (lambda: shape(pre_norms=False), ValueError, "pre_norms and post_norms are False: set one of them"),
        (lambda: shape(eos_token_ids=(256,)), ValueError, "token id 256 is outside the vocabulary of 256: give ids"),
        (lambda: shape(window=4), ValueError, r"window is 4, but windowed_layers is \(\): give both or neither"),
        (lambda: shape(window=4, windowed_layers=(2,)), ValueError, "layer 2 is not one of the 2 layers: correct"),
        (
            lambda: shape(latent=Latent(**LATENT)),
            ValueError,
            "kv_heads is 2 and head_width 4: give 1 and 12 for latent",
        ),
        (
            lambda: shape(kv_heads=1, head_width=12, latent=Latent(**LATENT), qk_norm=True),
            ValueError,
            "qk_norm is True: leave it out, latent attention does not support it",
        ),
    ],
)
def test_an_invalid_config_is_rejected(build, error, message: str):
    with pytest.raises(error, match=message):
        build()


LATENT = {"width": 16, "rope_width": 4, "nope_width": 8, "value_width": 8}


def shape(**changes) -> ModelConfig:
    return ModelConfig(**BYTES_SHAPE | {"max_positions": 64} | changes)
