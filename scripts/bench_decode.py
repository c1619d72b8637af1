#!/usr/bin/env python3
"""Time decode steps of a model with random weights and a cache of a given length, on one mesh after another.

python scripts/bench_decode.py --config configs/llama-3.1-8b.toml --mesh 4x1 --mesh 2x2 --mesh 1x4

Every combination of mesh, placement and combine is one run. The time per token (of every row) is measured in three
ways: one call per token and a wait after each ("awaited"), one call per token and a wait after the last ("queued"; not
on a CPU, where steps that queue up deadlock), and many tokens per call ("many"). Tokens are arbitrary and never read.
The roofline is the time to read a device's weights and an even share of the cache, at the bandwidth measured here.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from random_weights import fill_with_noise, make_random_weights
from rich.console import Console
from rich.table import Table
from roofline import count_kv_bytes, count_weight_bytes, measure_bandwidth
from shapes import read_shape, take_first_layers

from helix_jax.arrays import bytes_per_device, put
from helix_jax.cache import CacheSpec, KVCache, Rows, make_cache, per_row
from helix_jax.cli.app import Parser, run_command
from helix_jax.cli.devices import open_mesh
from helix_jax.cli.options import DTYPES, add_choice, default_dtype
from helix_jax.cli.output import new_figure, write_json
from helix_jax.combine import COMBINES
from helix_jax.config import ModelConfig
from helix_jax.engine.engine import DEFAULT_PAGE
from helix_jax.kernels import KERNELS
from helix_jax.layout import PLACEMENTS
from helix_jax.mesh import CP, ROWS_B, TP, make_mesh
from helix_jax.models.transformer import Weights
from helix_jax.plan import Plan
from helix_jax.step import DecodeState, StepOutput, decode, step
from helix_jax.validation import check_int

PROGRAM = "bench_decode.py"
WARM_UP = 2
MIN_CALLS = 3  # with many tokens each, for a median
TIMINGS = {"awaited_ms": "awaited", "queued_ms": "queued", "many_ms": "many"}
PLATFORMS = ("auto", "cpu", "gpu")


class Program(NamedTuple):
    """A program that takes the cache and the rows, and returns them among its results."""

    run: Callable[[KVCache, Rows], StepOutput | DecodeState]
    lower: Callable[[KVCache, Rows], Any]


class Job(NamedTuple):
    """The settings that all runs share. `bandwidth` is in bytes per second."""

    options: argparse.Namespace
    config: ModelConfig
    bandwidth: float


def main() -> int:
    return run_command(lambda: bench(check_options(parse_arguments())), PROGRAM)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE.toml", help="model config, such as those in configs/")
    add("--mesh", action="append", required=True, metavar="TPxCP", help="mesh, such as 2x4; may be repeated")
    add("--layers", type=int, metavar="N", help="time only the first N layers (default: all)")
    add("--rows", type=int, default=8, metavar="N", help="number of sequences (default: 8)")
    add("--context", type=int, default=131072, metavar="TOKENS", help="length of each prompt (default: 131072)")
    add("--decoded", type=int, default=0, metavar="TOKENS", help="tokens already decoded after the prompt (default: 0)")
    text = "rule that assigns blocks to ranks; may be repeated (default: helix)"
    add_choice(parser, "--placement", PLACEMENTS, text, several=True)
    text = "collective that combines the ranks' partial results; may be repeated (default: psum)"
    add_choice(parser, "--combine", COMBINES, text, several=True)
    add_choice(parser, "--kernel", KERNELS, "attention kernel", default="auto")
    add("--block", type=int, default=16, metavar="TOKENS", help="length of a block of the sequence (default: 16)")
    text = "tokens per cache page (default: %(default)s)"
    add("--page", type=int, default=DEFAULT_PAGE, metavar="TOKENS", help=text)
    add("--tokens-per-call", type=int, default=16, metavar="N", help='tokens per call of "many" (default: 16)')
    add("--steps", type=int, default=20, metavar="N", help="timed steps of one token each (default: 20)")
    add_choice(parser, "--dtype", DTYPES, "type of weights and cache (default: bfloat16; float32 on a CPU)")
    text = "devices to use; cpu is split into as many fake devices as the largest mesh needs"
    add_choice(parser, "--platform", PLATFORMS, text, default="auto")
    add("--json", type=Path, metavar="FILE", help="write all numbers to FILE, after every run")
    add("--plot", type=Path, metavar="FILE.png", help="draw the ms per token of every run")
    return parser.parse_args()


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    least = {"rows": 1, "context": 0, "decoded": 0, "page": 1, "tokens_per_call": 1, "steps": 1}
    for name, minimum in least.items():
        check_int(f"--{name.replace('_', '-')}", getattr(options, name), least=minimum)
    options.placement, options.combine = options.placement or ["helix"], options.combine or ["psum"]
    options.mesh = [parse_mesh(text) for text in options.mesh]
    return options


def parse_mesh(text: str) -> tuple[int, int]:
    """Return tp and cp of a mesh such as "2x4".

    Raises:
        ValueError: The text has another form, or a size is 0.
    """
    match = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", text, re.ASCII)
    if not match:
        raise ValueError(f"--mesh is '{text}': give tp x cp, both at least 1, such as 2x4")
    return int(match[1]), int(match[2])


def bench(options: argparse.Namespace) -> None:
    """Measure every run, write the report after each, and print a table."""
    config = read_shape(options.config)
    config = config if options.layers is None else take_first_layers(config, options.layers)
    figure = new_figure("--plot", options.plot) if options.plot else None
    largest = open_mesh(options.platform, *max(options.mesh, key=math.prod))
    devices = list(largest.devices.flat)
    options.platform = devices[0].platform
    options.dtype = options.dtype or default_dtype(largest)
    # Create all plans before any weights, because this reports most mistakes.
    meshes = [make_mesh(tp, cp, devices=devices) for tp, cp in options.mesh]
    plans_by_mesh = [(mesh, make_plans(mesh, options, config)) for mesh in meshes]
    job = Job(options, config, measure_bandwidth(devices[0]))
    report = describe(job, devices[0].device_kind)
    write_json(options.json, report)  # before anything is measured, in case the file cannot be written
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    for mesh, plans in plans_by_mesh:
        weights = make_random_weights(config, mesh, options.dtype)
        for plan in plans:
            run = measure(job, plan, weights)
            report["runs"].append(run)
            write_json(options.json, report)
            name = f"{run['mesh']} {run['placement']} {run['combine']}"
            progress.print(f"{name}: {run['best_ms']:.4g} ms per token, {run['times_roofline']:.3g} x roofline")
        del weights  # before those of the next mesh are created
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(make_table(report))
    if figure:
        draw(figure, options.plot, report)


def make_plans(mesh: Mesh, options: argparse.Namespace, config: ModelConfig) -> list[Plan]:
    """Return a plan for each combination of placement and combine.

    Raises:
        ValueError: The mesh does not divide the model's heads, or the kernel does not support them.
    """
    plans = [
        Plan(mesh, options.block, placement, combine, options.kernel)
        for placement in options.placement
        for combine in options.combine
    ]
    for plan in plans:
        plan.check_model(config)
        plan.kernel_for_model(config, options.page, options.dtype)
    return plans


def describe(job: Job, device: str) -> dict[str, Any]:
    """Return a report of the settings, without runs."""
    names = ("rows", "context", "decoded", "block", "page", "tokens_per_call", "steps", "dtype", "platform")
    report = {"config": job.options.config.stem, "layers": job.config.layers, "device": device, "jax": jax.__version__}
    report |= {name: getattr(job.options, name) for name in names}
    return report | {"bandwidth_bytes_per_s": job.bandwidth, "runs": []}


def measure(job: Job, plan: Plan, weights: Weights) -> dict[str, Any]:
    """Time one plan. Return a run of the report, in which bytes are per device."""
    options = job.options
    calls = max(MIN_CALLS, options.steps // options.tokens_per_call)
    spare = max(WARM_UP + options.steps, (WARM_UP + calls) * options.tokens_per_call)
    cache, rows = make_filled_cache(job, plan, spare)
    run: dict[str, Any] = {"mesh": f"{plan.mesh.shape[TP]}x{plan.mesh.shape[CP]}"}
    run |= {"placement": plan.layout.placement, "combine": plan.combine}
    run |= {"kernel": plan.kernel_for_model(job.config, options.page, options.dtype)}
    run |= {"cache_bytes": bytes_per_device(cache), "weight_bytes": bytes_per_device(weights)}

    one, many = make_programs(job, plan, weights)
    run["compile_s"], run["temporary_bytes"] = compile_ahead(one, cache, rows)
    run["many_compile_s"], run["many_temporary_bytes"] = compile_ahead(many, cache, rows)
    run["awaited_ms"], cache = time_awaited(one, cache, rows, options.steps)
    run["queued_ms"] = None
    if options.platform != "cpu":
        run["queued_ms"], cache = time_queued(one, cache, rows, options.steps)
    call_ms, cache = time_awaited(many, cache, rows, calls)
    run["many_ms"] = call_ms / options.tokens_per_call
    best_ms = min(run[timing] for timing in TIMINGS if run[timing] is not None)
    return run | compare_with_roofline(job, plan, weights, best_ms)


def compare_with_roofline(job: Job, plan: Plan, weights: Weights, best_ms: float) -> dict[str, float]:
    """Compare with the rooflines of an evenly sharded cache, as in the paper, and of the fullest rank."""
    weight_bytes = count_weight_bytes(job.config, job.options.rows, weights)
    kv_bytes = count_kv_bytes(job.options, job.config, plan)
    even_ms, fullest_ms = (1e3 * (kv + weight_bytes) / job.bandwidth for kv in kv_bytes)
    speed = 1e3 * job.options.rows / best_ms / plan.mesh.size
    rooflines = {"roofline_ms": even_ms, "roofline_of_fullest_ms": fullest_ms, "times_roofline": best_ms / even_ms}
    return {"best_ms": best_ms, "tokens_per_s_per_device": speed, **rooflines}


def make_filled_cache(job: Job, plan: Plan, spare: int) -> tuple[KVCache, Rows]:
    """Return a cache of random numbers as long as after prompt and decoding, with pages for `spare` more tokens."""
    options, config, length = job.options, job.config, job.options.context + job.options.decoded
    spec = CacheSpec.from_config(config, options.dtype)
    lens = ([options.context] * options.rows, [length + spare] * options.rows)
    cache, rows = make_cache(plan, spec, *lens, page=options.page)
    pools, structure = jax.tree.flatten(cache)
    pools = [fill_with_noise(pool_AKWH, seed) for seed, pool_AKWH in enumerate(pools)]
    return jax.tree.unflatten(structure, pools), rows._replace(length_B=per_row(plan, [length] * options.rows))


def make_programs(job: Job, plan: Plan, weights: Weights) -> tuple[Program, Program]:
    """Return the program of one step, and that of many steps, in which no row ends."""
    rows, tokens = job.options.rows, job.options.tokens_per_call
    token_B = np.arange(rows) % job.config.vocab
    new = {"tokens_BT": per_row(plan, token_B[:, None]), "count_B": per_row(plan, np.ones(rows))}
    count_B = per_row(plan, [tokens] * rows)
    model = job.config, plan, weights

    def many(program: Any, cache: KVCache, rows: Rows) -> Any:
        running_B = put(np.zeros(len(token_B), bool), plan.mesh, ROWS_B)
        state = DecodeState(cache, rows, per_row(plan, token_B), running_B)  # all of it is donated
        return program(*model, state, count_B, tokens)

    return (
        Program(partial(step, *model, **new), partial(step.lower, *model, **new)),
        Program(lambda cache, rows: many(decode, cache, rows)[1], partial(many, decode.lower)),
    )


def compile_ahead(program: Any, cache: KVCache, rows: Rows) -> tuple[float, int | None]:
    """Compile a program, so that its calls do not. Return the seconds, and the bytes of temporary arrays if known."""
    start = time.perf_counter()
    compiled = program.lower(cache, rows).compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    return seconds, memory.temp_size_in_bytes if memory else None


def time_awaited(program: Program, cache: KVCache, rows: Rows, calls: int) -> tuple[float, KVCache]:
    """Time calls with a wait after each. Return the median ms, and the cache."""
    (cache, rows), seconds = warm_up(program, cache, rows), []
    for _ in range(calls):
        start = time.perf_counter()
        cache, rows = cache_and_rows(jax.block_until_ready(program.run(cache, rows)))
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds), cache


def time_queued(program: Program, cache: KVCache, rows: Rows, calls: int) -> tuple[float, KVCache]:
    """Time calls with a wait after the last. Return the mean ms, and the cache."""
    cache, rows = warm_up(program, cache, rows)
    start = time.perf_counter()
    for _ in range(calls):
        cache, rows = cache_and_rows(program.run(cache, rows))
    jax.block_until_ready((cache, rows))
    return 1e3 * (time.perf_counter() - start) / calls, cache


def warm_up(program: Program, cache: KVCache, rows: Rows) -> tuple[KVCache, Rows]:
    """Run a program."""
    for _ in range(WARM_UP):
        cache, rows = cache_and_rows(jax.block_until_ready(program.run(cache, rows)))
    return cache, rows


def cache_and_rows(output: StepOutput | DecodeState) -> tuple[KVCache, Rows]:
    return output.cache, output.rows


def make_table(report: dict[str, Any]) -> Table:
    """Return the numbers of every run."""
    model = f"{report['config']}, {report['layers']} layers, {report['dtype']}"
    cached = f"{report['rows']} rows of {report['context']} + {report['decoded']} tokens"
    title = f"{model}; {cached}; {report['device']}, {report['bandwidth_bytes_per_s'] / 1e9:.4g} GB/s"
    settings = ("mesh", "placement", "combine", "kernel")
    numbers = {name: (f"{timing}\nms", 1) for name, timing in TIMINGS.items()} | {
        "tokens_per_s_per_device": ("tokens/s\n/device", 1),
        "roofline_ms": ("roofline\nms", 1),
        "times_roofline": ("times\nroofline", 1),
        "cache_bytes": ("cache\nGB", 1e9),
        "temporary_bytes": ("temporary\nGB", 1e9),
        "compile_s": ("compile\ns", 1),
    }
    headings = (heading for heading, _ in numbers.values())
    table = Table(*settings, *headings, title=title, title_justify="left")
    for run in report["runs"]:
        cells = ("-" if run[name] is None else f"{run[name] / unit:.4g}" for name, (_, unit) in numbers.items())
        table.add_row(*(run[name] for name in settings), *cells)
    return table


def draw(figure: Any, file: Path, report: dict[str, Any]) -> None:
    """Draw the ms per token of each run as bars, and its roofline as a line."""
    runs = report["runs"]
    timings = [timing for timing in TIMINGS if runs[0][timing] is not None]
    figure.set_size_inches(3 + len(runs), 4)
    axes, center_X, width = figure.subplots(), np.arange(len(runs)), 0.8 / len(timings)
    for index, timing in enumerate(timings):
        left_X, heights = center_X - 0.4 + index * width, [run[timing] for run in runs]
        axes.bar(left_X, heights, width, align="edge", label=TIMINGS[timing])
    rooflines = [run["roofline_ms"] for run in runs]
    axes.hlines(rooflines, center_X - 0.4, center_X + 0.4, color="black", label="roofline")
    axes.set_xticks(center_X, ["\n".join((run["mesh"], run["placement"], run["combine"])) for run in runs])
    axes.set(ylabel="ms per token", title=f"{report['config']}, {report['layers']} layers, {report['device']}")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
