"""Wrong uses of the Python API: each raises an error of one line that names the value and what to do instead.

The checks of annotations that beartype makes in other tests are off, as for users. Nothing is compiled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import helix_jax as hx
from helix_jax.training import Sequences, TrainPlan, fit
from tests.reference import BYTES, TINY, plan_of, tiny_model

TYPE, VALUE = TypeError, ValueError


@pytest.fixture(params=[True, False], ids=["unchecked", "beartype"])
def annotations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the checks of annotations off, or leave them on if beartype is installed."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", request.param)


@pytest.fixture
def no_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def assert_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Check the type of an error, that it is one line `what is wrong: what to do`, and a part of this line."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert message in text
    assert type(caught.value) is error
    assert "\n" not in text
    assert all(part.strip() for part in text.rsplit(":", 1))
    assert len(text) < 400


# helix_attention: 2 rows of 3 new tokens, 8 query and 2 key/value heads of width 8, on tp 2 x cp 4

Q, KV = np.ones((2, 3, 8, 8), np.float32), np.ones((2, 3, 2, 8), np.float32)


def attention_arguments() -> dict[str, Any]:
    plan = plan_of(2, 4)
    cache, rows = hx.make_cache(plan, hx.CacheSpec(2, 2, 8, jnp.float32), [5, 5], [40, 40], page=4)
    count_B = jnp.array([3, 2])
    return {"plan": plan, "cache": cache, "q": Q, "k": KV, "v": KV, "rows": rows, "count_B": count_B, "scale": 0.5}


def with_rows(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: {"rows": given["rows"]._replace(**changes)}


def made_for(tp: int, cp: int, kv_heads: int = 2, k: np.ndarray = KV, **options: Any) -> Callable[..., dict[str, Any]]:
    """Return a function that makes another cache. It needs devices, which are not there while tests are collected."""
    spec = hx.CacheSpec(2, kv_heads, 8, jnp.float32, **options)
    return lambda given: {"cache": hx.make_cache(plan_of(tp, cp), spec, [5, 5], [40, 40])[0], "k": k}


def without_pages(given: dict[str, Any]) -> dict[str, Any]:
    [table_RBM] = given["rows"].tables_RBM
    return {"rows": given["rows"]._replace(tables_RBM=(table_RBM.at[0, 1, 0].set(-1),))}


@pytest.mark.usefixtures("annotations")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda given: {"plan": given["plan"].mesh}, TYPE, "plan is a Mesh: give a helix_jax.Plan"),
        (lambda given: {"cache": (given["cache"],)}, TYPE, "cache is a tuple: give a helix_jax.KVCache"),
        (lambda given: {"rows": tuple(given["rows"])}, TYPE, "rows is a tuple: give a helix_jax.Rows"),
        ({"q": Q.tolist()}, TYPE, "q_BTNH is a list: give an array"),
        ({"q": Q.astype(int)}, TYPE, "q_BTNH has type int64: give floating-point numbers"),
        ({"k": KV > 0}, TYPE, "k_BTKH has type bool: give floating-point numbers"),
        ({"q": Q[0]}, VALUE, "q_BTNH has shape [3, 8, 8]: give 4 dimensions, [B, T, N, H]"),
        ({"q": Q[:, :0], "k": KV[:, :0]}, VALUE, "q_BTNH has shape [2, 0, 8, 8]: give at least one row and one new"),
        ({"q": Q[..., :4]}, VALUE, "q_BTNH has heads of width 4, but the cache stores 8: give 8"),
        ({"k": KV[..., :4]}, VALUE, "k_BTKH has heads of width 4, but the cache stores 8: give 8"),
        ({"k": KV[:1]}, VALUE, "q_BTNH has 2 rows of 3 new tokens, but k_BTKH has 1 of 3: give the keys of the same"),
        ({"k": KV[:, :2]}, VALUE, "q_BTNH has 2 rows of 3 new tokens, but k_BTKH has 2 of 2: give the keys of the"),
        ({"k": KV[:, :, :1]}, VALUE, "there are 1 key/value heads, but with tp 2 the cache stores 2: give 2"),
        ({"v": KV[..., :4]}, VALUE, "v_BTKH has shape [2, 3, 2, 4], but k_BTKH has [2, 3, 2, 8]: give both the same"),
        ({"v": None}, VALUE, "v_BTKH is None, but the cache stores keys and values: give both"),
        ({"q": Q[:, :, :7]}, VALUE, "tp 2 does not divide the 7 query heads: choose a tp that does"),
        (made_for(2, 4, 6, np.tile(KV, (1, 1, 3, 1))), VALUE, "8 query heads for 6 key/value heads: give a"),
        (made_for(4, 2), VALUE, "there are 2 key/value heads, but with tp 2 the cache stores 4: give 4"),
        (made_for(1, 8), VALUE, "the cache is on a mesh of dp 1 x tp 1 x cp 8, but the plan's has dp 1 x tp 2 x cp 4"),
        ({"count_B": [3, 2]}, TYPE, "count_B is a list: give an array"),
        ({"count_B": jnp.array([3.0, 2])}, TYPE, "count_B has type float32: give integers, such as int32"),
        ({"count_B": jnp.array([3])}, VALUE, "count_B has shape [1]: give [2], one for each row of q_BTNH"),
        ({"count_B": jnp.array(3)}, VALUE, "count_B has shape []: give 1 dimensions, [B]"),
        ({"count_B": jnp.array([3, 4])}, VALUE, "count_B of row 1 is 4, but there are 3 new tokens: give at most that"),
        ({"count_B": jnp.array([-1, 3])}, VALUE, "count_B of row 0 is -1: give 0 or more"),
        (with_rows(length_B=jnp.array([0, -2])), VALUE, "length_B of row 1 is -2: give 0 or more"),
        (with_rows(length_B=jnp.array([0.0, 2])), TYPE, "length_B has type float32: give integers"),
        (with_rows(prompt_len_B=jnp.array([5])), VALUE, "prompt_len_B has shape [1]: give [2]"),
        (with_rows(length_B=jnp.array([0, 90])), VALUE, "row 1: length 90 with 2 new tokens needs 37 slots on rank 0"),
        (without_pages, VALUE, "row 1: length 0 with 2 new tokens needs 2 slots on rank 0 of cp, but its pages there"),
        (with_rows(tables_RBM=()), VALUE, "group is 0, but rows have page tables for 0"),
        (with_rows(tables_RBM=(jnp.zeros((8, 2, 3), int),)), VALUE, "have shape [8, 2, 3]: give [4, 2, M] for cp 4"),
        ({"layer": 2}, VALUE, "layer is 2: give 0 to 1, as the cache has 2"),
        ({"layer": jnp.array(-1)}, VALUE, "layer is -1: give 0 to 1"),
        ({"layer": 1.0}, TYPE, "layer is 1.0: give a whole number"),
        ({"layer": jnp.array(1.0)}, TYPE, "layer has type float32: give an integer"),
        ({"layer": jnp.array([0, 1])}, VALUE, "layer has shape [2]: give one number"),
        ({"group": 1}, VALUE, "group is 1, but rows have page tables for 1: give 0 to 0"),
        ({"window": 0}, VALUE, "window is 0: give at least 1"),
        ({"window": 2.5}, TYPE, "window is 2.5: give a whole number"),
        ({"scale": 0}, VALUE, "scale is 0: give a positive number"),
        ({"scale": "0.5"}, TYPE, "scale is '0.5': give a number"),
        ({"v_width": 4}, VALUE, "v_width is 4, but v_BTKH has the values: leave v_width out"),
        (
            made_for(1, 8, 1, KV[:, :, :1], latent=True),
            VALUE,
            "v_BTKH is an array, but the cache stores latents",
        ),
        ({"sink_N": jnp.ones(4)}, VALUE, "sink_N has shape [4]: give [8], one for each head of the output"),
    ],
)
def test_a_wrong_use_of_helix_attention(change, error, message):
    given = attention_arguments()
    given |= change(given) if callable(change) else change
    arrays = [given.pop(name) for name in ("plan", "cache", "q", "k", "v", "rows", "count_B")]
    assert_refused(lambda: hx.helix_attention(*arrays, **given), error, message)


# Models


class Given(NamedTuple):
    """What the calls below use: a byte model on a mesh, and its folder."""

    plan: hx.Plan
    model: hx.Transformer
    folder: Path
    engine: hx.Engine


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    plan, folder = plan_of(1, 2), tmp_path_factory.mktemp("misuse")
    model = hx.shard(tiny_model(BYTES), plan)
    hx.save(model, folder / "model")
    (folder / "empty").mkdir()
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    return Given(plan, model, folder, hx.Engine(model, plan, rows=2, max_len=32, page=4))


@pytest.mark.usefixtures("no_annotations")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda given: hx.load("/nowhere", given.plan), VALUE, "'/nowhere' does not exist: give a Hugging Face folder"),
        (
            lambda given: hx.load(given.folder / "empty", given.plan),
            VALUE,
            "config.json' does not exist: give a Hugging",
        ),
        (lambda given: hx.load(given.folder / "config", given.plan), VALUE, "has no weights: add model.safetensors"),
        (lambda given: hx.load(given.model, given.plan), TYPE, "the model folder is a Transformer: give the path"),
        (lambda given: hx.load(given.folder / "model", given.plan.mesh), TYPE, "plan is a Mesh: give a helix_jax.Plan"),
        (lambda given: hx.load(given.folder / "model", None), TYPE, "plan is a NoneType: give a helix_jax.Plan"),
        (
            lambda given: hx.load(given.folder / "model", given.plan, "bf16"),
            TYPE,
            "dtype is 'bf16': give a type of flo",
        ),
        (
            lambda given: hx.load(given.folder / "model", given.plan, jnp.int8),
            TYPE,
            "dtype is int8: give a type of flo",
        ),
        (
            lambda given: hx.load(given.folder / "model", given.plan, None),
            TYPE,
            "dtype is None: give a type of floating",
        ),
        (
            lambda given: hx.load(given.folder / "model", plan_of(3, 2)),
            VALUE,
            "tp 3 neither divides the 2 key/value hea",
        ),
        (lambda given: hx.save({"a": 1}, given.folder / "new"), TYPE, "the model is a dict: give a Transformer"),
        (lambda given: hx.Plan(jax.devices()), TYPE, "mesh is a list: give a mesh of helix_jax.make_mesh"),
        (lambda given: hx.Plan(given.plan.mesh, block=1.5), TYPE, "block is 1.5: give a whole number"),
        (
            lambda given: hx.Plan(given.plan.mesh, cache_dtype="int8"),
            VALUE,
            "cache_dtype is 'int8': choose one of auto",
        ),
        (lambda given: hx.make_cache(given.plan.mesh, None, [1], [1]), TYPE, "plan is a Mesh: give a helix_jax.Plan"),
        (
            lambda given: hx.make_cache(given.plan, BYTES, [1], [1]),
            TYPE,
            "spec is a ModelConfig: give a helix_jax.Cache",
        ),
        (lambda given: hx.make_cache(given.plan, None, 1, 1), TYPE, "prompt_lens is 1: give a list of whole numbers"),
        (lambda given: hx.make_cache(given.plan, None, [1.5], [2]), TYPE, "prompt_lens is [1.5]: give a list of whole"),
        (lambda given: hx.CacheSpec(0, 2, 8, jnp.float32), VALUE, "layers is 0: give at least 1"),
        (lambda given: hx.CacheSpec(1, 2, 8, jnp.int8), TYPE, "dtype is int8: give a type of floating-point numbers"),
    ],
)
def test_a_wrong_use_of_load_plan_and_cache(given: Given, call, error, message):
    assert_refused(lambda: call(given), error, message)


WEIGHTS = {"q": np.ones((8, 6), np.float32), "norm": jnp.ones(4)}


@pytest.mark.usefixtures("no_annotations")
@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        (None, TYPE, "the model is a dict: give a Transformer, or specs, a table of PartitionSpecs"),
        ([P()], TYPE, "specs is a list: give a dict of patterns and PartitionSpecs"),
        ({"*": ("tp",)}, TYPE, "specs['*'] is ('tp',): give a jax.sharding.PartitionSpec"),
        ({3: P()}, TYPE, "specs has the key 3: give a pattern of parameter paths"),
        ({"*": P("model")}, VALUE, "specs['*']: the mesh has no axis 'model': choose one of dp, tp, cp"),
        ({"*": P("tp", "tp")}, VALUE, "specs['*'] uses the axis 'tp' 2 times: use it for one dimension"),
        ({"k": P(), "*": P()}, VALUE, "specs['k'] matches no parameter: correct the pattern; there are norm, q"),
        ({"*": P(), "q": P("tp")}, VALUE, "specs['q'] is never used, because patterns before it match 'q'"),
        ({"q": P()}, VALUE, "no pattern of specs matches the parameter 'norm': add one"),
        (
            {"n*": P(None, "tp"), "*": P()},
            VALUE,
            "specs['n*'] has 2 dimensions, but the parameter 'norm' has shape [4]",
        ),
        ({"q": P(None, ("tp", "cp")), "*": P()}, VALUE, "tp 2 x cp 4 does not divide dimension 1 of the parameter 'q'"),
    ],
)
def test_a_wrong_table_of_specs(specs, error, message):
    assert_refused(lambda: hx.shard(WEIGHTS, plan_of(2, 4), specs=specs), error, message)


@pytest.mark.usefixtures("no_annotations")
def test_a_wrong_argument_beside_specs():
    plan, specs = plan_of(2, 4), {"*": P()}
    assert_refused(lambda: hx.shard({"a": "x"}, plan, specs=specs), TYPE, "the parameter 'a' is a str: give arrays")
    assert_refused(lambda: hx.shard(WEIGHTS, (2, 4), specs=specs), TYPE, "plan is a tuple: give a helix_jax.Plan or a")
    assert_refused(lambda: hx.shard(WEIGHTS, plan, "bf16", specs=specs), TYPE, "dtype is 'bf16': give a type of float")


# Engine and SamplingParams


@pytest.mark.usefixtures("no_annotations")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda given: hx.Engine("folder", given.plan), TYPE, "the model is a str: give a model of helix_jax.load"),
        (lambda given: hx.Engine(given.model, given.plan.mesh), TYPE, "plan is a Mesh: give a helix_jax.Plan"),
        (lambda given: hx.Engine(given.model, plan_of(1, 4)), VALUE, "another mesh than the plan's: use load or shard"),
        (
            lambda given: hx.Engine(tiny_model(BYTES), given.plan),
            VALUE,
            "another mesh than the plan's: use load or sha",
        ),
        (lambda given: hx.Engine(given.model, given.plan, rows=0), VALUE, "rows is 0: give at least 1"),
        (
            lambda given: hx.Engine(given.model, given.plan, max_len=1000),
            VALUE,
            "max_len is 1000: give at most the mode",
        ),
        (
            lambda given: hx.Engine(given.model, given.plan, tokenizer="gpt2"),
            TYPE,
            "tokenizer is a str: give an object",
        ),
        (
            lambda given: hx.Engine(given.model, given.plan, prefix_caching="no"),
            TYPE,
            "prefix_caching is a str: give Tr",
        ),
        (
            lambda given: hx.Engine(given.model, given.plan, speculate=True),
            TYPE,
            "speculate is True: give 'ngram', or",
        ),
        (lambda given: given.engine.submit("text"), VALUE, "text needs a tokenizer, and the engine has none: give tok"),
        (lambda given: given.engine.submit(b"text"), TYPE, "the prompt is not a sequence of token ids but of type byt"),
        (lambda given: given.engine.submit([1.0]), TYPE, "the prompt is not a sequence of token ids but of type list"),
        (lambda given: given.engine.submit([300]), VALUE, "token id 300 is outside the vocabulary of 256: give ids fr"),
        (lambda given: given.engine.submit([1] * 40), VALUE, "40 tokens and 128 new ones exceed the maximum of 32 pos"),
        (
            lambda given: given.engine.submit([1], {"temperature": 1}),
            TYPE,
            "params is {'temperature': 1}: give Sampling",
        ),
        (lambda given: given.engine.submit([1], id=3), TYPE, "id is 3: give a string, or none"),
        (
            lambda given: given.engine.submit([1], stop_at(999)),
            VALUE,
            "stop_token_ids: token id 999 is outside the voc",
        ),
        (lambda given: given.engine.submit_all([[1]], ids="a"), TYPE, "ids is the string 'a': give a list of strings"),
        (lambda given: given.engine.cancel(["a"]), TYPE, "id is a list: give the id of a request, a string"),
        (lambda given: given.engine.generate("text"), TYPE, "prompts is a string: give a list of prompts"),
        (lambda given: given.engine.generate(None), TYPE, "prompts is a NoneType: give a list of prompts"),
        (
            lambda given: given.engine.generate([1, 2]),
            TYPE,
            "prompt 0 is not a sequence of token ids but 1: give a list",
        ),
        (lambda given: given.engine.generate([[1]], {}), TYPE, "params is {}: give SamplingParams(...), or a list of"),
        (lambda given: given.engine.score([[1, 2]], top=50), VALUE, "top is 50: give 0 to 20"),
        (lambda given: hx.generate(given.model, ["text"], given.plan), TYPE, "of type str: encode it with a tokenizer"),
        (
            lambda given: hx.generate(given.model, [[1]], given.plan, temperature=1),
            TYPE,
            "temperature is not an option",
        ),
        (
            lambda given: hx.generate(given.plan, [[1]], given.model),
            TYPE,
            "the model is a Plan: give a model of helix_",
        ),
        (
            lambda given: hx.transfer("a", given.engine, given.model),
            TYPE,
            "target is a Transformer: give a helix_jax.En",
        ),
    ],
)
def test_a_wrong_use_of_an_engine(given: Given, call, error, message):
    assert_refused(lambda: call(given), error, message)
    assert not given.engine.requests


def stop_at(token: int) -> hx.SamplingParams:
    return hx.SamplingParams(max_new_tokens=2, stop_token_ids=[token])


@pytest.mark.usefixtures("no_annotations")
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_new_tokens": -1}, VALUE, "max_new_tokens is -1: give at least 1"),
        ({"max_new_tokens": 1.5}, TYPE, "max_new_tokens is 1.5: give a whole number"),
        ({"temperature": -1}, VALUE, "temperature is -1: give 0 (greedy) or a positive number"),
        ({"temperature": "hot"}, TYPE, "temperature is 'hot': give a number"),
        ({"top_k": -1}, VALUE, "top_k is -1: give 0 (all tokens) or more"),
        ({"top_p": 0}, VALUE, "top_p is 0: give a probability above 0 and at most 1"),
        ({"min_p": 2}, VALUE, "min_p is 2: give a number from 0 to 1"),
        ({"repetition_penalty": 0}, VALUE, "repetition_penalty is 0: give a positive number"),
        ({"seed": -1}, VALUE, "seed is -1: give a whole number from 0 to 2^64 - 1"),
        ({"stop": [3]}, TYPE, "stop is (3,): give a list of strings"),
        ({"stop": ""}, VALUE, "stop is ('',): give a list of strings that are not empty"),
        ({"stop_token_ids": 3}, TYPE, "stop_token_ids is 3: give a list of token ids"),
        ({"stop_token_ids": [-1]}, VALUE, "stop_token_ids is (-1,): give token ids of 0 or more"),
        ({"ignore_eos": 1}, TYPE, "ignore_eos is 1: give true or false"),
        ({"logprobs": 21}, VALUE, "logprobs is 21: give 0 to 20"),
        ({"n": 2}, VALUE, "n is 2 with temperature 0, so that all samples are equal: give a temperature too"),
    ],
)
def test_wrong_sampling_params(values: dict[str, Any], error, message):
    assert_refused(lambda: hx.SamplingParams(**values), error, message)


# Training


BATCH = np.ones((2, 33), np.int32)
STARTS, MASK = np.zeros((2, 32), np.int32), np.ones((2, 32), bool)


@pytest.mark.usefixtures("no_annotations")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "folder"}, TYPE, "the model is a str: give a Transformer or a ModelConfig"),
        ({"optimizer": optax.adamw}, TYPE, "the optimizer is a function: give an optax optimizer"),
        ({"optimizer": 1e-3}, TYPE, "the optimizer is a float: give an optax optimizer"),
        ({"batches": None}, TYPE, "batches is a NoneType: give a list of batches, or an iterator"),
        ({"batches": lambda: [BATCH]}, TYPE, "batches is a function: give a list of batches, or an iterator"),
        ({"batches": []}, VALUE, "batches is empty: give at least one"),
        ({"batches": ["text"]}, TYPE, "a batch has dtype <U4: give an integer array of token ids"),
        ({"batches": [BATCH * 1.0]}, TYPE, "a batch has dtype float64: give an integer array of token ids"),
        ({"batches": BATCH}, VALUE, "a batch has shape (33,): give [B, S + 1]"),
        ({"batches": [[[1, 2], [1]]]}, VALUE, "the sequences of a batch have different lengths: give [B, S + 1]"),
        ({"batches": [BATCH[:, :32]]}, VALUE, "31 positions are not a multiple of 2 ranks x blocks of 16: give 32"),
        ({"batches": [BATCH + 300]}, VALUE, "token id 301 is outside the vocabulary of 256: give ids from 0 to 255"),
        (
            {"batches": [Sequences(BATCH, STARTS, MASK * 0.5)]},
            TYPE,
            "loss_mask_BS of a batch has dtype float64: give bo",
        ),
        (
            {"batches": [Sequences(BATCH, STARTS, MASK[:, 1:])]},
            VALUE,
            "loss_mask_BS of a batch has shape (2, 31) beside",
        ),
        ({"steps": 0}, VALUE, "steps is 0: give at least 1"),
        ({"steps": 1.5}, TYPE, "steps is 1.5: give a whole number"),
        ({"loss": "cross_entropy"}, TYPE, "loss is a str: give a function"),
        (
            {"loss": lambda logits, targets, mask: logits.mean((0, 1))},
            VALUE,
            "the loss returned float32 of shape=(256,)",
        ),
        ({"loss": lambda logits, targets, mask: 0.0}, VALUE, "the loss returned a float: return a scalar array"),
        ({"loss": lambda logits, targets, mask: targets.sum()}, VALUE, "the loss returned int32 of shape=(): return a"),
        ({"plan": plan_of(1, 1)}, TYPE, "plan is a Plan: give a helix_jax.training.TrainPlan(config, mesh)"),
        ({"model": TINY}, VALUE, "plan.model differs from the config of the model: create the plan with this config"),
        ({"state": {"embed_VD": 1}}, TYPE, "state is a dict: give a TrainState, as on_step receives it"),
        ({"on_step": 3}, TYPE, "on_step is an int: give a function"),
    ],
)
def test_a_wrong_use_of_fit(change: dict[str, Any], error, message):
    plan = TrainPlan(BYTES, plan_of(1, 2).mesh)
    arguments = {"model": BYTES, "batches": [BATCH], "optimizer": optax.sgd(0.1), "plan": plan} | change
    assert_refused(lambda: fit(**arguments), error, message)


@pytest.mark.usefixtures("no_annotations")
def test_a_wrong_train_plan():
    mesh = plan_of(1, 2).mesh
    assert_refused(lambda: TrainPlan(mesh, BYTES), TYPE, "model is a Mesh: give a helix_jax.ModelConfig")
    assert_refused(lambda: TrainPlan(BYTES, (1, 2)), TYPE, "mesh is a tuple: give a mesh of helix_jax.make_mesh")


# What is right


class Small(nnx.Module):
    """A module with weights that are not alike, and state that is no parameter."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.count = nnx.Variable(jnp.zeros(()))


def test_a_table_of_specs_places_modules_and_pytrees():
    mesh, model = plan_of(2, 4).mesh, Small(nnx.Rngs(0))
    specs = {"layers/0/kernel": P(None, ("tp", "cp")), "*/kernel": P(("tp", "cp"), None), "*": P()}
    sharded = hx.shard(model, plan_of(2, 4), jnp.bfloat16, specs=specs)
    first, second = (sharded.layers[index].kernel[...] for index in range(2))
    assert (first.sharding.spec, second.sharding.spec) == (P(None, ("tp", "cp")), P(("tp", "cp")))
    assert (first.sharding.mesh, first.dtype, sharded.count[...].dtype) == (mesh, jnp.bfloat16, jnp.float32)
    assert sharded.layers[0].bias[...].sharding.is_fully_replicated
    np.testing.assert_array_equal(first, model.layers[0].kernel[...].astype(jnp.bfloat16))
    assert model.layers[0].kernel[...].dtype == jnp.float32

    tree = {"a": [np.arange(8), jnp.ones((8, 2))]}
    placed = hx.shard(tree, jax.make_mesh((8,), ("x",)), jnp.float16, specs={"a/?": P("x")})
    assert [x.sharding.spec for x in placed["a"]] == [P("x"), P("x")]
    assert [x.dtype for x in placed["a"]] == [jnp.int32, jnp.float16]
    np.testing.assert_array_equal(placed["a"][0], np.arange(8))
