"""Programs compiled ahead of time for absent TPUs: memory, collectives, and in-place access to the cache."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import SingleDeviceSharding

from helix_jax.abstract import abstract_arguments
from helix_jax.arrays import bytes_per_device
from helix_jax.config import Latent, ModelConfig
from helix_jax.kernels import backend_attend, tpu
from helix_jax.mesh import make_mesh
from helix_jax.plan import Plan
from helix_jax.step import step
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
def test_a_decode_step_for_four_chips_has_the_computed_memory_and_the_documented_collectives(tmp_path: Path):
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
    # One cp rank needs no combine: the embedding, two projections per layer, and the logits remain.
    assert sum(run["collectives"].values()) == 2 * layers + 2


@with_libtpu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v5e:3x7"], "--topology 'v5e:3x7' cannot be made"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["--topology", "v9:2x2"], "the memory of a v9 is not known: v5e, v5p, v6e are"),
                (["--layers", 99], "--layers is 99: give 1 to 32"),
                (["--config", "none.toml"], "none.toml"),
            )
        ),
    ],
)
def test_bad_options_are_reported_in_one_line_with_exit_code_2(options, message: str):
    done = aot("--topology", "v5e:2x2", *options)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr


CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}
SHAPES = {  # B, T, N, K, H, W, type
    "decoding": (4, 1, 32, 8, 128, 64, "bfloat16"),
    "a chunk": (2, 512, 32, 8, 128, 64, "bfloat16"),
    "groups of 3, a few new tokens": (4, 3, 6, 2, 128, 16, "bfloat16"),
    "wide heads, a chunk": (2, 512, 16, 2, 256, 64, "bfloat16"),
    "shortest pages": (4, 1, 32, 32, 128, 8, "bfloat16"),
    "longest pages, float32, a chunk": (1, 512, 16, 2, 256, 1024, "float32"),
    "latent": (4, 1, 128, 1, 640, 64, "bfloat16"),
    "latent, a chunk": (2, 64, 128, 1, 640, 64, "bfloat16"),
    "latent, float32": (4, 1, 128, 1, 640, 64, "float32"),
}


@cache
def chips(generation: str) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")  # otherwise libtpu queries the network
        patch.setenv("TPU_ACCELERATOR_TYPE", generation)
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so several processes may compile
        return list(topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[generation]).devices)


@pytest.fixture
def uncached() -> Iterator[None]:
    """Disable the compilation cache: JAX stores programs for absent chips, but cannot load them again."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


def operations_of_shape(text: str, shape: tuple[int, ...]) -> set[str]:
    """Return the operations of a compiled program, except views, whose result has this shape."""
    found = re.findall(rf"= \w+\[{','.join(map(str, shape))}\]\S* ([\w-]+)\(", text)
    return set(found) - {"parameter", "bitcast", "get-tuple-element"}


def shapes_and_chips() -> Iterator:
    """Yield every shape for every generation of chips. In the fast tier each shape is compiled for one of them.

    The longest pages take more than all the others together.
    """
    for number, name in enumerate(SHAPES):
        for index, generation in enumerate(CHIPS):
            is_fast = index == number % len(CHIPS) and "longest" not in name
            yield pytest.param(name, generation, marks=[] if is_fast else pytest.mark.slow)


@with_libtpu
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(("name", "generation"), list(shapes_and_chips()))
def test_the_kernel_compiles_and_reads_the_cache_in_place(name: str, generation: str):
    pool, text = compiled_kernel(generation, *SHAPES[name])
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert not operations_of_shape(text, pool)


def compiled_kernel(
    generation: str, B: int, T: int, N: int, K: int, H: int, W: int, dtype: str
) -> tuple[tuple[int, ...], str]:
    """Compile the kernel for one chip. Return the shape of its pools and the text of the program."""
    M, latent = 2**12 // W, H == 640
    A = B * M + 41
    abstract = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(chips(generation)[0]))
    pool, ints = abstract((A, K, W, H), dtype), partial(abstract, dtype=jnp.int32)
    run = partial(backend_attend("tpu"), scale=0.1, v_width=512 if latent else None)
    arguments = abstract((B, T, N, H), dtype), pool, None if latent else pool, ints((B, M)), ints((B, T)), ints((B, T))
    return pool.shape, jax.jit(run).lower(*arguments).compile().as_text()


@with_libtpu
@pytest.mark.usefixtures("uncached")
def test_narrow_heads_are_rejected_because_their_cache_would_be_copied(monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(tpu, "check_arrays", lambda *_: None)
    pool, text = compiled_kernel("v5e", 4, 1, 32, 8, 64, 64, "bfloat16")
    assert "copy" in operations_of_shape(text, pool)


def small_config(kind: str) -> ModelConfig:
    shape = {"layers": 2, "width": 256, "heads": 16, "ff_width": 512, "vocab": 512, "max_positions": 4096}
    if kind == "latent":
        latent = Latent(width=512, rope_width=64, nope_width=128, value_width=128)
        return ModelConfig(**shape, family="deepseek_v3", kv_heads=1, head_width=192, latent=latent)
    return ModelConfig(**shape, kv_heads=4, head_width=int(kind))


@with_libtpu
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("kind", "T", "generation", "tp", "cp"),
    [("128", 1, "v5e", 2, 2), ("128", 16, "v6e", 2, 4), ("64", 1, "v6e", 4, 2), ("latent", 1, "v6e", 2, 4)],
)
def test_a_step_on_a_mesh_calls_the_kernel_in_every_layer_and_copies_no_cache(
    kind: str, T: int, generation: str, tp: int, cp: int
):
    config = small_config(kind)
    plan = Plan(make_mesh(tp, cp, devices=chips(generation)), 16)
    assert plan.kernel_for_model(config, 64, jnp.bfloat16) == "tpu"
    arguments = abstract_arguments(config, plan, rows=2, slots=2**16, T=T, page=64, dtype=jnp.bfloat16)
    compiled = step.lower(*arguments).compile()
    pool = arguments[3][0].pool_XKWH
    share = pool.sharding.shard_shape(pool.shape)
    assert share[-1] % 128 == 0
    cache_bytes = bytes_per_device(arguments[3])
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == config.layers
    assert operations_of_shape(compiled.as_text(), share) <= {"scatter", "fusion"}  # of the append
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 50
