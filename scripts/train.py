#!/usr/bin/env python3
"""Trains a model on text, from a config, into a folder that `helix-jax generate --model` and transformers read.

python scripts/train.py --config configs/demo.toml --out runs/demo
python scripts/train.py --config my.toml --init DIR --cp 4 --out runs/longer

A config has the tables [data], [model] (or --init: a Hugging Face folder to start from) and [train]. A run that was
stopped, however it was, goes on where its last state was saved if the same command is given again, on any mesh.
"""

import argparse
import json
import math
import sys
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from reporting import INTERRUPTED, Parser, complain, exit_status
from rich.console import Console
from train_log import Log, mfu

from helix_jax import checkpoint
from helix_jax.checkpoint.states import States
from helix_jax.cli.devices import open_mesh
from helix_jax.config import ModelConfig, from_mapping
from helix_jax.data import Corpus, Sequences, check_corpus, cut, held_out_windows, open_corpus, sequences_of
from helix_jax.layout import BlockLayout, dealt
from helix_jax.mesh import DP, make_mesh
from helix_jax.models.transformer import Transformer, Weights, assemble
from helix_jax.recall import plant
from helix_jax.text import Tokenizer, open_tokenizer
from helix_jax.train import (
    LOG2_E,
    Batch,
    TrainConfig,
    Training,
    TrainState,
    abstract_state,
    deal,
    evaluate,
    start,
    train_step,
)

EVAL_TOKENS = 2**16  # of held-out text at once


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """files: of text, or of tokens (.npy), beside the config. separator: of documents in text; end_id: the token that
    ends one. passkeys: in this share of the sequences things to remember are hidden (bytes only).
    """

    files: tuple[str, ...]
    separator: str | None = None
    end_id: int | None = None
    passkeys: float = 0.0


@dataclass(frozen=True)
class Run:
    """What a command line comes to."""

    training: Training
    data: DataConfig
    corpus: Corpus
    out: Path
    init: Path | None


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
    add("--block", type=int, default=16, metavar="TOKENS", help="in which sequences are dealt (default: 16)")
    add("--dtype", choices=("float32", "bfloat16"), help="to compute in (default: bfloat16; float32 on a CPU)")
    add("--platform", choices=("auto", "cpu", "gpu", "tpu"), default="auto", help="cpu: fake devices")
    return parser.parse_args()


def read_run(options: argparse.Namespace) -> Run:
    """Everything that can be refused before a step is compiled."""
    tables = read_tables(options.config, needed={"data", "train"} | (set() if options.init else {"model"}))
    where = str(options.config)
    data = from_mapping(DataConfig, tables["data"], f"{where} [data]")
    config = from_mapping(TrainConfig, tables["train"], f"{where} [train]")
    if options.init:
        model = checkpoint.read_config(options.init)
    else:
        model = from_mapping(ModelConfig, tables["model"], f"{where} [model]")
    tokenizer = open_tokenizer(options.init or options.config.parent, model)
    if tokenizer is None and any(not file.endswith(".npy") for file in data.files):
        raise ValueError(
            f"{where}: the model has no tokenizer: set tokenizer = 'bytes', or give files of tokens (.npy)"
        )
    if not 0 <= data.passkeys <= 1 or (data.passkeys and model.tokenizer != "bytes"):
        raise ValueError(
            f"{where}: passkeys is {data.passkeys}: give a share from 0 to 1, and 0 where tokens are no bytes"
        )
    mesh = open_mesh(options.platform, options.tp, options.cp, options.dp)
    corpus = open_data(options.config.parent, data, tokenizer, model, config)
    dtype = jnp.dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    layout = BlockLayout(options.cp, options.block, "striped")
    return Run(Training(model, config, mesh, layout, dtype, corpus.documents), data, corpus, options.out, options.init)


def read_tables(file: Path, needed: set[str]) -> dict[str, Any]:
    try:
        tables = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    for key in sorted(set(tables) - {"data", "model", "train"}):
        raise ValueError(f"{file}: unknown key '{key}': known are data, model, train")
    for key in sorted(needed - set(tables)):
        raise ValueError(f"{file}: [{key}] is missing: add it")
    return tables


def open_data(
    folder: Path, data: DataConfig, tokenizer: Tokenizer | None, model: ModelConfig, config: TrainConfig
) -> Corpus:
    files = [folder / file for file in data.files]
    corpus = open_corpus(files, tokenizer, model.vocab, config.held_out, data.separator, data.end_id)
    check_corpus(corpus, config.context)
    return corpus


def train(run: Run) -> None:
    training, config = run.training, run.training.config
    claim(run.out, training.model)
    states = States(run.out / "states")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        first, state = states.restore(abstract_state(training)) or (0, start(training, first_weights(run)))
        describe(run, state, first, console)
        batch = batch_of(run, first)
        with Log(run.out, config.steps, first, console) as log:
            for step in range(first, config.steps):
                began = time.perf_counter()
                loss, state = train_step(training, state, batch)
                batch = batch_of(run, step + 1)  # while the devices are at work
                nats = float(loss)  # read before the next step: on a CPU never more than one is under way
                log.step(step + 1, **figures(run, step, nats, time.perf_counter() - began, state))
                if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                    log.held_out(step + 1, **score(run, state.weights))
                    states.save(step + 1, state)
            states.finish()
        save_model(run, state, console)
    finally:
        states.close()


def claim(out: Path, model: ModelConfig) -> None:
    """Makes the folder of a run of this model; raises ValueError if it is that of another."""
    file, ours = out / "run.json", json.loads(json.dumps(asdict(model)))
    if file.exists():
        theirs = json.loads(file.read_text())
        for key in ours:
            if ours[key] != theirs.get(key):
                raise ValueError(
                    f"'{out}' is of a run with {key} {theirs.get(key)!r}, not {ours[key]!r}: choose another --out"
                )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ours, indent=1) + "\n")


def first_weights(run: Run) -> Weights:
    if run.init:
        return checkpoint.load(run.init, make_mesh(), jnp.float32).weights()
    return Transformer(run.training.model, rngs=nnx.Rngs(run.training.config.seed)).weights()


def describe(run: Run, state: TrainState, first: int, console: Console) -> None:
    training, mesh = run.training, run.training.mesh
    size = sum(weight.size for weight in jax.tree.leaves(state.weights))
    axes = " x ".join(f"{name} {count}" for name, count in mesh.shape.items())
    devices = f"{mesh.size} x {training.device_kind} ({axes})"
    console.print(f"{size / 1e6:.2f} M parameters, {jnp.dtype(training.dtype).name} on {devices}")
    if first:
        console.print(f"going on after step {first}, of the state in '{run.out / 'states'}'")


def figures(run: Run, step: int, nats: float, seconds: float, state: TrainState) -> dict[str, float]:
    """What is told of a step. Raises ValueError if it has led nowhere."""
    if not math.isfinite(nats):
        raise ValueError(
            f"the loss of step {step + 1} is {nats}: lower learning_rate, or raise warmup_steps; the states in "
            f"'{run.out / 'states'}' are from before"
        )
    speed = run.training.config.batch * run.training.config.context / seconds
    share = mfu(run.training, state.weights, speed)
    return {"nats": nats, **bits(run, nats), "tokens_per_s": speed, **({} if share is None else {"mfu": share})}


def batch_of(run: Run, step: int) -> Batch:
    return deal(run.training, *planted(run, step), parts=run.training.config.accumulate)


def planted(run: Run, step: int) -> Sequences:
    """The sequences of a step, some with things to remember hidden in them; a function of the seed and the step."""
    config = run.training.config
    found = sequences_of(run.corpus, config.context, config.batch, config.seed, step)
    random = np.random.default_rng((config.seed, step, 1))
    for row in np.flatnonzero(random.random(config.batch) < run.data.passkeys):
        if not found.first_BS[row].any() and found.counted_BS[row].all():  # all of one document
            text = plant(found.tokens_BS[row].astype(np.uint8).tobytes(), random)
            found.tokens_BS[row] = np.frombuffer(text, np.uint8)
    return found


def score(run: Run, weights: Weights) -> dict[str, float]:
    """Of the held-out text, every token once, each after at least half a context."""
    training, context = run.training, run.training.config.context
    starts, counted = held_out_windows(run.corpus, context)
    dp = training.mesh.shape[DP]
    rows = max(1, EVAL_TOKENS // context // dp) * dp
    order, total, count = np.asarray(dealt(training.layout, context)), 0.0, 0
    for i in range(0, len(starts), rows):
        some = np.resize(starts[i : i + rows], rows)  # the last batch is filled up with some of its own
        found = cut(run.corpus, some, context)
        nats_BS = np.asarray(evaluate(training, weights, deal(training, *found, parts=0)))
        mine = (counted[i : i + rows] & found.counted_BS[: len(counted[i : i + rows])])[:, order]
        total += float(nats_BS[: len(mine)][mine].sum(dtype=np.float64))
        count += int(mine.sum())
    nats = total / max(count, 1)
    return {"held_out_nats": nats, **{f"held_out_{k}": v for k, v in bits(run, nats).items()}, "held_out_tokens": count}


def bits(run: Run, nats: float) -> dict[str, float]:
    per_token = run.corpus.bytes_per_token
    return {} if per_token is None else {"bits_per_byte": nats * LOG2_E / per_token}


def save_model(run: Run, state: TrainState, console: Console) -> None:
    model = assemble(run.training.model, state.weights)
    checkpoint.save(model, run.out / "model", jnp.bfloat16)
    console.print(f"the model is in '{run.out / 'model'}'")


if __name__ == "__main__":
    sys.exit(main())
