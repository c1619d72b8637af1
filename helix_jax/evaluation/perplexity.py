#!/usr/bin/env python3
"""Bits per byte of held-out text by how far into the context it stands, sharded and on one device.

python scripts/eval_perplexity.py --cp 8 --placement helix --json perplexity.json --plot perplexity.png

At each position the context before it is read, and then --span bytes one by one, as if they had been decoded: so they
lie on the ranks in turn. The numbers of every placement must be those of one device, within 1e-3 nats a byte: else
exit 1.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from evaluating import ALONE, byte_model, held_out_text, models_of, plans_of, run, shared_parser
from reader import forced_nats
from reporting import new_figure, write_json
from rich.console import Console
from rich.table import Table

from helix_jax.training import LOG2_E

CLOSE_NATS = 1e-3


def main() -> int:
    options = parse_arguments()
    return run(lambda: evaluate(options), if_too_large="give fewer --windows")


def parse_arguments() -> argparse.Namespace:
    parser = shared_parser(__doc__)
    add = parser.add_argument
    add("--positions", type=int, nargs="+", metavar="BYTES", help="of contexts (default: from 64 on, times two)")
    add("--span", type=int, default=64, metavar="BYTES", help="read one by one (default: 64)")
    add("--windows", type=int, default=8, metavar="N", help="places in the text (default: 8)")
    return parser.parse_args()


def evaluate(options: argparse.Namespace) -> list[str]:
    """Prints and writes what was found. Returns a line for every placement that differs from one device."""
    config = byte_model(options)
    longest = config.max_positions - options.span
    positions = options.positions or [2**n for n in range(6, 32) if 2**n <= longest] or [longest]
    if min(options.span, options.windows) < 1 or min(positions) < 2 or max(positions) > longest:
        raise ValueError(
            f"positions {positions}, a span of {options.span}, {options.windows} windows: give positions from 2 to "
            f"{longest}, as the model has {config.max_positions}, and at least 1 of the others"
        )
    text = held_out_text(options, least=max(positions) + options.span)
    figure = new_figure("--plot", options.plot) if options.plot else None
    plans = plans_of(options)
    found: dict[str, Any] = {"positions": positions, "span": options.span, "cp": options.cp, "bits_per_byte": {}}
    write_json(options.json, found)  # a file that cannot be written is better known now
    alone, different = np.zeros(0), []
    for name, plan, model in models_of(options, plans):
        most = max(positions) + options.span  # one shape, and one compilation, for all
        nats = np.stack([forced_nats(model, plan, text, at, options.span, options.windows, most) for at in positions])
        found["bits_per_byte"][name] = (nats.mean((1, 2)) * LOG2_E).tolist()
        write_json(options.json, found)
        alone = nats if name == ALONE else alone
        gap = float(np.abs(nats - alone).max())
        if gap > CLOSE_NATS:
            different.append(f"under {name} a byte is {gap:.2g} nats from what it is on one device")
    report(found)
    if figure:
        draw(figure, options.plot, found)
    return different


def report(found: dict[str, Any]) -> None:
    table = Table("bits per byte after", *found["bits_per_byte"])
    for row, position in enumerate(found["positions"]):
        table.add_row(f"{position:,} bytes", *(f"{bits[row]:.4f}" for bits in found["bits_per_byte"].values()))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def draw(figure: Any, file: Path, found: dict[str, Any]) -> None:
    axes = figure.add_subplot(xlabel="bytes before", ylabel="bits per byte", xscale="log")
    for name, bits in found["bits_per_byte"].items():
        axes.plot(found["positions"], bits, "o-" if name == ALONE else "x--", label=name, markersize=4)
    axes.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
