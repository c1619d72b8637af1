#!/usr/bin/env python3
"""Times decode steps of a model of random weights, over a cache as long as asked for, on one mesh after the other.

python scripts/bench_decode.py --config configs/llama-3.1-8b.toml --mesh 4x1 --mesh 2x2 --mesh 1x4

Every combination of mesh, placement and combine is a run of its own. Its ms per token (of every row) are measured in
three ways: one call per token and a wait for each ("awaited"), one call per token and one wait for all ("queued"; not
on a CPU, where steps that pile up deadlock), and many tokens in each call. Tokens are not read, and always the same.
The roofline is the time to read, at the bandwidth found here, a device's weights and an even share of the cache.
"""

import argparse
import math
import re
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from random_weights import filled, random_weights
from rich.console import Console
from rich.table import Table
from roofline import kv_bytes_read, measure_bandwidth, weight_bytes_read
from shapes import first_layers, read_shape

from helix_jax.arrays import bytes_per_device
from helix_jax.cache import CacheSpec, KVCache, Rows, make_cache, per_row
from helix_jax.cli.app import Parser, run_command
from helix_jax.cli.devices import open_mesh
from helix_jax.cli.output import new_figure, write_json
from helix_jax.combine import COMBINES
from helix_jax.config import ModelConfig
from helix_jax.generation import DEFAULT_PAGE
from helix_jax.kernels import KERNELS
from helix_jax.layout import PLACEMENTS
from helix_jax.mesh import CP, REPLICATED, TP, make_mesh, sharding
from helix_jax.models.transformer import Weights
from helix_jax.plan import Plan
from helix_jax.step import DecodeInput, MultiStepOutput, StepOutput, many_steps, step

PROGRAM = "bench_decode.py"
WARM_UP = 2
LEAST_CALLS = 3  # of many tokens, for a median
WAYS = {"awaited_ms": "awaited", "queued_ms": "queued", "many_ms": "many"}

# A step, or many in one call: all is given but the cache and the rows.
Program = partial[StepOutput] | partial[MultiStepOutput]


class Job(NamedTuple):
    """What all runs share. bandwidth: bytes per second."""

    options: argparse.Namespace
    config: ModelConfig
    bandwidth: float


def main() -> int:
    return run_command(lambda: bench(checked(parse_arguments())), PROGRAM)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE.toml", help="a shape, like those in configs/")
    add("--mesh", action="append", required=True, metavar="TPxCP", help="like 2x4; may be repeated")
    add("--layers", type=int, metavar="N", help="only the first N (default: all)")
    add("--rows", type=int, default=8, metavar="N", help="sequences (default: 8)")
    add("--context", type=int, default=131072, metavar="TOKENS", help="of each prompt (default: 131072)")
    add("--decoded", type=int, default=0, metavar="TOKENS", help="decoded already, after it (default: 0)")
    add("--placement", action="append", metavar="|".join(PLACEMENTS), help="may be repeated (default: helix)")
    add("--combine", action="append", metavar="|".join(COMBINES), help="may be repeated (default: psum)")
    add("--kernel", default="auto", metavar="|".join(KERNELS), help="what attends (default: auto)")
    add("--block", type=int, default=16, metavar="TOKENS", help="length of a decode block (default: 16)")
    add("--page", type=int, default=DEFAULT_PAGE, metavar="TOKENS", help=f"of a page (default: {DEFAULT_PAGE})")
    add("--tokens-per-call", type=int, default=16, metavar="N", help="where a call decodes many (default: 16)")
    add("--steps", type=int, default=20, metavar="N", help="timed, of one token each (default: 20)")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and cache (default: bfloat16; float32 on a CPU)")
    add("--platform", choices=("auto", "cpu", "gpu"), default="auto", help="cpu: tp * cp fake devices")
    add("--json", type=Path, metavar="FILE", help="write all numbers, after every run")
    add("--plot", type=Path, metavar="FILE.png", help="draw ms per token")
    return parser.parse_args()


def checked(options: argparse.Namespace) -> argparse.Namespace:
    least = {"rows": 1, "context": 0, "decoded": 0, "page": 1, "tokens_per_call": 1, "steps": 1}
    for name, low in least.items():
        if getattr(options, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give at least {low}")
    options.placement, options.combine = options.placement or ["helix"], options.combine or ["psum"]
    options.mesh = [tp_and_cp(text) for text in options.mesh]
    return options


def tp_and_cp(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text, re.ASCII)
    if not found:
        raise ValueError(f"--mesh '{text}' is not tp x cp: write it like 2x4")
    return int(found[1]), int(found[2])


def bench(options: argparse.Namespace) -> None:
    config = read_shape(options.config)
    config = config if options.layers is None else first_layers(config, options.layers)
    figure = new_figure("--plot", options.plot) if options.plot else None
    devices = list(open_mesh(options.platform, *max(options.mesh, key=math.prod)).devices.flat)
    options.platform = devices[0].platform
    options.dtype = options.dtype or ("float32" if options.platform == "cpu" else "bfloat16")
    # All plans before any weight: this is where most requests are refused.
    plans = [(mesh, plans_on(mesh, options, config)) for mesh in (make_mesh(*m, devices=devices) for m in options.mesh)]
    job = Job(options, config, measure_bandwidth(devices[0]))
    found, note = describe(job, devices[0].device_kind), Console(stderr=True, highlight=False, soft_wrap=True)
    for mesh, plans_of_mesh in plans:
        weights = random_weights(config, mesh, options.dtype)
        for plan in plans_of_mesh:
            run = measure(job, plan, weights)
            found["runs"].append(run)
            write_json(options.json, found)
            name = f"{run['mesh']} {run['placement']} {run['combine']}"
            note.print(f"{name}: {run['best_ms']:.4g} ms per token, {run['times_roofline']:.3g} x roofline")
        del weights  # before there are those of the next mesh
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table_of(found))
    if figure:
        draw(figure, options.plot, found)


def plans_on(mesh: Mesh, options: argparse.Namespace, config: ModelConfig) -> list[Plan]:
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
    names = ("rows", "context", "decoded", "block", "page", "tokens_per_call", "steps", "dtype", "platform")
    found = {"config": job.options.config.stem, "layers": job.config.layers, "device": device, "jax": jax.__version__}
    found |= {name: getattr(job.options, name) for name in names}
    found |= {"bandwidth_bytes_per_s": job.bandwidth, "runs": []}
    write_json(job.options.json, found)  # a file that cannot be written is better known now
    return found


def measure(job: Job, plan: Plan, weights: Weights) -> dict[str, Any]:
    """One run, as it stands in the JSON. Bytes are per device."""
    options = job.options
    calls = max(LEAST_CALLS, options.steps // options.tokens_per_call)
    spare = max(options.steps, WARM_UP, max(WARM_UP, calls) * options.tokens_per_call)
    cache, rows = cache_after_decoding(job, plan, spare)
    run: dict[str, Any] = {"mesh": f"{plan.mesh.shape[TP]}x{plan.mesh.shape[CP]}"}
    run |= {"placement": plan.layout.placement, "combine": plan.combine}
    run |= {"kernel": plan.kernel_for_model(job.config, options.page, options.dtype)}
    run |= {"cache_bytes": bytes_per_device(cache), "weight_bytes": bytes_per_device(weights)}

    one, many = programs(job, plan, weights)
    run["compile_s"], run["temporary_bytes"] = compile_ahead(one, cache, rows)
    run["many_compile_s"], run["many_temporary_bytes"] = compile_ahead(many, cache, rows)
    run["awaited_ms"], cache = awaited(one, cache, rows, options.steps)
    run["queued_ms"] = None
    if options.platform != "cpu":
        run["queued_ms"], cache = queued(one, cache, rows, options.steps)
    call_ms, cache = awaited(many, cache, rows, calls)
    run["many_ms"] = call_ms / options.tokens_per_call
    return run | verdict(job, plan, weights, min(run[way] for way in WAYS if run[way] is not None))


def verdict(job: Job, plan: Plan, weights: Weights, best_ms: float) -> dict[str, float]:
    """Compare with the rooflines of an evenly sharded cache, as in the paper, and of the fullest rank."""
    read, kvs = weight_bytes_read(job.config, job.options.rows, weights), kv_bytes_read(job.options, job.config, plan)
    even_ms, fullest_ms = (1e3 * (kv + read) / job.bandwidth for kv in kvs)
    speed = 1e3 * job.options.rows / best_ms / plan.mesh.size
    rooflines = {"roofline_ms": even_ms, "roofline_of_fullest_ms": fullest_ms, "times_roofline": best_ms / even_ms}
    return {"best_ms": best_ms, "tokens_per_s_per_device": speed, **rooflines}


def cache_after_decoding(job: Job, plan: Plan, spare: int) -> tuple[KVCache, Rows]:
    """Return a cache of random numbers as long as after prompt and decoding, with pages for `spare` more tokens."""
    options, config, length = job.options, job.config, job.options.context + job.options.decoded
    spec = CacheSpec.from_config(config, options.dtype)
    lens = ([options.context] * options.rows, [length + spare] * options.rows)
    cache, rows = make_cache(plan, spec, *lens, page=options.page)
    pools, nest = jax.tree.flatten(cache)
    pools = [filled(pool_AKWH, seed) for seed, pool_AKWH in enumerate(pools)]
    return jax.tree.unflatten(nest, pools), rows._replace(length_B=per_row(plan, [length] * options.rows))


def programs(job: Job, plan: Plan, weights: Weights) -> tuple[Program, Program]:
    """A step, and a call of many that nothing ends."""
    rows, where = job.options.rows, sharding(plan.mesh, REPLICATED)
    token_B = np.arange(rows) % job.config.vocab
    new = {"tokens_BT": per_row(plan, token_B[:, None]), "count_B": per_row(plan, np.ones(rows)), "sampling": None}
    no_stop_ids = jax.device_put(np.zeros(0, np.int32), where)
    inputs = DecodeInput(per_row(plan, token_B), per_row(plan, [2**31 - 1] * rows), no_stop_ids)
    given = (job.config, plan, job.options.tokens_per_call, weights)
    return partial(step, job.config, plan, weights, **new), partial(many_steps, *given, inputs=inputs, sampling=None)


def compile_ahead(program: Any, cache: KVCache, rows: Rows) -> tuple[float, int | None]:
    """Seconds that it took, and bytes that it needs beside its arguments. A call finds it compiled."""
    began = time.perf_counter()
    compiled = program.func.lower(*program.args, cache, rows, **program.keywords).compile()
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    return seconds, memory.temp_size_in_bytes if memory else None


def awaited(program: Program, cache: KVCache, rows: Rows, calls: int) -> tuple[float, KVCache]:
    """The median ms of a call, each waited for; and the cache."""
    cache, seconds = warmed(program, cache, rows), []
    for _ in range(calls):
        began = time.perf_counter()
        cache, rows = jax.block_until_ready(program(cache, rows))[2:]
        seconds.append(time.perf_counter() - began)
    return 1e3 * median(seconds), cache


def queued(program: Program, cache: KVCache, rows: Rows, calls: int) -> tuple[float, KVCache]:
    """The mean ms of a call, all waited for at the end; and the cache."""
    cache = warmed(program, cache, rows)
    began = time.perf_counter()
    for _ in range(calls):
        cache, rows = program(cache, rows)[2:]
    jax.block_until_ready((cache, rows))
    return 1e3 * (time.perf_counter() - began) / calls, cache


def warmed(program: Program, cache: KVCache, rows: Rows) -> KVCache:
    """What is written here is written again, as `rows` stay where they are."""
    for _ in range(WARM_UP):
        cache = jax.block_until_ready(program(cache, rows)).cache
    return cache


def table_of(found: dict[str, Any]) -> Table:
    model = f"{found['config']}, {found['layers']} layers, {found['dtype']}"
    cached = f"{found['rows']} rows of {found['context']} + {found['decoded']} tokens"
    title = f"{model}; {cached}; {found['device']}, {found['bandwidth_bytes_per_s'] / 1e9:.4g} GB/s"
    words = ("mesh", "placement", "combine", "kernel")
    numbers = {name: (f"{way}\nms", 1) for name, way in WAYS.items()} | {
        "tokens_per_s_per_device": ("tokens/s\n/device", 1),
        "roofline_ms": ("roofline\nms", 1),
        "times_roofline": ("times\nroofline", 1),
        "cache_bytes": ("cache\nGB", 1e9),
        "temporary_bytes": ("temporary\nGB", 1e9),
        "compile_s": ("compile\ns", 1),
    }
    table = Table(*words, *(head for head, _ in numbers.values()), title=title, title_justify="left")
    for run in found["runs"]:
        cells = ("-" if run[name] is None else f"{run[name] / unit:.4g}" for name, (_, unit) in numbers.items())
        table.add_row(*(run[name] for name in words), *cells)
    return table


def draw(figure: Any, file: Path, found: dict[str, Any]) -> None:
    """Bars of ms per token of each run, and the roofline across them."""
    runs = found["runs"]
    ways = [way for way in WAYS if runs[0][way] is not None]
    figure.set_size_inches(3 + len(runs), 4)
    axes, at_X, width = figure.subplots(), np.arange(len(runs)), 0.8 / len(ways)
    for index, way in enumerate(ways):
        axes.bar(at_X - 0.4 + index * width, [run[way] for run in runs], width, align="edge", label=WAYS[way])
    axes.hlines([run["roofline_ms"] for run in runs], at_X - 0.4, at_X + 0.4, color="black", label="roofline")
    axes.set_xticks(at_X, ["\n".join((run["mesh"], run["placement"], run["combine"])) for run in runs])
    axes.set(ylabel="ms per token", title=f"{found['config']}, {found['layers']} layers, {found['device']}")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
