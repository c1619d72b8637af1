"""The demo model gives the logits that Hugging Face transformers computes from its folder (scripts/make_golden.py)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.checkpoint import load
from helix_jax.engine import SamplingParams
from helix_jax.generation import make_engine
from helix_jax.mesh import make_mesh
from helix_jax.sampling import MAX_LOGPROBS
from helix_jax.text import ByteTokenizer
from helix_jax.training import BITS_PER_NAT, TrainPlan, eval_step, shard_batch
from helix_jax.training.data import held_out_windows, open_corpus, slice_sequences
from tests.conftest import ROOT
from tests.reference import naive_logits, plan_of

DEMO = ROOT / "helix_jax" / "demo"


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "demo.npz")


def test_logits_equal_those_of_transformers(golden):
    model = load(DEMO, plan_of(), jnp.float32)
    ours = naive_logits(model, [golden["tokens"].tolist()], len(golden["tokens"]))[0, :: int(golden["stride"])]
    assert np.abs(ours - golden["logits"]).max() <= 2e-4


@pytest.mark.optimized
@pytest.mark.parametrize(("tp", "cp"), [(1, 8), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_sharded_log_probabilities_and_greedy_tokens_equal_those_of_transformers(tp: int, cp: int, golden):
    plan = plan_of(tp, cp)
    model = load(DEMO, plan, jnp.float32)
    tokens, stride = golden["tokens"].tolist(), int(golden["stride"])
    indices = (1, 40, len(golden["logits"]) - 1)
    prompts = [*(tokens[: index * stride + 1] for index in indices), tokens]
    first = SamplingParams(max_new_tokens=1, logprobs=MAX_LOGPROBS)
    greedy = SamplingParams(max_new_tokens=len(golden["greedy"]), ignore_eos=True)
    engine = make_engine(model, prompts, plan, greedy, chunk=64)
    *outputs, whole = engine.generate(prompts, [first] * len(indices) + [greedy])
    for index, output in zip(indices, outputs, strict=True):
        [(_, top)] = output.logprobs
        ids, logprobs = zip(*top, strict=True)
        expected = golden["logits"][index].astype(np.float64)
        expected -= np.log(np.exp(expected - expected.max()).sum()) + expected.max()
        assert np.abs(np.array(logprobs) - expected[list(ids)]).max() <= 2e-4
    assert list(whole.tokens) == golden["greedy"].tolist()


def test_the_demo_model_is_small_and_its_log_reaches_the_published_loss():
    assert (DEMO / "model.safetensors").stat().st_size <= 16_000_000
    last = json.loads((DEMO / "train_log.jsonl").read_text().splitlines()[-1])
    assert last["held_out_bits_per_byte"] <= 1.65


@pytest.mark.optimized
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("share", "context"), [(0.01, 2048), pytest.param(1.0, 8192, marks=pytest.mark.slow)])
def test_the_demo_weights_predict_the_held_out_text(share: float, context: int):
    """Evaluate in float32: the end of the held-out text in the fast tier, all of it in the long one."""
    held_out = 0.05 * share
    corpus = open_corpus([ROOT / "scripts" / "data" / "kjv.txt"], ByteTokenizer(), 256, held_out)
    starts, counted = held_out_windows(corpus, context)
    model = load(DEMO, plan_of(), jnp.float32)
    plan = TrainPlan(model.config, make_mesh(1, 1), packed=False)
    total = 0.0
    for start, mask in zip(starts, counted, strict=True):
        batch = shard_batch(plan, slice_sequences(corpus, start[None], context), parts=0)
        total += float(np.asarray(eval_step(plan, model.weights(), batch))[0][mask].sum())
    bits_per_byte = total * BITS_PER_NAT / counted.sum()
    assert counted.sum() == int(4404412 * held_out)
    assert bits_per_byte <= 1.65
