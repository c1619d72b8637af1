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


def plot_crossover(
    figure: Any, curves: Mapping[tuple[str, int], Curves], measured: Iterable[Measured], devices: int
) -> None:
    """Draw predicted milliseconds by context, one panel per model and number of rows, and measured points over them.

    Args:
        figure: An empty matplotlib figure.
        curves: The predictions by model and rows.
        measured: The points.
        devices: The number of devices.
    """
    figure.set_size_inches(4 * len(curves), 3.6)
    points = list(measured)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, ((model, rows), each) in zip(panels, curves.items(), strict=True):
        for label, times, color, mesh in (
            ("cp", each.cp_ms, "C0", (1, devices)),
            ("tp", each.tp_ms, "C1", (devices, 1)),
        ):
            axes.plot(each.contexts, times, color=color, label=f"{label} {devices}, predicted")
            own = [p for p in points if (p.model, p.rows, (p.tp, p.cp)) == (model, rows, mesh)]
            if own:
                axes.plot([p.context for p in own], [p.ms for p in own], "o", color=color, label=f"{label}, measured")
        axes.set(xscale="log", xlabel="context", ylabel="ms per token", title=f"{model}, {rows} rows")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
