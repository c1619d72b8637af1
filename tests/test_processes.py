"""Several processes on one machine, connected by Gloo, compute what one process with as many devices computes."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from helix_jax import devices, processes
from helix_jax.checkpoint import save
from helix_jax.devices import open_mesh
from helix_jax.processes import Processes, lost_process_message, min_over_processes, on_first_process
from tests.conftest import ROOT
from tests.reference import BYTES, BYTES_SHAPE, tiny_model
from tests.test_cli import ENVIRONMENT, HELIX, assert_bad_input, call, json_of

TRAIN = [*HELIX, "train"]
MESH = ["--tp", 2, "--cp", 2, "--platform", "cpu"]  # with few devices, collectives are fast on few cores
TWO = 2
COUNTS = [TWO, pytest.param(4, marks=pytest.mark.slow)]
HEARTBEAT = {"HELIX_JAX_HEARTBEAT_TIMEOUT_S": "10"}  # the default is 30
ENDS_WITHIN_S = 60


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a byte model of one layer: every process compiles it."""
    folder = tmp_path_factory.mktemp("byte_model")
    save(tiny_model(replace(BYTES, layers=1)), folder)
    return folder


def gpus_of(index: int, gpus_each: int) -> dict[str, str]:
    """Return the environment of a process that uses its share of the GPUs of this machine, beside that of the tests."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(jax.local_device_count())))
    own = visible.split(",")[index * gpus_each : (index + 1) * gpus_each]
    memory, optimised = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    return {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ",".join(own), **memory, **optimised}


def start(
    count: int, command: list[object], tmp_path: Path, under_slurm: bool = False, gpus_each: int = 0
) -> list[subprocess.Popen]:
    """Start processes with one command line. Their output goes to files, because a full pipe would stop them.

    They use fake devices of the CPU, or `gpus_each` GPUs each.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started, slurm = [], {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": count, "SLURM_JOB_ID": port}
    for index in range(count):
        if under_slurm:  # as JAX detects it
            where, variables = ["--distributed"], slurm | {"SLURM_PROCID": index, "SLURM_LOCALID": index}
        else:
            where, variables = ["--coordinator", f"localhost:{port}", "--processes", count, "--process", index], {}
        line = [*map(str, command), *map(str, where if count > 1 else [])]
        environment = ENVIRONMENT | HEARTBEAT | {name: str(value) for name, value in variables.items()}
        environment |= gpus_of(index, gpus_each) if gpus_each else {}
        with (tmp_path / f"out{index}").open("w") as out, (tmp_path / f"err{index}").open("w") as err:
            started.append(subprocess.Popen(line, stdout=out, stderr=err, env=environment, cwd=ROOT))
    return started


def run(
    count: int,
    command: list[object],
    tmp_path: Path,
    expected: int = 0,
    under_slurm: bool = False,
    gpus_each: int = 0,
) -> str:
    """Run processes and return the stdout of the first. The others print nothing, but XLA warns on GPUs."""
    for index, process in enumerate(start(count, command, tmp_path, under_slurm, gpus_each)):
        assert process.wait(300) == expected, (tmp_path / f"err{index}").read_text()
    for index in range(1, count):
        assert (tmp_path / f"out{index}").read_text() == ""
        assert expected or gpus_each or (tmp_path / f"err{index}").read_text() == ""
    return (tmp_path / "out0").read_text()


@pytest.mark.parametrize("count", COUNTS)
def test_several_processes_generate_the_tokens_of_one_and_print_them_once(count: int, byte_model: Path, tmp_path: Path):
    sampling = ["--temperature", 0.8, "--top-k", 20]
    options = ["generate", "--model", byte_model, "--prompt", "And it came to pass", "--max-new-tokens", 30, *MESH]
    command = [*HELIX, *options, *sampling, "--json", "--verify"]
    together = json.loads(run(count, command, tmp_path, under_slurm=True))
    alone = json_of(call(*options, *sampling, "--seed", together["seed"], "--json"))
    assert together["tokens"] == alone["tokens"]
    assert len(together["tokens"]) == 30
    assert together["ranks"] == alone["ranks"]
    assert together["verified"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_batch_has_the_results_of_one_process_and_continues(count: int, byte_model: Path, tmp_path: Path):
    requests = [{"id": f"r{i}", "prompt": f"Line {i} of it, " * (i + 1), "max_new_tokens": 4 + i} for i in range(6)]
    sampled = [request | {"temperature": 0.8, "seed": i} for i, request in enumerate(requests[1::2])]
    lines = [json.dumps(request) + "\n" for request in [*requests[::2], *sampled]]
    (tmp_path / "in").write_text("".join(lines) + "nonsense\n")

    def options(out: Path) -> list[object]:
        rows = 1 if count == TWO else 4  # with one row, each process compiles a prefill program and a sampler less
        model = ("--model", byte_model, "--rows", rows, "--prefill-chunk", 4)
        return ["batch", tmp_path / "in", "--out", out, *model, *MESH]

    def results(out: Path) -> dict[str, object]:
        entries = [json.loads(line) for line in out.read_text().splitlines()]
        assert len({entry["id"] for entry in entries}) == len(entries) == len(requests) + 1
        return {entry["id"]: entry.get("tokens") or entry["error"] for entry in entries}

    half = tmp_path / "half"
    assert call(*options(tmp_path / "alone")).returncode == 1  # because of the bad line
    half.write_text("".join((tmp_path / "alone").read_text().splitlines(keepends=True)[:2]))
    run(count, [*HELIX, *options(half)], tmp_path, expected=1)
    assert results(half) == results(tmp_path / "alone")


def config_of(steps: int, tmp_path: Path) -> Path:
    tables = {
        "data": {"files": [str(ROOT / "scripts" / "data" / "kjv.txt")], "passkeys": 0.5},
        "model": BYTES_SHAPE | {"layers": 1, "max_positions": 128, "tied_head": True, "tokenizer": "bytes"},
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


def assert_close(losses: list[tuple[int, float]], alone: list[tuple[int, float]]) -> None:
    """Gloo adds in another order, so the last bits differ."""
    assert [step for step, _ in losses] == [step for step, _ in alone] == list(range(1, 21))
    assert [nats for _, nats in losses] == pytest.approx([nats for _, nats in alone], abs=1e-5)


@pytest.mark.slow
def test_after_a_process_is_killed_the_others_end_and_one_process_continues_training(tmp_path: Path):
    command = [*TRAIN, "--config", config_of(20, tmp_path), "--cp", 2, "--dp", 2, "--platform", "cpu"]
    both, out = start(TWO, [*command, "--out", tmp_path / "both"], tmp_path), tmp_path / "both"
    while not (out / "checkpoints" / "5").exists():  # complete: orbax renames it
        time.sleep(0.05)
        assert all(process.poll() is None for process in both), (tmp_path / "err0").read_text()
    killed = time.monotonic()
    both[1].kill()
    both[1].wait()
    assert both[0].wait(ENDS_WITHIN_S) in (processes.LOST_PROCESS, -signal.SIGABRT)
    assert time.monotonic() - killed < ENDS_WITHIN_S
    assert re.search("another (process was lost|task died)", (tmp_path / "err0").read_text())
    before = curve(out)
    assert 5 <= len(before) < 20
    assert call(*command[len(HELIX) :], "--out", out).returncode == 0
    assert curve(out)[:5] == before[:5]
    assert [step for step, _ in curve(out)] == list(range(1, 21))
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_twenty_steps_of_training_equal_those_of_one_process(count: int, tmp_path: Path):
    command = [*TRAIN, "--config", config_of(20, tmp_path), "--tp", 2, "--cp", 2, "--dp", 2, "--platform", "cpu"]
    for n in (1, count):
        run(n, [*command, "--out", tmp_path / str(n)], tmp_path)
    assert_close(curve(tmp_path / str(count)), curve(tmp_path / "1"))


GENERATE = ["generate", "--prompt", "And", "--platform", "cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "here"], "coordinator is 'here': give HOST:PORT"),
        (["--coordinator", "here:1", "--processes", 0], "processes is 0: give at least 1"),
        (["--coordinator", "here:1", "--processes", 2, "--process", 2], "process is 2: give an index from 0"),
    ],
)
def test_impossible_processes_are_one_line_and_exit_2(options: list[object], message: str):
    assert_bad_input(call(*GENERATE, *options), message)


@pytest.mark.parametrize(
    "options", [["--distributed"], pytest.param(["--coordinator", "localhost:1"], marks=pytest.mark.slow)]
)
def test_processes_that_cannot_be_detected_are_one_line_and_exit_2(options: list[object]):
    environment = {key: value for key, value in ENVIRONMENT.items() if not key.startswith(("SLURM", "OMPI", "KUBER"))}
    command = [*HELIX, *GENERATE, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=False)
    assert_bad_input(done, "the other processes are not known")


@pytest.mark.parametrize(
    ("mesh", "out", "message"),
    [
        (MESH, "no/out", "cannot be written"),  # which only the first process tries
        (["--cp", 5, "--platform", "cpu"], "out", "tp 1 x cp 5 uses 5 of the 6 devices of 2 processes: use all"),
    ],
)
def test_an_error_of_the_first_process_is_an_error_of_all(
    mesh: list[object], out: str, message: str, byte_model: Path, tmp_path: Path
):
    (tmp_path / "in").write_text('{"prompt": "And"}\n')
    command = [*HELIX, "batch", tmp_path / "in", "--out", tmp_path / out, "--model", byte_model, *mesh]
    run(TWO, command, tmp_path, expected=2)
    for index in range(TWO):
        assert message in (tmp_path / f"err{index}").read_text()


def test_a_single_process_agrees_with_itself():
    assert on_first_process(lambda: {"a": [1]}) == {"a": [1]}
    assert min_over_processes(7) == 7
    assert lost_process_message(RuntimeError("Connection closed by peer")) is None
    assert Processes("host:80", 2, 1).count == 2
    with pytest.raises(OSError, match="no"):
        on_first_process(lambda: (_ for _ in ()).throw(OSError("no")))


@pytest.mark.parametrize(("given", "expected"), [(None, 32), ("5", 5)])
def test_fake_devices_get_spare_threads(monkeypatch, given: str | None, expected: int):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    if given:
        monkeypatch.setenv("PJRT_NPROC", given)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    open_mesh("auto", 1, 4, 2)
    assert os.environ.pop("PJRT_NPROC") == str(expected)


@pytest.mark.parametrize(
    ("platform", "processes", "given", "expected"),
    [("gpu", 1, None, "0"), ("gpu", 1, "1", "1"), ("gpu", 2, None, None), ("cpu", 1, None, None)],
)
def test_xla_alone_orders_the_collectives_of_gpus_of_one_process(
    platform: str, processes: int, given: str | None, expected: str | None, monkeypatch
):
    name = "NCCL_GRAPH_MIXING_SUPPORT"
    monkeypatch.setenv(name, given or "")  # so that it is restored
    if given is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "process_count", lambda: processes)
    devices._leave_order_of_collectives_to_xla([SimpleNamespace(platform=platform)])
    assert os.environ.get(name) == expected
