"""What a training run tells: a bar, a line of JSON for each step, a curve, and TensorBoard if tensorboardX is there."""

import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from helix_jax.mesh import EXPERT_WEIGHTS
from helix_jax.models.transformer import Weights
from helix_jax.processes import is_first
from helix_jax.training import TrainPlan

LOG_FILE, CURVE_FILE = "train_log.jsonl", "curve.png"
# Dense bfloat16 FLOP/s of one device, as its maker says.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "v5 lite": 197e12, "v5p": 459e12, "v6": 918e12}


def mfu(run: TrainPlan, weights: Weights, tokens_per_s: float) -> float | None:
    """The share of the devices' FLOP/s that the model's own come to; None of devices whose peak is not known.

    Six per parameter and token, without lookups and experts that were not chosen, and twelve per pair of a query and a
    key that it sees, head and number of its width: what is computed twice for want of memory does not count.
    """
    peak = next((peak for name, peak in PEAKS.items() if name in run.device_kind), None)
    if peak is None:
        return None
    model = run.model
    chosen = model.experts.top_k / model.experts.num_experts if model.experts else 1

    def used(path: tuple[Any, ...], weight: Any) -> float:
        name = str(path[-1].key)
        if name == "embed_VD":
            return weight.size * model.tied_head
        return weight.size * (chosen if name in EXPERT_WEIGHTS["flat"] else 1)

    matrices = sum(jax.tree.leaves(jax.tree.map_with_path(used, weights)))
    seen = sum(min(model.window_of(layer) or math.inf, run.config.context / 2) for layer in range(model.layers))
    return tokens_per_s * (6 * matrices + 12 * model.heads * model.head_width * seen) / (peak * run.mesh.size)


@contextmanager
def open_log(folder: Path, steps: int, first: int, console: Console) -> Iterator["Log | Unlogged"]:
    """Of several processes the first one tells."""
    if not is_first():
        yield Unlogged()
        return
    with Log(folder, steps, first, console) as log:
        yield log


class Unlogged:
    """Tells nothing."""

    def step(self, step: int, **found: float) -> None: ...

    def held_out(self, step: int, **found: float) -> None: ...


class Log:
    """Of one run: what an earlier one wrote after the state from which this one goes on is dropped."""

    def __init__(self, folder: Path, steps: int, first: int, console: Console):
        self._file, self._curve, self._entries = folder / LOG_FILE, folder / CURVE_FILE, []
        if first and self._file.exists():
            known = [json.loads(line) for line in self._file.read_text().splitlines() if line.endswith("}")]
            self._entries = [entry for entry in known if entry.get("step", math.inf) <= first]
        self._steps, self._first = steps, first
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._board: Any = None
        if importlib.util.find_spec("tensorboardX"):
            board = importlib.import_module("tensorboardX").SummaryWriter
            self._board = board(str(folder / "tensorboard"), purge_step=first + 1)

    def __enter__(self) -> "Log":
        kept = self._file.with_suffix(".kept")  # a run may be killed at any time: the log is never cut where it lies
        kept.write_text("".join(json.dumps(entry) + "\n" for entry in self._entries))
        kept.replace(self._file)
        self._opened = self._file.open("a")
        self._bar.start()
        self._task = self._bar.add_task("training", total=self._steps, completed=self._first, now="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()
        self._opened.close()
        if self._board:
            self._board.close()
        if kind is None:
            self._draw()

    def step(self, step: int, **found: float) -> None:
        self._write({"step": step, **found})
        now = [f"loss {found['nats']:.3f}", *(f"{found[k]:.3f} bits/byte" for k in ("bits_per_byte",) if k in found)]
        now += [f"{found['tokens_per_s']:,.0f} tokens/s", *(f"MFU {found[k]:.1%}" for k in ("mfu",) if k in found)]
        self._bar.update(self._task, completed=step, now=", ".join(now))

    def held_out(self, step: int, **found: float) -> None:
        self._write({"step": step, **found})
        said = ", ".join(f"{name} {value:.5g}" for name, value in found.items())
        self._bar.console.print(f"step {step} of {self._steps}: {said}", soft_wrap=True)

    def _write(self, entry: dict[str, float]) -> None:
        self._entries.append(entry)
        self._opened.write(json.dumps(entry) + "\n")
        self._opened.flush()
        for name, value in entry.items() if self._board else ():
            self._board.add_scalar(name, value, int(entry["step"]))

    def _draw(self) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
        for name, style in (("nats", "-"), ("held_out_nats", "o-")):
            points = [(entry["step"], entry[name]) for entry in self._entries if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), linewidth=1, markersize=3)
        axes.legend()
        figure.savefig(self._curve, dpi=150)
