"""Show which rank stores which tokens of a prompt and its continuation: as a table, as JSON or as a figure."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from helix_jax.cli.app import OK
from helix_jax.cli.options import add_choice
from helix_jax.cli.output import new_figure
from helix_jax.layout import PLACEMENTS, BlockLayout, rank_ranges
from helix_jax.validation import check_int

EXAMPLE = "helix-jax layout --prompt 400 --decode 400 --block 100 --cp 4"
MAX_BLOCKS = 10_000_000
MAX_LEGEND_RANKS = 16
_MARKERS, _MARKERS_PER_LINE = "os^vD*Px", 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `helix-jax layout` to its parser."""
    sequence = parser.add_argument_group("sequence")
    add = sequence.add_argument
    add("--prompt", type=int, required=True, metavar="TOKENS", help="length of the prompt (may be 0)")
    add("--decode", type=int, required=True, metavar="TOKENS", help="number of decoded tokens")
    ranks = parser.add_argument_group("ranks", "the devices that share the sequence")
    add = ranks.add_argument
    add("--block", type=int, required=True, metavar="TOKENS", help="length of a block: consecutive tokens on one rank")
    add("--cp", type=int, required=True, metavar="RANKS", help="number of ranks")
    add_choice(ranks, "--placement", PLACEMENTS, "rule that assigns blocks to ranks", default="helix")
    add = parser.add_argument_group("output").add_argument
    add("--plot", type=Path, metavar="FILE.png", help="plot tokens per rank against decode step, for all placements")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run `helix-jax layout` and return its exit code."""
    check_int("--prompt", options.prompt, least=0)
    check_int("--decode", options.decode, least=0)
    layout = BlockLayout(options.cp, options.block, options.placement)
    blocks = -(-(options.prompt + options.decode) // options.block)
    if blocks > MAX_BLOCKS:
        raise ValueError(f"{blocks} blocks are too many to list: increase --block, or give fewer tokens")
    result = describe_layout(layout, options.prompt, options.decode)
    if options.plot is not None:
        plot_growth(options.plot, layout, options.prompt, options.decode)
        print(f"helix-jax: wrote '{options.plot}'", file=sys.stderr)
    if options.json:
        print(json.dumps(result))
    else:
        Console(highlight=False, soft_wrap=True).print(_table(result))
    return OK


def describe_layout(layout: BlockLayout, prompt_len: int, decoded: int) -> dict[str, Any]:
    """Return, for every rank, its ranges of positions after decoding, and the skew between the ranks."""
    ranges = rank_ranges(layout, prompt_len + decoded, prompt_len)
    tokens = [sum(past_last - first for first, past_last in of_rank) for of_rank in ranges]
    ranks = [
        {"rank": rank, "tokens": count, "ranges": [list(positions) for positions in of_rank]}
        for rank, (count, of_rank) in enumerate(zip(tokens, ranges, strict=True))
    ]
    return {
        "placement": layout.placement,
        "block": layout.block,
        "cp": layout.ranks,
        "ranks": ranks,
        "skew_tokens": max(tokens) - min(tokens),
    }


def plot_growth(file: Path, layout: BlockLayout, prompt_len: int, decoded: int) -> None:
    """Plot tokens per rank against decode step, one panel per placement.

    Args:
        file: The image to write. Its suffix determines the format.
        layout: The ranks and the block. All placements are plotted.
        prompt_len: The length of the prompt.
        decoded: The number of decoded tokens.

    Raises:
        ValueError: matplotlib cannot write such files.
        MissingPackageError: matplotlib is not installed.
    """
    figure = new_figure("--plot", file)
    figure.set_size_inches(12, 3.6)
    panels = figure.subplots(1, len(PLACEMENTS), sharey=True)
    steps = np.arange(decoded + 1)
    for panel, placement in zip(panels, PLACEMENTS, strict=True):
        placed = BlockLayout(layout.ranks, layout.block, placement)
        for rank in range(layout.ranks):
            style = line_style(rank, layout.ranks, len(steps))
            panel.plot(steps, placed.filled(prompt_len + steps, prompt_len, rank), label=f"rank {rank}", **style)
        panel.set(title=placement, xlabel="decode step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens stored")
    if layout.ranks <= MAX_LEGEND_RANKS:
        panels[-1].legend(loc="upper left", fontsize="small")
    figure.suptitle(f"prompt {prompt_len}, block {layout.block}, cp {layout.ranks}")
    figure.savefig(file, dpi=120)


def line_style(rank: int, ranks: int, points: int) -> dict[str, Any]:
    """Return the style of the line of a rank, distinguishable from those of other ranks where they coincide.

    Later lines are thinner, so that earlier ones are seen behind them, and the markers of the ranks alternate.

    Args:
        rank: The rank.
        ranks: The number of ranks.
        points: The number of points of the line.
    """
    spacing = max(1, points // _MARKERS_PER_LINE)
    return {
        "color": f"C{rank % 10}",
        "linewidth": 4 - 3 * rank / max(1, ranks - 1),
        "marker": _MARKERS[rank % len(_MARKERS)],
        "markevery": (spacing * rank // ranks, spacing),
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['placement']}, block {result['block']}, cp {result['cp']}: skew {result['skew_tokens']} tokens"
    table = Table("rank", "tokens", "positions [first, past last)", title=title, title_justify="left")
    for rank in result["ranks"]:
        ranges = ", ".join(f"{first}-{past_last}" for first, past_last in rank["ranges"])
        table.add_row(str(rank["rank"]), str(rank["tokens"]), ranges or "none")
    return table
