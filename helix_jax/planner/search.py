"""Searches the ways to share a model: the Pareto frontier of speed and throughput, and the best choice for a limit."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from helix_jax.config import ModelConfig
from helix_jax.planner.costs import Costs, Workload
from helix_jax.planner.hardware import Hardware
from helix_jax.planner.parallelism import Parallelism, divisors, enumerate_parallelisms
from helix_jax.planner.step import StepTime, most_rows, predict_step


@dataclass(frozen=True)
class Candidate:
    """A parallelism with a number of rows, and what it is predicted to do.

    Args:
        parallelism: How the devices of a replica share the model.
        rows: The rows of a replica.
        most_rows: The rows that a replica has memory for.
        time: Seconds per token of every row.
        memory_bytes: The bytes of weights and cache of a device.
    """

    parallelism: Parallelism
    rows: int
    most_rows: int
    time: StepTime
    memory_bytes: float

    @property
    def ttl_s(self) -> float:
        """Seconds per token of a row, the token-to-token latency."""
        return self.time.total

    @property
    def tokens_per_s_per_user(self) -> float:
        """Tokens per second of a row."""
        return 1 / self.ttl_s

    @property
    def tokens_per_s_per_device(self) -> float:
        """Tokens per second of all rows, divided by the devices."""
        return self.rows / self.ttl_s / self.parallelism.devices

    @property
    def bottleneck(self) -> str:
        """What most of the time is spent on, or "memory" if there is none for twice the rows and most is for weights.

        More rows would share the reads of the weights, so that then memory limits the throughput.
        """
        name = self.time.bottleneck()
        return "memory" if name == "weights" and 2 * self.rows > self.most_rows else name


def sweep(
    config: ModelConfig, workload: Workload, hardware: Hardware, devices: int, strategies: Iterable[str]
) -> list[Candidate]:
    """Predict every parallelism that fits into memory, on every number of devices that divides `devices`.

    Args:
        config: The model.
        workload: What is decoded.
        hardware: The devices.
        devices: The number of devices. With fewer, there are several replicas.
        strategies: The strategies to try, keys of `parallelism.STRATEGIES`.
    """
    return [
        candidate
        for count in divisors(devices)
        for parallelism in enumerate_parallelisms(config, count, tuple(strategies))
        for candidate in _candidates(config, workload, hardware, parallelism)
    ]


def pareto_frontier(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that no other one exceeds in tokens per second per user and per device, fastest first."""
    frontier: list[Candidate] = []
    fastest_first = sorted(candidates, key=lambda each: (-each.tokens_per_s_per_user, -each.tokens_per_s_per_device))
    for candidate in fastest_first:
        if not frontier or candidate.tokens_per_s_per_device > frontier[-1].tokens_per_s_per_device:
            frontier.append(candidate)
    return frontier


def best_throughput(candidates: Iterable[Candidate], ttl_s: float = np.inf) -> Candidate | None:
    """Return the candidate with most tokens per second and device of those that take at most `ttl_s` per token."""
    return max(
        (each for each in candidates if each.ttl_s <= ttl_s),
        key=lambda each: each.tokens_per_s_per_device,
        default=None,
    )


def fastest(candidates: Iterable[Candidate], devices: int = 0, rows: int = 0) -> Candidate | None:
    """Return the candidate with the fewest seconds per token of those whose replicas on `devices` have `rows` rows."""
    enough = (each for each in candidates if each.rows * (devices // each.parallelism.devices) >= rows)
    return min(enough, key=lambda each: each.ttl_s, default=None)


def throughput_gain(frontier: Iterable[Candidate], baseline: Iterable[Candidate]) -> tuple[float, float]:
    """Return the largest ratio of tokens per second and device to a baseline, and the seconds per token where it is.

    Only latencies that the baseline reaches are compared.
    """
    ours, gains = list(frontier), []
    for other in pareto_frontier(baseline):
        best = best_throughput(ours, other.ttl_s)
        if best:
            gains.append((best.tokens_per_s_per_device / other.tokens_per_s_per_device, other.ttl_s))
    return max(gains, default=(np.nan, np.nan))


def interactivity_gain(frontier: Iterable[Candidate], baseline: Iterable[Candidate]) -> float:
    """Return the ratio of the most tokens per second and user to those of a baseline."""
    ours, theirs = fastest(frontier), fastest(baseline)
    return theirs.ttl_s / ours.ttl_s if ours and theirs else np.nan


def _candidates(
    config: ModelConfig, workload: Workload, hardware: Hardware, parallelism: Parallelism
) -> Iterator[Candidate]:
    limit = most_rows(config, workload, parallelism, hardware)
    if not limit:
        return
    costs = Costs(config, workload, parallelism)
    rows_X = _rows_to_try(limit, parallelism.pp * parallelism.dp)
    times = predict_step(config, workload, parallelism, hardware, rows_X)
    for index, rows in enumerate(rows_X):
        time = StepTime(*(float(seconds[index]) for seconds in times))
        memory = costs.weight_bytes() + rows * costs.cache_bytes_per_row()
        yield Candidate(parallelism, rows, limit, time, memory)


def _rows_to_try(limit: int, least: int) -> list[int]:
    """Return powers of two times `least`, up to `limit`, and `limit`."""
    steps = range((limit // least).bit_length())
    return sorted({limit, *(least << step for step in steps)})
