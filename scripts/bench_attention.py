#!/usr/bin/env python3
"""Time decode attention over pages on one GPU, and compare it with the memory bandwidth and with other libraries.

python scripts/bench_attention.py --cases grouped latent unequal small --json attention.json

Each contender is checked before it is timed. The contenders of a case are timed in turn, for several rounds. Each makes
many calls in a row, as the layers of a model do, over buffers larger than the cache of a GPU. The table shows medians.
Contenders that are not installed (FlashInfer, PyTorch) are left out. Errors are relative to float64, or to float32 in
large cases.
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
from helix_jax.validation import check_int

PROGRAM = "bench_attention.py"
MAX_ERROR = 1e-2  # relative: inputs are bfloat16, and so are the outputs of some contenders
BUSY_SECONDS = 0.05  # the GPU works this long per measurement, so that the jitter of the host is small in comparison
EXACT_BYTES = 2**26  # a host computes attention over these in float64 in a second or two


def compute_reference(inputs: Inputs) -> np.ndarray:
    """Compute attention over the first buffer row by row: in float64 on the host, or in float32 for large cases."""
    attend_row = _attend_row_float64 if inputs.case.bytes <= EXACT_BYTES else _attend_row_float32
    return np.concatenate([attend_row(inputs, row) for row in range(len(inputs.table_BM))])


def _attend_row_float32(inputs: Inputs, row: int) -> np.ndarray:
    only = slice(row, row + 1)
    table_BM, lo_BT, hi_BT = (x[only] for x in inputs.visible)
    pages = [None if pool is None else pool[table_BM[0]].astype(jnp.float32) for pool in inputs.pools[0]]
    run = jax.jit(partial(attend, **inputs.case.options))
    arguments = inputs.q_BTNH[only].astype(jnp.float32), *pages, jnp.arange(table_BM.shape[1])[None]
    return np.asarray(run(*arguments, lo_BT, hi_BT).o_BTNH[:, 0])


def _attend_row_float64(inputs: Inputs, row: int) -> np.ndarray:
    case = inputs.case
    k, v = inputs.pools[0]
    pages = [np.asarray(pool[inputs.table_BM[row]], np.float64) for pool in (k, v) if pool is not None]
    k_KSH, *rest = (x.swapaxes(0, 1).reshape(x.shape[1], -1, case.width)[:, : case.lengths[row]] for x in pages)
    v_KSH = rest[0] if rest else k_KSH[..., :LATENT_VALUES]
    q_KGH = np.asarray(inputs.q_BTNH[row, 0], np.float64).reshape(-1, case.group, case.width)
    s_KGS = case.scale * q_KGH @ k_KSH.swapaxes(1, 2)
    p_KGS = np.exp(s_KGS - s_KGS.max(-1, keepdims=True))
    return ((p_KGS @ v_KSH) / p_KGS.sum(-1, keepdims=True)).reshape(1, case.heads, -1)


def check_outputs(inputs: Inputs, contenders: dict[str, Contender]) -> dict[str, float]:
    """Return the relative error of each contender.

    Raises:
        ValueError: An error is too large, or a second run of mosaic_gpu computes other bits.
    """
    expected, errors = compute_reference(inputs), {}
    for name, contender in contenders.items():
        if contender.output is None:
            continue
        output = contender.output()
        errors[name] = float(np.linalg.norm(output - expected) / np.linalg.norm(expected))
        if not errors[name] < MAX_ERROR:
            raise ValueError(
                f"{inputs.case.name}: {name} has a relative error of {errors[name]:.2g}: leave it out of --contenders"
            )
        if name == "mosaic_gpu" and not np.array_equal(output, contender.output()):
            raise ValueError(
                f"{inputs.case.name}: {name} computes other bits in a second run: leave it out of --contenders"
            )
    return errors


def time_contenders(contenders: dict[str, Contender], layers: int, rounds: int) -> dict[str, float]:
    """Return the seconds per layer of each contender, the median of the rounds.

    The time of one call is subtracted from that of many, to exclude the work of the host before the first layer and
    after the last.
    """
    more = {name: _count_added_calls(contender) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, contender in [*contenders.items()] * rounds:
        one_s, many_s = (_time_calls(contender, calls) for calls in (1, 1 + more[name]))
        seconds[name].append((many_s - one_s) / (more[name] * layers))
    return {name: float(np.median(values)) for name, values in seconds.items()}


def _count_added_calls(contender: Contender) -> int:
    """Return how many calls keep the GPU busy for BUSY_SECONDS. This also warms up."""
    return int(np.ceil(BUSY_SECONDS / min(_time_calls(contender, 1) for _ in range(3))))


def _time_calls(contender: Contender, calls: int) -> float:
    start = time.perf_counter()
    results = [contender.run() for _ in range(calls)]
    contender.wait(results)
    return time.perf_counter() - start


def choose_layers(case: Case) -> int:
    """Return how many layers a call has: enough that it takes longer on the GPU than on the host."""
    return case.buffers * max(1, int(np.clip(4e10 // case.bytes, 8, 32)) // case.buffers)


def measure(case: Case, names: list[str], rounds: int) -> dict[str, Any]:
    """Check and time the contenders that support a case. Return its part of the report."""
    inputs, layers = Inputs(case), choose_layers(case)
    contenders = {name: CONTENDERS[name](inputs, layers) for name in names}
    supported = {name: contender for name, contender in contenders.items() if contender is not None}
    errors = check_outputs(inputs, supported)
    seconds = time_contenders(supported, layers, rounds)
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


def make_table(reports: list[dict[str, Any]], names: list[str]) -> Table:
    """Return a row for each case and a column for each contender."""
    table = Table("TB/s (share of the ceiling)", *names, title=jax.devices()[0].device_kind)
    for report in reports:
        cells = []
        for name in names:
            result = report["results"].get(name)
            cells.append("-" if result is None else _format_result(result))
        table.add_row(report["case"]["name"], *cells)
    return table


def _format_result(result: dict[str, Any]) -> str:
    """Return the bandwidth, or the time of a short call, which is mostly overhead."""
    share = "" if result["to_ceiling"] is None else f" ({result['to_ceiling']:.3f})"
    return f"{result['tb_per_s']:.2f}{share}" if result["us"] > 100 else f"{result['us']:.1f} us{share}"


def draw(figure: Any, reports: list[dict[str, Any]], names: list[str], file: Path) -> None:
    """Draw TB/s of every case, with one line per contender."""
    figure.set_size_inches(3 + len(reports), 5)
    axes = figure.subplots()
    for i, name in enumerate(names):
        points = [(x, r["results"][name]["tb_per_s"]) for x, r in enumerate(reports) if name in r["results"]]
        axes.plot(*zip(*points, strict=True), marker="os^vDPX"[i % 7], label=name)
    axes.set_xticks(range(len(reports)), [r["case"]["name"] for r in reports], rotation=30, ha="right")
    axes.set(ylabel="TB/s of keys and values", ylim=(0, None), title=jax.devices()[0].device_kind)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    cases = ["grouped", "latent", "unequal", "small"]
    text = f"groups of cases, of {', '.join(CASES)} (default: {' '.join(cases)})"
    add("--cases", nargs="+", choices=CASES, default=cases, metavar="GROUP", help=text)
    text = f"implementations, of {', '.join(CONTENDERS)} (default: all)"
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME", help=text)
    add("--rounds", type=int, default=7, metavar="N", help="rounds, whose median is reported (default: 7)")
    add("--json", type=Path, metavar="FILE", help="write all numbers to FILE, after every case")
    add("--plot", type=Path, metavar="FILE.png", help="draw TB/s of every case")
    return parser.parse_args()


def bench(options: argparse.Namespace) -> None:
    """Measure every case, write the report after each, and print a table."""
    check_int("--rounds", options.rounds, least=1)
    platform = jax.devices()[0].platform
    if platform != "gpu":
        raise ValueError(f"JAX found a {platform.upper()}, and this benchmark times a GPU: use a machine with one")
    figure = new_figure("--plot", options.plot) if options.plot else None
    reports: list[dict[str, Any]] = []
    write_json(options.json, reports)  # before anything is measured, in case the file cannot be written
    for case in [case for group in options.cases for case in CASES[group]]:
        reports.append(measure(case, options.contenders, options.rounds))
        write_json(options.json, reports)
        results = (f"{name} {_format_result(result)}" for name, result in reports[-1]["results"].items())
        print(f"{case.name}: {', '.join(results)}", file=sys.stderr, flush=True)
    if figure:
        draw(figure, reports, options.contenders, options.plot)
    Console(width=None if sys.stdout.isatty() else 180).print(make_table(reports, options.contenders))


def main() -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # other libraries need memory too
    return run_command(lambda: bench(parse_arguments()), PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
