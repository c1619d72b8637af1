"""Runs the benchmarks of scripts/ on a tiny model, and the choice of the folder for compiled programs."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from helix_jax.cli.compilation_cache import enable_compilation_cache
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
    """Run the benchmark in this process, which has 8 fake devices."""
    jax.devices()
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", *map(str, arguments), "--platform", "cpu"])
    try:
        return importlib.import_module("bench_decode").main()
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
