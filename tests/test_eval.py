"""The evaluations: what is asked leaves no trace, what is lost is one rank's, and the scripts run as users run them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.checkpoint import load
from helix_jax.layout import BlockLayout
from helix_jax.mesh import make_mesh
from helix_jax.plan import Plan
from tests.conftest import ROOT
from tests.reference import naive_logits, plan_of
from tests.test_cli import ENVIRONMENT

TEXT = (ROOT / "scripts" / "data" / "kjv.txt").read_bytes()[-3000:]


@pytest.fixture(scope="module")
def reader_of(byte_model: Path):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        module = importlib.import_module("reader")
    finally:
        sys.path.pop(0)
    mesh = make_mesh(1, 4)
    model = load(byte_model, Plan(mesh), jnp.float32)

    def make(placement: str, prompts, room: int):
        most = max(map(len, prompts)) + room
        return module.Reader(model, Plan(mesh, 4, placement), prompts, most)

    return make


PROMPTS = [list(TEXT[:70]), list(TEXT[100:133])]


@pytest.mark.parametrize("placement", ["helix", "striped"])
def test_a_reader_reads_and_says_what_a_model_without_a_cache_does(reader_of, byte_model: Path, placement: str):
    model, reader = load(byte_model, plan_of(), jnp.float32), reader_of(placement, PROMPTS, 60)
    reader.read([TEXT[200:209], TEXT[300:320]])
    texts = [[*PROMPTS[0], *TEXT[200:209]], [*PROMPTS[1], *TEXT[300:320]]]
    for row, said in enumerate(reader.say(12).tolist()):
        logits = naive_logits(model, [[*texts[row], *said]], 128)[0]
        at = np.arange(len(texts[row]) - 1, len(texts[row]) + 11)
        gap = logits[at].max(-1) - logits[at, said]
        assert gap.max() < 1e-4
    token_B = np.asarray([5, 6])
    before = [list(np.asarray(reader.lengths))]
    logits_BV = reader.read_one(token_B)
    assert (reader.lengths == before[0] + np.ones(2)).all()
    assert logits_BV.shape == (2, 256)


def test_a_question_leaves_no_trace(reader_of):
    asked, quiet = reader_of("helix", PROMPTS, 60), reader_of("helix", PROMPTS, 60)
    first = asked.answer([b"What is this?", b"And that?"], 7)
    again = asked.answer([b"What is this?", b"And that?"], 7)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(asked.say(20), quiet.say(20))


def test_what_is_lost_is_one_rank_s(reader_of):
    reader = reader_of("helix", PROMPTS, 4)
    before = jax.tree.map(np.asarray, reader.cache)
    reader.lose(2)
    for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(reader.cache), strict=True):
        was_R, now_R = (np.asarray(x).reshape(4, -1) for x in (was, now))
        assert was_R[2].any()
        assert not now_R[2].any()
        np.testing.assert_array_equal(np.delete(was_R, 2, 0), np.delete(now_R, 2, 0))


def run(script: str, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / script, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, check=False)


def test_needles_are_hidden_and_asked_for_and_every_placement_answers_alike(byte_model: Path, tmp_path: Path):
    options = ("--model", byte_model, "--cp", 2, "--lengths", 120, 200, "--depths", 3, "--decoded", 20)
    files = ("--json", tmp_path / "n.json", "--plot", tmp_path / "n.png")
    done = run("eval_needle.py", *options, "--placement", "helix", "--placement", "striped", *files)
    assert done.returncode == 0, done.stderr
    assert "again after 20 tokens" in done.stdout
    found = json.loads((tmp_path / "n.json").read_text())
    assert len(found["cells"]) == 6
    assert found["helix"]["answers"] == found["striped"]["answers"] == found["one device"]["answers"]
    assert all(len(said) == 2 for said in found["helix"]["answers"])
    for cell, owner in zip(found["cells"], found["helix"]["owners"], strict=True):
        assert cell["context"][cell["place"] :].startswith(cell["key"])
        assert owner == int(BlockLayout(2, 16).owner(cell["place"], len(cell["context"])))
    np.testing.assert_allclose(found["helix"]["bits_per_byte"], found["one device"]["bits_per_byte"], rtol=1e-5)
    assert (tmp_path / "n.png").stat().st_size > 1000


def test_the_keys_of_a_rank_are_lost_with_it_and_no_others(tmp_path: Path):
    """By the model that ships: one device finds all of them, and four find all but those of the rank that is zeroed."""
    options = ("--cp", 4, "--lengths", 1000, "--depths", 9, "--decoded", 0, "--placement", "helix")
    done = run("eval_needle.py", *options, "--lose", 1, "--json", tmp_path / "n.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "n.json").read_text())
    keys = [cell["key"] for cell in found["cells"]]
    assert found["one device"]["answers"] == [[key] for key in keys]
    owners = found["helix"]["owners"]
    assert set(owners) == {0, 1, 2, 3}
    for key, [said], owner in zip(keys, found["helix"]["answers"], owners, strict=True):
        assert (said == key) == (owner != 1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_shipped_model_finds_keys_at_every_depth_of_its_whole_context_under_every_placement(tmp_path: Path):
    options = ("--cp", 8, "--lengths", 7600, "--depths", 8, "--rows", 8)
    done = run("eval_needle.py", *options, "--json", tmp_path / "n.json")
    assert done.returncode == 0, done.stderr  # every placement answers every cell as one device does
    found = json.loads((tmp_path / "n.json").read_text())
    assert len(found["one device"]["answers"]) == 8
    assert all(said == [cell["key"]] * 2 for said, cell in zip(found["helix"]["answers"], found["cells"], strict=True))


def test_perplexity_is_that_of_one_pass_at_every_position(byte_model: Path, tmp_path: Path):
    options = ("--model", byte_model, "--cp", 2, "--positions", 2, 50, "--span", 20, "--windows", 3)
    done = run("eval_perplexity.py", *options, "--placement", "helix", "--json", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "p.json").read_text())["bits_per_byte"]
    text = (ROOT / "scripts" / "data" / "kjv.txt").read_bytes()
    text = text[len(text) - int(len(text) * 0.05) :]
    model = load(byte_model, plan_of(), jnp.float32)
    for row, position in enumerate((2, 50)):
        nats = []
        for start in np.linspace(0, len(text) - position - 20, 3).astype(int):
            window = list(text[start : start + position + 20])
            logits = naive_logits(model, [window], 80)[0].astype(np.float64)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nats += [-logp[at - 1, window[at]] for at in range(position, position + 20)]
        for name in ("one device", "helix"):
            np.testing.assert_allclose(found[name][row], np.mean(nats) / np.log(2), rtol=1e-5)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            "eval_needle.py",
            ["--lengths", 500, "--decoded", 9],
            "contexts of [500] bytes, 9 decoded and",
        ),
        ("eval_needle.py", ["--lengths", 20, "--decoded", 0], "a context of 20 bytes holds no fact and question"),
        ("eval_needle.py", ["--lose", 2], "--lose 2 is no rank of cp 2: give 0 to 1"),
        ("eval_needle.py", ["--depths", 0], "--depths is 0: give at least 1"),
        (
            "eval_needle.py",
            ["--held-out", 0, "--lengths", 100, "--decoded", 9],
            "--held-out is 0.0: give a share above 0",
        ),
        ("eval_needle.py", ["--model", GOLDEN_LLAMA := ROOT / "tests" / "golden" / "llama"], "is no byte model"),
        ("eval_needle.py", ["--decoded", 100000], "100000 decoded and"),
        ("eval_needle.py", ["--cp", 0], "--cp is 0: give at least 1"),
        ("eval_needle.py", ["--plot", "p.foo", "--decoded", 9], "--plot 'p.foo' is of no kind that matplotlib writes"),
        ("eval_needle.py", ["--json", "/nowhere/n.json", "--lengths", 100, "--decoded", 9], "/nowhere/n.json"),
        ("eval_perplexity.py", ["--held-out", "inf"], "--held-out is inf"),
        ("eval_perplexity.py", ["--span", 1000], "a span of 1000"),
        ("eval_perplexity.py", ["--positions", 500], "positions [500], a span of 64"),
        ("eval_perplexity.py", ["--model", GOLDEN_LLAMA], "is no byte model"),
        (
            "eval_perplexity.py",
            ["--held-out", 0.00001],
            "44 bytes are held out, and what is asked for needs 320: give more",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_exit_2(byte_model: Path, script: str, options, message: str):
    done = run(script, "--model", byte_model, "--cp", 2, *options)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr
