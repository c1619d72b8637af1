#!/usr/bin/env python3
"""Time decoding and prefill of a model with random weights, as users call them, on one mesh after another.

python scripts/bench_decode.py --config configs/llama-3.1-8b.toml --mesh 2x1 --mesh 1x2 --case 1x8192 --case 32x8192

Every combination of mesh, placement, combine and case is one run. The time per token (of every row) is measured for
`Engine` while all rows decode, for `generate`, and for the program `decode` over a cache of random numbers, or for
those that --time names. The
roofline is the time to read a device's weights and an even share of the cache, at the bandwidth measured here. With
--baseline, PyTorch and FlashInfer run the same cases, tensor parallel over as many devices (baseline_torch.py).
"""

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from public_apis import time_engine, time_generate, time_prefill
from random_weights import fill_with_noise, make_random_weights
from rich.console import Console
from rich.table import Table
from roofline import count_kv_bytes, count_weight_bytes

from helix_jax.arrays import bytes_per_device, put
from helix_jax.cache import cache_specs, make_caches, per_row
from helix_jax.cli.app import Parser, run_command
from helix_jax.cli.options import DTYPES, add_choice, default_dtype
from helix_jax.cli.output import new_figure, write_json
from helix_jax.combine import COMBINES
from helix_jax.config import ModelConfig
from helix_jax.decoding import DEFAULT_STEPS, DecodeState, decode_program
from helix_jax.devices import open_mesh
from helix_jax.engine.options import DEFAULT_PAGE
from helix_jax.kernels import KERNELS
from helix_jax.layout import PLACEMENTS
from helix_jax.mesh import CP, ROWS_B, TP, make_mesh
from helix_jax.models.transformer import Transformer, Weights, assemble
from helix_jax.plan import CACHE_DTYPES, Plan
from helix_jax.planner.measure import measure_bandwidth
from helix_jax.planner.shapes import read_shape, take_first_layers
from helix_jax.validation import check_int

PROGRAM = "bench_decode.py"
CALLS = 4  # timed calls of `decode`, after one that is not
PLATFORMS = ("auto", "cpu", "gpu")
POSITIONS = 2**30
TIMED = ("Engine", "generate", "decode")
TIMINGS = {f"{name.lower()}_ms": name for name in (*TIMED, "baseline")}


class Case(NamedTuple):
    """How many rows there are, and how many tokens each has at first."""

    rows: int
    context: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.context}"


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
    add("--kv-heads", type=int, metavar="N", help="time a model with N key/value heads (default: those of the config)")
    text = "sequences and the length of each when decoding begins; may be repeated (default: 8x8192)"
    add("--case", action="append", metavar="ROWSxTOKENS", help=text)
    text = "prompts to prefill and the length of each; may be repeated (default: none)"
    add("--prefill", action="append", metavar="ROWSxTOKENS", help=text)
    text = "tokens decoded before, in the cache of `decode`: the ranks store them as the placement says (default: 0)"
    add("--decoded", type=int, default=0, metavar="TOKENS", help=text)
    text = "rule that assigns blocks to ranks; may be repeated (default: helix)"
    add_choice(parser, "--placement", PLACEMENTS, text, several=True)
    text = "collective that combines the ranks' partial results; may be repeated (default: psum)"
    add_choice(parser, "--combine", COMBINES, text, several=True)
    add_choice(parser, "--kernel", KERNELS, "attention kernel", default="auto")
    add("--block", type=int, default=16, metavar="TOKENS", help="length of a block of the sequence (default: 16)")
    text = "tokens per cache page (default: %(default)s)"
    add("--page", type=int, default=DEFAULT_PAGE, metavar="TOKENS", help=text)
    add("--steps-per-call", type=int, default=DEFAULT_STEPS, metavar="N", help="decode steps (default: %(default)s)")
    text = "what is timed; may be repeated (default: all three)"
    add_choice(parser, "--time", TIMED, text, several=True)
    add_choice(parser, "--dtype", DTYPES, "type of the weights (default: bfloat16; float32 on a CPU)")
    add_choice(
        parser, "--kv-cache-dtype", CACHE_DTYPES, "type of the cache (default: that of the weights)", default="auto"
    )
    text = "devices to use; cpu is split into as many fake devices as the largest mesh needs"
    add_choice(parser, "--platform", PLATFORMS, text, default="auto")
    add("--baseline", action="store_true", help="run the cases with PyTorch and FlashInfer too")
    add("--json", type=Path, metavar="FILE", help="write all numbers to FILE, after every run")
    add("--plot", type=Path, metavar="FILE.png", help="draw the ms per token of every run")
    return parser.parse_args()


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    least = {"decoded": 0, "page": 1, "steps_per_call": 1} | ({} if options.kv_heads is None else {"kv_heads": 1})
    for name, minimum in least.items():
        check_int(f"--{name.replace('_', '-')}", getattr(options, name), least=minimum)
    options.placement, options.combine = options.placement or ["helix"], options.combine or ["psum"]
    options.time = options.time or TIMED
    options.mesh = [parse_sizes("--mesh", text, "tp x cp") for text in options.mesh]
    options.case = [Case(*parse_sizes("--case", text, "rows x tokens")) for text in options.case or ["8x8192"]]
    options.prefill = [Case(*parse_sizes("--prefill", text, "rows x tokens")) for text in options.prefill or []]
    if options.baseline and options.kv_heads is not None:
        raise ValueError(f"--kv-heads is {options.kv_heads}, but the baseline has those of --config: leave one out")
    if options.baseline:
        check_packages("--baseline", "torch", "flashinfer", instead="leave it out")
    return options


def check_packages(what: str, *names: str, instead: str) -> None:
    """Check that packages are installed.

    Raises:
        ValueError: Some are not.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{what} needs {' and '.join(missing)}: install them, or {instead}")


def parse_sizes(option: str, text: str, meaning: str) -> tuple[int, int]:
    """Return two sizes such as "2x4".

    Raises:
        ValueError: The text has another form, or a size is 0.
    """
    match = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", text, re.ASCII)
    if not match:
        raise ValueError(f"{option} is '{text}': give {meaning}, both at least 1, such as 2x4")
    return int(match[1]), int(match[2])


def bench(options: argparse.Namespace) -> None:
    """Measure every run, write the report after each, and print tables."""
    config = read_config(options.config, options.layers, options.kv_heads)
    figure = new_figure("--plot", options.plot) if options.plot else None
    baselines = run_baselines(options)  # before JAX takes the memory of the devices
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
        model = assemble(config, make_random_weights(config, mesh, options.dtype))
        baseline = baselines.get(mesh.size, {})
        for plan in plans:
            for kind, cases, measure in (
                ("runs", options.case, measure_decoding),
                ("prefills", options.prefill, measure_prefill),
            ):
                for case in cases:
                    report[kind].append(describe_plan(plan, case) | measure(job, plan, model, case, baseline))
                    write_json(options.json, report)
                    progress.print(json.dumps(report[kind][-1]))
        del model  # before that of the next mesh is created
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(make_table(report))
    if report["prefills"]:
        console.print(make_prefill_table(report))
    if figure:
        draw(figure, options.plot, report)


def read_config(file: Path, layers: int | None, kv_heads: int | None) -> ModelConfig:
    """Return a config with only the first layers, or with another number of key/value heads, if they are given."""
    config = read_shape(file)
    config = config if layers is None else take_first_layers(config, layers)
    config = config if kv_heads is None else replace(config, kv_heads=kv_heads)
    return replace(config, max_positions=POSITIONS)  # a case may be as long as the model, and decodes more


def run_baselines(options: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Return the report of baseline_torch.py by number of devices."""
    if not options.baseline:
        return {}
    arguments = ["--decode", *map(str, options.case)]
    arguments += [] if options.layers is None else ["--layers", str(options.layers)]
    # A prompt is one chunk there, and several short ones are as fast as one that is as long as a chunk of ours.
    arguments += ["--prefill", *(str(max(case.context, 2048)) for case in options.prefill)] if options.prefill else []
    counts = sorted({math.prod(mesh) for mesh in options.mesh})
    return {devices: run_baseline(options.config, devices, arguments) for devices in counts}


def run_baseline(
    config: Path, devices: int, arguments: list[str], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run baseline_torch.py, which prints its report.

    Args:
        config: The model.
        devices: How many devices it uses.
        arguments: Its other arguments.
        environment: That of its process. None: that of this one.

    Raises:
        ValueError: It failed.
    """
    command = [sys.executable, str(Path(__file__).with_name("baseline_torch.py")), "--config", str(config)]
    command += ["--devices", str(devices), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise ValueError(f"the baseline exited with {done.returncode}: see its message above")
    return json.loads(done.stdout.splitlines()[-1])


def make_plans(mesh: Mesh, options: argparse.Namespace, config: ModelConfig) -> list[Plan]:
    """Return a plan for each combination of placement and combine.

    Raises:
        ValueError: The mesh does not divide the model's heads, or the kernel does not support them.
    """
    plans = [
        Plan(mesh, options.block, placement, combine, options.kernel, cache_dtype=options.kv_cache_dtype)
        for placement in options.placement
        for combine in (options.combine if mesh.shape[CP] > 1 else options.combine[:1])
    ]
    for plan in plans:
        plan.check_model(config)
        plan.kernel_for_model(config, options.page, options.dtype)
    return plans


def describe(job: Job, device: str) -> dict[str, Any]:
    """Return a report of the settings, without runs."""
    names = ("decoded", "block", "page", "steps_per_call", "dtype", "kv_cache_dtype", "platform")
    report = {"config": job.options.config.stem, "layers": job.config.layers, "device": device, "jax": jax.__version__}
    report |= {name: getattr(job.options, name) for name in names}
    return report | {"bandwidth_bytes_per_s": job.bandwidth, "runs": [], "prefills": []}


def describe_plan(plan: Plan, case: Case) -> dict[str, Any]:
    mesh = f"{plan.mesh.shape[TP]}x{plan.mesh.shape[CP]}"
    return {"mesh": mesh, "placement": plan.layout.placement, "combine": plan.combine, "case": str(case)}


def measure_decoding(job: Job, plan: Plan, model: Transformer, case: Case, baseline: dict[str, Any]) -> dict[str, Any]:
    """Time one plan and case. Bytes are per device."""
    options, weights = job.options, model.weights()
    engine_options = {"page": options.page, "steps_per_call": options.steps_per_call}
    run: dict[str, Any] = {"kernel": plan.kernel_for_model(job.config, options.page, options.dtype)}
    run |= dict.fromkeys(TIMINGS)
    if "Engine" in options.time:
        run["engine_ms"] = time_engine(model, plan, *case, **engine_options)
    if "generate" in options.time:
        run["generate_ms"] = time_generate(model, plan, *case, **engine_options)
    if "decode" in options.time:
        run |= time_decode(job, plan, weights, case)
    run["baseline_ms"] = baseline.get("decode_ms", {}).get(str(case))
    weight_bytes = count_weight_bytes(job.config, case.rows, weights)
    kv_bytes = count_kv_bytes(case, options, job.config, plan)
    run["roofline_ms"], run["roofline_of_fullest_ms"] = (1e3 * (kv + weight_bytes) / job.bandwidth for kv in kv_bytes)
    return run | {"weight_bytes": bytes_per_device(weights)}


def time_decode(job: Job, plan: Plan, weights: Weights, case: Case) -> dict[str, Any]:
    """Time the program `decode` over a cache of random numbers, as long as after the prompt and earlier decoding."""
    options, config, steps = job.options, job.config, job.options.steps_per_call
    length = case.context + options.decoded
    lens = ([case.context] * case.rows, [length + (2 + CALLS) * steps] * case.rows)
    caches, rows = make_caches(plan, cache_specs(config, plan.cache_dtype_for(options.dtype)), *lens, page=options.page)
    cache_bytes = bytes_per_device(caches)
    caches = jax.tree.map(lambda pool_XKWH: fill_with_noise(pool_XKWH, 0), caches)
    rows = rows._replace(length_B=per_row(plan, [length] * case.rows))
    token_B, finished_B = np.arange(case.rows) % config.vocab, np.zeros(case.rows, bool)
    state = DecodeState(caches, rows, per_row(plan, token_B), put(finished_B, plan.mesh, ROWS_B))
    decode = decode_program(plan)
    call = partial(decode, config, plan, weights)
    count_B, seconds = per_row(plan, [steps] * case.rows), []
    start = time.perf_counter()
    lowered = decode.lower(config, plan, weights, state, count_B, steps)
    memory = lowered.compile().memory_analysis()
    compile_s = time.perf_counter() - start
    for _ in range(1 + CALLS):
        start = time.perf_counter()
        _, state = jax.block_until_ready(call(state, count_B, steps))
        seconds.append(time.perf_counter() - start)
    return {
        "decode_ms": 1e3 * median(seconds[1:]) / steps,
        "decode_compile_s": compile_s,
        "decode_temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "cache_bytes": cache_bytes,
    }


def measure_prefill(job: Job, plan: Plan, model: Transformer, case: Case, baseline: dict[str, Any]) -> dict[str, Any]:
    """Time the prefill of one plan and case."""
    speed = time_prefill(model, plan, *case, page=job.options.page)
    theirs = baseline.get("prefill_tokens_per_s", {}).get(str(max(case.context, 2048)))
    return {"tokens_per_s": speed, "baseline_tokens_per_s": theirs}


def make_table(report: dict[str, Any]) -> Table:
    """Return the times of every run, and their ratios to the baseline and to the roofline."""
    settings = ("mesh", "placement", "combine", "kernel", "case")
    headings = [f"{name}\nms" for name in (*TIMINGS.values(), "roofline")]
    ratios = ["Engine /\nbaseline", "generate /\nbaseline", "Engine /\nroofline"]
    table = Table(*settings, *headings, *ratios, "cache\nGB", title=make_title(report), title_justify="left")
    for run in report["runs"]:
        numbers = [run[timing] for timing in TIMINGS] + [run["roofline_ms"]]
        numbers += [divide(run[name], run["baseline_ms"]) for name in ("engine_ms", "generate_ms")]
        numbers += [divide(run["engine_ms"], run["roofline_ms"]), divide(run.get("cache_bytes"), 1e9)]
        table.add_row(*(run[name] for name in settings), *map(format_number, numbers))
    return table


def make_prefill_table(report: dict[str, Any]) -> Table:
    """Return the tokens per second of every prefill."""
    settings = ("mesh", "placement", "combine", "case")
    table = Table(*settings, "prefill\ntokens/s", "baseline\ntokens/s", "ratio", title_justify="left")
    for run in report["prefills"]:
        numbers = [run["tokens_per_s"], run["baseline_tokens_per_s"]]
        numbers.append(divide(*numbers))
        table.add_row(*(run[name] for name in settings), *map(format_number, numbers))
    return table


def make_title(report: dict[str, Any]) -> str:
    model = f"{report['config']}, {report['layers']} layers, {report['dtype']}"
    speed = f"{report['device']}, {report['bandwidth_bytes_per_s'] / 1e9:.4g} GB/s"
    return f"{model}; {report['steps_per_call']} steps per call; {speed}; JAX {report['jax']}"


def divide(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def format_number(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


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
    axes.set_xticks(center_X, ["\n".join((run["mesh"], run["case"], run["combine"])) for run in runs])
    axes.set(ylabel="ms per token", title=f"{report['config']}, {report['layers']} layers, {report['device']}")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
