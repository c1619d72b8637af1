#!/usr/bin/env python3
"""Compiles whole steps for TPUs that are not there, and says what each of their chips would hold.

python scripts/aot_tpu.py --config configs/llama-3.1-70b.toml --topology v5p:2x2x4 --topology v6e:4x4
python scripts/aot_tpu.py --smallest --json aot.json

Needs libtpu: pip install '.[tpu]'. Per chip: bytes of weights and cache, of what a step needs beside them, and of what
it takes over in place; whether the chip's memory holds it; and the step's collectives. --smallest goes through the
topologies of each generation from the smallest on, and compiles where weights and cache alone fit.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from shapes import first_layers, read_shape

from helix_jax.abstract import abstract_arguments
from helix_jax.arrays import bytes_per_device
from helix_jax.cli.app import Parser, run_command
from helix_jax.cli.devices import libtpu_silenced
from helix_jax.cli.output import write_json
from helix_jax.config import ModelConfig
from helix_jax.mesh import CP, DP, TP, make_mesh
from helix_jax.plan import Plan
from helix_jax.step import step
from helix_jax.training import TrainConfig, TrainPlan, abstract_batch, abstract_state, make_optimizer, train_step

ROOT = Path(__file__).resolve().parents[1]
HBM_BYTES = {"v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}  # of a chip, as its maker says
TOPOLOGIES = (
    *("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8"),
    *("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"),
)
LARGE = ("llama-3.1-70b", "llama-3.1-405b", "deepseek-r1", "gpt-oss-120b")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
PROGRAM = "aot_tpu.py"
PROGRAMS = ("decode", "prefill", "train")


def main() -> int:
    options = parse_arguments()
    return run_command(lambda: compile_all(options), PROGRAM)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add(
        "--config", type=Path, action="append", metavar="FILE.toml", help="may be repeated (default: four large models)"
    )
    add("--topology", action="append", metavar="NAME", help="like v5e:2x2; may be repeated (default: all)")
    add("--smallest", action="store_true", help="of each generation only the smallest that holds it")
    add("--program", action="append", choices=PROGRAMS, help="may be repeated (default: decode)")
    add("--tokens", type=int, default=2**20, metavar="N", help="of each sequence (default: 1,048,576)")
    add("--rows", type=int, default=8, metavar="N", help="sequences (default: 8)")
    add("--chunk", type=int, default=512, metavar="TOKENS", help="of a prompt, for prefill (default: 512)")
    add("--layers", type=int, metavar="N", help="only the first N (default: all)")
    add("--block", type=int, default=16, metavar="TOKENS", help="(default: 16)")
    add("--page", type=int, default=64, metavar="TOKENS", help="(default: 64)")
    add("--json", type=Path, metavar="FILE", help="write all numbers, after every program")
    return parser.parse_args()


def compile_all(options: argparse.Namespace) -> None:
    files = options.config or [ROOT / "configs" / f"{name}.toml" for name in LARGE]
    # All that is asked for is looked at before anything is compiled.
    configs = {file.stem: read_shape(file) for file in files}
    configs = {name: first_layers(config, options.layers or config.layers) for name, config in configs.items()}
    topologies = {name: chips_of(name) for name in options.topology or TOPOLOGIES}
    found: dict[str, Any] = {"jax": jax.__version__, "tokens": options.tokens, "rows": options.rows, "runs": []}
    note = Console(stderr=True, highlight=False, soft_wrap=True)
    for name, config in configs.items():
        for program in options.program or ["decode"]:
            done: set[str] = set()
            for topology, chips in topologies.items():
                generation = topology.split(":")[0]
                if options.smallest and generation in done:
                    continue
                run = measure(options, config, name, program, topology, chips)
                found["runs"].append(run)
                write_json(options.json, found)
                note.print(describe_run(run))
                if run["fits"]:
                    done.add(generation)
    Console(highlight=False, width=None if sys.stdout.isatty() else 180).print(table_of(found))


def chips_of(topology: str) -> list[Any]:
    """The devices of a topology.

    Raises:
        ValueError: a generation whose memory is not known here, a name that libtpu does not know, no libtpu.
    """
    generation = topology.split(":")[0]
    if generation not in HBM_BYTES:
        raise ValueError(
            f"--topology '{topology}': the memory of a {generation} is not known: {', '.join(HBM_BYTES)} are"
        )
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu asks the network for it
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", generation)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened: others may compile too
    try:
        from jax.experimental import topologies

        with libtpu_silenced([]):
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # of a plugin that is not there, of libtpu
        why = " ".join(str(error).split())[:120]
        raise ValueError(
            f"--topology '{topology}' cannot be made ({why}): is libtpu there? pip install '.[tpu]'"
        ) from None


def plan_for(config: ModelConfig, chips: list[Any], rows: int, block: int, program: str) -> Plan | None:
    """As many chips to a sequence as the query heads allow, tp as far as there are key/value heads; None if none is.

    In training all of them to a sequence.
    """
    if program == "train":
        return Plan(make_mesh(1, len(chips), devices=chips), block)
    flat = next(n for n in range(len(chips), 0, -1) if config.heads % n == 0 and len(chips) % n == 0)
    dp = len(chips) // flat
    if rows % dp:
        return None
    tp = 1 if config.latent else next(n for n in range(flat, 0, -1) if config.kv_heads % n == 0 and flat % n == 0)
    mesh = make_mesh(tp, flat // tp, dp, devices=chips)
    return Plan(mesh, block)


def measure(
    options: argparse.Namespace, config: ModelConfig, name: str, program: str, topology: str, chips: list[Any]
) -> dict[str, Any]:
    """One program on one topology, as it stands in the JSON. Bytes are per chip."""
    run: dict[str, Any] = {"config": name, "layers": config.layers, "program": program, "topology": topology}
    run |= {"chips": len(chips), "hbm_bytes": HBM_BYTES[topology.split(":")[0]], "fits": False}
    plan = plan_for(config, chips, options.rows, options.block, program)
    if plan is None:
        return run | {"why": f"{options.rows} rows cannot be shared"}
    run |= {axis: plan.mesh.shape[axis] for axis in (DP, TP, CP)}
    run |= {"slots": plan.layout.max_filled(options.tokens, options.tokens)}
    jitted, arguments, kept = choose_program(options, config, plan, program)
    run |= {name: bytes_per_device(part) for name, part in kept.items()}
    if sum(run[name] for name in kept) > run["hbm_bytes"]:
        return run | {"why": "the arguments alone are larger"}
    began = time.perf_counter()
    try:
        with libtpu_silenced([]):
            compiled = jitted.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return run | {"why": " ".join(str(error).split())[:160]}
    memory = compiled.memory_analysis()
    run |= {"compile_s": time.perf_counter() - began, "argument_bytes": memory.argument_size_in_bytes}
    run |= {"temporary_bytes": memory.temp_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes}
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    whole += memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = {"bytes": whole, "collectives": collectives(compiled.as_text())}
    if whole > run["hbm_bytes"]:  # libtpu compiles for more than there is
        return run | found | {"why": f"{whole / 1e9:.1f} GB of {run['hbm_bytes'] / 1e9:.1f}"}
    return run | found | {"fits": True}


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


def collectives(text: str) -> dict[str, int]:
    """How many of each kind; what the compiler repeats under one name and channel counts once."""
    kinds = "|".join(KINDS)
    names = set(
        re.findall(rf"^\s*(?:ROOT )?%(\S+) = .*? ({kinds})(?:-start)?\(.*?(channel_id=\d+)", text, re.MULTILINE)
    )
    return dict(Counter(kind for _, kind, _ in names))


def describe_run(run: dict[str, Any]) -> str:
    where = f"{run['config']} {run['program']} on {run['topology']}"
    if not run["fits"]:
        return f"{where}: no, {run['why']}"
    return f"{where}: {run['bytes'] / 1e9:.1f} GB of {run['hbm_bytes'] / 1e9:.1f}, compiled in {run['compile_s']:.0f} s"


def table_of(found: dict[str, Any]) -> Table:
    title = f"{found['rows']} rows of {found['tokens']:,} tokens; GB of each chip; jax {found['jax']}"
    columns = (
        "model",
        "program",
        "topology",
        "chips",
        "dp x tp x cp",
        "weights",
        "cache",
        "temporary",
        "in place",
        "all",
    )
    table = Table(*columns, "of", "collectives", title=title)
    for run in (run for run in found["runs"] if run["fits"]):
        sizes = ("weight_bytes", "cache_bytes", "temporary_bytes", "alias_bytes", "bytes", "hbm_bytes")
        sizes_here = [run.get(name) for name in sizes]
        sizes_here[0] = run.get("state_bytes", sizes_here[0])
        cells = ["-" if size is None else f"{size / 1e9:.2f}" for size in sizes_here]
        axes = f"{run[DP]} x {run[TP]} x {run[CP]}"
        kinds = ", ".join(f"{count} {kind}" for kind, count in run["collectives"].items())
        table.add_row(run["config"], run["program"], run["topology"], str(run["chips"]), axes, *cells, kinds)
    return table


if __name__ == "__main__":
    sys.exit(main())
