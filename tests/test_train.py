"""The train step: losses, gradients and updates equal those of one device, in a share of its memory; and `fit`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helix_jax import mesh, training
from helix_jax.checkpoint import load
from helix_jax.config import ModelConfig
from helix_jax.training import (
    Sequences,
    abstract_batch,
    abstract_state,
    eval_step,
    fit,
    make_optimizer,
    shard_batch,
    train_step,
)
from helix_jax.training.step import _num_chunks
from tests.conftest import GOLDEN
from tests.reference import TINY, naive_logits, plan_of, tiny_model
from tests.training_cases import (
    CONFIG,
    gradients_alone,
    largest_error,
    losses_and_gradients,
    packed_sequences,
    train_plan,
)

FAST_CASES = [(2, 2, 2, 10)]  # tp, cp, dp, steps
SLOW_CASES = [(2, 4, 1, 50), (1, 2, 1, 50), (1, 4, 1, 50), (1, 8, 1, 50), (2, 1, 1, 50), (2, 2, 1, 50)]
ONE_CHANGE = [{"remat": False}, {"accumulate": 2}, {"batch": 4}]


@pytest.fixture(scope="module")
def one_device():
    """The losses of 50 steps and the first gradient on one device."""
    return losses_and_gradients(train_plan(), tiny_model().weights(), packed_sequences(), 50)


def test_the_loss_is_the_cross_entropy_of_each_next_token_in_its_document():
    tokens, start, mask = packed_sequences()
    plan, weights = train_plan(), tiny_model().weights()
    loss = np.asarray(eval_step(plan, weights, shard_batch(plan, Sequences(tokens, start, mask), parts=0)))
    for row, first, end in [(0, 0, 64), (1, 0, 20), (1, 20, 64), (2, 50, 60)]:
        document = tokens[row, first : end + 1].tolist()
        logits = naive_logits(tiny_model(), [document], 65)[0, : end - first].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        counts = mask[row, first:end]
        expected = -logp[np.arange(end - first), document[1:]]
        np.testing.assert_allclose(loss[row, first:end][counts], expected[counts], rtol=1e-5, atol=1e-5)
        assert counts.sum() >= end - first - 1


@pytest.mark.parametrize(
    ("tp", "cp", "dp", "steps"), [*FAST_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_gradients_and_losses_equal_those_of_one_device(tp: int, cp: int, dp: int, steps: int, one_device):
    losses, gradients = losses_and_gradients(train_plan(tp, cp, dp), tiny_model().weights(), packed_sequences(), steps)
    expected_losses, expected_gradients = one_device
    assert largest_error(gradients, expected_gradients) < 1e-5
    assert np.abs(np.subtract(losses, expected_losses[:steps])).max() < 1e-4
    assert expected_losses[-1] < 0.5 < 4 < expected_losses[0]  # the sequences are learned by heart


@pytest.mark.parametrize(
    "change",
    [
        {"remat": False, "accumulate": 2, "batch": 4},
        *(pytest.param(change, marks=pytest.mark.slow) for change in ONE_CHANGE),
    ],
    ids=lambda change: "-".join(change),
)
def test_remat_accumulation_and_chunks_of_logits_change_nothing(change, one_device, monkeypatch):
    if "batch" in change:
        monkeypatch.setattr("helix_jax.training.step._MAX_LOGITS", 3 * 4 * TINY.vocab)
        assert _num_chunks(16, 4 * TINY.vocab) == 8  # of 2 slots, because 3 do not divide 16
    plan = train_plan(1, 4, **change, seed=len(str(change)))  # the seed makes it a program of its own
    losses, _ = losses_and_gradients(plan, tiny_model().weights(), packed_sequences(), 3)
    assert np.abs(np.subtract(losses, one_device[0][:3])).max() < 1e-5


IN_LONG_TIER = ("deepseek_v3", "gemma3_text", "olmo3", "qwen2_moe", "glm4")


@pytest.mark.parametrize("family", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in IN_LONG_TIER)])
def test_windows_sinks_latents_experts_and_norms_have_the_same_gradients(family: str):
    model = load(GOLDEN / family, plan_of(), jnp.float32)
    one, eight = (
        gradients_alone(train_plan(*axes, model=model.config), model.weights(), packed_sequences(model.config.vocab))
        for axes in ((1, 1), (2, 4))
    )
    assert largest_error(eight, one) < 1e-5


@pytest.mark.slow
def test_gradients_in_bfloat16_are_summed_in_float32(monkeypatch):
    """512 lookups of each id, and 512 chunks of logits: in bfloat16 a sum stops growing at 256."""
    model = dataclasses.replace(TINY, vocab=8, layers=1)
    tokens = np.random.default_rng(0).integers(0, 8, (4, 1025))
    sequences = Sequences(tokens, np.zeros((4, 1024), int), np.ones((4, 1024), bool))
    monkeypatch.setattr("helix_jax.training.step._MAX_LOGITS", 64)
    assert _num_chunks(1024, 4 * 8) == 512
    exact, rounded = (
        gradients_alone(
            train_plan(model=model, dtype=dtype, context=1024, packed=False), tiny_model(model).weights(), sequences
        )
        for dtype in ("float32", "bfloat16")
    )
    for name in ("embed_VD", "head_VD"):
        assert largest_error(rounded[name], exact[name]) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_without_packing_a_gpu_uses_cudnn_and_has_the_same_gradients():
    model = dataclasses.replace(TINY, head_width=16)
    sequences = Sequences(*(x[:1] for x in packed_sequences()))
    gradients = []
    for packed in (True, False):
        plan = train_plan(model=model, dtype="bfloat16", packed=packed)
        assert plan.uses_cudnn is not packed
        gradients.append(gradients_alone(plan, tiny_model(model).weights(), sequences))
    assert largest_error(gradients[1], gradients[0]) < 0.05


@pytest.mark.slow
def test_dropout_depends_on_seed_step_and_place():
    config = dataclasses.replace(TINY, layers=1)

    def losses(**changes):
        plan = train_plan(1, 2, model=config, dropout=0.5, **changes)
        return losses_and_gradients(plan, tiny_model(config).weights(), packed_sequences(), 2)[0]

    first = losses()
    assert first == losses()
    assert first != losses(seed=1)
    assert abs(first[0] - first[1]) > 1e-3  # the learning rate is still 0: only the masks differ


def test_the_learning_rate_warms_up_and_decays_only_matrices_decay_and_gradients_are_clipped():
    optimizer = make_optimizer(CONFIG)
    weights = {name: jnp.ones((2, 2)) for name in ("embed_VD", "attention_norm_D", "q_bias_NH", "sink_N")}
    state, rates = optimizer.init(weights), []
    update = jax.jit(optimizer.update)
    for _ in range(CONFIG.steps):
        updates, state = update(jax.tree.map(jnp.zeros_like, weights), state, weights)
        rates.append(-float(updates.pop("embed_VD")[0, 0]) / CONFIG.weight_decay)
        assert not any(values.any() for values in updates.values())
    np.testing.assert_allclose(rates[:6], np.linspace(0, CONFIG.learning_rate, 6), rtol=1e-5)
    angle = np.pi * np.arange(45) / 45
    np.testing.assert_allclose(rates[5:], CONFIG.learning_rate * (1 + np.cos(angle)) / 2, rtol=1e-4)
    _, state = update(jax.tree.map(lambda x: 100 * x, weights), optimizer.init(weights), weights)
    clipped = optax.tree.norm(optax.tree.get(state, "mu")) / 0.1  # the first moment is a tenth of the gradient
    np.testing.assert_allclose(clipped, CONFIG.clip_norm, rtol=1e-5)


def lowered_step(plan, batch: int = 4, context: int = 64):
    optimizer = make_optimizer(CONFIG)
    return train_step.lower(
        plan, optimizer, None, abstract_state(plan, optimizer), abstract_batch(plan, batch, context)
    )


def test_float32_training_uses_float32_products():
    text = lowered_step(train_plan(1, 2)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > TINY.layers * 9
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.optimized
def test_memory_falls_with_the_ranks_and_the_state_is_donated():
    model = ModelConfig(
        layers=2, width=64, heads=4, kv_heads=2, head_width=16, ff_width=128, vocab=256, max_positions=32768
    )
    memory = {}
    for cp in (1, 4):
        plan = train_plan(1, cp, model=model, batch=1, context=32768)
        memory[cp] = lowered_step(plan, 1, 32768).compile().memory_analysis()
    assert memory[1].temp_size_in_bytes >= 3.5 * memory[4].temp_size_in_bytes
    assert memory[1].alias_size_in_bytes >= 3.5 * memory[4].alias_size_in_bytes  # each rank stores its share
    assert memory[4].alias_size_in_bytes > 0.9 * (memory[4].argument_size_in_bytes - 4 * 4 * 32768 // 4)


def test_small_parameters_are_copied(monkeypatch):
    monkeypatch.setattr(mesh, "_LEAST_TO_SPLIT", 2**16)
    on = plan_of(2, 2, 2).mesh
    split, copied = (mesh.stored_sharding(on, "q_DNH", (width, 8, 32)) for width in (256, 252))
    assert split.shard_shape((256, 8, 32)) == (64, 4, 32)
    assert copied.shard_shape((252, 8, 32)) == (252, 4, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0: give at least 1"),
        ({"warmup_steps": 50}, "warmup_steps is 50: give at least 0 and fewer than 50 steps"),
        ({"dropout": 1.0}, "dropout is 1.0: give a fraction"),
        ({"held_out": -0.1}, "held_out is -0.1: give a fraction"),
        ({"context": 1}, "context is 1: give at least 2"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0: give a positive number"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0: give a positive number"),
        ({"seed": -1}, "seed is -1: give at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan: give 0 or a positive number"),
        ({"accumulate": 3}, "accumulate 3 does not divide the batch of 4: give a divisor"),
        ({"tp": 3}, "tp 3 does not divide the 16 heads: choose a tp that does"),
        ({"cp": 3}, "64 positions are not a multiple of 3 ranks x blocks of 4: give 60 or 72"),
        ({"dp": 2, "batch": 3}, "dp 2 does not divide the 3 sequences of a part of a batch"),
        ({"context": 8192}, "context 8192 exceeds max_positions 4096"),
    ],
)
def test_an_impossible_plan_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train_plan(**change)


# fit ------------------------------------------------------------------------------------------------------------------


def batches():
    while True:
        yield packed_sequences()


def test_fit_equals_the_steps_of_a_run_and_continues_from_a_state(one_device):
    plan, optimizer, seen = train_plan(), make_optimizer(CONFIG), []
    model = tiny_model()
    trained = fit(
        model, batches(), optimizer, steps=3, plan=plan, on_step=lambda step, metrics, _: seen.append((step, metrics))
    )
    assert [step for step, _ in seen] == [1, 2, 3]
    np.testing.assert_allclose([float(metrics.loss) for _, metrics in seen], one_device[0][:3], rtol=1e-6)
    assert trained.config == model.config
    assert largest_error(trained.weights(), model.weights()) > 1e-3
    states = []
    fit(
        model,
        batches(),
        optimizer,
        steps=2,
        plan=plan,
        on_step=lambda *step: states.append(jax.tree.map(jnp.copy, step[2])),
    )
    again = fit(model, batches(), optimizer, steps=3, plan=plan, state=states[-1])
    assert largest_error(again.weights(), trained.weights()) == 0


def test_fit_takes_a_config_plain_arrays_another_optimizer_and_another_loss():
    config, seen = dataclasses.replace(TINY, layers=1), []
    tokens = np.random.default_rng(0).integers(0, config.vocab, (4, 65))

    def loss(logits_BSV, targets_BS, loss_mask_BS):
        nats = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, targets_BS)
        return jnp.where(loss_mask_BS, nats, 0).sum() / loss_mask_BS.sum()

    def losses(mesh, loss):
        seen.clear()
        optimizer = optax.sgd(0.1)
        fit(
            config,
            [tokens] * 3,
            optimizer,
            loss=loss,
            plan=train_plan(*mesh, model=config, packed=False),
            on_step=lambda step, metrics, state: seen.append(float(metrics.loss)),
        )
        return list(seen)

    expected = losses((1, 1), None)
    assert expected[2] < expected[0]
    np.testing.assert_allclose(losses((1, 4), loss), expected, rtol=1e-5)  # positions are in their natural order


def test_all_steps_run_one_program():
    """Random weights and hyperparameters in the optimizer's state have weak types, unlike the results of a step."""
    config, optimizer = dataclasses.replace(TINY, layers=1), optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
    before = train_step._cache_size()
    fit(config, [packed_sequences()] * 3, optimizer, plan=train_plan(1, 2, model=config))
    assert train_step._cache_size() == before + 1


def test_fit_warns_when_the_batches_end_early(caplog):
    fit(TINY, [packed_sequences()], make_optimizer(CONFIG), steps=3, plan=train_plan())
    assert "the batches ended after step 1: 3 steps were requested" in caplog.text


TOKENS = np.zeros((4, 65), np.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "llama"}, TypeError, "model"),
        ({"optimizer": "adamw"}, TypeError, "optimizer"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": [TOKENS[0]]}, ValueError, r"a batch has shape \(65,\)"),
        ({"batches": [TOKENS.astype(float)]}, TypeError, "a batch has dtype float64: give an integer array"),
        ({"batches": [TOKENS[:3]], "dp": 2}, ValueError, "dp 2 does not divide the 3 sequences"),
        ({"batches": [TOKENS + 61]}, ValueError, "token id 61 is outside the vocabulary of 61"),
        ({"batches": [TOKENS - 1]}, ValueError, "token id -1 is outside the vocabulary of 61"),
        ({"batches": [TOKENS[:, :-1]]}, ValueError, "63 positions are not a multiple of 1 ranks x blocks of 4"),
        ({"steps": 0}, ValueError, "steps is 0: give at least 1"),
        (
            {"loss": lambda logits, targets, mask: mask},
            ValueError,
            r"the loss returned .*shape=\(4, 64\).*: return a scalar",
        ),
        ({"model": dataclasses.replace(TINY, layers=1)}, ValueError, "plan.model differs from the config"),
    ],
)
def test_a_wrong_use_of_fit_is_refused(arguments, error, message):
    given = {"model": TINY, "batches": [TOKENS], "optimizer": optax.sgd(0.1)} | arguments
    plan = train_plan(dp=given.pop("dp", 1))
    with pytest.raises(error, match=message):
        training.fit(given.pop("model"), given.pop("batches"), given.pop("optimizer"), plan=plan, **given)
