"""`helix-jax train`: a run from a config file, stopped in every way and continued."""

import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helix_jax.checkpoint import load
from helix_jax.cli import main
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
    return folder


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
    assert "step 6 of 6" not in errors
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
def test_the_scripts_are_the_subcommands(script: str):
    command = [sys.executable, str(ROOT / "scripts" / script), "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: helix-jax ")


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(trained: Path, capsys):
    shutil.copytree(trained / "whole", trained / "copy")
    before = losses(trained / "copy")
    status, errors = train(trained, capsys, "copy", "--cp", 2)
    assert status == 0, errors
    assert f"continuing after step {STEPS}" in errors
    assert losses(trained / "copy") == before
