"""What the evaluations of long context share: options, the held-out text, and each placement beside one device."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
from reporting import Parser, exit_status

from helix_jax import checkpoint
from helix_jax.cli.devices import open_mesh
from helix_jax.config import ModelConfig
from helix_jax.layout import PLACEMENTS, BlockLayout
from helix_jax.mesh import make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
DIFFERENT = 1
ALONE = "one device"


def run(evaluate: Callable[[], list[str]], if_too_large: str) -> int:
    """The exit status. evaluate: gives a line for every placement that differs from one device."""
    different: list[str] = []
    status = exit_status(lambda: different.extend(evaluate()), if_too_large)
    for line in different:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return status or (DIFFERENT if different else 0)


def shared_parser(description: str | None) -> argparse.ArgumentParser:
    parser = Parser(description)
    add, text = parser.add_argument, ROOT / "scripts" / "data" / "kjv.txt"
    add("--model", type=Path, default=checkpoint.DEMO_MODEL, metavar="DIR", help="of bytes (default: that which ships)")
    add("--text", type=Path, default=text, metavar="FILE", help="whose end is read (default: that which it learned)")
    add("--held-out", type=float, default=0.05, metavar="SHARE", help="of it that was not learned (default: 0.05)")
    add("--tp", type=int, default=1, metavar="N", help="(default: 1)")
    add("--cp", type=int, default=8, metavar="N", help="(default: 8)")
    add("--block", type=int, default=16, metavar="TOKENS", help="length of a decode block (default: 16)")
    add("--placement", action="append", choices=PLACEMENTS, help="may be repeated (default: all)")
    add("--platform", choices=("auto", "cpu", "gpu", "tpu"), default="auto", help="cpu: tp * cp fake devices")
    add("--json", type=Path, metavar="FILE", help="write what was found")
    add("--plot", type=Path, metavar="FILE.png", help="draw it")
    return parser


def byte_model(options: argparse.Namespace) -> ModelConfig:
    """Its shape. Raises ValueError if it is none of bytes."""
    config = checkpoint.read_config(options.model)
    if config.tokenizer != "bytes":
        raise ValueError(f"'{options.model}' is no byte model: what is read and asked for are bytes")
    return config


def held_out_text(options: argparse.Namespace, least: int) -> bytes:
    """Raises ValueError if it has not that many bytes."""
    if not 0 < options.held_out <= 1:
        raise ValueError(f"--held-out is {options.held_out}: give a share above 0, at most 1")
    text = options.text.read_bytes()
    text = text[len(text) - int(len(text) * options.held_out) :]
    if len(text) < least:
        raise ValueError(f"{len(text)} bytes are held out, and what is asked for needs {least}: give more text")
    return text


def plans_of(options: argparse.Namespace) -> dict[str, Plan]:
    """One device first, then the placements."""
    mesh = open_mesh(options.platform, options.tp, options.cp)
    plans = {ALONE: Plan(make_mesh(1, 1, devices=list(mesh.devices.flat)), options.block)}
    for name in options.placement or PLACEMENTS:
        plans[name] = Plan(mesh, options.block, name)
    return plans


def models_of(options: argparse.Namespace, plans: dict[str, Plan]) -> Iterator[tuple[str, Plan, Transformer]]:
    """The model on each, one after the other."""
    for name, plan in plans.items():
        yield name, plan, checkpoint.load(options.model, plan, jnp.float32)
