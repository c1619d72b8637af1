"""Predict decoding on a number of devices: which tp, which cp, how many rows, and whether Helix is worth it.

Every mesh that fits into memory is predicted, on every number of devices that divides --devices, and compared with
other ways to share a model. helix_jax/planner/README.md describes the model behind the numbers, and how close it is.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from helix_jax.cli.app import OK
from helix_jax.cli.options import add_choice
from helix_jax.cli.output import new_figure
from helix_jax.config import ModelConfig
from helix_jax.planner import (
    BASELINES,
    HARDWARE,
    OWN,
    STRATEGIES,
    Candidate,
    Hardware,
    Workload,
    best_throughput,
    fastest,
    find_hardware,
    pareto_frontier,
    read_shape,
    sweep,
)
from helix_jax.planner.hardware import DTYPE_BYTES
from helix_jax.planner.measure import measure_hardware
from helix_jax.planner.memory import check_fits
from helix_jax.planner.plots import plot_frontiers
from helix_jax.validation import check_choice, check_int, check_positive

EXAMPLE = "helix-jax plan --config configs/llama-3.1-8b.toml --devices 8 --hardware h100 --context 1M --rows 8"
MAX_DEVICES, MAX_CONTEXT = 4096, 2**30
HERE = "here"
_UNITS = {"": 1, "K": 2**10, "M": 2**20}
_PIPE_WIDTH = 100  # columns of a report that is not written to a terminal


class Job(NamedTuple):
    """The question."""

    name: str
    config: ModelConfig
    workload: Workload
    hardware: Hardware
    options: argparse.Namespace


class Plans(NamedTuple):
    """The candidates: those that helix_jax runs, and the baselines."""

    own: list[Candidate]
    baselines: list[Candidate]


class Choice(NamedTuple):
    """The best candidates for a limit."""

    limit: str
    own: Candidate | None
    baseline: Candidate | None
    gain: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `helix-jax plan` to its parser."""
    model = parser.add_argument_group("model")
    text = "model config, such as those in configs/"
    model.add_argument("--config", type=Path, required=True, metavar="FILE.toml", help=text)
    add_choice(model, "--dtype", tuple(DTYPE_BYTES), "type of the weights", default="bfloat16")
    text = "type of the cache; helix_jax itself has no fp4, and keeps weights in 16 or 32 bits"
    add_choice(model, "--cache-dtype", tuple(DTYPE_BYTES), text, default="bfloat16")
    add = parser.add_argument_group("devices").add_argument
    add("--devices", type=int, required=True, metavar="N", help="number of devices")
    text = f"kind of device: {', '.join(HARDWARE)}, or {HERE}, which measures the devices of this machine"
    add("--hardware", required=True, metavar="NAME", help=text)
    add = parser.add_argument_group("work").add_argument
    text = "tokens in the cache of each row, such as 131072, 128K or 1M"
    add("--context", required=True, metavar="TOKENS", help=text)
    add("--ttl-ms", type=float, metavar="MS", help="find the most tokens per second within this time per token")
    add("--rows", type=int, metavar="N", help="find the fastest plan for this many rows on all devices together")
    add = parser.add_argument_group("assumptions").add_argument
    add("--hop-b", action="store_true", help="overlap the combine with attention, which helix_jax does not do")
    text = "neglect what kernels and routing to experts take beside reads and operations"
    add("--ideal", action="store_true", help=text)
    add = parser.add_argument_group("output").add_argument
    add("--plot", type=Path, metavar="FILE.png", help="draw the frontiers")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run `helix-jax plan` and return its exit code."""
    job = make_job(options)
    figure = new_figure("--plot", options.plot) if options.plot else None
    check_fits(job.name, job.config, job.workload, job.hardware, options.devices)
    plans = make_plans(job)
    choices = choose(plans, options)
    if figure:
        labels = {"helix-jax (Helix and tensor parallelism)": plans.own}
        labels |= {name: [each for each in plans.baselines if each.parallelism.strategy == name] for name in BASELINES}
        plot_frontiers(figure, {label: pareto_frontier(each) for label, each in labels.items()}, describe(job))
        figure.savefig(options.plot, dpi=120)
        print(f"helix-jax: wrote '{options.plot}'", file=sys.stderr)
    if options.json:
        print(json.dumps(to_json(job, plans, choices)))
    else:
        _print_report(Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH), job, plans, choices)
    return OK


def make_job(options: argparse.Namespace) -> Job:
    """Check the options, and return the question.

    Raises:
        ValueError: An option is invalid.
        OSError: The config cannot be read.
    """
    check_int("--devices", options.devices, least=1)
    if options.devices > MAX_DEVICES:
        raise ValueError(f"--devices is {options.devices}: give at most {MAX_DEVICES}")
    if options.rows is not None:
        check_int("--rows", options.rows, least=1)
    if options.ttl_ms is not None:
        check_positive("--ttl-ms", options.ttl_ms)
    check_choice("--hardware", options.hardware, (*HARDWARE, HERE))
    context = parse_context(options.context)
    workload = Workload(context=context, dtype=options.dtype, cache_dtype=options.cache_dtype, hop_b=options.hop_b)
    config = read_shape(options.config)
    hardware = measure_hardware(jax.devices()) if options.hardware == HERE else find_hardware(options.hardware)
    hardware = replace(hardware, kernel_s=0.0, routing_s=0.0) if options.ideal else hardware
    return Job(options.config.stem, config, workload, hardware, options)


def make_plans(job: Job) -> Plans:
    """Predict all candidates."""
    candidates = sweep(job.config, job.workload, job.hardware, job.options.devices, STRATEGIES)
    return Plans(*([each for each in candidates if each.parallelism.strategy in names] for names in (OWN, BASELINES)))


def parse_context(text: str) -> int:
    """Return the tokens that a text such as "128K" means; K is 1,024.

    Raises:
        ValueError: It has another form, or the number is out of range.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KM]?)", text.upper(), re.ASCII)
    if not match:
        raise ValueError(f"--context is '{text}': give a number of tokens such as 131072, 128K or 1M")
    tokens = float(match[1]) * _UNITS[match[2]]
    if not 1 <= tokens <= MAX_CONTEXT:
        raise ValueError(f"--context is '{text}': give 1 to {MAX_CONTEXT} tokens")
    return int(tokens)


def choose(plans: Plans, options: argparse.Namespace) -> list[Choice]:
    """Return the fastest candidates, those with most tokens per second, and those that the limits ask for.

    Raises:
        ValueError: No candidate is fast enough, or has enough rows.
    """
    choices = [
        _choice("fastest", plans, fastest, _speed),
        _choice("most tokens/s", plans, best_throughput, _throughput),
    ]
    if options.ttl_ms is not None:
        limit = f"most tokens/s within {options.ttl_ms:g} ms per token"
        choices.append(_choice(limit, plans, lambda each: best_throughput(each, options.ttl_ms / 1e3), _throughput))
        if not choices[-1].own:
            least = math.ceil(1e5 * min(each.ttl_s for each in plans.own)) / 100
            raise ValueError(
                f"--ttl-ms is {options.ttl_ms:g}, but a token takes at least {least} ms: give at least {least}"
            )
    if options.rows is not None:
        limit = f"fastest with {options.rows} rows"
        choices.append(_choice(limit, plans, lambda each: fastest(each, options.devices, options.rows), _speed))
        if not choices[-1].own:
            most = max(_total_rows(each, options.devices) for each in plans.own)
            raise ValueError(
                f"--rows is {options.rows}, but there is memory for {most}: give at most {most} rows, or more devices"
            )
    return choices


def describe(job: Job) -> str:
    """Return a line about the question."""
    workload = job.workload
    types = f"weights {workload.dtype}, cache {workload.cache_dtype}"
    return f"{job.name}, {job.options.devices} x {job.options.hardware}, {workload.context:,} tokens per row, {types}"


def to_json(job: Job, plans: Plans, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the result as JSON."""
    devices = job.options.devices

    def show(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
        return [candidate_json(each, devices) for each in candidates]

    return {
        "model": job.name,
        "devices": devices,
        "hardware": {"name": job.options.hardware, "source": job.hardware.source},
        "context": job.workload.context,
        "dtype": job.workload.dtype,
        "cache_dtype": job.workload.cache_dtype,
        "hop_b": job.workload.hop_b,
        "ideal": job.options.ideal,
        "frontier": show(pareto_frontier(plans.own)),
        "baseline_frontier": show(pareto_frontier(plans.baselines)),
        "choices": [
            {
                "limit": each.limit,
                "best": each.own and candidate_json(each.own, devices),
                "baseline": each.baseline and candidate_json(each.baseline, devices),
                "gain": each.gain,
            }
            for each in choices
        ],
    }


def candidate_json(candidate: Candidate, devices: int) -> dict[str, Any]:
    """Return a candidate as JSON. `rows` is per replica."""
    parallelism = candidate.parallelism
    return {
        "strategy": parallelism.strategy,
        **{axis: getattr(parallelism, axis) for axis in ("tp", "cp", "pp", "dp", "ep", "devices", "experts")},
        "replicas": devices // parallelism.devices,
        "rows": candidate.rows,
        "most_rows": candidate.most_rows,
        "ms_per_token": 1e3 * candidate.ttl_s,
        "tokens_per_s_per_user": candidate.tokens_per_s_per_user,
        "tokens_per_s_per_device": candidate.tokens_per_s_per_device,
        "memory_bytes": candidate.memory_bytes,
        "bottleneck": candidate.bottleneck,
        "ms": {name: 1e3 * seconds for name, seconds in candidate.time._asdict().items()},
    }


def _choice(
    limit: str,
    plans: Plans,
    select: Callable[[list[Candidate]], Candidate | None],
    measure: Callable[[Candidate], float],
) -> Choice:
    own, baseline = select(plans.own), select(plans.baselines)
    return Choice(limit, own, baseline, measure(own) / measure(baseline) if own and baseline else None)


def _speed(candidate: Candidate) -> float:
    return candidate.tokens_per_s_per_user


def _throughput(candidate: Candidate) -> float:
    return candidate.tokens_per_s_per_device


def _total_rows(candidate: Candidate, devices: int) -> int:
    return candidate.rows * (devices // candidate.parallelism.devices)


def _print_report(console: Console, job: Job, plans: Plans, choices: Sequence[Choice]) -> None:
    console.print(f"{describe(job)}\nhardware: {job.hardware.source}\n")
    console.print(_frontier_table("helix-jax: Helix and tensor parallelism", plans.own))
    console.print(_frontier_table("the best of the baselines", plans.baselines))
    for name in BASELINES:
        console.print(f"{name}: {STRATEGIES[name].description}")
    for choice in choices:
        ratio = f"  ratio     {choice.gain:.2f}" if choice.gain else ""
        lines = (
            f"\n{choice.limit}:\n  helix-jax {_summary(choice.own)}\n  baseline  {_summary(choice.baseline)}\n{ratio}"
        )
        console.print(lines.rstrip(), soft_wrap=True)


def _summary(candidate: Candidate | None) -> str:
    if candidate is None:
        return "none"
    rows = f"{candidate.rows} row{'s' * (candidate.rows > 1)}"
    return (
        f"{candidate.parallelism}, {rows}, {1e3 * candidate.ttl_s:.2f} ms per token, "
        f"{candidate.tokens_per_s_per_device:.1f} tokens/s per device"
    )


def _frontier_table(title: str, candidates: Sequence[Candidate]) -> Table:
    """Return a table of a Pareto frontier. Rows are those of a replica."""
    columns = ("mesh", "ep", "rows", "ms per\ntoken", "tokens/s\nper user", "tokens/s\nper device", "GB per\ndevice")
    table = Table(*columns, "bottleneck", title=title, title_justify="left", box=SIMPLE)
    for each in pareto_frontier(candidates):
        numbers = 1e3 * each.ttl_s, each.tokens_per_s_per_user, each.tokens_per_s_per_device, each.memory_bytes / 1e9
        shown = (f"{number:.3g}" if number < 1000 else f"{number:,.0f}" for number in numbers)
        table.add_row(str(each.parallelism), str(each.parallelism.ep), str(each.rows), *shown, each.bottleneck)
    return table
