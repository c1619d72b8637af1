"""Programs for TPUs that are not there: what libtpu compiles holds what arithmetic says, and no collective more."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_cli import ENVIRONMENT

with_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'"
)
LLAMA = ROOT / "configs" / "llama-3.1-8b.toml"


def aot(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "aot_tpu.py", "--config", LLAMA, *options]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)


@with_libtpu
@pytest.mark.timeout(600)
def test_a_decode_step_for_four_chips_holds_its_shares_and_keeps_its_promises(tmp_path: Path):
    layers, tokens, rows, chips = 1, 65536, 2, 4
    done = aot(
        "--layers", layers, "--tokens", tokens, "--rows", rows, "--topology", "v5e:2x2", "--json", tmp_path / "a"
    )
    assert done.returncode == 0, done.stderr
    [run] = json.loads((tmp_path / "a").read_text())["runs"]
    assert (run["tp"], run["cp"], run["fits"]) == (4, 1, True)
    cache = layers * rows * tokens * 2 * 8 * 128 * 2 / chips
    D, N, K, H, F, V = 4096, 32, 8, 128, 14336, 128256
    weights = 2 * (layers * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + 2 * V * D) / chips
    assert abs(run["cache_bytes"] / cache - 1) < 0.01
    assert abs(run["weight_bytes"] / weights - 1) < 0.01
    assert run["argument_bytes"] <= 1.01 * (run["cache_bytes"] + run["weight_bytes"])
    assert run["alias_bytes"] >= run["cache_bytes"]
    # With one rank of cp no partials meet; the embedding, two projections of a layer, and the logits.
    assert sum(run["collectives"].values()) == 2 * layers + 2


@with_libtpu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v9:2x2"], "the memory of a v9 is not known: v5e, v5p, v6e are"),
        (["--topology", "v5e:3x7"], "--topology 'v5e:3x7' cannot be made"),
        (["--layers", 99], "--layers is 99: give 1 to 32"),
        (["--config", "none.toml"], "none.toml"),
    ],
)
def test_what_cannot_be_compiled_for_is_one_line_and_exit_2(options, message: str):
    done = aot("--topology", "v5e:2x2", *options)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr
