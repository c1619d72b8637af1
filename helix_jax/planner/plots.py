"""Draws frontiers, crossings, and figure 1 of the paper."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helix_jax.planner.comparison import Measured
from helix_jax.planner.crossover import Curves
from helix_jax.planner.paper import Panel
from helix_jax.planner.search import Candidate


def plot_frontiers(figure: Any, frontiers: Mapping[str, Iterable[Candidate]], title: str) -> None:
    """Draw tokens per second and device against tokens per second and user.

    Args:
        figure: An empty matplotlib figure.
        frontiers: Candidates by the label of their line.
        title: The title.
    """
    axes = figure.add_subplot(xlabel="tokens per second and user", ylabel="tokens per second and device")
    for label, candidates in frontiers.items():
        points = [(each.tokens_per_s_per_user, each.tokens_per_s_per_device) for each in candidates]
        axes.plot(*zip(*points, strict=True), "o-", label=label, markersize=4) if points else None
    axes.set(yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend()


def plot_figure_1(figure: Any, panels: Sequence[Panel]) -> None:
    """Draw the read times of the panels of figure 1."""
    figure.set_size_inches(12, 3.6)
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        axes.loglog(panel.x, panel.cache_us, "o-", base=2, label="cache")
        axes.loglog(panel.x, panel.weights_us, "s-", base=2, label="weights")
        axes.set(xlabel=panel.label, ylabel="microseconds per layer")
        axes.grid(alpha=0.3)
        axes.legend()


def plot_crossover(figure: Any, panels: Mapping[str, tuple[Curves, Sequence[Measured]]], devices: int) -> None:
    """Draw predicted milliseconds by context, and measured points over them.

    Args:
        figure: An empty matplotlib figure.
        panels: The predictions and the measured points, by the title of their panel.
        devices: The number of devices.
    """
    figure.set_size_inches(4 * len(panels), 3.6)
    for axes, (title, (curves, points)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for label, times, mesh, style in (
            (f"tp {devices}", curves.tp_ms, (devices, 1), {"color": "C1", "linestyle": "--", "marker": "s"}),
            (f"cp {devices} (Helix)", curves.cp_ms, (1, devices), {"color": "C0", "linestyle": "-", "marker": "o"}),
        ):
            axes.plot(curves.contexts, times, **style | {"marker": ""}, label=f"{label}, predicted")
            own = [(point.context, point.ms) for point in points if (point.tp, point.cp) == mesh]
            if own:
                axes.plot(*zip(*own, strict=True), **style | {"linestyle": ""}, label=f"{label}, measured")
        axes.set_xscale("log", base=2)
        axes.set_xticks(curves.contexts[::2], [f"{context >> 10}K" for context in curves.contexts[::2]])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="context in tokens", ylabel="ms per token")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.tight_layout()
