"""Computes what the paper reports: the read times of appendix A, figure 1, and the claims at a million tokens.

Source: arXiv 2507.07120.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from helix_jax.config import ModelConfig
from helix_jax.planner.costs import Workload
from helix_jax.planner.hardware import HARDWARE, Hardware
from helix_jax.planner.parallelism import OWN
from helix_jax.planner.search import Candidate, interactivity_gain, pareto_frontier, sweep, throughput_gain

DEVICES, CONTEXT = 64, 2**20

# Everything is FP4, HOP-B is on, and per-head values are exchanged. Only reads, operations and communication take time.
# A collective takes what it takes on H200s, which is an assumption: the paper does not give the latency that it uses.
HARDWARE_OF_PAPER = replace(HARDWARE["gb200"], kernel_s=0.0, routing_s=0.0)
WORKLOAD = Workload(context=CONTEXT, dtype="fp4", cache_dtype="fp4", hop_b=True, combine_values=True)


@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """A layer as in appendix A, whose letters the comments give, and how it is decoded.

    Args:
        width: The width of the residual stream (D).
        heads: Query heads (N, in figure 1 Q).
        kv_heads: Key/value heads (K).
        head_width: The width of a head (H).
        ff_width: The width of the feed-forward (F).
        rows: Sequences (B).
        number_bytes: The bytes of a number.
        bandwidth: The bytes per second that a device reads.
    """

    width: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    rows: int
    number_bytes: float
    bandwidth: float

    def cache_read_s(self, context: int, tp: int = 1, kvp: int = 1) -> float:
        """Return the seconds to read a device's share of the cache of a layer."""
        numbers = self.rows * 2 * math.ceil(self.kv_heads / tp) * self.head_width * (context / kvp)
        return numbers * self.number_bytes / self.bandwidth

    def weight_read_s(self, tp: int = 1, ffn_tp: int | None = None) -> float:
        """Return the seconds to read a device's share of the weights of a layer. By default ffn_tp is tp.

        As in the paper, the output projection is divided by tp, though Helix divides it by all devices.
        """
        attention = 2 * self.width * (self.heads / tp) * self.head_width
        attention += 2 * self.width * math.ceil(self.kv_heads / tp) * self.head_width
        numbers = attention + 3 * self.width * self.ff_width / (ffn_tp or tp)
        return numbers * self.number_bytes / self.bandwidth


FIGURE_1 = DenseLayer(
    width=16384, heads=128, kv_heads=8, head_width=128, ff_width=65536, rows=8, number_bytes=0.5, bandwidth=8e12
)


class Panel(NamedTuple):
    """A panel of figure 1: microseconds to read the cache and the weights of a layer."""

    label: str
    x: Sequence[int]
    cache_us: list[float]
    weights_us: list[float]


def figure_1(layer: DenseLayer = FIGURE_1) -> list[Panel]:
    """Return the panels of figure 1: read times by tp, by kvp at a tp of the key/value heads, and by context."""
    widths, tp = [2**k for k in range(7)], layer.kv_heads
    contexts = [2**k for k in range(14, 23)]
    by_tp = [(layer.cache_read_s(CONTEXT, x), layer.weight_read_s(x)) for x in widths]
    by_kvp = [(layer.cache_read_s(CONTEXT, tp, x), layer.weight_read_s(tp, tp * x)) for x in widths]
    by_context = [(layer.cache_read_s(x, tp), layer.weight_read_s(tp)) for x in contexts]
    labels = ("tp", f"kvp, tp {tp}, feed-forward over all devices", f"context, tp {tp}")
    return [
        Panel(label, x, [1e6 * cache for cache, _ in times], [1e6 * weights for _, weights in times])
        for label, x, times in zip(labels, (widths, widths, contexts), (by_tp, by_kvp, by_context), strict=True)
    ]


def crossing_context(layer: DenseLayer, tp: int, ffn_tp: int | None = None, kvp: int = 1) -> float:
    """Return the context from which reading the cache takes longer than reading the weights."""
    return layer.weight_read_s(tp, ffn_tp) / layer.cache_read_s(1, tp, kvp)


class Gains(NamedTuple):
    """What Helix gains over baselines, as ratios.

    Attributes:
        interactivity: Of the most tokens per second and user.
        throughput: Of tokens per second and device, the largest of all latencies that the baselines reach. With equal
            latencies and devices it is the ratio of rows.
        ttl_ms: The latency at which it is.
    """

    interactivity: float
    throughput: float
    ttl_ms: float


# model -> the baselines for which the gains are closest to the paper's, and the paper's interactivity and throughput
CLAIMS = {
    "llama-3.1-405b": (("tp", "pp", "kvp"), 1.13, 4.0),
    "deepseek-r1": (("tp", "pp"), 1.5, 32.0),
}
# model -> tokens per second and user without HOP-B, relative to with it (figure 7)
HOP_B_CLAIMS = {"llama-3.1-405b": -0.12, "deepseek-r1": -0.01}


def sweep_as_paper(
    config: ModelConfig, strategies: Sequence[str] = OWN, hardware: Hardware = HARDWARE_OF_PAPER, hop_b: bool = True
) -> list[Candidate]:
    """Predict all candidates of some strategies on up to 64 devices, with the paper's assumptions."""
    return sweep(config, replace(WORKLOAD, hop_b=hop_b), hardware, DEVICES, strategies)


def compute_gains(config: ModelConfig, baselines: Sequence[str], hardware: Hardware = HARDWARE_OF_PAPER) -> Gains:
    """Return what Helix gains over some baselines, with the paper's assumptions."""
    ours, theirs = sweep_as_paper(config, OWN, hardware), sweep_as_paper(config, baselines, hardware)
    throughput, ttl_s = throughput_gain(ours, theirs)
    return Gains(interactivity_gain(ours, theirs), throughput, 1e3 * ttl_s)


def hop_b_losses(config: ModelConfig, hardware: Hardware = HARDWARE_OF_PAPER) -> list[tuple[int, float]]:
    """Return, along the frontier, the rows and by how much tokens per second and user change without HOP-B."""
    without = {(each.parallelism, each.rows): each for each in sweep_as_paper(config, OWN, hardware, hop_b=False)}
    frontier = pareto_frontier(sweep_as_paper(config, OWN, hardware))
    return [(each.rows, each.ttl_s / without[each.parallelism, each.rows].ttl_s - 1) for each in frontier]
