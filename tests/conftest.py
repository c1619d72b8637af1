"""Runs every test on a CPU that is split into 8 fake devices, and checks the shapes in the library's signatures."""

import importlib.util
import json
import os
import pathlib
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("PJRT_NPROC", "32")  # threads of XLA, of which collectives need several per device (devices.py)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # tests start processes that use the same GPUs

ROOT = pathlib.Path(__file__).parents[1]
# scripts/make_golden.py --out can write other folders to test with.
GOLDEN = pathlib.Path(os.environ.get("HELIX_GOLDEN", ROOT / "tests" / "golden"))
COMPILATION_CACHE = ROOT / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    install_import_hook("helix_jax", "beartype.beartype")


# Compilation is most of the time of the tests. Most of them check values, for which unoptimised programs do.
FAST_COMPILATION = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # for the tests that start processes
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _optimisations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile with all optimisations in tests marked `optimized`, which read programs, memory or times."""
    if "optimized" not in request.keywords:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def _split_small_parameters() -> None:
    """Split the parameters of the tests' models over dp and cp as if they were larger."""
    from helix_jax import mesh

    mesh._LEAST_TO_SPLIT = 1


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the folder of a byte model with random weights, which compiles faster than the demo model."""
    from helix_jax.checkpoint import save
    from tests.reference import BYTES, tiny_model

    folder = tmp_path_factory.mktemp("byte_model")
    save(tiny_model(BYTES), folder)
    return folder


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the folder of a small model with a tokenizer of few words and a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("chat_model")
    words = ["user", ":", "</s>", "hello", "there", "assistant", "?", "system"]  # the model ends with token 2
    words += [f"word{id}" for id in range(len(words), 97)]
    level = tokenizers.models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(level)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    for file in ("config.json", "model.safetensors"):
        (folder / file).symlink_to(GOLDEN / "llama" / file)
    turns = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    refusal = "{% if messages[0].role == 'tool' %}{{ raise_exception('it begins with a tool') }}{% endif %}"
    template = refusal + turns + "{% if add_generation_prompt %}assistant :{% endif %}"
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long test: run scripts/test --all"))
