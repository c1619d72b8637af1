"""Every family gives the logits that Hugging Face transformers gives for the same folder (scripts/make_golden.py)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.cache import CacheSpec, make_cache, per_row
from helix_jax.checkpoint import load, read_config
from helix_jax.families import FAMILIES
from helix_jax.generation import generate
from helix_jax.layout import BlockLayout
from helix_jax.mesh import make_mesh
from helix_jax.plan import Plan
from helix_jax.sampling import make_sampling
from helix_jax.step import step
from tests.conftest import GOLDEN
from tests.reference import naive_logits, plan_of, relative_error

BLOCK, CHUNK, PAGE, STEPS = 4, 16, 8, 64  # at cp 4 a rotation is 16 tokens
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/golden.npz"))

PLAIN = [folder for folder in FOLDERS if "quantization_config" not in (folder / "config.json").read_text()]

each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def check(ours_XV, golden_XV) -> None:
    """Within 2e-4 at every position, and the same best token wherever the two best differ by more than 1e-3."""
    errors = [relative_error(ours, golden) for ours, golden in zip(ours_XV, golden_XV, strict=True)]
    assert max(errors) <= 2e-4, f"position {np.argmax(errors)} is off by {max(errors):.2g}"
    best = np.sort(golden_XV, -1)
    clear = best[:, -1] - best[:, -2] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ours_XV.argmax(-1)[clear], golden_XV.argmax(-1)[clear])


def forced_logits(model, plan: Plan, text: list[int], prompt_lens: list[int]) -> list[list[tuple[int, np.ndarray]]]:
    """Rows that hold the same text, of which each knows another prompt; (position, logits) of every step of each."""
    rows_n = len(prompt_lens)
    room = [length + STEPS - 1 for length in prompt_lens]
    cache, rows = make_cache(plan, CacheSpec.from_config(model.config, model.dtype), prompt_lens, room, page=PAGE)
    weights, sampling = model.weights(), make_sampling(rows_n)
    done, given = np.zeros(rows_n, int), [[] for _ in range(rows_n)]

    def feed(width: int, count_B: np.ndarray):
        tokens_BT = np.zeros((rows_n, width), np.int32)
        for row, count in enumerate(count_B):
            tokens_BT[row, :count] = text[done[row] : done[row] + count]
        new = per_row(plan, tokens_BT), per_row(plan, count_B)
        out = step(model.config, plan, weights, cache, rows, *new, sampling)
        for row, count in enumerate(count_B):
            done[row] += count
            if count:
                given[row].append((done[row] - 1, np.asarray(out.logits_BV[row, : model.config.vocab])))
        return out.cache, out.rows

    while (done < prompt_lens).any():
        cache, rows = feed(CHUNK, np.minimum(CHUNK, prompt_lens - done))
    for _ in range(STEPS - 1):
        cache, rows = feed(1, np.ones(rows_n, int))
    return given


def meshes():
    """Every family on cp 4 and on tp 2 x cp 2; in the fast tier on one of them in turn, the richest on both."""
    for number, folder in enumerate(PLAIN):
        for tp, cp in ((1, 4), (2, 2)):
            fast = tp == 1 + number % 2 or folder.name in ("deepseek_v3", "gpt_oss")
            yield pytest.param(folder, tp, cp, marks=[] if fast else pytest.mark.slow, id=f"{folder.name}-{tp}-{cp}")


@pytest.mark.parametrize(("folder", "tp", "cp"), list(meshes()))
def test_logits_and_greedy_tokens_are_those_of_transformers(folder: Path, tp: int, cp: int):
    """At prefill and over 64 steps, for rows of unequal prompts; then greedily."""
    golden = np.load(folder / "golden.npz")
    text, prompt = golden["tokens"].tolist(), int(golden["prompt_len"])
    mesh = make_mesh(tp, cp)
    plan = Plan(mesh, BLOCK, experts="cp" if tp > 1 else "flat")
    model = load(folder, plan, jnp.float32)
    prompt_lens = [prompt, 29, 7]
    for given in forced_logits(model, plan, text, prompt_lens):
        positions, logits = zip(*given, strict=True)
        check(np.stack(logits), golden["logits"][list(positions)])
    prompts = [text[:length] for length in prompt_lens]
    options = {"max_new_tokens": STEPS, "chunk": CHUNK, "page": PAGE, "stop_token_ids": ()}
    assert generate(model, prompts, plan, **options)[0] == golden["greedy"].tolist()


@each_folder
def test_one_pass_without_a_cache_gives_them_too(folder: Path):
    golden = np.load(folder / "golden.npz")
    text = golden["tokens"].tolist()
    model = load(folder, plan_of(), jnp.float32)
    ours = naive_logits(model, [text], len(text))[0, : len(golden["logits"]), : model.config.vocab]
    check(ours, golden["logits"])


def test_there_is_a_golden_folder_for_every_family():
    assert {read_config(folder).family for folder in FOLDERS} == set(FAMILIES)
