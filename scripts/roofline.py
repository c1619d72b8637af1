"""Computes the roofline of a decode step: the bytes that a device must read."""

import argparse
from typing import Protocol

import jax
import numpy as np

from helix_jax.arrays import bytes_per_device
from helix_jax.cache import cache_specs
from helix_jax.config import ModelConfig
from helix_jax.layout import BlockLayout
from helix_jax.mesh import EXPERT_WEIGHTS, TP
from helix_jax.models.transformer import Weights
from helix_jax.plan import Plan


def count_weight_bytes(config: ModelConfig, rows: int, weights: Weights) -> float:
    """Return the bytes of weights that a device must read in a step."""
    named = [(str(path[-1].key), array) for path, array in jax.tree_util.tree_leaves_with_path(weights)]
    return sum(bytes_per_device(array) * estimate_read_share(config, name, rows) for name, array in named)


def estimate_read_share(config: ModelConfig, name: str, rows: int) -> float:
    """Return the share of a parameter that a step of `rows` tokens reads."""
    if name == "embed_VD" and not config.tied_head:
        return min(1, rows / config.vocab)
    if config.experts and name in EXPERT_WEIGHTS["flat"]:
        # A high estimate: routing is balanced, and no two rows choose the same expert until all have been chosen.
        return min(1, rows * config.experts.top_k / config.experts.num_experts)
    return 1


class Sequences(Protocol):
    """How many rows there are, and the length of each prompt."""

    @property
    def rows(self) -> int: ...
    @property
    def context(self) -> int: ...


def count_kv_bytes(
    case: Sequences, options: argparse.Namespace, config: ModelConfig, plan: Plan
) -> tuple[float, float]:
    """Return the bytes of the cache that a device must read in a step. A windowed layer reads its window.

    Returns:
        The bytes if all ranks store the same number of tokens, and the bytes of the fullest rank.

    Source: arXiv 2507.07120, appendix A.
    """
    tp = plan.mesh.shape[TP]
    spec = cache_specs(config, plan.cache_dtype_for(options.dtype))[0]  # the groups differ in windows only
    per_slot = case.rows * -(-spec.kv_heads // tp) * spec.bytes_per_token / (spec.layers * spec.kv_heads)
    lengths = case.context, case.context + options.decoded
    windows = [config.window_of(layer) for layer in range(config.layers)]
    slots_LR = np.array([count_slots(*lengths, plan.layout, window) for window in windows])
    return per_slot * float(slots_LR.mean(1).sum()), per_slot * float(slots_LR.max(1).sum())


def count_slots(prompt_len: int, length: int, layout: BlockLayout, window: int | None) -> np.ndarray:
    """Return the slots of a row that each rank reads in a layer."""
    rank_R = np.arange(layout.ranks)
    before_window = layout.filled(length - window, prompt_len, rank_R) if window else 0
    return layout.filled(length, prompt_len, rank_R) - before_window
