"""Several processes on one machine, joined by gloo, do what one process with as many devices does."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helix_jax import processes
from helix_jax.processes import Processes, on_first_process, min_over_processes, lost_process_message
from tests.conftest import ROOT
from tests.reference import BYTES_SHAPE
from tests.test_cli import ENVIRONMENT

HELIX = [sys.executable, "-m", "helix_jax"]
TRAIN = [sys.executable, ROOT / "scripts" / "train.py"]
MESH = ["--tp", 2, "--cp", 4, "--platform", "cpu"]
TWO = 2
COUNTS = [TWO, pytest.param(4, marks=pytest.mark.slow)]
ENDS_WITHIN_S = 60


def begin(count: int, command: list[object], tmp_path: Path, under_slurm: bool = False) -> list[subprocess.Popen]:
    """So many processes with one command line. What they say goes to files: a full pipe would stop them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    begun, slurm = [], {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": count, "SLURM_JOB_ID": port}
    for number in range(count):
        if under_slurm:  # as JAX knows it
            where, here = ["--distributed"], slurm | {"SLURM_PROCID": number, "SLURM_LOCALID": number}
        else:
            where, here = ["--coordinator", f"localhost:{port}", "--processes", count, "--process", number], {}
        line = [*map(str, command), *map(str, where if count > 1 else [])]
        environment = ENVIRONMENT | {name: str(value) for name, value in here.items()}
        with (tmp_path / f"out{number}").open("w") as out, (tmp_path / f"err{number}").open("w") as err:
            begun.append(subprocess.Popen(line, stdout=out, stderr=err, env=environment, cwd=ROOT))
    return begun


def run(count: int, command: list[object], tmp_path: Path, expected: int = 0, under_slurm: bool = False) -> str:
    """What the first of them says on stdout; the others say nothing at all."""
    for number, one in enumerate(begin(count, command, tmp_path, under_slurm)):
        assert one.wait(300) == expected, (tmp_path / f"err{number}").read_text()
    for number in range(1, count):
        assert (tmp_path / f"out{number}").read_text() == ""
        assert expected or (tmp_path / f"err{number}").read_text() == ""
    return (tmp_path / "out0").read_text()


@pytest.mark.parametrize("count", COUNTS)
def test_generate_says_the_same_tokens_and_only_once(count: int, byte_model: Path, tmp_path: Path):
    command = [
        *HELIX,
        "generate",
        "--model",
        byte_model,
        "--prompt",
        "And it came to pass",
        "--max-new-tokens",
        30,
        *MESH,
    ]
    told = json.loads(run(count, [*command, "--json", "--verify"], tmp_path, under_slurm=True))
    alone = json.loads(run(1, [*command, "--json"], tmp_path))
    assert told["tokens"] == alone["tokens"]
    assert len(told["tokens"]) == 30
    assert told["ranks"] == alone["ranks"]
    assert told["verified"]


@pytest.mark.parametrize("count", COUNTS)
def test_a_batch_has_the_same_results_and_goes_on_where_it_was(count: int, byte_model: Path, tmp_path: Path):
    asked = [
        {"id": f"r{i}", "prompt": f"Line {i} of it, " * (i + 1), "max_new_tokens": 4 + i, "temperature": 0.8 * (i % 2)}
        for i in range(6)
    ]
    (tmp_path / "in").write_text("".join(json.dumps(one) + "\n" for one in asked) + "nonsense\n")

    def answered(count: int, out: Path) -> dict[str, object]:
        command = [*HELIX, "batch", tmp_path / "in", "--out", out, "--model", byte_model, "--rows", 4, *MESH]
        run(count, command, tmp_path, expected=1)  # the line that is none
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert len({one["id"] for one in found}) == len(found) == len(asked) + 1
        return {one["id"]: one.get("tokens") or one["error"] for one in found}

    half = tmp_path / "half"
    alone = answered(1, tmp_path / "alone")
    half.write_text("".join((tmp_path / "alone").read_text().splitlines(keepends=True)[:2]))
    assert answered(count, half) == alone


def config_of(steps: int, tmp_path: Path) -> Path:
    tables = {
        "data": {"files": [str(ROOT / "scripts" / "data" / "kjv.txt")], "passkeys": 0.5},
        "model": BYTES_SHAPE | {"max_positions": 128, "tied_head": True, "tokenizer": "bytes"},
        "train": {"steps": steps, "batch": 2, "context": 128, "warmup_steps": 5, "eval_every": 5, "held_out": 0.0},
    }
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    file = tmp_path / f"train{steps}.toml"
    file.write_text("\n".join(lines))
    return file


def curve(out: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines() if line.endswith("}")]
    return [(entry["step"], entry["nats"]) for entry in entries if "nats" in entry]


def assert_close(ours: list[tuple[int, float]], alone: list[tuple[int, float]]) -> None:
    """Gloo adds in an order of its own: the last bits differ."""
    assert [step for step, _ in ours] == [step for step, _ in alone] == list(range(1, 21))
    assert [nats for _, nats in ours] == pytest.approx([nats for _, nats in alone], abs=1e-5)


def test_when_a_process_is_killed_the_others_end_and_one_alone_goes_on_from_their_state(tmp_path: Path):
    command = [*TRAIN, "--config", config_of(20, tmp_path), "--cp", 4, "--dp", 2, "--platform", "cpu"]
    run(1, [*command, "--out", tmp_path / "alone"], tmp_path)
    both, out = begin(TWO, [*command, "--out", tmp_path / "both"], tmp_path), tmp_path / "both"
    while not (out / "states" / "5").exists():  # written whole: orbax renames it
        time.sleep(0.05)
        assert all(one.poll() is None for one in both), (tmp_path / "err0").read_text()
    killed = time.monotonic()
    both[1].kill()
    both[1].wait()
    assert both[0].wait(ENDS_WITHIN_S) in (processes.LOST_PROCESS, -signal.SIGABRT)
    assert time.monotonic() - killed < ENDS_WITHIN_S
    assert re.search("another (process is gone|task died)", (tmp_path / "err0").read_text())
    before = curve(out)
    assert 5 <= len(before) < 20
    run(1, [*command, "--out", out], tmp_path)
    assert curve(out)[:5] == before[:5]
    assert_close(curve(out), curve(tmp_path / "alone"))
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_twenty_steps_of_training_are_those_of_one_process(count: int, tmp_path: Path):
    command = [*TRAIN, "--config", config_of(20, tmp_path), "--tp", 2, "--cp", 2, "--dp", 2, "--platform", "cpu"]
    for n in (1, count):
        run(n, [*command, "--out", tmp_path / str(n)], tmp_path)
    assert_close(curve(tmp_path / str(count)), curve(tmp_path / "1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "here"], "the coordinator is 'here': give HOST:PORT"),
        (["--coordinator", "here:1", "--processes", 0], "there are 0 processes: give at least 1"),
        (["--coordinator", "here:1", "--processes", 2, "--process", 2], "process 2 is not one of 2"),
        (["--distributed"], "nothing tells where the other processes are"),
        (["--coordinator", "localhost:1"], "nothing tells where the other processes are"),
    ],
)
def test_processes_that_cannot_meet_are_one_line_and_exit_2(options: list[object], message: str):
    command = [*HELIX, "generate", "--prompt", "And", "--platform", "cpu", *options]
    environment = {key: value for key, value in ENVIRONMENT.items() if not key.startswith(("SLURM", "OMPI", "KUBER"))}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("mesh", "out", "message"),
    [
        (MESH, "no/out", "cannot be written"),  # which the first alone tries
        (["--cp", 5, "--platform", "cpu"], "out", "tp 1 x cp 5 takes 5 of the 6 devices of 2 processes: take all"),
    ],
)
def test_what_fails_in_the_first_fails_in_all(
    mesh: list[object], out: str, message: str, byte_model: Path, tmp_path: Path
):
    (tmp_path / "in").write_text('{"prompt": "And"}\n')
    command = [*HELIX, "batch", tmp_path / "in", "--out", tmp_path / out, "--model", byte_model, *mesh]
    run(TWO, command, tmp_path, expected=2)
    for number in range(TWO):
        assert message in (tmp_path / f"err{number}").read_text()


def test_a_process_alone_agrees_with_itself():
    assert on_first_process(lambda: {"a": [1]}) == {"a": [1]}
    assert least(7) == 7
    assert lost(RuntimeError("Connection closed by peer")) is None
    assert Processes("host:80", 2, 1).count == 2
    with pytest.raises(OSError, match="no"):
        on_first_process(lambda: (_ for _ in ()).throw(OSError("no")))
