"""Every test runs on a CPU split into 8 fake devices, with the shapes in the library's signatures checked."""

import importlib.util
import os
import pathlib

import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(
    os.environ.get("HELIX_GOLDEN", ROOT / "tests" / "golden")
)  # or what make_golden.py made elsewhere
COMPILED = ROOT / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    install_import_hook("helix_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a byte model of random weights, which compiles faster than the one that ships."""
    from helix_jax.checkpoint import save
    from tests.reference import BYTES, tiny_model

    folder = tmp_path_factory.mktemp("byte_model")
    save(tiny_model(BYTES), folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="the long form: scripts/test --all"))
