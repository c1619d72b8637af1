"""Describes how devices can share a model: the strategies that are compared, and their sizes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from helix_jax.config import ModelConfig
from helix_jax.heads import unsupported_tp_reason
from helix_jax.validation import check_choice, check_int


class Strategy(NamedTuple):
    """A way to share a model.

    Attributes:
        axes: The axes that it may have beside tp and ep.
        description: What is divided over which axes.
        output_axes: The axes over which the output projection of attention is divided.
    """

    axes: tuple[str, ...]
    description: str
    output_axes: tuple[str, ...] = ("tp",)


STRATEGIES = {
    "helix": Strategy(("cp",), "the sequence over cp, everything else over tp x cp", ("tp", "cp")),
    "tp": Strategy((), "tensor parallelism; the cache is copied beyond the key/value heads"),
    "pp": Strategy(("pp",), "tensor parallelism in pipeline stages"),
    "kvp": Strategy(("cp", "pp"), "the sequence over cp, everything else over tp alone, copied (Medha)"),
    "dp": Strategy(("dp",), "rows over dp in attention, everything else over tp x dp"),
}
BASELINES = ("tp", "pp", "kvp", "dp")  # the paper's, and dp
OWN = ("helix", "tp")  # what helix_jax runs


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How devices share a model.

    Args:
        strategy: A key of STRATEGIES.
        tp: Devices that share the heads of attention.
        cp: Devices that share the sequence.
        pp: Pipeline stages, each with a share of the layers and as many rows in progress as every other.
        dp: Groups of devices that share the rows in attention.
        ep: Devices that share the experts. The other devices of the feed-forward share the width of each expert.

    Raises:
        TypeError: A size is not an int.
        ValueError: The strategy is unknown, a size is below 1, the strategy does not have an axis, or ep does not
            divide the devices of the feed-forward.
    """

    strategy: str
    tp: int
    cp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        axes = STRATEGIES[self.strategy].axes
        for axis in ("tp", "cp", "pp", "dp", "ep"):
            check_int(axis, getattr(self, axis), least=1)
            if axis not in (*axes, "tp", "ep") and getattr(self, axis) > 1:
                raise ValueError(f"{axis} is {getattr(self, axis)}, but strategy {self.strategy} has none: give 1")
        if self.ffn_devices % self.ep:
            raise ValueError(f"ep {self.ep} does not divide the {self.ffn_devices} devices: choose a divisor")

    @property
    def devices(self) -> int:
        """All devices of a replica of the model."""
        return self.pp * self.dp * self.tp * self.cp

    @property
    def output_devices(self) -> int:
        """The devices that share the output projection of attention."""
        return math.prod(getattr(self, axis) for axis in STRATEGIES[self.strategy].output_axes)

    @property
    def ffn_devices(self) -> int:
        """The devices that share the feed-forward layers and the output head."""
        return self.output_devices * self.dp

    @property
    def experts(self) -> str | None:
        """The option `--experts` of helix_jax that shares experts like this, or None if it has none."""
        if self.strategy not in OWN:
            return None
        return "flat" if self.ep == self.devices else "cp" if self.ep == self.cp else None

    def __str__(self) -> str:
        axes = [axis for axis in STRATEGIES[self.strategy].axes if getattr(self, axis) > 1]
        return f"{self.strategy}: " + " x ".join(f"{axis} {getattr(self, axis)}" for axis in ("tp", *axes))


def enumerate_parallelisms(config: ModelConfig, devices: int, strategies: tuple[str, ...]) -> Iterator[Parallelism]:
    """Yield every way in which exactly `devices` devices can share a model.

    Args:
        config: The model.
        devices: The number of devices.
        strategies: The strategies, keys of STRATEGIES. Each has all of its axes above 1, or all but pp.
    """
    kv_heads = None if config.latent else config.kv_heads
    for strategy in strategies:
        axes = STRATEGIES[strategy].axes
        for tp in divisors(devices):
            if unsupported_tp_reason(tp, config.heads, kv_heads):
                continue
            for sizes in _factorisations(devices // tp, axes):
                if all(size > 1 for axis, size in sizes.items() if axis != "pp" or axes == ("pp",)):
                    yield from _with_experts(config, Parallelism(strategy=strategy, tp=tp, **sizes))


def _with_experts(config: ModelConfig, parallelism: Parallelism) -> Iterator[Parallelism]:
    """Yield a parallelism with every number of devices that may share the experts, the largest first."""
    if parallelism.pp > config.layers:
        return
    most = config.experts.num_experts if config.experts else 1
    sizes = {name: getattr(parallelism, name) for name in ("strategy", "tp", "cp", "pp", "dp")}
    for ep in reversed(divisors(parallelism.ffn_devices)):
        if ep <= most:
            yield Parallelism(**sizes, ep=ep)


def _factorisations(n: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Yield every way to write n as a product of one size per axis."""
    if not axes:
        if n == 1:
            yield {}
        return
    for size in divisors(n):
        for others in _factorisations(n // size, axes[1:]):
            yield {axes[0]: size, **others}


def divisors(n: int) -> list[int]:
    """Return the divisors of n, in order."""
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})
