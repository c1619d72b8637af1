#!/usr/bin/env python3
"""Trains a model on text, from a config, into a folder that `helix-jax generate --model` and transformers read.

python scripts/train.py --config configs/demo.toml --out runs/demo
python scripts/train.py --config my.toml --init DIR --cp 4 --out runs/longer

A config has the tables [data], [model] (or --init: a Hugging Face folder to start from) and [train]. A run that was
stopped, however it was, goes on where its last state was saved if the same command is given again, on any mesh.
"""

import argparse
import fcntl
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from reporting import INTERRUPTED, Parser, complain, exit_status, interrupts_noticed
from rich.console import Console
from train_log import mfu, open_log
from train_run import Run, read_run

from helix_jax.arrays import fetch
from helix_jax import checkpoint
from helix_jax.training.checkpointer import Checkpointer
from helix_jax.checkpoint.tensors import read_json
from helix_jax.cli.devices import add_process_arguments
from helix_jax.training.data import Sequences, slice_sequences, held_out_windows, training_sequences
from helix_jax.layout import positions_by_rank
from helix_jax.mesh import DP
from helix_jax.models.transformer import Weights, assemble
from helix_jax.processes import on_first_process, is_first
from helix_jax.training.passkeys import insert_passkeys
from helix_jax.training import (
    LOG2_E,
    Batch,
    StepMetrics,
    TrainState,
    abstract_state,
    shard_batch,
    eval_step,
    init_state,
    train_step,
)

FREE_KEYS = {"eval_every", "remat", "accumulate"}  # of [train]: they may differ when a run goes on
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def main() -> int:
    options = parse_arguments()
    status = exit_status(lambda: train(read_run(options)), if_too_large="raise accumulate, or take more devices")
    if status == INTERRUPTED:
        complain(f"the same command goes on from the last state saved in '{options.out}'")
    return status


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE.toml", help="what to train, on what, and how")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder of the run: states, log, curve, the model")
    add("--init", type=Path, metavar="DIR", help="a Hugging Face folder to start from, in the place of [model]")
    add("--tp", type=int, default=1, metavar="N", help="devices that share heads and widths (default: 1)")
    add("--cp", type=int, default=1, metavar="N", help="devices that share each sequence (default: 1)")
    add("--dp", type=int, default=1, metavar="N", help="devices that share the batch (default: 1)")
    add("--block", type=int, default=16, metavar="TOKENS", help="in which sequences are positions_by_rank (default: 16)")
    add("--dtype", choices=("float32", "bfloat16"), help="to compute in (default: bfloat16; float32 on a CPU)")
    add("--platform", choices=("auto", "cpu", "gpu", "tpu"), default="auto", help="cpu: fake devices")
    add_process_arguments(parser)
    return parser.parse_args()


def train(run: Run) -> None:
    training, config = run.training, run.training.config
    with claimed(run):
        states = Checkpointer(run.out / "states")
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        try:
            first, state = states.restore(abstract_state(training)) or (0, first_state(run))
            describe(run, state, first, console)
            batch = batch_of(run, first)
            with open_log(run.out, config.steps, first, console) as log, interrupts_noticed() as notice_interrupt:
                for step in range(first, config.steps):
                    notice_interrupt()
                    began = time.perf_counter()
                    told, state = train_step(training, state, batch)
                    batch = batch_of(run, step + 1)  # while the devices are at work
                    # Read before the next step: on a CPU never more than one is under way.
                    log.step(step + 1, **figures(run, step, told, began, state))
                    if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                        if found := score(run, step, state.weights):
                            log.held_out(step + 1, **found)
                        states.save(step + 1, state)
                states.finish()
            save_model(run, state, console)
        finally:
            states.close()


def first_state(run: Run) -> TrainState:
    if run.init is None:
        return init_state(run.training)
    mesh = cast(Mesh, run.training.mesh)
    return init_state(run.training, checkpoint.load_for_training(run.init, mesh).weights())


@contextmanager
def claimed(run: Run) -> Iterator[None]:
    """The first process makes the folder of a run, and keeps others out of it. Raises as `_claimed_here`."""
    with ExitStack() as held:
        on_first_process(lambda: held.enter_context(_claimed_here(run)))
        yield


@contextmanager
def _claimed_here(run: Run) -> Iterator[None]:
    """Raises ValueError: the folder is that of a run of something else, or another process is at it."""
    training, file = run.training, run.out / "run.json"
    settings = {key: value for key, value in asdict(training.config).items() if key not in FREE_KEYS}
    data = asdict(run.data) | {"tokens": len(run.corpus.tokens_X)}
    parts = {"model": asdict(training.model), "data": data, "train": settings}
    ours = json.loads(json.dumps(parts | {"init": {"folder": str(run.init and run.init.absolute())}}))
    if file.exists():
        _check_same(run.out, read_json(file), ours)
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process trains in '{run.out}': wait for it, or choose another --out") from None
        if not file.exists():
            half = file.with_suffix(".half")
            half.write_text(json.dumps(ours, indent=1) + "\n")
            half.replace(file)
        yield


def _check_same(out: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for part, values in ours.items():
        for key, value in values.items():
            was = theirs.get(part, {}).get(key)
            if was != value:
                raise ValueError(f"'{out}' is of a run with {part} {key} {was!r}, not {value!r}: choose another --out")


def describe(run: Run, state: TrainState, first: int, console: Console) -> None:
    training, mesh = run.training, run.training.mesh
    size = sum(weight.size for weight in jax.tree.leaves(state.weights))
    axes = " x ".join(f"{name} {count}" for name, count in mesh.shape.items())
    devices = f"{mesh.size} x {training.device_kind} ({axes})"
    console.print(f"{size / 1e6:.2f} M parameters, {jnp.dtype(training.dtype).name} on {devices}")
    if first:
        console.print(f"going on after step {first}, of the state in '{run.out / 'states'}'")


def figures(run: Run, step: int, told: StepMetrics, began: float, state: TrainState) -> dict[str, float]:
    """What is told of a step, waited for. Raises ValueError if it leads nowhere."""
    found = {"nats": float(told.nats), "gradient_norm": float(told.gradient_norm)}
    speed = run.training.config.batch * run.training.config.context / (time.perf_counter() - began)
    share = mfu(run.training, state.weights, speed)
    _check_finite(run, step, found)
    more = {"tokens_per_s": speed, **({} if share is None else {"mfu": share})}
    return found | bits(run, found["nats"]) | more


def _check_finite(run: Run, step: int, found: dict[str, float]) -> None:
    for name, value in found.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{name} of step {step + 1} is {value}: lower learning_rate, or raise warmup_steps, in a new --out; the"
                f" states in '{run.out / 'states'}' are from before"
            )


def batch_of(run: Run, step: int) -> Batch:
    return shard_batch(run.training, *with_passkeys(run, step), parts=run.training.config.accumulate)


def with_passkeys(run: Run, step: int) -> Sequences:
    """The sequences of a step, some with things to remember hidden in them; a function of the seed and the step."""
    config = run.training.config
    found = training_sequences(run.corpus, config.context, config.batch, config.seed, step)
    random = np.random.default_rng((config.seed, step, 1))
    for row in np.flatnonzero(random.random(config.batch) < run.data.passkeys):
        if not found.document_start_BS[row].any() and found.loss_mask_BS[row].all():  # all of one document
            text = insert_passkeys(found.tokens_BS[row].astype(np.uint8).tobytes(), random)
            found.tokens_BS[row] = np.frombuffer(text, np.uint8)
    return found


def score(run: Run, step: int, weights: Weights) -> dict[str, float]:
    """Of the held-out text, every token once, each after at least half a context; nothing if none is held out."""
    training, config = run.training, run.training.config
    if run.corpus.held_out == len(run.corpus.tokens_X):
        return {}
    starts, counted = held_out_windows(run.corpus, config.context)
    dp = training.mesh.shape[DP]
    rows = min(config.batch // config.accumulate, -(-len(starts) // dp) * dp)  # no more than a step has at once
    order, total, count = positions_by_rank(training.layout, config.context), 0.0, 0
    for i in range(0, len(starts), rows):
        some = np.resize(starts[i : i + rows], rows)  # the last batch is filled up with some of its own
        found = slice_sequences(run.corpus, some, config.context)
        nats_BS = fetch(eval_step(training, weights, shard_batch(training, *found, parts=0)))
        mine = (counted[i : i + rows] & found.loss_mask_BS[: len(counted[i : i + rows])])[:, order]
        total += float(nats_BS[: len(mine)][mine].sum(dtype=np.float64))
        count += int(mine.sum())
    scores = {"held_out_nats": total / max(count, 1), "held_out_tokens": count}
    _check_finite(run, step, scores)
    return scores | {f"held_out_{name}": value for name, value in bits(run, scores["held_out_nats"]).items()}


def bits(run: Run, nats: float) -> dict[str, float]:
    per_token = run.corpus.bytes_per_token
    return {} if per_token is None else {"bits_per_byte": nats * LOG2_E / per_token}


def save_model(run: Run, state: TrainState, console: Console) -> None:
    model = assemble(run.training.model, state.weights)
    checkpoint.save(model, run.out / "model", jnp.bfloat16)
    for name in TOKENIZER_FILES if is_first() else ():
        if run.tokenizer and (run.tokenizer / name).exists():
            shutil.copy(run.tokenizer / name, run.out / "model" / name)
    console.print(f"the model is in '{run.out / 'model'}'")


if __name__ == "__main__":
    sys.exit(main())
