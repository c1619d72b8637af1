"""The log of a training run: a progress bar or a line per step, a line of JSON per step, a curve, and TensorBoard."""

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
from helix_jax.training.plan import TrainPlan
from helix_jax.training.plots import plot_curve
from helix_jax.validation import require_package

LOG_FILE, CURVE_FILE = "train_log.jsonl", "curve.png"
BITS_PER_NAT = 1 / math.log(2)
# Dense bfloat16 FLOP/s of one device, as its maker states them.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "v5 lite": 197e12, "v5p": 459e12, "v6": 918e12}


def model_flops_utilization(plan: TrainPlan, context: int, weights: Weights, tokens_per_s: float) -> float | None:
    """Return the fraction of the devices' peak FLOP/s that the model needs, or None if the peak is not known.

    Counts 6 FLOP per token and parameter, without lookups and experts that are not routed to, and 12 per pair of a
    query and a key that it sees, per head and number of its width. Recomputation to save memory does not count.
    """
    peak = next((peak for name, peak in _PEAK_FLOPS.items() if name in plan.device_kind), None)
    if peak is None:
        return None
    model = plan.model
    routed = model.experts.top_k / model.experts.num_experts if model.experts else 1

    def used(path: tuple[Any, ...], weight: Any) -> float:
        name = str(path[-1].key)
        if name == "embed_VD":
            return weight.size * model.tied_head
        return weight.size * (routed if name in EXPERT_WEIGHTS["flat"] else 1)

    parameters = sum(jax.tree.leaves(jax.tree.map_with_path(used, weights)))
    keys_seen = sum(min(model.window_of(layer) or math.inf, context / 2) for layer in range(model.layers))
    flops_per_token = 6 * parameters + 12 * model.heads * model.head_width * keys_seen
    return tokens_per_s * flops_per_token / (peak * plan.mesh.size)


@contextmanager
def open_log(
    folder: Path, steps: int, first: int, console: Console, tensorboard: Path | None = None
) -> Iterator["Log | NoLog"]:
    """Open the log of a run, with the arguments of `Log`. With several processes only the first one writes it."""
    if not is_first():
        yield NoLog()
        return
    with Log(folder, steps, first, console, tensorboard) as log:
        yield log


def check_tensorboard(folder: Path) -> None:
    """Check that events for TensorBoard can be written to a folder, which is created.

    Raises:
        ValueError: They cannot.
        MissingPackageError: tensorboardX is not installed.
    """
    require_package("tensorboardX", "--tensorboard", "'.[tensorboard]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--tensorboard '{folder}' cannot be created ({error.strerror}): give another folder"
        ) from None


class NoLog:
    """The log of a process that does not write one."""

    def step(self, step: int, **values: int | float) -> None:
        """Ignore a step."""

    def held_out(self, step: int, **values: int | float) -> None:
        """Ignore an evaluation."""


class Log:
    """The log of one run. Entries after the checkpoint from which the run continues are dropped.

    Args:
        folder: The folder of the run.
        steps: Steps of the whole run.
        first: Steps that were done before.
        console: Where the progress bar is drawn if it is a terminal, and a line is printed per step if not.
        tensorboard: The folder for events of TensorBoard. None: there are none.

    Raises:
        MissingPackageError: tensorboardX is needed and not installed.
    """

    def __init__(self, folder: Path, steps: int, first: int, console: Console, tensorboard: Path | None = None):
        self._file, self._curve, self._entries = folder / LOG_FILE, folder / CURVE_FILE, []
        if first and self._file.exists():
            entries = [json.loads(line) for line in self._file.read_text().splitlines() if line.endswith("}")]
            self._entries = [entry for entry in entries if entry.get("step", math.inf) <= first]
        self._steps, self._first, self._console = steps, first, console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tensorboard: Any = None
        if tensorboard:
            package = require_package("tensorboardX", "--tensorboard", "'.[tensorboard]'")
            self._tensorboard = package.SummaryWriter(str(tensorboard), purge_step=first + 1)

    def __enter__(self) -> "Log":
        copy = self._file.with_suffix(".copy")  # a run may be killed at any time: the log is never truncated in place
        copy.write_text("".join(json.dumps(entry) + "\n" for entry in self._entries))
        copy.replace(self._file)
        self._opened = self._file.open("a")
        self._bar.start()
        self._task = self._bar.add_task("training", total=self._steps, completed=self._first, status="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()
        self._opened.close()
        if self._tensorboard:
            self._tensorboard.close()
        if kind is None:
            self._draw_curve()

    def step(self, step: int, **values: int | float) -> None:
        """Log a step."""
        self._write({"step": step, **values})
        shown = (("nats", "loss {:.3f}"), ("bits_per_byte", "{:.3f} bits/byte"), ("tokens_per_s", "{:,.0f} tokens/s"))
        status = ", ".join(form.format(values[key]) for key, form in (*shown, ("mfu", "MFU {:.1%}")) if key in values)
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal:
            self._print(step, status)

    def held_out(self, step: int, **values: int | float) -> None:
        """Log and print an evaluation of the held-out text."""
        self._write({"step": step, **values})
        text = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
        self._print(step, text)

    def _print(self, step: int, text: str) -> None:
        self._console.print(f"step {step} of {self._steps}: {text}", soft_wrap=True)

    def _write(self, entry: dict[str, int | float]) -> None:
        self._entries.append(entry)
        self._opened.write(json.dumps(entry) + "\n")
        self._opened.flush()
        scalars = entry.items() if self._tensorboard else ()
        for name, value in scalars:
            if name != "step":
                self._tensorboard.add_scalar(name, value, int(entry["step"]))

    def _draw_curve(self) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            self._console.print("no curve was drawn, because matplotlib is not installed: pip install '.[plot]'")
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        plot_curve(figure, self._entries)
        figure.savefig(self._curve, dpi=150)
