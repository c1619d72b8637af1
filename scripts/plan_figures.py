#!/usr/bin/env python3
"""Draw the figures of helix_jax/planner/README.md, and print its tables.

python scripts/plan_figures.py --out DIR [--measured FILE.json]

Figure 1 of arXiv 2507.07120 and the frontiers of its two models, predicted steps against measured ones, and the
contexts from which cp is faster than tp, on two devices. --measured adds the steps of bench_gpus.py, and draws the
last figure for four devices too.
"""

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from helix_jax.cli.app import Parser, run_command
from helix_jax.cli.output import new_figure
from helix_jax.planner import HARDWARE, OWN, pareto_frontier, read_shape, take_first_layers
from helix_jax.planner.comparison import Measured, compare, read_measured, summarise
from helix_jax.planner.crossover import compare_by_context, crossover_context
from helix_jax.planner.paper import CLAIMS, HOP_B_CLAIMS, compute_gains, figure_1, hop_b_losses, sweep_as_paper
from helix_jax.planner.plots import plot_crossover, plot_figure_1, plot_frontiers

PROGRAM = "plan_figures.py"
CONFIGS = Path(__file__).parents[1] / "configs"
BASELINES = {"TP, PP, EP": ("tp", "pp"), "and KVP": ("tp", "pp", "kvp"), "and DP": ("tp", "pp", "kvp", "dp")}
CROSSOVERS = ("gemma-3-1b", "deepseek-v2-lite", "llama-3.1-8b")
# Shapes that were measured, with a single key/value head or latent: how they differ from a config in configs/.
MEASURED = {
    "Llama-3.1-8B, 8 layers, 1 key/value head": {"model": "llama-3.1-8b", "layers": 8, "kv_heads": 1},
    "DeepSeek-V2-Lite, 6 layers, 1 latent": {"model": "deepseek-v2-lite", "layers": 6, "kv_heads": None},
}
ROWS = (1, 8, 32)
CONTEXTS = [2**k for k in range(13, 21)]


def main() -> int:
    return run_command(draw, PROGRAM)


def draw() -> None:
    parser = Parser(PROGRAM, __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the figures")
    text = "file of bench_gpus.py, whose steps are added to those of measured.json; may be repeated (default: none)"
    parser.add_argument("--measured", type=Path, action="append", default=[], metavar="FILE", help=text)
    options = parser.parse_args()
    out, added = options.out, [point for file in options.measured for point in read_added(file)]
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    figure = new_figure("--out", out / "figure_1.png")
    plot_figure_1(figure, figure_1())
    figure.savefig(out / "figure_1.png", dpi=120)
    for name in CLAIMS:
        draw_frontiers(out / f"{name}.png", name)
    console.print(claims_table(), comparison_table([*read_measured(), *added]))
    newest = [point for point in read_measured() if point.version.startswith("newest")]
    draw_crossover(out / "crossover.png", [*newest, *added], 2)
    if added:
        draw_crossover(out / "crossover_4.png", [*newest, *added], 4)
    console.print(crossover_table())


def read_added(file: Path) -> list[Measured]:
    """Read the steps of a file of bench_gpus.py whose models are in configs/."""
    try:
        points = read_measured(file)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--measured '{file}' is not of bench_gpus.py ({error!r}): give a file that is") from None
    return [point for point in points if (CONFIGS / f"{point.model}.toml").exists()]


def draw_frontiers(file: Path, name: str) -> None:
    config = read_shape(CONFIGS / f"{name}.toml")
    lines = {"Helix": OWN, **BASELINES}
    frontiers = {label: pareto_frontier(sweep_as_paper(config, strategies)) for label, strategies in lines.items()}
    figure = new_figure("--out", file)
    plot_frontiers(figure, frontiers, f"{name}, 1M tokens, FP4, up to 64 GB200")
    figure.savefig(file, dpi=120)


def claims_table() -> Table:
    table = Table("model", "baselines", "interactivity", "throughput", "at ms", title="gains of Helix at 1M tokens")
    for name, (_, interactivity, throughput) in CLAIMS.items():
        config = read_shape(CONFIGS / f"{name}.toml")
        table.add_row(name, "the paper's claims", f"{interactivity:g}", f"{throughput:g}", "")
        for label, strategies in BASELINES.items():
            gains = compute_gains(config, strategies)
            table.add_row("", label, *(f"{number:.2f}" for number in gains))
        losses = ", ".join(f"{rows}: {loss:.1%}" for rows, loss in hop_b_losses(config))
        table.add_row("", f"without HOP-B, the paper {HOP_B_CLAIMS[name]:.0%}, by rows: {losses}", "", "", "")
    return table


def comparison_table(points: list[Measured]) -> Table:
    configs = {name: read_shape(CONFIGS / f"{name}.toml") for name in {point.model for point in points}}
    pairs = compare(points, configs)
    summary = summarise(pairs)
    title = f"{summary['within']} of {summary['points']} points within 15 %; the worst {summary['worst_error']:+.1%}"
    names = ("version", "model", "layers", "tp x cp", "rows x context", "other settings", "ms", "predicted", "error")
    table = Table(*names, title=title)
    for point, ms in pairs:
        sizes = [str(point.layers or "all"), f"{point.tp} x {point.cp}", f"{point.rows} x {point.context}"]
        others = [f"kv heads {point.kv_heads}"] if point.kv_heads else []
        others += [name for name in (point.combine, point.cache_dtype) if name not in (Measured.combine, "bfloat16")]
        times = [f"{point.ms:.2f}", f"{ms:.2f}", f"{ms / point.ms - 1:+.1%}"]
        table.add_row(point.version, point.model, *sizes, ", ".join(others), *times)
    return table


def draw_crossover(file: Path, points: list[Measured], devices: int) -> None:
    panels = {}
    for title, shape in MEASURED.items():
        config = take_first_layers(read_shape(CONFIGS / f"{shape['model']}.toml"), shape["layers"])
        config = replace(config, kv_heads=shape["kv_heads"] or config.kv_heads)
        own = [point for point in points if all(getattr(point, key) == value for key, value in shape.items())]
        for rows in (1, 8):
            curves = compare_by_context(config, HARDWARE["h200"], devices, rows, CONTEXTS)
            measured = [point for point in own if point.rows == rows]
            panels[f"{title},\n{rows} row{'s' if rows > 1 else ''}"] = curves, measured
    figure = new_figure("--out", file)
    plot_crossover(figure, panels, devices)
    figure.savefig(file, dpi=100)


def crossover_table() -> Table:
    title = "two H200s: the context from which cp 2 is faster than tp 2 (predicted)"
    table = Table("model", *(f"rows {rows}" for rows in ROWS), title=title)
    for name in CROSSOVERS:
        config = read_shape(CONFIGS / f"{name}.toml")
        contexts = [crossover_context(config, HARDWARE["h200"], 2, rows) for rows in ROWS]
        table.add_row(name, *("never" if context is None else f"{context:,}" for context in contexts))
    return table


if __name__ == "__main__":
    sys.exit(main())
