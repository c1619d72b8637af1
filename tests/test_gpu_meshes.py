"""Real devices: greedy tokens, programs and processes on every mesh of four GPUs, or of the two that there are.

JAX_PLATFORMS=cuda pytest -m gpu tests/test_gpu_meshes.py

On a CPU these are long tests, on four fake devices. The tokens are compared with those of one device, in float32. The
reference also has the log-probabilities of the two best tokens, because a difference is allowed where they are tied.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax import Engine, FinishedEvent, Plan, SamplingParams, generate, load
from helix_jax.checkpoint import DEMO_MODEL
from helix_jax.combine import COMBINES
from helix_jax.devices import default_dtype, open_mesh
from helix_jax.models.transformer import Transformer
from tests.conftest import GOLDEN
from tests.reference import TIE, plan_of, tiny_model
from tests.test_cli import HELIX, call, json_of
from tests.test_families import CHUNK, PAGE, plan_for
from tests.test_processes import TWO, run
from tests.test_step import check_decode_program, check_traces

PLATFORM, COUNT = jax.default_backend(), jax.device_count()
DEVICES = max(n for n in (1, 2, 4) if n <= COUNT)
MESHES = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]  # tp x cp
# Together they have grouped heads, latents, experts, windows and sinks.
MODELS = {"demo": DEMO_MODEL} | {name: GOLDEN / name for name in ("llama", "deepseek_v3", "gpt_oss", "gemma3_text")}
NEW_TOKENS = 48  # at cp 4 with blocks of 4 tokens, three rotations of the owner
LENGTHS = (60, 29, 7)
OPTIONS = {"chunk": CHUNK, "page": PAGE, "max_len": max(LENGTHS) + NEW_TOKENS}  # for pages this short, auto is xla
# A rounding error of float32 may move a number to the next fp8 value, which differs by up to an eighth.
TIES = {"auto": TIE, "fp8": 1e-2}

pytestmark = [pytest.mark.gpu, pytest.mark.optimized, *([pytest.mark.slow] if PLATFORM == "cpu" else [])]


def needs(devices: int) -> pytest.MarkDecorator:
    missing = f"needs {devices} devices, and there are {COUNT} of platform '{PLATFORM}'"
    reason = missing if devices > COUNT else f"meshes of {DEVICES} devices are checked instead"
    return pytest.mark.skipif(devices != DEVICES, reason=reason)


each_mesh = pytest.mark.parametrize(
    ("tp", "cp"), [pytest.param(tp, cp, marks=needs(tp * cp), id=f"{tp}x{cp}") for tp, cp in MESHES]
)


@pytest.fixture(scope="module", autouse=True)
def configured_nccl() -> None:
    """Let `open_mesh` configure NCCL, as commands and `LLM` do, before the first collective."""
    open_mesh("auto", 1, DEVICES)


def make_model(name: str, tp: int, cp: int, cache_dtype: str) -> tuple[Transformer, Plan]:
    plan = replace(plan_for(tp, cp), cache_dtype=cache_dtype)
    return load(MODELS[name], plan, jnp.float32), plan


def prompts_for(name: str) -> list[list[int]]:
    file = GOLDEN / "demo.npz" if name == "demo" else GOLDEN / name / "golden.npz"
    return [np.load(file)["tokens"].tolist()[:length] for length in LENGTHS]


def params(**options: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, **options)


@cache
def reference(name: str, cache_dtype: str) -> list[tuple[tuple[int, ...], list[float]]]:
    """Return the tokens of one device, and by how much the best token of each step was better than the next."""
    model, plan = make_model(name, 1, 1, cache_dtype)
    outputs = Engine(model, plan, rows=len(LENGTHS), **OPTIONS).generate(prompts_for(name), params(logprobs=2))
    return [(each.tokens, [top[0][1] - top[1][1] for _, top in each.logprobs or ()]) for each in outputs]


def count_ties(ours: Sequence[int], theirs: Sequence[int], gaps: Sequence[float], tie: float) -> int:
    """Return 0 if tokens are equal, 1 if they first differ where the two best were tied. Otherwise fail."""
    assert len(ours) == len(theirs)
    for index, (one, other, gap) in enumerate(zip(ours, theirs, gaps, strict=True)):
        if one != other:
            assert gap < tie, f"token {index} is {one}, not {other}, which was better by {gap:.2g}"
            return 1
    return 0


def run_staggered(model: Transformer, plan: Plan, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Return the tokens of an engine whose last request arrives while the others decode."""
    engine = Engine(model, plan, rows=len(prompts), **OPTIONS)
    ids = engine.submit_all(prompts[:-1], params())
    events = []
    while not engine.stats().decoded_tokens:
        events += engine.step()
    ids += [engine.submit(prompts[-1], params())]
    tokens = {
        event.id: event.result.tokens for event in [*events, *engine.events()] if isinstance(event, FinishedEvent)
    }
    return [tokens[id] for id in ids]


@each_mesh
@pytest.mark.parametrize("how", COMBINES)
def test_the_program_that_decodes_has_the_documented_collectives_and_copies_no_cache(how: str, tp: int, cp: int):
    """In the type that the devices decode with by default, which on a Hopper GPU uses its kernel."""
    if cp == 1 and how != COMBINES[0]:
        pytest.skip("on one cp rank there is nothing to combine")
    plan = plan_of(tp, cp, combine=how)
    check_decode_program(plan, slots=2**18, dtype=default_dtype(plan.mesh))


@each_mesh
def test_one_trace_of_each_program_serves_every_length(tp: int, cp: int, monkeypatch):
    check_traces(tiny_model(), plan_of(tp, cp, block=2), monkeypatch)


@each_mesh
def test_two_processes_with_half_of_the_devices_equal_one_with_all(tp: int, cp: int, tmp_path: Path):
    command = ["generate", "--prompt", "And it came to pass", "--max-new-tokens", NEW_TOKENS, "--dtype", "float32"]
    command += ["--tp", tp, "--cp", cp, "--platform", PLATFORM, "--json"]
    gpus_each = 0 if PLATFORM == "cpu" else tp * cp // TWO
    together = json.loads(run(TWO, [*HELIX, *command], tmp_path, gpus_each=gpus_each))
    alone = json_of(call(*command))
    assert len(together["tokens"]) == NEW_TOKENS
    assert (together["tokens"], together["ranks"]) == (alone["tokens"], alone["ranks"])


@each_mesh
@pytest.mark.parametrize("cache_dtype", TIES)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_those_of_one_device(name: str, cache_dtype: str, tp: int, cp: int):
    """Of `generate`, and of an engine in which a request arrives while others decode."""
    prompts, expected = prompts_for(name), reference(name, cache_dtype)
    model, plan = make_model(name, tp, cp, cache_dtype)
    for tokens in (generate(model, prompts, plan, params(), **OPTIONS), run_staggered(model, plan, prompts)):
        rows = zip(tokens, expected, strict=True)
        assert sum(count_ties(ours, *theirs, TIES[cache_dtype]) for ours, theirs in rows) <= 1


def test_the_comparison_of_tokens_can_fail():
    gaps = [0.5, 0.5, 1e-5]
    assert count_ties([1, 2, 3], [1, 2, 3], gaps, TIE) == 0
    assert count_ties([1, 2, 4], [1, 2, 3], gaps, TIE) == 1
    with pytest.raises(AssertionError, match="token 1 is 9, not 2, which was better by 0.5"):
        count_ties([1, 9, 3], [1, 2, 3], gaps, TIE)
