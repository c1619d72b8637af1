"""What a decode step has to read at the least, and how fast that can be: the measure of bench_decode.py."""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helix_jax.arrays import bytes_per_device
from helix_jax.config import ModelConfig
from helix_jax.layout import BlockLayout
from helix_jax.mesh import EXPERT_WEIGHTS, TP
from helix_jax.models.transformer import Weights
from helix_jax.plan import Plan


def measure_bandwidth(device: Any, calls: int = 10, repeats: int = 5) -> float:
    """Bytes per second that one device reads: the largest of many numbers, found several times for one wait."""
    size = 2**27 if device.platform == "cpu" else 2**32
    x_X = jnp.zeros(size // 2, jnp.bfloat16, device=device)
    largest = jax.jit(jnp.max)
    jax.block_until_ready(largest(x_X))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready([largest(x_X) for _ in range(calls)])
        seconds.append(time.perf_counter() - began)
    return calls * size / min(seconds)


def weight_bytes_read(config: ModelConfig, rows: int, weights: Weights) -> float:
    """What a device has to read of its weights in a step."""
    named = [(str(path[-1].key), array) for path, array in jax.tree_util.tree_leaves_with_path(weights)]
    return sum(bytes_per_device(array) * share_read(config, name, rows) for name, array in named)


def share_read(config: ModelConfig, name: str, rows: int) -> float:
    if name == "embed_VD" and not config.tied_head:
        return min(1, rows / config.vocab)
    if config.experts and name in EXPERT_WEIGHTS["flat"]:
        # An expectation, and a high one: routing is even, and no two rows choose the same expert before all are taken.
        return min(1, rows * config.experts.top_k / config.experts.num_experts)
    return 1


def kv_bytes_read(options: argparse.Namespace, config: ModelConfig, plan: Plan) -> tuple[float, float]:
    """What a device has to read of the cache in a step: if all ranks hold the same, and on the fullest.

    Source: arXiv 2507.07120, appendix A; of a windowed layer, its window.
    """
    tp = plan.mesh.shape[TP]
    numbers = config.cache_width if config.latent else 2 * -(-config.kv_heads // tp) * config.head_width
    per_slot = options.rows * numbers * jnp.dtype(options.dtype).itemsize
    slots_LR = np.array([slots_read(options, plan.layout, config.window_of(layer)) for layer in range(config.layers)])
    return per_slot * float(slots_LR.mean(1).sum()), per_slot * float(slots_LR.max(1).sum())


def slots_read(options: argparse.Namespace, layout: BlockLayout, window: int | None) -> np.ndarray:
    """Of each rank, in one row."""
    length, rank_R = options.context + options.decoded, np.arange(layout.ranks)
    past = layout.filled(length - window, options.context, rank_R) if window else 0
    return layout.filled(length, options.context, rank_R) - past
