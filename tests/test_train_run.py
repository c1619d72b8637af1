"""`helix-jax train`: a run from a config file, stopped in every way and continued."""

import fcntl
import json
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from rich.console import Console

from helix_jax.checkpoint import load
from helix_jax.cli import main
from helix_jax.training.checkpointer import last_saved_step
from helix_jax.training.log import open_log
from helix_jax.training.plots import plot_curve
from tests.conftest import FAST_COMPILATION, ROOT
from tests.reference import plan_of
from tests.test_cli import ENVIRONMENT

CONFIG = """
[data]
files = ["kjv.txt"]
passkeys = 0.5
[model]
layers = 1
width = 16
heads = 2
kv_heads = 1
head_width = 8
ff_width = 24
vocab = 256
max_positions = 128
tied_head = true
tokenizer = "bytes"
[train]
steps = 40
warmup_steps = 1
batch = 2
context = 128
held_out = 0.0002
eval_every = 5
"""
STEPS = 40


def run_folder(folder: Path, config: str = CONFIG) -> Path:
    """A folder with a config and its text."""
    (folder / "kjv.txt").symlink_to(ROOT / "scripts" / "data" / "kjv.txt")
    (folder / "run.toml").write_text(config)
    return folder


def arguments(folder: Path, out: str = "out", *options: object) -> list[str]:
    return ["train", "--config", str(folder / "run.toml"), "--out", str(folder / out), *map(str, options)]


def train(folder: Path, capsys, out: str = "out", *options: object) -> tuple[int, str]:
    """Train in this process. Returns the exit code and what was written to stderr."""
    status = main(arguments(folder, out, *options))
    return status, capsys.readouterr().err


def start(folder: Path, out: str, *options: object, **popen) -> subprocess.Popen:
    command = [sys.executable, "-m", "helix_jax", *arguments(folder, out, *options)]
    return subprocess.Popen(command, env=ENVIRONMENT | FAST_COMPILATION, cwd=ROOT, **popen)


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    return {entry["step"]: entry["nats"] for entry in map(json.loads, lines) if "nats" in entry}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run that nothing stopped."""
    folder = run_folder(tmp_path_factory.mktemp("train"))
    with start(folder, "whole", "--cp", 2, stderr=subprocess.PIPE, text=True) as run:
        _, errors = run.communicate()
    assert run.returncode == 0, errors
    (folder / "errors.txt").write_text(errors)
    return folder


def test_a_run_reports_compilation_and_without_a_terminal_every_step(trained: Path):
    lines = (trained / "errors.txt").read_text().splitlines()
    compiling, compiled, first, *_, last, saved = lines[1:]
    assert compiling == "compiling the train step ..."
    assert compiled.startswith("compiled the train step, and took the first step, in ")
    assert "tokens/s" not in first  # which would include compilation
    assert first.startswith(f"step 1 of {STEPS}: loss ")
    assert first.endswith(" bits/byte")
    steps = [line for line in lines if line.startswith("step ") and "tokens/s" in line]
    assert [line.split(":")[0] for line in steps] == [f"step {step} of {STEPS}" for step in range(2, STEPS + 1)]
    assert lines.count("compiling the evaluation ...") == 1
    assert last.startswith(f"step {STEPS} of {STEPS}: held_out_nats ")
    assert saved.startswith("the model is in ")


def test_a_run_writes_a_log_and_a_model_that_loads(trained: Path):
    log = [json.loads(line) for line in (trained / "whole" / "train_log.jsonl").read_text().splitlines()]
    held_out = [entry for entry in log if "held_out_nats" in entry]
    assert [entry["step"] for entry in held_out] == list(range(5, STEPS + 1, 5))
    assert held_out[-1]["held_out_tokens"] == int(4404412 * 0.0002)
    assert held_out[-1]["held_out_bits_per_byte"] < 7 < held_out[0]["held_out_bits_per_byte"] + 1
    assert sorted(losses(trained / "whole")) == list(range(1, STEPS + 1))
    assert load(trained / "whole" / "model", plan_of()).config.vocab == 256


def test_transformers_reads_a_trained_model_and_training_starts_from_it(trained: Path, tmp_path: Path, capsys):
    pytest.importorskip("transformers")
    config = CONFIG.split("[model]")[0] + "[train]" + CONFIG.split("[train]")[1].replace("= 40", "= 5")
    folder = run_folder(tmp_path, config)
    (folder / "more" / "checkpoints").mkdir(parents=True)  # of a run that was stopped before its first checkpoint
    status, errors = train(folder, capsys, "more", "--init", trained / "whole" / "model")
    assert status == 0, errors
    assert losses(folder / "more")[2] < losses(trained / "whole")[2] - 1
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(folder / "more" / "model").num_hidden_layers == 1


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_repeatedly_reaches_the_same_bits(trained: Path, kills: int):
    chance, out = random.Random(kills), f"killed{kills}"
    for kill in range(kills):
        with start(trained, out, "--cp", 2, stderr=subprocess.DEVNULL) as run:
            wait_for_log_lines(run, trained / out, STEPS * (kill + 1) // (kills + 2))
            time.sleep(chance.uniform(0, 0.2))
            run.send_signal(signal.SIGKILL)
    with start(trained, out, "--cp", 2, stderr=subprocess.PIPE, text=True) as run:
        _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert losses(trained / out) == losses(trained / "whole")
    ours, theirs = (trained / name / "model" / "model.safetensors" for name in (out, "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def wait_for_log_lines(run: subprocess.Popen, out: Path, lines: int) -> None:
    log = out / "train_log.jsonl"
    while not (log.exists() and len(log.read_bytes().splitlines()) > lines) and run.poll() is None:
        time.sleep(0.005)


def test_ctrl_c_reports_how_to_continue_and_the_mesh_may_change(trained: Path, capsys):
    with start(trained, "stopped", "--cp", 2, stderr=subprocess.PIPE, text=True) as run:
        wait_for_log_lines(run, trained / "stopped", 13)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "the same command continues from the last checkpoint" in errors
    assert "Traceback" not in errors
    status, errors = train(trained, capsys, "stopped", "--cp", 4, "--dp", 2)
    assert status == 0, errors
    assert "continuing after step" in errors
    ours, theirs = losses(trained / "stopped"), losses(trained / "whole")
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-4


def test_ctrl_c_before_the_first_checkpoint_reports_that_nothing_was_saved(tmp_path: Path, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("helix_jax.training.run.fit", interrupt)
    monkeypatch.setattr("helix_jax.cli.app._exit_interrupted", lambda program: sys.exit(130))
    with pytest.raises(SystemExit, match="130"):
        main(arguments(run_folder(tmp_path)))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "helix-jax: nothing was saved, because the first checkpoint is written after step 5 (eval_every)"
    (tmp_path / "out" / "checkpoints" / "10").mkdir()
    (tmp_path / "out" / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()
    assert last_saved_step(tmp_path / "out" / "checkpoints") == 10


def test_tensorboard_needs_its_package_and_a_folder(tmp_path: Path, monkeypatch, capsys):
    folder = run_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    status, errors = train(folder, capsys, "out", "--tensorboard", tmp_path / "events")
    assert (status, errors.splitlines()) == (
        2,
        ["helix-jax: --tensorboard needs the package tensorboardX: pip install '.[tensorboard]'"],
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", ModuleType("tensorboardX"))
    status, errors = train(folder, capsys, "out", "--tensorboard", tmp_path / "kjv.txt" / "events")
    assert status == 2
    assert f"--tensorboard '{tmp_path / 'kjv.txt' / 'events'}' cannot be created" in errors
    assert not (tmp_path / "out").exists()


def test_the_log_is_also_written_for_tensorboard(tmp_path: Path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int):
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    package = ModuleType("tensorboardX")
    package.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", package)
    with open_log(tmp_path, 9, 4, Console(quiet=True), tmp_path / "events") as log:
        log.step(5, nats=2.0)
    assert written == [(str(tmp_path / "events"), 5), ("nats", 2.0, 5), "closed"]


@pytest.mark.parametrize("name", ["bits_per_byte", "nats"])
def test_the_curve_shows_bits_per_byte_or_perplexity_smoothed_over_raw(name: str):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    entries = [{"step": step, name: 2 + step % 2} for step in range(1, 101)]
    plot_curve(figure, [*entries, {"step": 100, f"held_out_{name}": 2.25}])
    [axes] = figure.axes
    raw, smoothed, held_out = axes.lines
    in_bytes = name == "bits_per_byte"
    assert axes.get_ylabel() == ("bits per byte" if in_bytes else "perplexity")
    values = np.asarray([2.0, 3.0, 2.25]) if in_bytes else np.exp([2.0, 3.0, 2.25])
    assert sorted(set(raw.get_ydata())) == pytest.approx(values[:2])
    assert held_out.get_ydata() == pytest.approx(values[2:])
    assert np.ptp(smoothed.get_ydata()[-20:]) < 0.2 * np.ptp(raw.get_ydata())
    assert smoothed.get_ydata()[-1] == pytest.approx(values[:2].mean(), rel=0.05)
    assert smoothed.get_linewidth() > 2 * raw.get_linewidth()
    plot_curve(figure, [])


def test_the_folder_of_another_run_is_left_alone(trained: Path, tmp_path: Path, capsys):
    folder = run_folder(tmp_path, CONFIG.replace("width = 16", "width = 32"))
    whole = str(trained / "whole")
    status, errors = train(folder, capsys, whole)
    assert status == 2
    assert "is of a run with model width 16, not 32: choose another --out" in errors
    (folder / "run.toml").write_text(CONFIG.replace("steps = 40", "steps = 20"))
    assert "is of a run with train steps 40, not 20" in train(folder, capsys, whole, "--cp", 2)[1]
    changed = bytearray((folder / "kjv.txt").read_bytes())
    changed[1000] ^= 1  # as many bytes as before
    (folder / "kjv.txt").unlink()
    (folder / "kjv.txt").write_bytes(changed)
    (folder / "run.toml").write_text(CONFIG)
    assert "is of a run with data fingerprint '" in train(folder, capsys, whole, "--cp", 2)[1]
    with (trained / "whole" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process trains in" in train(trained, capsys, "whole", "--cp", 2)[1]


def test_a_run_copies_its_tokenizer_needs_no_held_out_text_and_refuses_changed_data(tmp_path: Path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"in": 0, "the": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "words.txt").write_text("in the beginning " * 100)
    changes = {"kjv.txt": "words.txt", "passkeys = 0.5": "", 'tokenizer = "bytes"': "", "0.0002": "0.0", "= 40": "= 6"}
    config = CONFIG
    for old, new in changes.items():
        config = config.replace(old, new)
    folder = run_folder(tmp_path, config)
    status, errors = train(folder, capsys)
    assert status == 0, errors
    assert "held_out" not in errors
    assert "compiling the evaluation" not in errors
    assert sorted(losses(folder / "out")) == list(range(1, 7))
    assert (folder / "out" / "curve.png").stat().st_size > 1000
    assert (folder / "out" / "model" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    (folder / "words.txt").write_text("in the beginning " * 101)
    assert "is of a run with data tokens 300, not 303" in train(folder, capsys)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 40", "steps = 40\ndepth = 2"), "unknown key 'depth'"),
        (("batch = 2", ""), "[train]: 'batch' is missing"),
        (("context = 128", "context = 256"), "context 256 exceeds max_positions 128"),
        (("kjv.txt", "none.txt"), "none.txt"),
        (("heads = 2", "heads = ["), "is not TOML"),
        (("vocab = 256", "vocab = 64"), "is outside the vocabulary of 64"),
        (('["kjv.txt"]', "5"), "files is 5"),
        (("held_out = 0.0002", "held_out = 0.99999"), "too few for one sequence of 128"),
        (('tokenizer = "bytes"', "tokenizer = 3"), "tokenizer is 3: give a value of type str"),
        (('tokenizer = "bytes"', ""), "the model has no tokenizer: set tokenizer = 'bytes'"),
        (("layers = 1", "layers = 1\neos_token_ids = [256]"), "token id 256 is outside the vocabulary of 256"),
        (("[train]", "[training]"), "unknown key 'training'"),
        (("layers = 1", "layers = 1\nqk_norm = true"), "qk_norm"),
        (('[data]\nfiles = ["kjv.txt"]\npasskeys = 0.5', "data = 5"), "data is 5: give a table, [data]"),
        (("passkeys = 0.5", "passkeys = 2.0"), "passkeys is 2.0: give a fraction from 0 to 1"),
        (("passkeys = 0.5", "passkeys_only = true"), "passkeys_only is true, but passkeys is 0: give the fraction"),
        (("context = 128", "context = 120"), "120 positions are not a multiple of 1 ranks"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_2(tmp_path: Path, change, message: str, capsys):
    folder = run_folder(tmp_path, CONFIG.replace(*change))
    status, errors = train(folder, capsys)
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert message in errors
    assert not (folder / "out").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_no_such_state_is_saved(tmp_path: Path, capsys):
    folder = run_folder(tmp_path, CONFIG.replace("steps = 40", "steps = 40\nlearning_rate = 1e30"))
    status, errors = train(folder, capsys)
    assert status == 2
    assert "lower learning_rate" in errors.splitlines()[-1]
    assert list((folder / "out" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("script", ["train.py", "eval_needle.py", "eval_perplexity.py"])
def test_the_scripts_are_the_subcommands(script: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: helix-jax ")


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(trained: Path, capsys):
    shutil.copytree(trained / "whole", trained / "copy")
    before = losses(trained / "copy")
    status, errors = train(trained, capsys, "copy", "--cp", 2)
    assert status == 0, errors
    assert f"continuing after step {STEPS}" in errors
    assert losses(trained / "copy") == before
