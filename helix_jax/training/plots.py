"""Draws the curve of a training run into a matplotlib figure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_LEAST_SMOOTHED = 10  # steps over which the average decays: at least so many, and at least this share of the run
_SMOOTHED_SHARE = 0.01


def plot_curve(figure: Any, entries: Iterable[Mapping[str, int | float]]) -> None:
    """Draw bits per byte, or perplexity if the tokens are not those of text, against the step.

    The values of the steps are drawn in a light colour, their moving average and the held-out values over them.

    Args:
        figure: An empty matplotlib figure.
        entries: The lines of a run's log.
    """
    entries = list(entries)
    in_bytes = any("bits_per_byte" in entry for entry in entries)
    trained, held_out = (_points(entries, prefix, in_bytes) for prefix in ("", "held_out_"))
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte" if in_bytes else "perplexity")
    if trained:
        steps, values = zip(*trained, strict=True)
        axes.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8, label="each step")
        axes.plot(steps, smooth(values), color="C0", linewidth=1.8, label="moving average")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C1", linewidth=1.8, markersize=5, label="held-out text")
    if not in_bytes:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if trained or held_out:
        axes.legend()


def smooth(values: Sequence[int | float]) -> np.ndarray:
    """Return the exponential moving average of values, without the bias of its start."""
    span = max(_LEAST_SMOOTHED, _SMOOTHED_SHARE * len(values))
    decay = math.exp(-1 / span)
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight)
    return np.asarray(averages)


def _points(
    entries: Iterable[Mapping[str, int | float]], prefix: str, in_bytes: bool
) -> list[tuple[int | float, int | float]]:
    """Return the steps at which a value was logged, and the values."""
    name = f"{prefix}bits_per_byte" if in_bytes else f"{prefix}nats"
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return points if in_bytes else [(step, math.exp(nats)) for step, nats in points]
