"""A training run from a config file: its folder, checkpoints, evaluations, and the model at the end."""

import fcntl
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from rich.console import Console

from helix_jax import checkpoint
from helix_jax.arrays import fetch
from helix_jax.checkpoint.tensors import read_json
from helix_jax.layout import positions_by_rank
from helix_jax.mesh import DP
from helix_jax.models.transformer import Transformer, Weights
from helix_jax.processes import is_first, on_first_process
from helix_jax.training.checkpointer import Checkpointer
from helix_jax.training.data import (
    Corpus,
    Sequences,
    check_corpus,
    held_out_windows,
    open_corpus,
    slice_sequences,
    training_sequences,
)
from helix_jax.training.fit import fit
from helix_jax.training.log import (
    BITS_PER_NAT,
    Log,
    NoLog,
    check_tensorboard,
    model_flops_utilization,
    open_log,
)
from helix_jax.training.passkeys import insert_passkeys, passkey_drill, recall_mask
from helix_jax.training.plan import TrainPlan
from helix_jax.training.run_config import RunConfig
from helix_jax.training.state import TrainState, abstract_state, init_state, make_optimizer, shard_batch
from helix_jax.training.step import StepMetrics, eval_step

CHECKPOINTS, MODEL = "checkpoints", "model"  # folders of a run
_MAY_CHANGE = {"eval_every", "remat", "accumulate"}  # keys of [train] that may differ when a run continues
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "tokenizer.model", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True)
class Run:
    """A run on a mesh."""

    config: RunConfig
    plan: TrainPlan
    optimizer: optax.GradientTransformation
    corpus: Corpus
    out: Path
    tensorboard: Path | None = None


def open_run(
    config: RunConfig, mesh: Mesh, out: Path, block: int, dtype: DTypeLike, tensorboard: Path | None = None
) -> Run:
    """Open the data of a run and check that the mesh can train it.

    Args:
        config: The config.
        mesh: The mesh.
        out: The folder of the run.
        block: Positions per block of the placement.
        dtype: The type that layers compute in.
        tensorboard: A folder for events of TensorBoard. None: there are none.

    Raises:
        ValueError: The data or the mesh does not fit the config, or `tensorboard` cannot be written.
        MissingPackageError: `tensorboard` is given, and tensorboardX is not installed.
        OSError: A data file cannot be read.
    """
    if tensorboard:
        check_tensorboard(tensorboard)
    data, train = config.data, config.train
    files = [config.file.parent / file for file in data.files]
    corpus = open_corpus(files, config.tokenizer, config.model.vocab, train.held_out, data.separator, data.end_id)
    check_corpus(corpus, train.context)
    plan = TrainPlan.from_config(train, config.model, mesh, block, dtype, packed=corpus.has_documents)
    return Run(config, plan, make_optimizer(train), corpus, out, tensorboard)


def train(run: Run, console: Console, check_interrupt: Callable[[], None] = lambda: None) -> Transformer:
    """Train until the end of the run, from its last checkpoint if there is one, and save the model.

    Args:
        run: The run.
        console: Where progress is reported.
        check_interrupt: Called before every step. It raises KeyboardInterrupt after Ctrl-C.

    Raises:
        ValueError: The folder belongs to another run, another process trains in it, or the loss is not finite.
        OSError: A file cannot be written.
    """
    with _claim_folder(run):
        checkpoints = Checkpointer(run.out / CHECKPOINTS)
        try:
            abstract = abstract_state(run.plan, run.optimizer)
            _report_start(run, abstract.weights, console)
            first, state = checkpoints.restore(abstract) or (0, _first_state(run))
            if first:
                console.print(f"continuing after step {first}, from the checkpoint in '{run.out / CHECKPOINTS}'")
            with open_log(run.out, run.config.train.steps, first, console, run.tensorboard) as log:
                progress = _Progress(run, first, log, checkpoints, console, check_interrupt)
                model = progress.train(state)
            checkpoints.finish()
            _save_model(run, model, console)
            return model
        finally:
            checkpoints.close()


class _Progress:
    """What happens between the steps of a run: reports, the log, evaluations, checkpoints, and Ctrl-C."""

    def __init__(
        self,
        run: Run,
        first: int,
        log: Log | NoLog,
        checkpoints: Checkpointer,
        console: Console,
        check_interrupt: Callable[[], None],
    ):
        self._run, self._first, self._log, self._checkpoints = run, first, log, checkpoints
        self._console, self._check_interrupt = console, check_interrupt
        self._has_evaluated = False
        self._began = 0.0

    def train(self, state: TrainState) -> Transformer:
        """Train until the last step. Returns the model."""
        self._check_interrupt()
        run, steps = self._run, self._run.config.train.steps
        if self._first < steps:
            self._console.print("compiling the train step ...")
        self._began = time.perf_counter()
        batches = (_sequences(run, step) for step in count(self._first))
        options: dict[str, Any] = {"steps": steps, "plan": run.plan, "state": state, "on_step": self._on_step}
        return fit(run.config.model, batches, run.optimizer, **options)

    def _on_step(self, step: int, metrics: StepMetrics, state: TrainState) -> None:
        run, train = self._run, self._run.config.train
        seconds = time.perf_counter() - self._began
        is_compiled = step > self._first + 1
        if not is_compiled:
            self._console.print(f"compiled the train step, and took the first step, in {seconds:.1f} s")
        self._log.step(step, **_step_entry(run, step, metrics, state, seconds if is_compiled else None))
        if step % train.eval_every == 0 or step == train.steps:
            self._evaluate(step, state.weights)
            self._checkpoints.save(step, state)
        self._check_interrupt()
        self._began = time.perf_counter()

    def _evaluate(self, step: int, weights: Weights) -> None:
        if not self._run.corpus.has_held_out:
            return
        if not self._has_evaluated:
            self._console.print("compiling the evaluation ...")
            self._has_evaluated = True
        self._log.held_out(step, **_evaluate(self._run, step, weights))


def _first_state(run: Run) -> TrainState:
    if run.config.init is None:
        return init_state(run.plan, run.optimizer)
    mesh: Any = run.plan.mesh
    return init_state(run.plan, run.optimizer, checkpoint.load_for_training(run.config.init, mesh).weights())


@contextmanager
def _claim_folder(run: Run) -> Iterator[None]:
    """Create the folder of a run and lock it. With several processes, the first one does. Raises as `_lock_folder`."""
    with ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(_lock_folder(run)))
        yield


@contextmanager
def _lock_folder(run: Run) -> Iterator[None]:
    """Lock the folder of a run.

    Raises:
        ValueError: The folder belongs to a run with other settings, or another process trains in it.
    """
    file, settings = run.out / "run.json", _settings(run)
    if file.exists():
        _check_same_settings(run.out, read_json(file), settings)
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process trains in '{run.out}': wait for it, or choose another --out") from None
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(settings, indent=1) + "\n")
            unfinished.replace(file)
        yield


def _settings(run: Run) -> dict[str, Any]:
    """Return everything that must be the same when a run continues."""
    config = run.config
    train = {key: value for key, value in asdict(config.train).items() if key not in _MAY_CHANGE}
    data = asdict(config.data) | {"tokens": len(run.corpus.tokens_X), "fingerprint": run.corpus.fingerprint()}
    init = {"folder": str(config.init and config.init.absolute())}
    settings = {"model": asdict(config.model), "data": data, "train": train, "init": init}
    return json.loads(json.dumps(settings))


def _check_same_settings(out: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for table, values in ours.items():
        for key, value in values.items():
            other = theirs.get(table, {}).get(key)
            if other != value:
                raise ValueError(
                    f"'{out}' is of a run with {table} {key} {other!r}, not {value!r}: choose another --out"
                )


def _report_start(run: Run, weights: Any, console: Console) -> None:
    plan, mesh = run.plan, run.plan.mesh
    size = sum(weight.size for weight in jax.tree.leaves(weights))
    axes = " x ".join(f"{name} {devices}" for name, devices in mesh.shape.items())
    devices = f"{mesh.size} x {plan.device_kind} ({axes})"
    console.print(f"{size / 1e6:.2f} M parameters, {jnp.dtype(plan.dtype).name} on {devices}")


def _step_entry(
    run: Run, step: int, metrics: StepMetrics, state: TrainState, seconds: float | None
) -> dict[str, int | float]:
    """Return the log entry of a step, without its speed if `seconds` is None.

    Raises:
        ValueError: The loss or the gradient is not finite.
    """
    entry: dict[str, int | float] = {"nats": float(metrics.loss), "gradient_norm": float(metrics.gradient_norm)}
    _check_finite(run, step, entry)
    entry |= _bits(run, entry["nats"])
    if seconds is None:
        return entry
    train = run.config.train
    speed = train.batch * train.context / seconds
    mfu = model_flops_utilization(run.plan, train.context, state.weights, speed)
    return entry | {"tokens_per_s": speed} | ({} if mfu is None else {"mfu": mfu})


def _check_finite(run: Run, step: int, entry: dict[str, int | float]) -> None:
    for name, value in entry.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{name} of step {step} is {value}: lower learning_rate or raise warmup_steps, with another --out; the "
                f"checkpoints in '{run.out / CHECKPOINTS}' are from before"
            )


def _sequences(run: Run, step: int) -> Sequences:
    """Return the sequences of a step, some with recall tasks: a function of the seed and the step."""
    train = run.config.train
    sequences = training_sequences(run.corpus, train.context, train.batch, train.seed, step)
    random = np.random.default_rng((train.seed, step, 1))
    for row in np.flatnonzero(random.random(train.batch) < run.config.data.passkeys):
        is_one_document = not sequences.document_start_BS[row].any() and sequences.loss_mask_BS[row].all()
        if is_one_document:
            _insert_tasks(run, sequences, int(row), random, step / train.steps)
    return sequences


def _insert_tasks(run: Run, sequences: Sequences, row: int, random: np.random.Generator, progress: float) -> None:
    """Insert recall tasks into a sequence, in place."""
    text = sequences.tokens_BS[row].astype(np.uint8).tobytes()
    if run.config.data.passkeys_only:
        text = passkey_drill(text, random, progress)
        sequences.loss_mask_BS[row] = recall_mask(text)[1:]
    else:
        text = insert_passkeys(text, random)
    sequences.tokens_BS[row] = np.frombuffer(text, np.uint8)


def _evaluate(run: Run, step: int, weights: Weights) -> dict[str, int | float]:
    """Return the loss of the held-out tokens, each after at least half a context."""
    plan, context, corpus = run.plan, run.config.train.context, run.corpus
    starts, counted = held_out_windows(corpus, context)
    dp = plan.mesh.shape[DP]
    rows = min(run.config.train.batch // plan.accumulate, -(-len(starts) // dp) * dp)  # as many as a step has at once
    order, total, tokens = positions_by_rank(plan.layout, context), 0.0, 0
    for i in range(0, len(starts), rows):
        padded = np.resize(starts[i : i + rows], rows)  # the last batch repeats some of its windows
        sequences = slice_sequences(corpus, padded, context)
        loss_BS = fetch(eval_step(plan, weights, shard_batch(plan, sequences, parts=0)))
        mask = (counted[i : i + rows] & sequences.loss_mask_BS[: len(counted[i : i + rows])])[:, order]
        total += float(loss_BS[: len(mask)][mask].sum(dtype=np.float64))
        tokens += int(mask.sum())
    scores: dict[str, int | float] = {"held_out_nats": total / max(tokens, 1), "held_out_tokens": tokens}
    _check_finite(run, step, scores)
    return scores | {f"held_out_{name}": value for name, value in _bits(run, scores["held_out_nats"]).items()}


def _bits(run: Run, nats: float) -> dict[str, int | float]:
    per_token = run.corpus.bytes_per_token
    return {} if per_token is None else {"bits_per_byte": nats * BITS_PER_NAT / per_token}


def _save_model(run: Run, model: Transformer, console: Console) -> None:
    folder, config = run.out / MODEL, run.config
    checkpoint.save(model, folder, jnp.bfloat16, config.init)
    copied = _TOKENIZER_FILES if is_first() and config.model.tokenizer != "bytes" else ()
    for name in copied:
        if (config.tokenizer_folder / name).exists():
            shutil.copy(config.tokenizer_folder / name, folder / name)
    console.print(f"the model is in '{folder}'")
