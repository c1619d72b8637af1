"""Train a model from a config file, into a folder that `helix-jax generate --model` and transformers read.

A config has the tables [data], [train] and [model]; --init DIR, a Hugging Face folder, can replace [model]. A run that
was stopped continues from its last checkpoint if the same command is run again, on any mesh.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp

from helix_jax.checkpoint import resolve_folder
from helix_jax.cli.app import OK, checked_interrupts
from helix_jax.cli.console import Reporter
from helix_jax.cli.options import (
    DTYPES,
    add_choice,
    add_device_arguments,
    add_mesh_arguments,
    default_dtype,
    open_devices,
)
from helix_jax.training.checkpointer import last_saved_step
from helix_jax.training.run import CHECKPOINTS, Run, open_run, train
from helix_jax.training.run_config import read_run_config

EXAMPLE = """helix-jax train --config configs/tiny.toml --out runs/tiny --cp 2 --dp 4
  helix-jax train --config my.toml --init DIR --cp 4 --out runs/longer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `helix-jax train`."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--config", type=Path, required=True, metavar="FILE.toml", help="the model, the data and the training settings")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder for checkpoints, log, curve and model")
    add("--init", type=Path, metavar="DIR", help="a Hugging Face folder, or owner/name on its hub, to start from")
    add("--tensorboard", type=Path, metavar="DIR", help="also write the log to a folder that TensorBoard reads")
    add_choice(group, "--dtype", DTYPES, "the type that layers compute in (default: bfloat16; float32 on a CPU)")
    add_mesh_arguments(parser, training=True)
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Train until the end of the run. Returns the exit code."""
    reporter = Reporter()
    config = read_run_config(options.config, options.init and resolve_folder(options.init))
    mesh = open_devices(options)
    dtype = jnp.dtype(options.dtype or default_dtype(mesh))
    opened = open_run(config, mesh, options.out, options.block, dtype, options.tensorboard)
    try:
        with checked_interrupts() as check_interrupt:
            train(opened, reporter.console, check_interrupt)
    except KeyboardInterrupt:
        reporter.info(_describe_saved(opened))
        raise
    return OK


def _describe_saved(run: Run) -> str:
    """Return what an interrupted run has saved, and what the same command does."""
    step = last_saved_step(run.out / CHECKPOINTS)
    if step is None:
        train = run.config.train
        first = min(train.eval_every, train.steps)
        return f"nothing was saved, because the first checkpoint is written after step {first} (eval_every)"
    return f"the same command continues from the last checkpoint in '{run.out}', of step {step}"
