"""Training learns, evaluates every held-out byte once, and runs from a shell as the README says."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_jax.checkpoint import load
from helix_jax.mesh import make_mesh
from helix_jax.train import TrainConfig, held_out_windows, nats_per_token, start, train_step
from tests.conftest import ROOT
from tests.reference import TINY, naive_logits, tiny_model

CONFIG = TrainConfig(steps=40, batch=4, context=16, warmup_steps=5, dropout=0.1, learning_rate=1e-2)


def test_the_loss_is_the_surprise_of_each_next_token():
    tokens = np.random.default_rng(0).integers(0, TINY.vocab, (1, 20))
    logits = naive_logits(tiny_model(), tokens.tolist(), 20)[0].astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ours = nats_per_token(tiny_model(), jnp.asarray(tokens, jnp.int32))[0]
    np.testing.assert_allclose(ours, -logp[np.arange(19), tokens[0, 1:]], rtol=1e-5, atol=1e-5)


def test_float32_training_asks_for_float32_products():
    state = start(tiny_model().weights(), CONFIG)
    run = jax.jit(train_step, static_argnums=(0, 1, 2))
    text = run.lower(TINY, CONFIG, jnp.float32, state, jnp.zeros((2, 9), jnp.int32)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 3 * TINY.layers * 9
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_training_learns_a_text_by_heart():
    weights = tiny_model().weights()
    state = start(weights, CONFIG)
    tokens_BS = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab, (4, 17)), jnp.int32)
    run = jax.jit(train_step, static_argnums=(0, 1, 2), donate_argnums=3)
    losses = []
    for _ in range(CONFIG.steps):
        loss, state = run(TINY, CONFIG, jnp.float32, state, tokens_BS)
        losses.append(float(loss))
    assert losses[0] > 4
    assert losses[-1] < 1
    assert int(state.step) == CONFIG.steps


@given(st.integers(2, 81), st.integers(0, 300), st.integers(1, 300))
def test_held_out_windows_predict_every_token_once_after_half_a_context(context: int, before: int, held: int):
    first = context + 1 + before
    text = np.arange(first + held)
    windows, counted = held_out_windows(text, first, context)
    predicted = windows[:, 1:][counted]
    assert sorted(predicted) == list(range(first, first + held))
    index = np.broadcast_to(np.arange(context), counted.shape)[counted]
    assert (index + 1 >= context // 2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0: give at least 1"),
        ({"warmup_steps": 40}, "warmup_steps is 40: give at least 0, fewer than the 40 steps"),
        ({"dropout": 1.0}, "dropout is 1.0: give a share"),
        ({"held_out": -0.1}, "held_out is -0.1: give a share"),
        ({"context": 1}, "context is 1: give at least 2"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0: give a positive number"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0: give a positive number"),
    ],
)
def test_a_run_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**vars(CONFIG), **change})


SMALL_RUN = """
text = "scripts/data/kjv.txt"
[model]
layers = 1
width = 16
heads = 2
kv_heads = 1
head_width = 8
ff_width = 24
vocab = 256
max_positions = 32
tied_head = true
tokenizer = "bytes"
[train]
steps = 4
warmup_steps = 1
batch = 2
context = 32
held_out = 0.0002
eval_every = 2
"""


def train(config: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "train.py", "--config", config, "--out", out]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def test_the_script_trains_a_folder_that_loads(tmp_path: Path):
    (tmp_path / "run.toml").write_text(SMALL_RUN)
    done = train(tmp_path / "run.toml", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4]
    assert all(0 < entry["held_out_bits_per_byte"] < 10 for entry in log)
    assert load(tmp_path / "out", make_mesh()).config.vocab == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 4", "steps = 4\ndepth = 2"), "unknown key 'depth'"),
        (("batch = 2", ""), "[train]: 'batch' is missing"),
        (("context = 32", "context = 64"), "context 64 exceeds max_positions 32"),
        (("scripts/data/kjv.txt", "scripts/data/none.txt"), "none.txt"),
        (("heads = 2", "heads = ["), "run.toml is not TOML"),
        (("vocab = 256", "vocab = 64"), "this script trains on bytes: set tokenizer = 'bytes' and vocab = 256"),
        (('"scripts/data/kjv.txt"', "5"), "5"),
        (("held_out = 0.0002", "held_out = 0.0"), "of which 0 are held out, are too few"),
        (('tokenizer = "bytes"', "tokenizer = 3"), "tokenizer is 3: give a value of type str"),
        (("layers = 1", "layers = 1\nstop_ids = [256]"), "stop id 256 is outside of the vocabulary of 256"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_2(tmp_path: Path, change, message: str):
    (tmp_path / "run.toml").write_text(SMALL_RUN.replace(*change))
    done = train(tmp_path / "run.toml", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
