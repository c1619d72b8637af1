"""Training learns, says the same on every mesh, fits in a share of the memory, and goes on after anything."""

import dataclasses
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helix_jax.checkpoint import load
from helix_jax.training.checkpointer import Checkpointer
from helix_jax.config import ModelConfig
from helix_jax.layout import BlockLayout
from helix_jax.mesh import make_mesh
from helix_jax.training import (
    Batch,
    TrainConfig,
    TrainPlan,
    abstract_batch,
    abstract_state,
    shard_batch,
    eval_step,
    init_state,
    token_loss,
    train_step,
)
from helix_jax.training.state import make_optimizer
from helix_jax.training.step import _pieces
from tests.conftest import GOLDEN, ROOT
from tests.reference import TINY, naive_logits, plan_of, tiny_model
from tests.test_cli import ENVIRONMENT

CONFIG = TrainConfig(steps=50, batch=4, context=64, warmup_steps=5, learning_rate=1e-2)
MESHES = [(1, 2, 1), (1, 4, 1), (1, 8, 1), (2, 1, 1), (2, 2, 1), (2, 4, 1), (2, 2, 2)]


def run_on(tp=1, cp=1, dp=1, model=TINY, dtype="float32", documents=True, **changes) -> TrainPlan:
    config = dataclasses.replace(CONFIG, **changes)
    layout = BlockLayout(cp, 4, "striped")
    return TrainPlan(model, config, make_mesh(tp, cp, dp), layout, jnp.dtype(dtype), documents)


def packed(vocab: int = TINY.vocab):
    """Four sequences, two of them of several documents."""
    tokens = np.random.default_rng(0).integers(0, vocab, (4, 65))
    first = np.zeros((4, 64), int)
    first[1, 20:], first[2, 50:], first[2, 60:] = 20, 50, 60
    counted = np.concatenate([first[:, 1:] == first[:, :-1], np.ones((4, 1), bool)], 1)
    return tokens, first, counted


def gradients(run: TrainPlan, weights, batch: Batch):
    def loss(weights):
        part = jax.tree.map(lambda x: x[0], batch)
        return jnp.where(part.loss_mask_XBS, token_loss(run, weights, part), 0).sum()

    state = init_state(run, weights)
    return jax.tree.map(np.asarray, jax.block_until_ready(jax.jit(jax.grad(loss))(state.weights)))


def largest_error(found, expected) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs if b.any())


def losses(run: TrainPlan, weights, batch: Batch, steps: int) -> list[float]:
    state, found = init_state(run, weights), []
    for _ in range(steps):
        loss, state = train_step(run, state, batch)
        found.append(float(loss.nats))
    return found


@pytest.fixture(scope="module")
def alone():
    """Gradients and 50 steps on one device, by a matrix of all pairs where no documents are."""
    run, weights = run_on(), tiny_model().weights()
    batch = shard_batch(run, *packed())
    return gradients(run, weights, batch), losses(run, weights, batch, 50)


def test_the_loss_is_the_surprise_of_each_next_token_in_its_document():
    tokens, first, counted = packed()
    run, weights = run_on(), tiny_model().weights()
    found = np.asarray(eval_step(run, weights, shard_batch(run, tokens, first, counted, parts=0)))
    for row, start_at, end in [(0, 0, 64), (1, 0, 20), (1, 20, 64), (2, 50, 60)]:
        document = tokens[row, start_at : end + 1].tolist()
        logits = naive_logits(tiny_model(), [document], len(document))[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        learned = counted[row, start_at:end]
        expected = -logp[np.arange(end - start_at), document[1:]]
        np.testing.assert_allclose(found[row, start_at:end][learned], expected[learned], rtol=1e-5, atol=1e-5)
        assert learned.sum() >= end - start_at - 1


@pytest.mark.parametrize(("tp", "cp", "dp"), MESHES)
def test_gradients_and_losses_are_those_of_one_device(tp: int, cp: int, dp: int, alone):
    run, weights = run_on(tp, cp, dp), tiny_model().weights()
    batch = shard_batch(run, *packed())
    assert largest_error(gradients(run, weights, batch), alone[0]) < 1e-5
    steps = 50 if (tp, cp) in ((1, 8), (2, 4)) else 5
    assert np.abs(np.subtract(losses(run, weights, batch, steps), alone[1][:steps])).max() < 1e-4
    assert alone[1][-1] < 0.5 < 4 < alone[1][0]  # it learns them by heart


@pytest.mark.parametrize("change", [{"remat": False}, {"accumulate": 2}, {"batch": 4}])
def test_remat_parts_of_a_batch_and_pieces_of_logits_change_nothing(change, alone, monkeypatch):
    if "batch" in change:
        monkeypatch.setattr("helix_jax.training.step._LOGITS", 3 * 4 * TINY.vocab)
        assert _pieces(16, 4 * TINY.vocab) == 8  # of 2 slots: 3 do not divide 16
    run = run_on(1, 4, **change, seed=len(str(change)))  # a program of its own
    found = losses(run, tiny_model().weights(), shard_batch(run, *packed(), parts=run.config.accumulate), 5)
    assert np.abs(np.subtract(found, alone[1][:5])).max() < 1e-5


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_windows_sinks_latents_experts_and_norms_have_the_same_gradients(family: str):
    model = load(GOLDEN / family, plan_of(), jnp.float32)
    found = []
    for axes in ((1, 1), (2, 4)):
        run = run_on(*axes, model=model.config)
        found.append(gradients(run, model.weights(), shard_batch(run, *packed(model.config.vocab))))
    assert largest_error(found[1], found[0]) < 1e-5


def test_gradients_in_bfloat16_are_summed_in_float32(monkeypatch):
    """Over 512 lookups of each id, and 512 pieces of logits; in bfloat16 a sum stops growing at 256."""
    model = dataclasses.replace(TINY, vocab=16, layers=1)
    tokens = np.random.default_rng(0).integers(0, 16, (4, 2049))
    everything = tokens, np.zeros((4, 2048), int), np.ones((4, 2048), bool)
    weights, found = tiny_model(model).weights(), []
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr("helix_jax.training.step._LOGITS", 256)
        run = run_on(model=model, dtype=dtype, context=2048, documents=False)
        found.append(gradients(run, weights, shard_batch(run, *everything)))
    for name in ("embed_VD", "head_VD"):
        assert largest_error(found[1][name], found[0][name]) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_without_documents_a_gpu_attends_by_cudnn_and_has_the_same_gradients():
    model = dataclasses.replace(TINY, head_width=16)
    tokens, first, counted = packed()
    batch, weights, found = (tokens[:1], first[:1], counted[:1]), tiny_model(model).weights(), []
    for documents in (True, False):
        run = run_on(model=model, dtype="bfloat16", documents=documents)
        assert run.flash is not documents
        found.append(gradients(run, weights, shard_batch(run, *batch)))
    assert largest_error(found[1], found[0]) < 0.05


def test_dropout_is_a_function_of_seed_step_and_place():
    run, weights = run_on(1, 2, dropout=0.5), tiny_model().weights()
    batch = shard_batch(run, *packed())
    found = losses(run, weights, batch, 3)
    assert found == losses(run, weights, batch, 3)
    assert found != losses(run_on(1, 2, dropout=0.5, seed=1), weights, batch, 3)
    assert abs(found[0] - found[1]) > 1e-3  # the rate is 0 at first: other masks


def test_the_rate_warms_up_and_falls_matrices_alone_decay_and_gradients_are_clipped():
    optimizer = make_optimizer(CONFIG)
    weights = {name: jnp.ones((2, 2)) for name in ("embed_VD", "attention_norm_D", "q_bias_NH", "sink_N")}
    memory, rates = optimizer.init(weights), []
    for _ in range(CONFIG.steps):
        updates, memory = optimizer.update(jax.tree.map(jnp.zeros_like, weights), memory, weights)
        rates.append(-float(updates.pop("embed_VD")[0, 0]) / CONFIG.weight_decay)
        assert not any(update.any() for update in updates.values())
    np.testing.assert_allclose(rates[:6], np.linspace(0, CONFIG.learning_rate, 6), rtol=1e-5)
    turned = np.pi * np.arange(45) / 45
    np.testing.assert_allclose(rates[5:], CONFIG.learning_rate * (1 + np.cos(turned)) / 2, rtol=1e-4)
    _, memory = optimizer.update(jax.tree.map(lambda x: 100 * x, weights), optimizer.init(weights), weights)
    clipped = optax.tree.norm(optax.tree.get(memory, "mu")) / 0.1  # of the gradient a tenth is remembered
    np.testing.assert_allclose(clipped, CONFIG.clip_norm, rtol=1e-5)


def lowered(run: TrainPlan):
    return train_step.lower(run, abstract_state(run), abstract_batch(run))


def test_float32_training_asks_for_float32_products():
    text = lowered(run_on(1, 2)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > TINY.layers * 9
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_memory_falls_with_the_ranks_and_the_state_is_taken_over():
    model = ModelConfig(
        layers=2, width=64, heads=4, kv_heads=2, head_width=16, ff_width=128, vocab=256, max_positions=32768
    )
    found = {}
    for cp in (1, 4):
        found[cp] = lowered(run_on(1, cp, model=model, batch=1, context=32768)).compile().memory_analysis()
    assert found[1].temp_size_in_bytes >= 3.5 * found[4].temp_size_in_bytes
    assert found[1].alias_size_in_bytes >= 3.5 * found[4].alias_size_in_bytes  # each keeps its share of the state
    assert found[4].alias_size_in_bytes > 0.9 * (found[4].argument_size_in_bytes - 4 * 4 * 32768 // 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0: give at least 1"),
        ({"warmup_steps": 50}, "warmup_steps is 50: give at least 0, fewer than the 50 steps"),
        ({"dropout": 1.0}, "dropout is 1.0: give a share"),
        ({"held_out": -0.1}, "held_out is -0.1: give a share"),
        ({"context": 1}, "context is 1: give at least 2"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0: give a positive number"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0: give a positive number"),
        ({"seed": -1}, "seed is -1: give at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan: give 0 or a positive number"),
        ({"accumulate": 3}, "accumulate 3 does not divide the batch of 4: give a divisor"),
        ({"tp": 3}, "tp 3 does not divide the 16 heads: give a tp that does"),
        ({"cp": 3}, "64 positions are not a whole number of turns of 3 ranks with blocks of 4: give 60 or 72"),
        ({"dp": 2, "batch": 3}, "dp 2 does not divide the 3 sequences of a part of a batch"),
        ({"context": 8192}, "context 8192 exceeds max_positions 4096"),
    ],
)
def test_a_run_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run_on(**change)


# states ---------------------------------------------------------------------------------------------------------------


def harm(folder: Path) -> None:
    """Cuts every file in it in half."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        os.truncate(file, file.stat().st_size // 2)


def test_a_state_comes_back_on_another_mesh_and_a_harmed_one_is_passed_over(tmp_path: Path, caplog):
    run, elsewhere = run_on(1, 4), run_on(2, 2, 2)
    state = init_state(run, tiny_model().weights())
    states = Checkpointer(tmp_path / "states")
    assert states.restore(abstract_state(run)) is None
    for step in (3, 7):
        states.save(step, state._replace(step=state.step + step))
    states.finish()
    harm(tmp_path / "states" / "7")
    found = Checkpointer(tmp_path / "states").restore(abstract_state(elsewhere))
    assert found is not None
    assert (found[0], int(found[1].step)) == (3, 3)
    assert "state 7 in" in caplog.text
    assert "an earlier one is taken" in caplog.text
    for ours, back, like in zip(*map(jax.tree.leaves, (state, found[1], abstract_state(elsewhere))), strict=True):
        assert back.sharding == like.sharding
        if back.ndim:
            np.testing.assert_array_equal(ours, back)
    states.save(7, state)  # the harmed one is replaced
    states.finish()
    assert Checkpointer(tmp_path / "states").restore(abstract_state(run))[0] == 7  # pyright: ignore[reportOptionalSubscript]
    for step in ("3", "7"):
        harm(tmp_path / "states" / step)
    with pytest.raises(ValueError, match=r"none of the states \[7, 3\] in .* can be read: bring one back"):
        Checkpointer(tmp_path / "states").restore(abstract_state(run))


def test_a_state_in_which_anything_was_changed_is_passed_over(tmp_path: Path, caplog):
    kept = {"x": jnp.arange(10_000.0)}
    states = Checkpointer(tmp_path)
    states.save(3, kept)
    states.save(7, kept)
    states.finish()
    file = max((path for path in (tmp_path / "7").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    for at in np.linspace(0, len(whole) - 1, 12).astype(int):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        step, found = Checkpointer(tmp_path).restore(kept)  # pyright: ignore[reportGeneralTypeIssues]
        assert step in (3, 7)  # there are bytes that say nothing
        np.testing.assert_array_equal(found["x"], kept["x"])
    assert "its numbers are not those that were written" in caplog.text


# the script -----------------------------------------------------------------------------------------------------------

SMALL_RUN = """
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
steps = 80
warmup_steps = 1
batch = 2
context = 128
held_out = 0.0002
eval_every = 5
"""


def folder_of(tmp_path: Path, run: str = SMALL_RUN) -> Path:
    (tmp_path / "kjv.txt").symlink_to(ROOT / "scripts" / "data" / "kjv.txt")
    (tmp_path / "run.toml").write_text(run)
    return tmp_path


def command(folder: Path, out: str, *options: object) -> list[str]:
    script = [sys.executable, ROOT / "scripts" / "train.py", "--config", folder / "run.toml", "--out", folder / out]
    return [*map(str, script), *map(str, options)]


def train(folder: Path, out: str = "out", *options: object) -> subprocess.CompletedProcess:
    run = command(folder, out, *options)
    return subprocess.run(run, capture_output=True, text=True, cwd="/", env=ENVIRONMENT, check=False)


def curve(folder: Path) -> dict[int, float]:
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    return {entry["step"]: entry["nats"] for entry in map(json.loads, lines) if "nats" in entry}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run that nothing stopped."""
    folder = folder_of(tmp_path_factory.mktemp("train"))
    done = train(folder, "whole", "--cp", 2)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_script_trains_a_folder_that_loads(trained: Path):
    log = [json.loads(line) for line in (trained / "whole" / "train_log.jsonl").read_text().splitlines()]
    held_out = [entry for entry in log if "held_out_nats" in entry]
    assert [entry["step"] for entry in held_out] == list(range(5, 81, 5))
    assert held_out[-1]["held_out_tokens"] == int(4404412 * 0.0002)
    assert held_out[-1]["held_out_bits_per_byte"] < 7 < held_out[0]["held_out_bits_per_byte"] + 1
    assert sorted(curve(trained / "whole")) == list(range(1, 81))
    assert load(trained / "whole" / "model", plan_of()).config.vocab == 256


def test_a_model_that_was_trained_is_read_by_transformers_and_trained_on(trained: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    folder = folder_of(tmp_path, SMALL_RUN.split("[model]")[0] + "[train]" + SMALL_RUN.split("[train]")[1])
    (folder / "more" / "states").mkdir(parents=True)  # of a run that was stopped before its first state
    done = train(folder, "more", "--init", trained / "whole" / "model")
    assert done.returncode == 0, done.stderr
    assert curve(folder / "more")[2] < curve(trained / "whole")[2] - 1
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(folder / "more" / "model").num_hidden_layers == 1


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_comes_to_the_same_bits(trained: Path, kills: int):
    chance, out = random.Random(kills), f"killed{kills}"
    began = time.monotonic()
    assert train(trained, f"timed{kills}", "--cp", 2).returncode == 0
    whole_s = time.monotonic() - began
    for _ in range(kills):
        with subprocess.Popen(command(trained, out, "--cp", 2), stderr=subprocess.DEVNULL, env=ENVIRONMENT) as run:
            time.sleep(chance.uniform(0.3, 1.1) * whole_s)
            run.send_signal(signal.SIGKILL)
    done = train(trained, out, "--cp", 2)
    assert done.returncode == 0, done.stderr
    assert curve(trained / out) == curve(trained / "whole")
    ours, theirs = (trained / name / "model" / "model.safetensors" for name in (out, "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_ctrl_c_says_how_to_go_on_and_the_mesh_may_change(trained: Path):
    with subprocess.Popen(command(trained, "stopped"), stderr=subprocess.PIPE, env=ENVIRONMENT, text=True) as run:
        log = trained / "stopped" / "train_log.jsonl"
        while not (log.exists() and len(log.read_bytes().splitlines()) > 13):
            assert run.poll() is None
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "the same command goes on from the last state saved" in errors
    assert "Traceback" not in errors
    done = train(trained, "stopped", "--cp", 4, "--dp", 2)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stderr
    ours, theirs = curve(trained / "stopped"), curve(trained / "whole")
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-4


def test_a_full_disk_is_said_and_what_was_saved_stays(tmp_path: Path, monkeypatch):
    run = run_on()
    state = init_state(run, tiny_model().weights())
    states = Checkpointer(tmp_path)
    states.save(3, state)
    states.finish()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
    message = (
        r"cannot be written to '.*' \(it has 0.5 MB, and 0.1 MB are free\): make room and run the same command again"
    )
    with pytest.raises(OSError, match=message):
        states.save(7, state)
    assert Checkpointer(tmp_path).restore(abstract_state(run))[0] == 3  # pyright: ignore[reportOptionalSubscript]


FILES_OF_A_KILOBYTE = """
import pathlib, resource, sys
import jax.numpy as jnp
from helix_jax.training.checkpointer import Checkpointer
states = Checkpointer(pathlib.Path(sys.argv[1]))
states.save(3, {"x": jnp.arange(10.0)})
states.finish()
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    states.save(7, {"x": jnp.arange(10_000) ** 2.0})
    states.finish()
except OSError as error:
    print(error)
states.close()
print(Checkpointer(pathlib.Path(sys.argv[1])).restore({"x": jnp.zeros(10)}))
"""


def test_a_state_that_the_system_stops_in_its_midst_is_said_and_the_one_before_stays(tmp_path: Path):
    run = [sys.executable, "-c", FILES_OF_A_KILOBYTE, str(tmp_path)]  # orbax's threads tell of it at length on stderr
    done = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False)
    said, found = done.stdout.splitlines()
    assert "cannot be written" in said
    assert "make room and run the same command again" in said
    assert found.startswith("(3, {'x': Array([0., 1.")


def test_the_folder_of_another_run_is_left_alone(trained: Path, tmp_path: Path):
    folder = folder_of(tmp_path, SMALL_RUN.replace("width = 16", "width = 32"))
    done = train(folder, str(trained / "whole"))
    assert done.returncode == 2
    assert "is of a run with model width 16, not 32: choose another --out" in done.stderr
    (folder / "run.toml").write_text(SMALL_RUN.replace("steps = 80", "steps = 20"))
    assert "is of a run with train steps 80, not 20" in train(folder, str(trained / "whole"), "--cp", 2).stderr
    with (trained / "whole" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process trains in" in train(trained, "whole", "--cp", 2).stderr


def test_nothing_need_be_held_out_a_tokenizer_comes_along_and_a_text_that_grew_is_another(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"in": 0, "the": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "words.txt").write_text("in the beginning " * 100)
    changes = {"kjv.txt": "words.txt", "passkeys = 0.5": "", 'tokenizer = "bytes"': "", "0.0002": "0.0", "= 80": "= 6"}
    run = SMALL_RUN
    for was, now in changes.items():
        run = run.replace(was, now)
    folder = folder_of(tmp_path, run)
    done = train(folder)
    assert done.returncode == 0, done.stderr
    assert "step 6 of 6" not in done.stderr
    assert sorted(curve(folder / "out")) == list(range(1, 7))
    assert (folder / "out" / "curve.png").stat().st_size > 1000
    assert (folder / "out" / "model" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    (folder / "words.txt").write_text("in the beginning " * 101)
    assert "is of a run with data tokens 300, not 303" in train(folder).stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 80", "steps = 80\ndepth = 2"), "unknown key 'depth'"),
        (("batch = 2", ""), "[train]: 'batch' is missing"),
        (("context = 128", "context = 256"), "context 256 exceeds max_positions 128"),
        (("kjv.txt", "none.txt"), "none.txt"),
        (("heads = 2", "heads = ["), "run.toml is not TOML"),
        (("vocab = 256", "vocab = 64"), "is outside of the model's vocabulary of 64"),
        (('["kjv.txt"]', "5"), "files is 5"),
        (("held_out = 0.0002", "held_out = 0.99999"), "too few for one sequence of 128"),
        (('tokenizer = "bytes"', "tokenizer = 3"), "tokenizer is 3: give a value of type str"),
        (('tokenizer = "bytes"', ""), "the model has no tokenizer: set tokenizer = 'bytes'"),
        (("layers = 1", "layers = 1\neos_token_ids = [256]"), "token id 256 is outside the vocabulary of 256"),
        (("[train]", "[training]"), "unknown key 'training'"),
        (("layers = 1", "layers = 1\nqk_norm = true"), "a 'llama' folder cannot say qk_norm"),
        (('[data]\nfiles = ["kjv.txt"]\npasskeys = 0.5', "data = 5"), "'data' is 5: give a table, [data]"),
        (("passkeys = 0.5", "passkeys = 2.0"), "passkeys is 2.0: give a share from 0 to 1"),
        (("context = 128", "context = 120"), "120 positions are not a whole number of turns of 1 ranks"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_2(tmp_path: Path, change, message: str):
    folder = folder_of(tmp_path, SMALL_RUN.replace(*change))
    done = train(folder)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not (folder / "out").exists()


def test_a_run_that_leads_nowhere_ends_and_no_such_state_is_saved(tmp_path: Path):
    folder = folder_of(tmp_path, SMALL_RUN.replace("steps = 80", "steps = 80\nlearning_rate = 1e30"))
    done = train(folder)
    assert done.returncode == 2
    assert "lower learning_rate" in done.stderr.splitlines()[-1]
    assert list((folder / "out" / "states").iterdir()) == []
