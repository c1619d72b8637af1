#!/usr/bin/env python3
"""Times an engine on a trace of requests: continuous batching against static batching, in one run.

python scripts/bench_engine.py --cp 2 --platform cpu --json engine.json

Prompts are random tokens, outputs of lengths drawn evenly, and nothing ends them early. Requests come at steps of the
engine, not at times, so that a trace is the same on every machine: all at the first, or with --rate as a Poisson
process. "continuous" submits each when it comes. "static" submits as many as there are rows of those that have come,
and the next when all of these have ended. Time to first token counts from when a request has come; gaps are those
between any two tokens of a request. All is compiled before, and prefixes are not shared.
"""

import argparse
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from reporting import Parser, exit_status, write_json
from rich.console import Console
from rich.table import Table

from helix_jax.checkpoint import read_config
from helix_jax.cli.devices import open_mesh
from helix_jax.cli.console import Reporter
from helix_jax.cli.options import DecodeSetup, add_shared_arguments, make_setup
from helix_jax.engine import Engine, TokenEvent, SamplingParams
from helix_jax.mesh import CP, TP

CHUNK = 128
PERCENTILES = (50, 90, 99)


class Asked(NamedTuple):
    """A request of the trace. step: of the engine, when it comes."""

    prompt: list[int]
    new_tokens: int
    step: int


class Times(NamedTuple):
    """What it took. moments: of each request when it came, and when it said each of its tokens; in seconds."""

    seconds: float
    steps: int
    moments: list[list[float]]


def main() -> int:
    return exit_status(lambda: bench(checked(parse_arguments())), if_too_large="take more devices, or fewer --rows")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--requests", type=int, default=64, metavar="N", help="in the trace (default: 64)")
    add("--rate", type=float, metavar="X", help="requests that come per step (default: all at the first)")
    add("--prompt", type=int, nargs=2, default=(32, 128), metavar="TOKENS", help="least and most (default: 32 128)")
    add("--new", type=int, nargs=2, default=(16, 256), metavar="TOKENS", help="least and most (default: 16 256)")
    add("--seed", type=int, default=0, help="of the trace (default: 0)")
    add("--rows", type=int, default=8, metavar="N", help="requests that decode together (default: 8)")
    add(
        "--pages",
        type=int,
        metavar="N",
        help="cache pages of each rank (default: what all rows can fill, or memory holds)",
    )
    add_shared_arguments(parser)
    add("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.set_defaults(prefill_chunk=CHUNK)  # no prompt is longer, unless asked for
    return parser.parse_args()


def checked(options: argparse.Namespace) -> argparse.Namespace:
    for name in ("requests", "rows"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: give at least 1")
    for name in ("prompt", "new"):
        least, most = getattr(options, name)
        if not 1 <= least <= most:
            raise ValueError(f"--{name} is {least} {most}: give the least, at least 1, and the most")
    if options.rate is not None and not options.rate > 0:
        raise ValueError(f"--rate is {options.rate}: give a number above 0, or leave it out")
    return options


def bench(options: argparse.Namespace) -> None:
    config, reporter = read_config(options.model), Reporter()
    mesh = open_mesh(options.platform, options.tp, options.cp)
    setup = make_setup(options, config, mesh)
    found = describe(options, setup, mesh.devices.flat[0].device_kind)
    trace = make_trace(options, config.vocab)
    room = {"rows": options.rows, "pages": options.pages, "page": setup.page, "chunk": setup.chunk}
    longest = options.prompt[1] + options.new[1]
    engine = Engine(setup.load(reporter), setup.plan, **room, max_len=longest, share_prefixes=False)
    found["compile_s"] = engine.warm_up()
    engine.generate([trace[0].prompt], SamplingParams(max_new_tokens=2))  # whatever else happens but once
    for how, together in (("continuous", None), ("static", options.rows)):
        found["runs"].append(measure(engine, trace, how, together))
        write_json(options.json, found)
    continuous, static = (run["tokens_per_s"] for run in found["runs"])
    found["ratio"] = continuous / static
    write_json(options.json, found)
    Console(highlight=False, soft_wrap=True).print(table_of(found))


def describe(options: argparse.Namespace, setup: DecodeSetup, device: str) -> dict[str, Any]:
    shape = setup.plan.mesh.shape
    found = {"model": setup.folder.name, "mesh": f"{shape[TP]}x{shape[CP]}", "placement": options.placement}
    found |= {"dtype": setup.dtype, "kernel": setup.kernel, "device": device, "jax": jax.__version__}
    names = ("requests", "rate", "prompt", "new", "seed", "rows", "pages", "block", "page", "prefill_chunk")
    found |= {name: getattr(options, name) for name in names} | {"runs": []}
    write_json(options.json, found)  # a file that cannot be written is better known now
    return found


def make_trace(options: argparse.Namespace, vocab: int) -> list[Asked]:
    """In the order of coming."""
    draw = np.random.default_rng(options.seed)
    prompt_lens, new_tokens = (
        draw.integers(least, most, options.requests, endpoint=True) for least, most in (options.prompt, options.new)
    )
    prompts = [draw.integers(vocab, size=length).tolist() for length in prompt_lens]
    waits = draw.exponential(1 / options.rate, options.requests) if options.rate else np.zeros(options.requests)
    steps = np.floor(np.cumsum(waits)).astype(int)
    return [Asked(*one) for one in zip(prompts, new_tokens.tolist(), steps.tolist(), strict=True)]


def measure(engine: Engine, trace: list[Asked], batching: str, together: int | None) -> dict[str, Any]:
    """One run, as it stands in the JSON."""
    before = engine.stats()
    times = play(engine, trace, together)
    tokens = sum(asked.new_tokens for asked in trace)
    run: dict[str, Any] = {"batching": batching, "seconds": times.seconds, "steps": times.steps, "tokens": tokens}
    run |= {"tokens_per_s": tokens / times.seconds, "preemptions": engine.stats().preemptions - before.preemptions}
    run["ttft_s"] = percentiles([first - came for came, first, *_ in times.moments])
    run["gap_s"] = percentiles([gap for _, *said in times.moments for gap in np.diff(said)])
    return run


def play(engine: Engine, trace: list[Asked], together: int | None) -> Times:
    """Runs the trace to its end.

    together: so many are submitted at once, when all before have ended (None: each when it comes).
    """
    coming, come = deque(trace), deque[tuple[Asked, float]]()
    moments: dict[str, list[float]] = {}
    steps = clock = 0
    began = now = time.perf_counter()
    while coming or come or engine.busy:
        if not come and not engine.busy:
            clock = max(clock, coming[0].step)  # no one waits until the next one comes
        while coming and coming[0].step <= clock:
            come.append((coming.popleft(), now))
        if together is None or not engine.busy:
            for _ in range(min(len(come), together or len(come))):
                asked, came = come.popleft()
                params = SamplingParams(max_new_tokens=asked.new_tokens, stop_token_ids=())
                moments[engine.submit(asked.prompt, params)] = [came]
        events = engine.step()
        now, steps, clock = time.perf_counter(), steps + 1, clock + 1
        for event in events:
            if isinstance(event, TokenEvent):
                moments[event.id].append(now)
    return Times(now - began, steps, list(moments.values()))


def percentiles(values: list[float]) -> dict[str, float | None]:
    return {f"p{p}": float(np.percentile(values, p)) if values else None for p in PERCENTILES}


def table_of(found: dict[str, Any]) -> Table:
    setting = (
        f"{found['model']}, tp x cp {found['mesh']}, {found['dtype']}, kernel {found['kernel']}, {found['device']}"
    )
    come = f"{found['rate']:g} a step" if found["rate"] else "all at the first step"
    title = f"{setting}; {found['requests']} requests, {come}, {found['rows']} rows"
    numbers = {"seconds": "s", "steps": "steps", "tokens_per_s": "tokens/s", "preemptions": "preempted"}
    lines = [(head, [run[name] for run in found["runs"]]) for name, head in numbers.items()]
    for name, (head, unit) in {"ttft_s": ("first token, s", 1), "gap_s": ("gap, ms", 1e3)}.items():
        for p in found["runs"][0][name]:
            seconds = [run[name][p] for run in found["runs"]]
            lines.append((f"{head}, {p}", [None if s is None else s * unit for s in seconds]))
    table = Table("", *(run["batching"] for run in found["runs"]), "ratio", title=title, title_justify="left")
    for head, (continuous, static) in lines:
        ratio = continuous / static if continuous and static else None
        table.add_row(head, *("-" if cell is None else f"{cell:.4g}" for cell in (continuous, static, ratio)))
    return table


if __name__ == "__main__":
    sys.exit(main())
