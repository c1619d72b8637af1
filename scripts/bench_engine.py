#!/usr/bin/env python3
"""Time an engine on a trace of requests, with continuous and with static batching.

python scripts/bench_engine.py --cp 2 --platform cpu --json engine.json

Prompts are random tokens, output lengths are uniform, and no output ends early. Requests arrive at steps of the engine,
not at times, so that a trace is the same on every machine: all at the first step, or with --rate as a Poisson process.
"continuous" submits each request when it arrives. "static" submits as many arrived requests as there are rows, and the
next ones when all of these have finished. The time to the first token counts from the arrival. Gaps are the times
between consecutive tokens of a request. Programs are compiled before, and prefix caching is off.
"""

import argparse
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from helix_jax.cli.app import Parser, run_command
from helix_jax.cli.console import Reporter
from helix_jax.cli.options import DecodeSetup, add_decode_arguments, make_setup, open_devices
from helix_jax.cli.output import write_json
from helix_jax.engine import Engine, SamplingParams, TokenEvent
from helix_jax.folder import ModelFolder
from helix_jax.mesh import CP, TP
from helix_jax.validation import check_int

PROGRAM = "bench_engine.py"
CHUNK = 128
PERCENTILES = (50, 90, 99)


class TraceRequest(NamedTuple):
    """A request of the trace. It arrives at step `step` of the engine."""

    prompt: list[int]
    new_tokens: int
    step: int


class Replay(NamedTuple):
    """The timing of a trace. `moments_s` are for each request the times of its arrival and of each of its tokens."""

    seconds: float
    steps: int
    moments_s: list[list[float]]


def main() -> int:
    return run_command(lambda: bench(check_options(parse_arguments())), PROGRAM)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--requests", type=int, default=64, metavar="N", help="number of requests in the trace (default: 64)")
    add("--rate", type=float, metavar="X", help="mean arrivals per step (default: all arrive at the first step)")
    lengths = {"type": int, "nargs": 2, "metavar": ("MIN", "MAX")}
    add("--prompt", **lengths, default=(32, 128), help="tokens of a prompt (default: 32 128)")
    add("--new", **lengths, default=(16, 256), help="tokens of an output (default: 16 256)")
    add("--seed", type=int, default=0, help="seed of the trace (default: 0)")
    add("--rows", type=int, default=8, metavar="N", help="requests that decode together (default: 8)")
    add(
        "--pages", type=int, metavar="N", help="cache pages per rank (default: what the rows can fill, or memory holds)"
    )
    add_decode_arguments(parser)
    add("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.set_defaults(prefill_chunk=CHUNK)  # no prompt is longer by default
    return parser.parse_args()


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    for name in ("requests", "rows"):
        check_int(f"--{name}", getattr(options, name), least=1)
    for name in ("prompt", "new"):
        least, most = getattr(options, name)
        if not 1 <= least <= most:
            raise ValueError(f"--{name} is {least} {most}: give the minimum, at least 1, and the maximum")
    if options.rate is not None and not options.rate > 0:
        raise ValueError(f"--rate is {options.rate}: give a number above 0, or leave it out")
    return options


def bench(options: argparse.Namespace) -> None:
    """Replay one trace in both ways, write the report after each, and print a table."""
    folder = ModelFolder.open(options.model)
    mesh = open_devices(options)
    setup = make_setup(options, folder, mesh, options.prompt[1] + options.new[1])
    report = describe(options, setup, mesh)
    write_json(options.json, report)  # before anything is measured, in case the file cannot be written
    trace = make_trace(options, folder.config.vocab)
    engine = Engine(
        setup.load(Reporter()),
        setup.plan,
        rows=options.rows,
        pages=options.pages,
        page=setup.page,
        max_len=options.prompt[1] + options.new[1],
        chunk=setup.chunk,
        **setup.load_drafts(Reporter()),
        prefix_caching=False,  # the second replay would find the prompts of the first
    )
    report["compile_s"] = engine.warm_up(sampling=False)
    engine.generate([trace[0].prompt], SamplingParams(max_new_tokens=2))  # whatever else happens only once
    for batching, batch_size in (("continuous", None), ("static", options.rows)):
        report["runs"].append(measure(engine, trace, batching, batch_size))
        write_json(options.json, report)
    continuous, static = (run["tokens_per_s"] for run in report["runs"])
    report["ratio"] = continuous / static
    write_json(options.json, report)
    Console(highlight=False, soft_wrap=True).print(make_table(report))


def describe(options: argparse.Namespace, setup: DecodeSetup, mesh: Mesh) -> dict[str, Any]:
    """Return a report of the settings, without runs."""
    names = ("requests", "rate", "prompt", "new", "seed", "rows", "pages", "block", "page", "prefill_chunk")
    return {
        "model": setup.folder.path.name,
        "mesh": f"{mesh.shape[TP]}x{mesh.shape[CP]}",
        "placement": options.placement,
        "dtype": setup.dtype,
        "kernel": setup.kernel,
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
        **{name: getattr(options, name) for name in names},
        "runs": [],
    }


def make_trace(options: argparse.Namespace, vocab: int) -> list[TraceRequest]:
    """Return random requests in the order of arrival."""
    random = np.random.default_rng(options.seed)
    prompt_lens, new_tokens = (
        random.integers(least, most, options.requests, endpoint=True) for least, most in (options.prompt, options.new)
    )
    prompts = [random.integers(vocab, size=length).tolist() for length in prompt_lens]
    waits = random.exponential(1 / options.rate, options.requests) if options.rate else np.zeros(options.requests)
    steps = np.floor(np.cumsum(waits)).astype(int)
    return [TraceRequest(*request) for request in zip(prompts, new_tokens.tolist(), steps.tolist(), strict=True)]


def measure(engine: Engine, trace: list[TraceRequest], batching: str, batch_size: int | None) -> dict[str, Any]:
    """Replay the trace once. Return the numbers of the report."""
    preemptions = engine.stats().preemptions
    replay = replay_trace(engine, trace, batch_size)
    tokens = sum(request.new_tokens for request in trace)
    return {
        "batching": batching,
        "seconds": replay.seconds,
        "steps": replay.steps,
        "tokens": tokens,
        "tokens_per_s": tokens / replay.seconds,
        "preemptions": engine.stats().preemptions - preemptions,
        "ttft_s": percentiles([first - arrival for arrival, first, *_ in replay.moments_s]),
        "gap_s": percentiles([gap for _, *moments in replay.moments_s for gap in np.diff(moments)]),
    }


def replay_trace(engine: Engine, trace: list[TraceRequest], batch_size: int | None) -> Replay:
    """Run the trace to its end.

    Args:
        engine: An idle engine.
        trace: Requests in the order of arrival.
        batch_size: How many requests to submit when all previous ones have finished. None submits each when it arrives.
    """
    expected, arrived = deque(trace), deque[tuple[TraceRequest, float]]()
    moments_s: dict[str, list[float]] = {}
    steps = clock = 0
    start = now = time.perf_counter()
    while expected or arrived or engine.busy:
        if not arrived and not engine.busy:
            clock = max(clock, expected[0].step)  # skip the steps without work
        while expected and expected[0].step <= clock:
            arrived.append((expected.popleft(), now))
        if batch_size is None or not engine.busy:
            for _ in range(min(len(arrived), batch_size or len(arrived))):
                request, arrival = arrived.popleft()
                params = SamplingParams(max_new_tokens=request.new_tokens, ignore_eos=True)
                moments_s[engine.submit(request.prompt, params)] = [arrival]
        events = engine.step()
        now, steps, clock = time.perf_counter(), steps + 1, clock + 1
        for event in events:
            if isinstance(event, TokenEvent):
                moments_s[event.id].append(now)
    return Replay(now - start, steps, list(moments_s.values()))


def percentiles(values: list[float]) -> dict[str, float | None]:
    return {f"p{p}": float(np.percentile(values, p)) if values else None for p in PERCENTILES}


def make_table(report: dict[str, Any]) -> Table:
    """Return the numbers of both runs, and their ratios."""
    settings = f"{report['model']}, tp x cp {report['mesh']}, {report['dtype']}, kernel {report['kernel']}"
    arrivals = f"{report['rate']:g} per step" if report["rate"] else "all at the first step"
    title = f"{settings}, {report['device']}; {report['requests']} requests, {arrivals}, {report['rows']} rows"
    headings = {"seconds": "s", "steps": "steps", "tokens_per_s": "tokens/s", "preemptions": "preemptions"}
    lines = [(heading, [run[name] for run in report["runs"]]) for name, heading in headings.items()]
    for name, (heading, unit) in {"ttft_s": ("first token, s", 1), "gap_s": ("gap, ms", 1e3)}.items():
        for p in report["runs"][0][name]:
            seconds = [run[name][p] for run in report["runs"]]
            lines.append((f"{heading}, {p}", [None if s is None else s * unit for s in seconds]))
    table = Table("", *(run["batching"] for run in report["runs"]), "ratio", title=title, title_justify="left")
    for heading, (continuous, static) in lines:
        ratio = continuous / static if continuous and static else None
        table.add_row(heading, *("-" if cell is None else f"{cell:.4g}" for cell in (continuous, static, ratio)))
    return table


if __name__ == "__main__":
    sys.exit(main())
