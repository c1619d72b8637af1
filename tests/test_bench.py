"""Runs the benchmarks of scripts/ on a tiny model, and the choice of the folder for compiled programs."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from helix_jax import devices
from helix_jax.cli.compilation_cache import enable_compilation_cache
from helix_jax.planner.comparison import read_measured
from tests.conftest import ROOT
from tests.test_cli import ENVIRONMENT

SCRIPTS = ROOT / "scripts"
TINY = """
[model]
family = "llama"
layers = 1
width = 32
heads = 4
kv_heads = 2
head_width = 8
ff_width = 32
vocab = 64
max_positions = 1024
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return file


def bench_decode(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return bench(monkeypatch, "bench_decode", *arguments, "--platform", "cpu")


def bench(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> int:
    """Run a benchmark in this process, which has 8 fake devices."""
    jax.devices()
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    try:
        return importlib.import_module(script).main()
    except SystemExit as stop:  # raised by the parser
        return int(stop.code or 0)


def test_the_decode_benchmark_reports_what_users_call(config: Path, tmp_path: Path, monkeypatch, capsys):
    report = tmp_path / "decode.json"
    sizes = ("--mesh", "1x2", "--case", "2x20", "--prefill", "2x8", "--steps-per-call", 2)
    assert bench_decode(monkeypatch, "--config", config, *sizes, "--json", report) == 0
    measured = json.loads(report.read_text())
    [run], [prefill] = measured["runs"], measured["prefills"]
    assert min(run[name] for name in ("engine_ms", "generate_ms", "decode_ms", "roofline_ms")) > 0
    assert run["baseline_ms"] is None
    assert prefill["tokens_per_s"] > 0
    assert "Engine" in capsys.readouterr().out


@pytest.mark.slow
def test_the_decode_benchmark_times_only_what_is_named(config: Path, tmp_path: Path, monkeypatch):
    """The roofline of an fp8 cache is less than that of a float32 cache. The devices have copies of the only head."""
    report, rooflines = tmp_path / "decode.json", {}
    sizes = ("--mesh", "2x1", "--kv-heads", 1, "--case", "2x900", "--time", "decode", "--steps-per-call", 2)
    for dtype in ("auto", "fp8"):
        assert bench_decode(monkeypatch, "--config", config, *sizes, "--kv-cache-dtype", dtype, "--json", report) == 0
        [run] = json.loads(report.read_text())["runs"]
        assert run["decode_ms"] > 0
        assert run["engine_ms"] is None
        rooflines[dtype] = run["roofline_ms"] * json.loads(report.read_text())["bandwidth_bytes_per_s"]
    assert rooflines["fp8"] < rooflines["auto"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "2"], "--mesh is '2': give tp x cp, both at least 1, such as 2x4"),
        (["--mesh", "1x2", "--case", "0x8"], "--case is '0x8': give rows x tokens, both at least 1"),
        (["--mesh", "1x2", "--steps-per-call", "0"], "--steps-per-call is 0: give at least 1"),
        (["--mesh", "3x1"], "tp 3 neither divides the 2 key/value heads nor is a multiple"),
        (["--mesh", "1x2", "--combine", "ring"], "--combine is 'ring': choose one of"),
    ],
)
def test_invalid_options_of_the_decode_benchmark_are_rejected(
    config: Path, options: list[str], message: str, monkeypatch, capsys
):
    assert bench_decode(monkeypatch, "--config", config, *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def bench_gpus(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # as the command sets it for the rest of the process
    return bench(monkeypatch, "bench_gpus", *arguments)


def test_the_gpu_benchmark_predicts_all_steps_before_it_times_one_and_continues(
    config: Path, tmp_path: Path, monkeypatch, capsys
):
    """A step that fails ends no other. The next run times only this one."""
    report, calls = tmp_path / "gpus.json", []
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("bench_gpus")
    measure = module.measure_decoding

    def measure_or_fail(*arguments):
        steps = json.loads(report.read_text())["groups"][0]["points"]
        assert [step["details"]["predicted_ms"] > 0 for step in steps] == [True] * 3
        calls.append(arguments)
        if len(calls) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return measure(*arguments)

    monkeypatch.setattr(module, "measure_decoding", measure_or_fail)
    sizes = ("--devices", 2, "--config", config, "--case", "2x20", "--steps-per-call", 2, "--platform", "cpu")
    command = ("--only", "one_kv_head", *sizes, "--json", report)
    assert bench_gpus(monkeypatch, *command) == 1
    assert "2x20 on 2x1 was not timed (RESOURCE_EXHAUSTED: out of memory): give fewer" in capsys.readouterr().err
    assert len(read_measured(report)) == 2
    assert bench_gpus(monkeypatch, *command) == 0
    assert len(calls) == 4
    points = read_measured(report)
    assert [(point.tp, point.cp, point.kv_heads) for point in points] == [(1, 1, 1), (2, 1, 1), (1, 2, 1)]
    for point, step in zip(points, json.loads(report.read_text())["groups"][0]["points"], strict=True):
        assert "error" not in step["details"]
        assert step["details"]["ms_per_roofline"] == point.ms / step["details"]["roofline_ms"]
        assert step["details"]["ms_per_predicted"] == point.ms / step["details"]["predicted_ms"]


def test_a_continued_report_keeps_failures_and_settings_apart(config: Path, tmp_path: Path, monkeypatch):
    """A failed step is no failure of a later run of another part, and a step with other settings is another one."""
    report, timed = tmp_path / "gpus.json", []
    monkeypatch.syspath_prepend(SCRIPTS)

    def measure(job, plan, *_) -> dict[str, float]:
        if plan.combine == "psum":
            raise jax.errors.JaxRuntimeError("")
        timed.append(job.options.steps_per_call)
        return {"decode_ms": 1.0, "roofline_ms": 0.5}

    monkeypatch.setattr(importlib.import_module("bench_gpus"), "measure_decoding", measure)
    sizes = ("--devices", 2, "--config", config, "--case", "2x20", "--platform", "cpu", "--json", report)
    assert bench_gpus(monkeypatch, "--only", "combine", *sizes) == 1
    timed.clear()
    for steps, groups in ((32, 1), (32, 1), (3, 2)):
        assert bench_gpus(monkeypatch, "--only", "fp8", "--steps-per-call", steps, *sizes) == 0
        assert len(json.loads(report.read_text())["groups"]) == groups
    assert timed == [32, 32, 3, 3]


def test_failed_checks_are_reported_and_end_with_exit_code_1(tmp_path: Path, monkeypatch, capsys):
    report = tmp_path / "gpus.json"

    def open_mesh(*arguments):  # as on GPUs
        monkeypatch.setenv("NCCL_GRAPH_MIXING_SUPPORT", "0")
        return devices.open_mesh(*arguments)

    def run_pytest(command: list[str], env: dict[str, str], **_) -> SimpleNamespace:
        assert "NCCL_GRAPH_MIXING_SUPPORT" not in env  # the tests start several processes, which keep the default
        counts = 'tests="9" failures="1" errors="1" skipped="3" time="2.5"'
        Path(command[-1].removeprefix("--junitxml=")).write_text(f"<testsuites><testsuite {counts}/></testsuites>")
        return SimpleNamespace(returncode=1)

    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("bench_gpus")
    monkeypatch.delenv("NCCL_GRAPH_MIXING_SUPPORT", raising=False)
    monkeypatch.setattr(module, "open_mesh", open_mesh)
    monkeypatch.setattr(module.subprocess, "run", run_pytest)
    assert bench_gpus(monkeypatch, "--only", "checks", "--platform", "cpu", "--json", report) == 1
    assert "2 checks failed" in capsys.readouterr().err
    assert json.loads(report.read_text())["checks"] == {"passed": 4, "failed": 2, "skipped": 3, "seconds": 2.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "magic"], "--only is 'magic': choose one of checks, baseline, llama"),
        (["--only", "fp8", "--skip", "fp8"], "--skip leaves out all of the parts: name fewer"),
        (["--only", "llama"], "platform is gpu, but JAX found only 8 x cpu: try --platform cpu"),
        (["--only", "llama", "--platform", "cpu", "--devices", "16"], "needs 16 devices, but there are 8 of platform"),
        (["--only", "llama", "--platform", "cpu", "--devices", "0"], "--devices is 0: give at least 1"),
        (["--only", "llama", "--platform", "cpu", "--devices", "3"], "of 3 devices are timed: give another --devices"),
        (["--only", "llama", "--platform", "cpu", "--case", "8"], "--case is '8': give rows x tokens"),
        (["--only", "checks", "--platform", "cpu", "--devices", "1"], "compares devices, and there is 1: use --skip"),
        (["--only", "llama", "--json", ROOT / "pyproject.toml"], "is no report of bench_gpus.py: give another name"),
        (["--only", "llama", "--json", ROOT / "no" / "x.json", "--platform", "cpu"], "cannot be opened"),
    ],
)
def test_invalid_options_of_the_gpu_benchmark_are_rejected(
    options: list[object], message: str, tmp_path: Path, monkeypatch, capsys
):
    assert bench_gpus(monkeypatch, "--json", tmp_path / "gpus.json", *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "gpus.json").exists()


@pytest.mark.slow
def test_the_start_up_benchmark_starts_cold_and_warm(config: Path):
    command = [sys.executable, SCRIPTS / "bench_startup.py", "--config", config, "--cp", 2, "--platform", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    seconds = dict(re.findall(r"(cold|warm): ([\d.]+) s", done.stdout))
    assert 0 < float(seconds["warm"]) < float(seconds["cold"])


CACHE_SETTINGS = (
    *("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_compilation_cache_max_size"),
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def without_cache():
    """Configure JAX without a folder for compiled programs."""
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("without_cache")
def test_compiled_programs_are_stored_in_the_cache_folder_of_the_user(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "helix_jax")
    enable_compilation_cache("off")
    assert not jax.config.jax_enable_compilation_cache


@pytest.mark.usefixtures("without_cache")
def test_a_folder_for_compiled_programs_can_be_given(tmp_path: Path):
    """A program without the time of its last use, which a killed process leaves, is removed."""
    folder, file = tmp_path / "mine", tmp_path / "file"
    ours = folder / "helix_jax"
    ours.mkdir(parents=True)
    file.write_text("")
    for name in ("killed-cache", "whole-cache", "whole-atime"):
        (ours / name).write_bytes(b"")
    (folder / "others-cache").write_bytes(b"")
    enable_compilation_cache(str(folder))
    assert jax.config.jax_compilation_cache_dir == str(ours)
    assert {path.name for path in ours.iterdir()} == {"whole-cache", "whole-atime"}
    assert (folder / "others-cache").exists()
    with pytest.raises(ValueError, match=r"which cannot be written \(Not a directory\): give another folder, or off"):
        enable_compilation_cache(str(file))
    with pytest.raises(ValueError, match="--compilation-cache is '': give a folder, or off"):
        enable_compilation_cache("")


@pytest.mark.usefixtures("without_cache")
def test_by_default_a_configured_folder_is_kept_and_an_unwritable_one_is_not_used(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    enable_compilation_cache("auto")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    enable_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    enable_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
