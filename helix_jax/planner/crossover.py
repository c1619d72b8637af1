"""Finds where sharding the sequence becomes faster than tensor parallelism, whose devices copy the cache."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from helix_jax.config import ModelConfig
from helix_jax.planner.costs import Workload
from helix_jax.planner.hardware import Hardware
from helix_jax.planner.parallelism import Parallelism
from helix_jax.planner.step import predict_step

LONGEST = 2**24  # tokens, beyond which a crossing is not searched for


class Curves(NamedTuple):
    """Milliseconds per token by context, with the sequence over all devices and with the heads over all devices."""

    contexts: Sequence[int]
    cp_ms: list[float]
    tp_ms: list[float]


def predict_ms(config: ModelConfig, hardware: Hardware, tp: int, cp: int, rows: int, context: int) -> float:
    """Return the milliseconds per token of `rows` rows on a mesh, in bfloat16."""
    parallelism = Parallelism(strategy="helix" if cp > 1 else "tp", tp=tp, cp=cp)
    return 1e3 * float(predict_step(config, Workload(context=context), parallelism, hardware, rows).total)


def compare_by_context(
    config: ModelConfig, hardware: Hardware, devices: int, rows: int, contexts: Sequence[int]
) -> Curves:
    """Return the times of cp `devices` and tp `devices` over contexts."""
    cp_ms = [predict_ms(config, hardware, 1, devices, rows, context) for context in contexts]
    tp_ms = [predict_ms(config, hardware, devices, 1, rows, context) for context in contexts]
    return Curves(contexts, cp_ms, tp_ms)


def crossover_context(config: ModelConfig, hardware: Hardware, devices: int, rows: int) -> int | None:
    """Return the shortest context from which cp `devices` is faster than tp `devices`, to 1 %.

    Returns:
        The context, or None if tp is still faster at the longest context that is searched.
    """

    def cp_is_faster(context: int) -> bool:
        [cp_ms], [tp_ms] = compare_by_context(config, hardware, devices, rows, [context])[1:]
        return cp_ms < tp_ms

    contexts = np.unique(np.geomspace(1, LONGEST, 1700).round().astype(int)).tolist()
    if not cp_is_faster(contexts[-1]):
        return None
    low, high = 0, len(contexts) - 1  # the difference of the two is linear in the context, up to rounding
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cp_is_faster(contexts[middle]) else (middle + 1, high)
    return contexts[low]
