#!/usr/bin/env python3
"""Trains a byte-level model on a text, from a config, into a folder that `helix-jax generate --model` reads.

python scripts/train.py --config configs/demo.toml --out runs/demo
"""

import argparse
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from helix_jax import checkpoint
from helix_jax.config import ModelConfig, from_mapping
from helix_jax.models.transformer import Transformer, Weights, assemble
from helix_jax.train import (
    LOG2_E,
    TrainConfig,
    TrainState,
    held_out_windows,
    nats_per_token,
    start,
    train_step,
)

ROOT = Path(__file__).resolve().parents[1]
EVAL_BATCH = 8


def main() -> int:
    arguments = parse_arguments()
    try:
        model_config, config, text = read_run(arguments.config)
        train(model_config, config, text, arguments.out)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"train.py: stopped; what was last saved is in '{arguments.out}'", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.toml")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    return parser.parse_args()


def read_run(file: Path) -> tuple[ModelConfig, TrainConfig, np.ndarray]:
    """The model, the training and the text that a config names.

    Raises:
        ValueError: a key that is unknown or missing, a text shorter than what is held out and one context need.
    """
    try:
        run = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    unknown = sorted(set(run) - {"text", "model", "train"})
    if unknown:
        raise ValueError(f"{file}: unknown key '{unknown[0]}': known are text, model, train")
    missing = [key for key in ("text", "model", "train") if key not in run]
    if missing:
        raise ValueError(f"{file}: '{missing[0]}' is missing")
    model = from_mapping(ModelConfig, run["model"], f"{file} [model]")
    config = from_mapping(TrainConfig, run["train"], f"{file} [train]")
    if config.context > model.max_positions:
        raise ValueError(f"{file}: context {config.context} exceeds max_positions {model.max_positions}")
    if model.tokenizer != "bytes" or model.vocab < 256:
        raise ValueError(f"{file}: this script trains on bytes: set tokenizer = 'bytes' and vocab = 256")
    text = np.frombuffer((ROOT / str(run["text"])).read_bytes(), np.uint8)
    first = first_held_out(text, config)
    if first <= config.context or first == len(text):
        raise ValueError(
            f"{run['text']}: {len(text)} bytes, of which {len(text) - first} are held out, are too few: "
            f"leave more than the context of {config.context} to train on, and at least 1 to hold out"
        )
    return model, config, text


def first_held_out(text: np.ndarray, config: TrainConfig) -> int:
    return len(text) - int(len(text) * config.held_out)


def train(model_config: ModelConfig, config: TrainConfig, text: np.ndarray, out: Path) -> None:
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    weights = Transformer(model_config, rngs=nnx.Rngs(config.seed)).weights()
    state = start(weights, config)
    run_step = jax.jit(train_step, static_argnums=(0, 1, 2), donate_argnums=3)
    out.mkdir(parents=True, exist_ok=True)
    size = sum(weight.size for weight in jax.tree.leaves(weights))
    console = Console(stderr=True)
    console.print(f"{size / 1e6:.2f} M parameters, {jnp.dtype(dtype).name} on {jax.devices()[0].device_kind}")

    began, nats = time.perf_counter(), float("nan")
    with progress_bar(console) as bar, (out / "train_log.jsonl").open("w") as log:
        task = bar.add_task("training", total=config.steps, loss="-", held_out="-")
        for step in range(config.steps):
            loss, state = run_step(model_config, config, dtype, state, batch_of(text, config, step))
            nats = float(loss)  # read before the next step: on a CPU never more than one in flight
            bar.update(task, advance=1, loss=f"{nats * LOG2_E:.3f}")
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                entry = {"step": step + 1, "tokens": (step + 1) * config.batch * config.context}
                entry |= {"train_bits_per_byte": nats * LOG2_E, **evaluate(model_config, state, text, config, dtype)}
                entry |= {"elapsed_s": time.perf_counter() - began}
                bar.update(task, held_out=f"{entry['held_out_bits_per_byte']:.4f}")
                bar.console.print(json.dumps(entry), soft_wrap=True)
                log.write(json.dumps(entry) + "\n")
                log.flush()
                checkpoint.save(assemble(model_config, state.weights), out, jnp.bfloat16)


def batch_of(text: np.ndarray, config: TrainConfig, step: int) -> jax.Array:
    """Windows from random places of the text that is not held out; a function of the seed and the step."""
    random = np.random.default_rng((config.seed, step))
    first = random.integers(0, first_held_out(text, config) - config.context, config.batch)
    return jnp.asarray(text[first[:, None] + np.arange(config.context + 1)].astype(np.int32))


def evaluate(
    model_config: ModelConfig, state: TrainState, text: np.ndarray, config: TrainConfig, dtype: Any
) -> dict[str, float]:
    """Bits per byte of the held-out text, every byte once, each after at least half a context."""
    windows, counted = held_out_windows(text, first_held_out(text, config), config.context)
    total = 0.0
    for i in range(0, len(windows), EVAL_BATCH):
        tokens = np.zeros((EVAL_BATCH, config.context + 1), np.int32)
        tokens[: len(windows[i : i + EVAL_BATCH])] = windows[i : i + EVAL_BATCH]
        nats = np.asarray(surprise(model_config, dtype, state.weights, tokens))[: len(windows[i : i + EVAL_BATCH])]
        total += float(nats[counted[i : i + EVAL_BATCH]].sum(dtype=np.float64))
    return {"held_out_bits_per_byte": total * LOG2_E / counted.sum(), "held_out_bytes": int(counted.sum())}


def _surprise(model_config: ModelConfig, dtype: Any, weights: Weights, tokens_BS: jax.Array) -> jax.Array:
    return nats_per_token(assemble(model_config, jax.tree.map(lambda weight: weight.astype(dtype), weights)), tokens_BS)


surprise = jax.jit(_surprise, static_argnums=(0, 1))


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]} bits/byte, held out {task.fields[held_out]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    sys.exit(main())
