#!/usr/bin/env python3
"""Hides passkeys in real text, at every depth of contexts of every length, and asks for them.

python scripts/eval_needle.py --cp 8 --placement helix --placement striped --json needles.json --plot needles.png

Each is asked for twice: at once after the context, and again after --decoded tokens that the model has said, which lie,
block by block, on the ranks in turn. The same cells are read on one device; a placement that answers otherwise in any
of them is a failure: exit 1. Beside the keys: bits per byte of held-out text that follows the longest context. --lose
zeroes what one rank has cached of the context, before the first question.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from evaluating import ALONE, byte_model, held_out_text, models_of, plans_of, run, shared_parser
from reader import Reader, forced_nats
from reporting import new_figure, write_json
from rich.console import Console
from rich.table import Table

from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.training.passkeys import DIGITS, NAMES, fact, haystack, new_key, question
from helix_jax.training import LOG2_E


def main() -> int:
    options = parse_arguments()
    return run(lambda: evaluate(checked(options)), if_too_large="give fewer --rows")


def parse_arguments() -> argparse.Namespace:
    parser = shared_parser(__doc__)
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", metavar="BYTES", help="of contexts (default: 4, up to the model's positions)")
    add("--depths", type=int, default=9, metavar="N", help="from the first byte to the last (default: 9)")
    add("--trials", type=int, default=1, metavar="N", help="of each cell, with other text and keys (default: 1)")
    add("--decoded", type=int, default=500, metavar="TOKENS", help="before it is asked again (default: 500)")
    add("--lose", type=int, metavar="RANK", help="zero what this rank has cached of the context")
    add("--seed", type=int, default=0, help="of text and keys (default: 0)")
    add("--rows", type=int, default=16, metavar="N", help="cells at once (default: 16)")
    return parser.parse_args()


def checked(options: argparse.Namespace) -> argparse.Namespace:
    for name, least in {"depths": 1, "trials": 1, "decoded": 0, "rows": 1, "seed": 0, "tp": 1, "cp": 1}.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}: give at least {least}")
    if options.lose is not None and not 0 <= options.lose < options.cp:
        raise ValueError(f"--lose {options.lose} is no rank of cp {options.cp}: give 0 to {options.cp - 1}")
    return options


def evaluate(options: argparse.Namespace) -> list[str]:
    """Prints and writes what was found. Returns a line for every placement that differs from one device."""
    config = byte_model(options)
    asked = len(question(max(NAMES, key=len))) + DIGITS
    room = asked + options.decoded
    longest = config.max_positions - room
    lengths = options.lengths or [max(1, longest * n // 4) for n in range(1, 5)]
    if max(lengths) > longest or min(lengths) < 1:
        raise ValueError(
            f"contexts of {lengths} bytes, {options.decoded} decoded and {asked} of a question do not fit the model's "
            f"{config.max_positions} positions: give other --lengths, or less --decoded"
        )
    text = held_out_text(options, least=max(lengths) + room)
    figure = new_figure("--plot", options.plot) if options.plot else None
    cells, plans = make_cells(options, text, lengths), plans_of(options)
    found: dict[str, Any] = {"cells": cells, "cp": options.cp, "decoded": options.decoded, "lost": options.lose}
    write_json(options.json, found)  # a file that cannot be written is better known now
    for name, plan, model in models_of(options, plans):
        lose = None if name == ALONE else options.lose
        found[name] = {
            "answers": ask_all(model, plan, cells, options, lose, max(lengths) + room),
            "owners": owners(plan, cells),
        }
        if options.lose is None:
            rows = min(options.rows, len(cells))
            nats = forced_nats(model, plan, text, max(lengths), room, rows, max(lengths) + room)
            found[name]["bits_per_byte"] = float(nats.mean()) * LOG2_E
        write_json(options.json, found)
    report(found, list(plans))
    if figure:
        draw(figure, options.plot, found, list(plans)[1])
    alone = found[ALONE]["answers"]
    if options.lose is not None:
        return []
    return [
        f"under {name} {sum(a != b for a, b in zip(alone, found[name]['answers'], strict=True))} of {len(cells)} cells "
        f"are answered otherwise than on one device"
        for name in plans
        if found[name]["answers"] != alone
    ]


def make_cells(options: argparse.Namespace, text: bytes, lengths: list[int]) -> list[dict[str, Any]]:
    random, cells = np.random.default_rng(options.seed), []
    for length in lengths:
        for depth in np.linspace(0, 1, options.depths) if options.depths > 1 else [0.5]:
            for _ in range(options.trials):
                name, key = str(random.choice(NAMES)), new_key(random)
                start = int(random.integers(0, max(1, len(text) - length)))
                prompt = haystack(text[start : start + length], length, float(depth), name, key)
                place = prompt.find(fact(name, key)) + len(fact(name, key)) - DIGITS - 2  # of the key's first byte
                cell = {"length": length, "depth": float(depth), "name": name, "key": key, "place": place}
                cells.append(cell | {"context": prompt[: -len(question(name))].decode("latin-1")})
    return cells


def ask_all(
    model: Transformer,
    plan: Plan,
    cells: list[dict[str, Any]],
    options: argparse.Namespace,
    lose: int | None,
    most: int,
) -> list[list[str]]:
    """For each cell what was said at once, and again later."""
    answers: list[list[str]] = []
    for first in range(0, len(cells), options.rows):
        some = cells[first : first + options.rows]
        rows = [some[n % len(some)] for n in range(min(options.rows, len(cells)))]  # as many as ever: one compilation
        reader = Reader(model, plan, [cell["context"].encode("latin-1") for cell in rows], most)
        if lose is not None:
            reader.lose(lose)
        asked = [question(cell["name"]) for cell in rows]
        said = [reader.answer(asked, DIGITS)]
        if options.decoded:
            reader.say(options.decoded)
            said.append(reader.answer(asked, DIGITS))
        texts = [[bytes(row.tolist()).decode("latin-1") for row in both] for both in zip(*said, strict=True)]
        answers += texts[: len(some)]
    return answers


def owners(plan: Plan, cells: list[dict[str, Any]]) -> list[int]:
    """The rank that holds the key's first byte."""
    return [int(plan.layout.owner(cell["place"], len(cell["context"]))) for cell in cells]


def right(found: dict[str, Any], name: str, asked: int) -> np.ndarray:
    answers = found[name]["answers"]
    return np.asarray([said[asked] == cell["key"] for said, cell in zip(answers, found["cells"], strict=True)])


def report(found: dict[str, Any], names: list[str]) -> None:
    times = len(found[names[0]]["answers"][0])
    lengths = sorted({cell["length"] for cell in found["cells"]})
    table = Table("keys that were found", *(f"{length:,} bytes" for length in lengths), "all")
    for name in names:
        for asked in range(times):
            good, at = right(found, name, asked), np.asarray([cell["length"] for cell in found["cells"]])
            shares = [good[at == length].mean() for length in lengths]
            label = name if asked == 0 else f"  again after {found['decoded']} tokens"
            table.add_row(label, *(f"{share:.1%}" for share in shares), f"{good.mean():.1%}")
        if "bits_per_byte" in found[name]:
            table.add_row(
                "  bits per byte after it", *[""] * (len(lengths) - 1), f"{found[name]['bits_per_byte']:.4f}", ""
            )
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def draw(figure: Any, file: Path, found: dict[str, Any], name: str) -> None:
    """Depth by length, as asked at once and again; in each cell the rank that owns the key."""
    times = len(found[name]["answers"][0])
    lengths = sorted({cell["length"] for cell in found["cells"]})
    depths = sorted({cell["depth"] for cell in found["cells"]})
    figure.set_size_inches(1.5 + 1.1 * len(lengths) * times, 1.5 + 0.4 * len(depths))
    for asked, axes in enumerate(np.atleast_1d(figure.subplots(1, times, sharey=True))):
        good = right(found, name, asked)
        share = np.zeros((len(depths), len(lengths)))
        for row, depth in enumerate(depths):
            for column, length in enumerate(lengths):
                here = [i for i, c in enumerate(found["cells"]) if (c["length"], c["depth"]) == (length, depth)]
                share[row, column] = good[here].mean()
                axes.text(column, row, f"rank {found[name]['owners'][here[0]]}", ha="center", va="center", fontsize=7)
        axes.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title("asked at once" if asked == 0 else f"after {found['decoded']} decoded tokens", fontsize=9)
        axes.set_xlabel("context, bytes")
    figure.suptitle(f"keys found under {name}, cp {found['cp']}; depth of the key", fontsize=10)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
