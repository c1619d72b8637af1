#!/usr/bin/env python3
"""Time from the start of a command to its first token, with an empty folder of compiled programs and with a full one.

python scripts/bench_startup.py --config configs/llama-3.1-8b.toml --tp 2

The prompt has 512 random tokens, and the weights are random; creating them is not counted. Everything else is: the
interpreter, the imports, the devices, tracing, compiling or reading what was compiled, and prefilling.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from public_apis import time_to_first_token
from random_weights import make_random_weights

from helix_jax.cli.app import Parser, run_command
from helix_jax.cli.compilation_cache import enable_compilation_cache
from helix_jax.cli.options import PLATFORMS, add_choice, default_dtype
from helix_jax.combine import COMBINES
from helix_jax.devices import open_mesh
from helix_jax.models.transformer import assemble
from helix_jax.plan import Plan
from helix_jax.planner.shapes import read_shape, take_first_layers

PROGRAM = "bench_startup.py"
PROMPT = 512
FOLDER = "BENCH_STARTUP_FOLDER"  # set in the timed processes: where compiled programs are stored


def main() -> int:
    options = parse_arguments()
    return run_command(lambda: measure(options) if FOLDER in os.environ else bench(), PROGRAM)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE.toml", help="model config, such as those in configs/")
    add("--layers", type=int, metavar="N", help="only the first N layers (default: all)")
    add("--tp", type=int, default=1, metavar="N", help="devices that share the heads in attention (default: 1)")
    add("--cp", type=int, default=1, metavar="N", help="devices that share the sequence (default: 1)")
    add_choice(parser, "--combine", COMBINES, "collective that combines the ranks' partial results", default="psum")
    add_choice(parser, "--platform", PLATFORMS, "devices to use", default="auto")
    return parser.parse_args()


def bench() -> None:
    """Run the same command twice, with one folder of compiled programs."""
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            start = time.perf_counter()
            command = [sys.executable, *sys.argv]
            done = subprocess.run(command, env=os.environ | {FOLDER: folder}, stdout=subprocess.PIPE, check=False)
            seconds = time.perf_counter() - start
            if done.returncode:
                raise ValueError(f"the timed command exited with {done.returncode}: see its message above")
            weights_s, engine_s = map(float, done.stdout.split())
            print(f"{state}: {seconds - weights_s:.1f} s to the first token, {engine_s:.1f} s of them in the engine")


def measure(options: argparse.Namespace) -> None:
    """Be the timed command. Print the seconds of creating the weights, and from the engine to the first token."""
    enable_compilation_cache(os.environ[FOLDER])
    config = read_shape(options.config)
    config = config if options.layers is None else take_first_layers(config, options.layers)
    mesh = open_mesh(options.platform, options.tp, options.cp)
    start = time.perf_counter()
    weights = jax.block_until_ready(make_random_weights(config, mesh, default_dtype(mesh)))
    weights_s = time.perf_counter() - start
    plan = Plan(mesh, combine=options.combine)
    print(weights_s, time_to_first_token(assemble(config, weights), plan, PROMPT))


if __name__ == "__main__":
    sys.exit(main())
