"""Shows which rank holds which tokens of a prompt and its continuation, as a table, as JSON or as a picture."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from helix_jax.layout import PLACEMENTS, BlockLayout, rank_ranges

MOST_BLOCKS = 10_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", type=int, required=True, metavar="TOKENS", help="length of the prompt; 0 is legal")
    add("--decode", type=int, required=True, metavar="TOKENS", help="tokens decoded after it")
    add("--block", type=int, required=True, metavar="TOKENS", help="length of a block")
    add("--cp", type=int, required=True, metavar="RANKS", help="ranks that share the sequence")
    add("--placement", default="helix", metavar="|".join(PLACEMENTS), help="where blocks go (default: helix)")
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw tokens per rank against decode step, all placements",
    )
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    for name in ("prompt", "decode"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} is {getattr(options, name)}: give 0 tokens or more")
    layout = BlockLayout(options.cp, options.block, options.placement)
    blocks = -(-(options.prompt + options.decode) // options.block)
    if blocks > MOST_BLOCKS:
        raise ValueError(f"{blocks} blocks are too many to list: give a longer --block, or fewer tokens")
    found = report(layout, options.prompt, options.decode)
    if options.plot is not None:
        if not options.plot.suffix:
            raise ValueError(f"--plot '{options.plot}' has no ending: give a file like growth.png")
        plot_growth(options.plot, layout, options.prompt, options.decode)
        print(f"helix-jax: wrote '{options.plot}'", file=sys.stderr)
    if options.json:
        print(json.dumps(found))
    else:
        Console(highlight=False, soft_wrap=True).print(_table(found))
    return 0


def report(layout: BlockLayout, prompt_len: int, decoded: int) -> dict[str, Any]:
    """Who holds what at the end: for every rank its ranges of positions, and by how much the ranks differ."""
    held = rank_ranges(layout, prompt_len + decoded, prompt_len)
    tokens = [sum(past_last - first for first, past_last in ranges) for ranges in held]
    ranks = [
        {"rank": rank, "tokens": count, "ranges": [list(positions) for positions in ranges]}
        for rank, (count, ranges) in enumerate(zip(tokens, held, strict=True))
    ]
    return {
        "placement": layout.placement,
        "block": layout.block,
        "cp": layout.ranks,
        "ranks": ranks,
        "skew_tokens": max(tokens) - min(tokens),
    }


def plot_growth(file: Path, layout: BlockLayout, prompt_len: int, decoded: int) -> None:
    """Draws tokens per rank against decode step, one panel per placement, into `file`.

    Raises:
        ValueError: matplotlib is not installed, or it does not know the file's format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, len(PLACEMENTS), sharey=True)
    steps = np.arange(decoded + 1)
    for panel, placement in zip(panels, PLACEMENTS, strict=True):
        dealt = BlockLayout(layout.ranks, layout.block, placement)
        for rank in range(layout.ranks):
            panel.plot(steps, dealt.filled(prompt_len + steps, prompt_len, rank), label=f"rank {rank}")
        panel.set(title=placement, xlabel="decode step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens held")
    if layout.ranks <= 16:
        panels[-1].legend(loc="upper left", fontsize="small")
    figure.suptitle(f"prompt {prompt_len}, block {layout.block}, cp {layout.ranks}")
    figure.savefig(file, dpi=120)


def _table(found: dict[str, Any]) -> Table:
    title = f"{found['placement']}, block {found['block']}, cp {found['cp']}: skew {found['skew_tokens']} tokens"
    table = Table("rank", "tokens", "positions [first, past last)", title=title, title_justify="left")
    for rank in found["ranks"]:
        ranges = ", ".join(f"{first}-{past_last}" for first, past_last in rank["ranges"])
        table.add_row(str(rank["rank"]), str(rank["tokens"]), ranges or "none")
    return table
