"""Every family computes the logits that Hugging Face transformers computes from its folder (scripts/make_golden.py)."""

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.cache import cache_specs, make_caches, per_row
from helix_jax.checkpoint import load, read_config
from helix_jax.engine import SamplingParams
from helix_jax.families import FAMILIES
from helix_jax.generation import generate
from helix_jax.plan import Plan
from helix_jax.step import step
from tests.conftest import GOLDEN
from tests.reference import naive_logits, plan_of, relative_error

BLOCK, CHUNK, PAGE, STEPS = 4, 16, 8, 64  # at cp 4 a rotation of the owner is 16 tokens
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/golden.npz"))
UNQUANTISED = [folder for folder in FOLDERS if "quantization_config" not in (folder / "config.json").read_text()]
# Together they have latents, grouped routing, windows, sinks, experts, norms over all heads, and heads that cp does not
# divide.
ON_A_MESH_IN_THE_FAST_TIER = ("gpt_oss", "deepseek_v3", "llama_9_heads", "olmo2", "llama", "gemma3_text", "smollm3")
GREEDY_IN_THE_FAST_TIER = ("llama", "deepseek_v3", "gpt_oss")

each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def check_logits(logits_XV, golden_XV) -> None:
    """Check that all errors are at most 2e-4, and that the best tokens agree where the two best differ by over 1e-3."""
    errors = [relative_error(ours, golden) for ours, golden in zip(logits_XV, golden_XV, strict=True)]
    assert max(errors) <= 2e-4, f"the relative error at position {np.argmax(errors)} is {max(errors):.2g}"
    best = np.sort(golden_XV, -1)
    clear = best[:, -1] - best[:, -2] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(logits_XV.argmax(-1)[clear], golden_XV.argmax(-1)[clear])


def forced_logits(model, plan: Plan, text: list[int], prompt_lens: list[int]) -> list[list[tuple[int, np.ndarray]]]:
    """Prefill prompts of unequal length and decode the rest of one text: (position, logits) of every step, per row."""
    B = len(prompt_lens)
    max_lens = [length + STEPS - 1 for length in prompt_lens]
    cache, rows = make_caches(plan, cache_specs(model.config, model.dtype), prompt_lens, max_lens, page=PAGE)
    weights = model.weights()
    done_B, logits = np.zeros(B, int), [[] for _ in range(B)]

    def feed(width: int, count_B: np.ndarray):
        tokens_BT = np.zeros((B, width), np.int32)
        for row, count in enumerate(count_B):
            tokens_BT[row, :count] = text[done_B[row] : done_B[row] + count]
        out = step(model.config, plan, weights, cache, rows, per_row(plan, tokens_BT), per_row(plan, count_B), None)
        logits_BV = np.asarray(out.logits_BV)[:, : model.config.vocab]
        for row, count in enumerate(count_B):
            done_B[row] += count
            if count:
                logits[row].append((done_B[row] - 1, logits_BV[row]))
        return out.caches, out.rows

    while (done_B < prompt_lens).any():
        cache, rows = feed(CHUNK, np.clip(prompt_lens - done_B, 0, CHUNK))
    for _ in range(STEPS - 1):
        cache, rows = feed(1, np.ones(B, int))
    return logits


def families_and_meshes(in_fast_tier: tuple[str, ...]) -> Iterator:
    """Yield every family on four meshes. In the fast tier some families take turns, in the long tier all run.

    A family whose layers differ from those of another one in nothing that a mesh divides is in the fast tier without a
    mesh.
    """
    fast = {name: number for number, name in enumerate(in_fast_tier)}
    for folder in FOLDERS:
        meshes = ((1, 4), (2, 2), (1, 8), (2, 4))
        if folder.name == "llama_9_heads":
            meshes = ((1, 8), (3, 2), (6, 1), (1, 3))
        for index, (tp, cp) in enumerate(meshes):
            is_fast = folder.name in fast and index == fast[folder.name] % len(meshes)
            marks = [] if is_fast else pytest.mark.slow
            yield pytest.param(folder, tp, cp, marks=marks, id=f"{folder.name}-{tp}-{cp}")


def plan_for(tp: int, cp: int) -> Plan:
    return plan_of(tp, cp, block=BLOCK, experts="cp" if tp > 1 else "flat")


@pytest.mark.parametrize(("folder", "tp", "cp"), list(families_and_meshes(ON_A_MESH_IN_THE_FAST_TIER)))
def test_sharded_logits_equal_those_of_transformers(folder: Path, tp: int, cp: int):
    """Prefill and 64 decode steps are compared, for rows of unequal prompts."""
    golden, plan = np.load(folder / "golden.npz"), plan_for(tp, cp)
    model, prompt_lens = load(folder, plan, jnp.float32), [int(golden["prompt_len"]), 29, 7]
    for steps in forced_logits(model, plan, golden["tokens"].tolist(), prompt_lens):
        positions, logits = zip(*steps, strict=True)
        check_logits(np.stack(logits), golden["logits"][list(positions)])


@pytest.mark.parametrize(("folder", "tp", "cp"), list(families_and_meshes(GREEDY_IN_THE_FAST_TIER)))
def test_sharded_greedy_tokens_equal_those_of_transformers(folder: Path, tp: int, cp: int):
    golden, plan = np.load(folder / "golden.npz"), plan_for(tp, cp)
    model = load(folder, plan, jnp.float32)
    prompts = [golden["tokens"].tolist()[:length] for length in (int(golden["prompt_len"]), 29, 7)]
    params = SamplingParams(max_new_tokens=STEPS, ignore_eos=True)
    assert generate(model, prompts, plan, params, chunk=CHUNK, page=PAGE)[0] == golden["greedy"].tolist()


@each_folder
def test_one_pass_without_a_cache_equals_transformers(folder: Path):
    golden = np.load(folder / "golden.npz")
    text = golden["tokens"].tolist()
    model = load(folder, plan_of(), jnp.float32)
    logits = naive_logits(model, [text], len(text))[0, : len(golden["logits"]), : model.config.vocab]
    check_logits(logits, golden["logits"])


def test_every_family_has_a_golden_folder():
    assert {read_config(folder).family for folder in FOLDERS} == set(FAMILIES)
