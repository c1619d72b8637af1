#!/usr/bin/env python3
"""Compile whole steps for TPUs without having them, and report the memory that each chip needs.

python scripts/aot_tpu.py --config configs/llama-3.1-70b.toml --topology v5p:2x2x4 --topology v6e:4x4
python scripts/aot_tpu.py --smallest --json aot.json

Needs libtpu: pip install '.[tpu]'. Reported per chip are the bytes of weights and cache, of temporary arrays, and of
arguments that are updated in place; whether they fit the chip's memory; and the collectives of the step. --smallest
tries the topologies of each generation in the order of their size, and compiles where weights and cache alone fit.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from helix_jax.abstract import abstract_arguments
from helix_jax.arrays import bytes_per_device
from helix_jax.cli.app import Parser, run_command
from helix_jax.cli.options import add_choice
from helix_jax.cli.output import write_json
from helix_jax.config import ModelConfig
from helix_jax.devices import libtpu_silenced
from helix_jax.mesh import CP, DP, TP, make_mesh
from helix_jax.plan import Plan
from helix_jax.planner.shapes import read_shape, take_first_layers
from helix_jax.step import step
from helix_jax.training import TrainConfig, TrainPlan, abstract_batch, abstract_state, make_optimizer, train_step

PROGRAM = "aot_tpu.py"
ROOT = Path(__file__).resolve().parents[1]
HBM_BYTES = {"v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}  # per chip, as documented by Google
TOPOLOGIES = (
    *("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8"),
    *("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"),
)
LARGE = ("llama-3.1-70b", "llama-3.1-405b", "deepseek-r1", "gpt-oss-120b")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
PROGRAMS = ("decode", "prefill", "train")


class Topology(NamedTuple):
    """The chips of a topology, such as v5e:2x2."""

    name: str
    chips: list[Any]

    @property
    def generation(self) -> str:
        """The generation, such as v5e."""
        return self.name.split(":")[0]


def main() -> int:
    return run_command(lambda: compile_all(parse_arguments()), PROGRAM)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    text = "model config, such as those in configs/; may be repeated (default: four large models)"
    add("--config", type=Path, action="append", metavar="FILE.toml", help=text)
    text = "topology, such as v5e:2x2; may be repeated (default: all that are known)"
    add("--topology", action="append", metavar="NAME", help=text)
    add("--smallest", action="store_true", help="stop at the smallest topology of each generation that fits")
    add_choice(parser, "--program", PROGRAMS, "program to compile; may be repeated (default: decode)", several=True)
    add("--tokens", type=int, default=2**20, metavar="N", help="tokens per sequence (default: 1,048,576)")
    add("--rows", type=int, default=8, metavar="N", help="number of sequences (default: 8)")
    add("--chunk", type=int, default=512, metavar="TOKENS", help="prompt tokens per prefill step (default: 512)")
    add("--layers", type=int, metavar="N", help="compile only the first N layers (default: all)")
    add("--block", type=int, default=16, metavar="TOKENS", help="length of a block of the sequence (default: 16)")
    add("--page", type=int, default=64, metavar="TOKENS", help="tokens per cache page (default: 64)")
    add("--json", type=Path, metavar="FILE", help="write all numbers to FILE, after every program")
    return parser.parse_args()


def compile_all(options: argparse.Namespace) -> None:
    """Compile every program for every topology, write the report after each, and print a table."""
    files = options.config or [ROOT / "configs" / f"{name}.toml" for name in LARGE]
    # Check all configs and topologies before anything is compiled.
    configs = {file.stem: read_shape(file) for file in files}
    if options.layers is not None:
        configs = {name: take_first_layers(config, options.layers) for name, config in configs.items()}
    topologies = [open_topology(name) for name in dict.fromkeys(options.topology or TOPOLOGIES)]
    report: dict[str, Any] = {"jax": jax.__version__, "tokens": options.tokens, "rows": options.rows, "runs": []}
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    for name, config in configs.items():
        for program in options.program or ["decode"]:
            fitting: set[str] = set()
            for topology in topologies:
                if options.smallest and topology.generation in fitting:
                    continue
                run = {"config": name} | measure(options, config, program, topology)
                report["runs"].append(run)
                write_json(options.json, report)
                progress.print(describe_run(run))
                if run["fits"]:
                    fitting.add(topology.generation)
    Console(highlight=False, width=None if sys.stdout.isatty() else 180).print(make_table(report))


def open_topology(name: str) -> Topology:
    """Return the topology of a name.

    Raises:
        ValueError: The memory of the generation is not in HBM_BYTES, libtpu does not know the name, or libtpu is not
            installed.
    """
    topology = Topology(name, [])
    if topology.generation not in HBM_BYTES:
        known = ", ".join(HBM_BYTES)
        raise ValueError(f"--topology '{name}': the memory of a {topology.generation} is not known: {known} are")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # otherwise libtpu requests it over the network
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.generation)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so several processes may compile
    try:
        from jax.experimental import topologies

        with libtpu_silenced([]):
            topology.chips.extend(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # the types differ between a missing plugin and the errors of libtpu
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"--topology '{name}' cannot be made ({reason}): check the name, and that libtpu is installed "
            f"(pip install '.[tpu]')"
        ) from None
    return topology


def choose_plan(options: argparse.Namespace, config: ModelConfig, chips: list[Any], program: str) -> Plan | None:
    """Return how the chips share the work, or None if they cannot share the rows.

    In decoding and prefill, as many chips share a sequence as the query heads allow, and tp is as large as the
    key/value heads allow. In training all chips share each sequence.
    """
    if program == "train":
        return Plan(make_mesh(1, len(chips), devices=chips), options.block)
    flat = next(n for n in range(len(chips), 0, -1) if config.heads % n == 0 and len(chips) % n == 0)
    dp = len(chips) // flat
    if options.rows % dp:
        return None
    tp = 1 if config.latent else next(n for n in range(flat, 0, -1) if config.kv_heads % n == 0 and flat % n == 0)
    return Plan(make_mesh(tp, flat // tp, dp, devices=chips), options.block)


def measure(options: argparse.Namespace, config: ModelConfig, program: str, topology: Topology) -> dict[str, Any]:
    """Compile a program for a topology. Return a run of the report, in which bytes are per chip."""
    hbm_bytes = HBM_BYTES[topology.generation]
    run: dict[str, Any] = {"layers": config.layers, "program": program, "topology": topology.name}
    run |= {"chips": len(topology.chips), "hbm_bytes": hbm_bytes, "fits": False}
    plan = choose_plan(options, config, topology.chips, program)
    if plan is None:
        return run | {"why": f"{options.rows} rows cannot be shared"}
    run |= {axis: plan.mesh.shape[axis] for axis in (DP, TP, CP)}
    run |= {"slots": plan.layout.max_filled(options.tokens, options.tokens)}
    jitted, arguments, stored = choose_program(options, config, plan, program)
    run |= {name: bytes_per_device(part) for name, part in stored.items()}
    if sum(run[name] for name in stored) > hbm_bytes:
        return run | {"why": "the arguments alone are larger"}
    return run | compile_program(jitted, arguments, hbm_bytes)


def compile_program(jitted: Any, arguments: Any, hbm_bytes: int) -> dict[str, Any]:
    """Compile a program. Return its memory and collectives, and whether it fits, or why not."""
    start = time.perf_counter()
    try:
        with libtpu_silenced([]):
            compiled = jitted.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"why": " ".join(str(error).split())[:160]}
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    numbers = {
        "compile_s": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "bytes": needed,
        "collectives": count_collectives(compiled.as_text()),
    }
    if needed > hbm_bytes:  # libtpu may compile a program that needs more memory than a chip has
        return numbers | {"why": f"{needed / 1e9:.1f} GB of {hbm_bytes / 1e9:.1f}"}
    return numbers | {"fits": True}


def choose_program(options: argparse.Namespace, config: ModelConfig, plan: Plan, program: str) -> tuple[Any, Any, dict]:
    """Return the jitted function to compile, its arguments, and the arguments that stay on a chip."""
    if program == "train":
        model = replace(config, max_positions=max(config.max_positions, options.tokens))
        train_plan = TrainPlan(model, plan.mesh, options.block, jnp.dtype("bfloat16"))
        optimizer = make_optimizer(TrainConfig(steps=1000, batch=options.rows, context=options.tokens))
        state = abstract_state(train_plan, optimizer)
        batch = abstract_batch(train_plan, options.rows, options.tokens)
        return train_step, (train_plan, optimizer, None, state, batch), {"state_bytes": state}
    slots = plan.layout.max_filled(options.tokens, options.tokens)
    shape = {"rows": options.rows, "slots": slots, "page": options.page, "dtype": jnp.bfloat16}
    arguments = abstract_arguments(config, plan, T=options.chunk if program == "prefill" else 1, **shape)
    return step, arguments, {"weight_bytes": arguments[2], "cache_bytes": arguments[3]}


def count_collectives(text: str) -> dict[str, int]:
    """Count the collectives of each kind in a program. Repetitions of one name and channel count once."""
    kinds = "|".join(COLLECTIVES)
    names = set(
        re.findall(rf"^\s*(?:ROOT )?%(\S+) = .*? ({kinds})(?:-start)?\(.*?(channel_id=\d+)", text, re.MULTILINE)
    )
    return dict(Counter(kind for _, kind, _ in names))


def describe_run(run: dict[str, Any]) -> str:
    """Return one line about a run."""
    what = f"{run['config']} {run['program']} on {run['topology']}"
    if not run["fits"]:
        return f"{what}: does not fit ({run['why']})"
    return f"{what}: {run['bytes'] / 1e9:.1f} GB of {run['hbm_bytes'] / 1e9:.1f}, compiled in {run['compile_s']:.0f} s"


def make_table(report: dict[str, Any]) -> Table:
    """Return the numbers of the runs that fit."""
    title = f"{report['rows']} rows of {report['tokens']:,} tokens; GB per chip; jax {report['jax']}"
    settings = ("model", "program", "topology", "chips", "dp x tp x cp")
    sizes = ("weights", "cache", "temporary", "in place", "all", "of")
    table = Table(*settings, *sizes, "collectives", title=title)
    for run in (run for run in report["runs"] if run["fits"]):
        names = ("weight_bytes", "cache_bytes", "temporary_bytes", "alias_bytes", "bytes", "hbm_bytes")
        first, *others = (run.get(name) for name in names)
        numbers = [run.get("state_bytes", first), *others]
        cells = ["-" if size is None else f"{size / 1e9:.2f}" for size in numbers]
        axes = f"{run[DP]} x {run[TP]} x {run[CP]}"
        kinds = ", ".join(f"{count} {kind}" for kind, count in run["collectives"].items())
        table.add_row(run["config"], run["program"], run["topology"], str(run["chips"]), axes, *cells, kinds)
    return table


if __name__ == "__main__":
    sys.exit(main())
