#!/usr/bin/env python3
"""Times decode attention over pages on one GPU, beside what the memory can do and what other libraries reach.

python scripts/bench_attention.py --cases grouped latent unequal small --json attention.json

Each contender is checked before it is timed. All of a case are timed in turn, round after round, over buffers larger
than any cache, many calls in a row as the layers of a model make them; the table gives medians. Contenders that are not
installed (FlashInfer, PyTorch) are left out. Errors are relative: to float64, of large cases to float32.
"""

import argparse
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import CASES, CONTENDERS, LATENT_VALUES, Case, Contender, Inputs
from rich.console import Console
from rich.table import Table

from helix_jax.attention import attend
from helix_jax.cli.app import Parser, run_command
from helix_jax.cli.output import new_figure, write_json

PROGRAM = "bench_attention.py"
ERROR = 1e-2  # relative, of what may be timed: bfloat16 inputs, and outputs of some
BUSY_SECONDS = 0.05  # against which the host's jitter is little
EXACT_BYTES = 2**26  # what a host attends to in float64 in a second or two


def reference(inputs: Inputs) -> np.ndarray:
    """Attention over the first buffer, a row at a time: in float64 on the host; where that is too much, in float32."""
    one = _row_in_float64 if inputs.case.bytes <= EXACT_BYTES else _row_in_float32
    return np.concatenate([one(inputs, row) for row in range(len(inputs.table_BM))])


def _row_in_float32(inputs: Inputs, row: int) -> np.ndarray:
    mine = slice(row, row + 1)
    table_BM, lo_BT, hi_BT = (x[mine] for x in inputs.seen)
    pages = [None if pool is None else pool[table_BM[0]].astype(jnp.float32) for pool in inputs.pools[0]]
    run = jax.jit(partial(attend, **inputs.case.options))
    arguments = inputs.q_BTNH[mine].astype(jnp.float32), *pages, jnp.arange(table_BM.shape[1])[None]
    return np.asarray(run(*arguments, lo_BT, hi_BT).o_BTNH[:, 0])


def _row_in_float64(inputs: Inputs, row: int) -> np.ndarray:
    case = inputs.case
    k, v = inputs.pools[0]
    pages = [np.asarray(pool[inputs.table_BM[row]], np.float64) for pool in (k, v) if pool is not None]
    k_KSH, *rest = (x.swapaxes(0, 1).reshape(x.shape[1], -1, case.width)[:, : case.lengths[row]] for x in pages)
    v_KSH = rest[0] if rest else k_KSH[..., :LATENT_VALUES]
    q_KGH = np.asarray(inputs.q_BTNH[row, 0], np.float64).reshape(-1, case.group, case.width)
    s_KGS = case.scale * q_KGH @ k_KSH.swapaxes(1, 2)
    p_KGS = np.exp(s_KGS - s_KGS.max(-1, keepdims=True))
    return ((p_KGS @ v_KSH) / p_KGS.sum(-1, keepdims=True)).reshape(1, case.heads, -1)


def checked(inputs: Inputs, contenders: dict[str, Contender]) -> dict[str, float]:
    """The relative error of each; raises if one is wrong, or not the same twice."""
    expected, errors = reference(inputs), {}
    for name, contender in contenders.items():
        if contender.output is None:
            continue
        found = contender.output()
        errors[name] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        if not errors[name] < ERROR:
            raise ValueError(
                f"{inputs.case.name}: {name} is wrong, by {errors[name]:.2g} relative: leave it out of --contenders"
            )
        if name == "mosaic_gpu" and not np.array_equal(found, contender.output()):
            raise ValueError(f"{inputs.case.name}: {name} gives other bits on a second run")
    return errors


def timed(contenders: dict[str, Contender], layers: int, rounds: int) -> dict[str, float]:
    """Seconds per layer, the median of the rounds.

    Of many calls in a row less one: what the host does before the first layer and after the last is none of the GPU's.
    """
    more = {name: _calls_to_add(contender) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, contender in [*contenders.items()] * rounds:
        once, often = (_elapsed(contender, calls) for calls in (1, 1 + more[name]))
        seconds[name].append((often - once) / (more[name] * layers))
    return {name: float(np.median(values)) for name, values in seconds.items()}


def _calls_to_add(contender: Contender) -> int:
    """So many that they keep the GPU busy for long. Warms up, too."""
    return int(np.ceil(BUSY_SECONDS / min(_elapsed(contender, 1) for _ in range(3))))


def _elapsed(contender: Contender, calls: int) -> float:
    start = time.perf_counter()
    results = [contender.run() for _ in range(calls)]
    contender.wait(results)
    return time.perf_counter() - start


def layers_for(case: Case) -> int:
    """So many that a call takes longer on the GPU than on the host, which else would hold it up."""
    return case.buffers * max(1, int(np.clip(4e10 // case.bytes, 8, 32)) // case.buffers)


def measured(case: Case, wanted: list[str], rounds: int) -> dict[str, Any]:
    inputs, layers = Inputs(case), layers_for(case)
    contenders = {name: CONTENDERS[name](inputs, layers) for name in wanted}
    present = {name: contender for name, contender in contenders.items() if contender is not None}
    errors = checked(inputs, present)
    seconds = timed(present, layers, rounds)
    results = {
        name: {
            "us": 1e6 * second,
            "tb_per_s": case.bytes / second / 1e12,
            "to_ceiling": seconds["ceiling"] / second if "ceiling" in seconds else None,
            "error": errors.get(name),
        }
        for name, second in seconds.items()
    }
    return {"case": {**asdict(case), "bytes": case.bytes}, "layers": layers, "results": results}


def table_of(reports: list[dict[str, Any]], wanted: list[str]) -> Table:
    table = Table("TB/s (share of the ceiling)", *wanted, title=jax.devices()[0].device_kind)
    for report in reports:
        cells = []
        for name in wanted:
            result = report["results"].get(name)
            cells.append("-" if result is None else _cell(result))
        table.add_row(report["case"]["name"], *cells)
    return table


def _cell(result: dict[str, Any]) -> str:
    share = "" if result["to_ceiling"] is None else f" ({result['to_ceiling']:.3f})"
    return f"{result['tb_per_s']:.2f}{share}" if result["us"] > 100 else f"{result['us']:.1f} us{share}"


def draw(figure: Any, reports: list[dict[str, Any]], wanted: list[str], file: Path) -> None:
    figure.set_size_inches(3 + len(reports), 5)
    axes = figure.subplots()
    for i, name in enumerate(wanted):
        points = [(x, r["results"][name]["tb_per_s"]) for x, r in enumerate(reports) if name in r["results"]]
        axes.plot(*zip(*points, strict=True), marker="os^vDPX"[i % 7], label=name)
    axes.set_xticks(range(len(reports)), [r["case"]["name"] for r in reports], rotation=30, ha="right")
    axes.set(ylabel="TB/s of keys and values", ylim=(0, None), title=jax.devices()[0].device_kind)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=["grouped", "latent", "unequal", "small"])
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    add("--rounds", type=int, default=7, metavar="N", help="of which the median is named (default: 7)")
    add("--json", type=Path, metavar="FILE", help="write all numbers, after every case")
    add("--plot", type=Path, metavar="FILE.png", help="draw TB/s")
    return parser.parse_args()


def bench(options: argparse.Namespace) -> None:
    if options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}: give at least 1")
    platform = jax.devices()[0].platform
    if platform != "gpu":
        raise ValueError(f"this times a GPU, and JAX sees a {platform.upper()}: run it on one")
    figure = new_figure("--plot", options.plot) if options.plot else None
    reports: list[dict[str, Any]] = []
    write_json(options.json, reports)  # a file that cannot be written is better known now
    for case in [case for group in options.cases for case in CASES[group]]:
        reports.append(measured(case, options.contenders, options.rounds))
        write_json(options.json, reports)
        named = (f"{name} {_cell(result)}" for name, result in reports[-1]["results"].items())
        print(f"{case.name}: {', '.join(named)}", file=sys.stderr, flush=True)
    if figure:
        draw(figure, reports, options.contenders, options.plot)
    Console(width=None if sys.stdout.isatty() else 180).print(table_of(reports, options.contenders))


def main() -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory too
    return run_command(lambda: bench(parse_arguments()), PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
