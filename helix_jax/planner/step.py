"""Predicts the time and the memory of a decode step."""

import math
from typing import Any, NamedTuple

import numpy as np

from helix_jax.config import ModelConfig
from helix_jax.planner.costs import Costs, Layer, Numbers, Part, Workload, as_rows, count_layers
from helix_jax.planner.hardware import Hardware
from helix_jax.planner.parallelism import Parallelism

MEMORY_SHARE = 0.9  # of a device's memory; the rest is for activations, programs and fragmentation


class StepTime(NamedTuple):
    """Seconds of a step by what they are spent on. Each may be an array of one per number of rows.

    Attributes:
        weights: Reading weights.
        cache: Reading the cache.
        arithmetic: Operations, as far as they take longer than the reads of the same part.
        communication: Collectives.
        launches: What kernels take however little they do, and the routing of tokens to experts.
    """

    weights: Numbers = 0.0
    cache: Numbers = 0.0
    arithmetic: Numbers = 0.0
    communication: Numbers = 0.0
    launches: Numbers = 0.0

    @property
    def total(self) -> Any:
        """All seconds of the step."""
        return sum(self)

    def bottleneck(self) -> str:
        """Return the name of the largest."""
        return max(self._fields, key=lambda name: getattr(self, name))

    def plus(self, other: "StepTime", times: float = 1.0) -> "StepTime":
        """Return the sum of this and `times` as much as another."""
        return StepTime(*(mine + times * its for mine, its in zip(self, other, strict=True)))


def predict_step(
    config: ModelConfig, workload: Workload, parallelism: Parallelism, hardware: Hardware, rows: Any
) -> StepTime:
    """Predict the time per token of every row, while all rows decode.

    Args:
        config: The model.
        workload: What is decoded.
        parallelism: How devices share the model.
        hardware: The devices.
        rows: The rows of a replica. With pipeline stages, each has rows / pp of them at a time, and a token passes all
            stages. An array gives one time for each.
    """
    costs = Costs(config, workload, parallelism)
    in_stage = as_rows(rows) / parallelism.pp
    total = _time_part(costs.head(in_stage), workload, hardware)
    for kind, count in count_layers(config):
        layer = _time_layer(costs.layer(kind, in_stage), workload, hardware, in_stage / parallelism.dp)
        total = total.plus(layer, count * _imbalance(config, parallelism))
    total = total.plus(_time_part(costs.handovers(in_stage), workload, hardware))
    return StepTime(*(np.broadcast_to(seconds, in_stage.shape) for seconds in total))


def most_rows(config: ModelConfig, workload: Workload, parallelism: Parallelism, hardware: Hardware) -> int:
    """Return how many rows a replica has memory for. 0: not even its weights fit, or not a row beside them."""
    costs = Costs(config, workload, parallelism)
    free = hardware.memory_bytes * MEMORY_SHARE - costs.weight_bytes() * _imbalance(config, parallelism)
    rows = math.floor(free / (costs.cache_bytes_per_row() * _imbalance(config, parallelism)))
    groups = parallelism.pp * parallelism.dp
    return max(0, rows // groups * groups)


def exposed_communication(compute: Numbers, communication: Numbers, rows: Numbers, hop_b: bool) -> Numbers:
    """Return the seconds of a combine that attention does not hide.

    Args:
        compute: Seconds of attention of all rows.
        communication: Seconds of the combine of all rows.
        rows: The number of rows.
        hop_b: Whether the combine of a row overlaps with the attention of the next, in a pipeline over the rows.

    Source: arXiv 2507.07120, figure 3.
    """
    rows = np.maximum(rows, 1)
    hidden = (rows - 1) / rows * np.minimum(compute, communication)
    return communication - hidden if hop_b else communication


def _imbalance(config: ModelConfig, parallelism: Parallelism) -> float:
    """Return the layers of the largest pipeline stage as a multiple of an even share."""
    return math.ceil(config.layers / parallelism.pp) * parallelism.pp / config.layers


def _time_layer(layer: Layer, workload: Workload, hardware: Hardware, rows: Numbers) -> StepTime:
    attention = _time_part(layer.attention, workload, hardware, workload.cache_dtype)
    compute, sent = attention.total - attention.communication, attention.communication
    total = attention._replace(communication=exposed_communication(compute, sent, rows, workload.hop_b))
    for part in (layer.projections, layer.output, layer.ffn):
        total = total.plus(_time_part(part, workload, hardware))
    return total


def _time_part(part: Part, workload: Workload, hardware: Hardware, dtype: str | None = None) -> StepTime:
    weights, cache = part.weight_bytes / hardware.bandwidth, part.cache_bytes / hardware.bandwidth
    operations = part.flops / hardware.flops_of(dtype or workload.dtype)
    return StepTime(
        weights=weights,
        cache=cache,
        arithmetic=np.maximum(operations - weights - cache, 0),
        communication=part.collectives * hardware.collective_s + part.sent_bytes / hardware.link_bandwidth,
        launches=part.kernels * hardware.kernel_s + part.routings * hardware.routing_s,
    )
