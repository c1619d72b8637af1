"""Tests the notebook: all cells run in order in one process, as in Jupyter, and a wrong token stops the run."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import helix_jax as hx
from tests.conftest import FAST_COMPILATION, ROOT
from tests.test_cli import ENVIRONMENT

NOTEBOOK = ROOT / "scripts" / "helix_colab.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text())
CODE = {cell["id"]: "".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "code"}
AS_TEXT: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 500}

# Runs a notebook like Jupyter: all cells in one namespace, in order. Each cell's figures are drawn after it.
RUNNER = """
import json, sys
from pathlib import Path

notebook, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
names = {"__name__": "__main__"}
for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
        pyplot = sys.modules.get("matplotlib.pyplot")
        figures = pyplot.get_fignums() if pyplot else []
        for number in figures:
            pyplot.figure(number).savefig(folder / f"{cell['id']}-{number}.png")
        if figures:
            pyplot.close("all")
        (folder / cell["id"]).touch()
"""


def run(notebook: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run a notebook. Writes a file into `folder` for every cell that completes, and a picture of every figure."""
    return subprocess.run(
        [sys.executable, "-c", RUNNER, str(notebook), str(folder)],
        cwd=folder,
        env=ENVIRONMENT | FAST_COMPILATION | {"MPLBACKEND": "Agg", "PIP_NO_INDEX": "1"},
        **AS_TEXT,
    )


def test_every_cell_runs_and_every_figure_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = run(NOTEBOOK, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout  # helix_jax is already installed
    assert {path.name for path in tmp_path.iterdir() if not path.suffix} == set(CODE)
    drawing = {name for name, source in CODE.items() if "plt.show()" in source}
    assert {path.stem.rsplit("-", 1)[0] for path in tmp_path.glob("*.png")} == drawing
    assert len(drawing) >= 3


def test_a_cell_that_fails_stops_the_run_and_is_named(tmp_path: Path):
    sources = ["token = 1", "assert token == 2, 'a wrong token'", "never = True"]
    cells = [{"cell_type": "code", "id": f"cell-{i}", "source": [source]} for i, source in enumerate(sources)]
    notebook = tmp_path / "bad.ipynb"
    notebook.write_text(json.dumps({"cells": cells}))
    done = run(notebook, tmp_path)
    assert done.returncode == 1
    assert 'File "cell cell-1"' in done.stderr
    assert "a wrong token" in done.stderr
    assert [(tmp_path / f"cell-{i}").exists() for i in range(3)] == [True, False, False]


IsWrong = Callable[[hx.Transformer, hx.Plan], bool]


def sharded(model: hx.Transformer, plan: hx.Plan) -> bool:
    return plan.mesh.size > 1


@pytest.fixture(scope="module")
def cached_load() -> Callable[..., hx.Transformer]:
    return cache(hx.load)


@pytest.fixture
def run_cells(monkeypatch: pytest.MonkeyPatch, cached_load) -> Callable[..., None]:
    """Return a function that runs cells in this process, with a `stream` that computes nothing.

    All its tokens are 65, except that the last one is 66 where `is_wrong(model, plan)`.
    """
    pytest.importorskip("matplotlib")

    def run_cells(is_wrong: IsWrong, *cells: str) -> None:
        def stream(model, prompts, plan, params: hx.SamplingParams, **_) -> Iterator[hx.TokenEvent]:
            top = tuple((token, -float(token)) for token in range(20))
            for remaining in reversed(range(params.max_new_tokens)):
                token = 66 if remaining == 0 and is_wrong(model, plan) else 65
                yield hx.TokenEvent("0", token, None, 0.0, top)

        monkeypatch.setattr(hx, "stream", stream)
        monkeypatch.setattr(hx, "load", cached_load)
        names = {"__name__": "__main__", "Path": Path, "importlib": importlib}  # the cell "install" imports these two
        for cell in ("devices", *cells):
            exec(compile(CODE[cell], f"cell {cell}", "exec"), names)

    return run_cells


@pytest.mark.parametrize(
    ("cells", "is_wrong"),
    [
        (["decode"], sharded),
        (["decode", "swap"], lambda model, plan: sharded(model, plan) and plan.placement == "striped"),
        (["decode", "swap"], lambda model, plan: sharded(model, plan) and plan.combine == "all_to_all"),
        (["decode", "folder"], lambda model, plan: sharded(model, plan) and model.config.family == "mistral"),
    ],
    ids=["decode", "placement", "combine", "folder"],
)
def test_a_wrong_token_fails_the_cell_that_finds_it(run_cells, cells: list[str], is_wrong: IsWrong):
    with pytest.raises(AssertionError, match="other tokens than one") as failure:
        run_cells(is_wrong, *cells)
    assert str(failure.traceback[-1].path) == f"cell {cells[-1]}"


def test_equal_tokens_pass_every_comparison(run_cells):
    run_cells(lambda model, plan: False, "decode", "swap")


# installing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_helix_jax(tmp_path: Path) -> dict[str, str]:
    """Return an environment where helix_jax cannot be imported and pip only prints its arguments."""
    broken, pip = tmp_path / "fake" / "helix_jax.py", tmp_path / "fake" / "pip.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError")
    pip.write_text("import sys; print('pip got', sys.argv[1:])")
    return {"PYTHONPATH": str(tmp_path / "fake")}


def install(folder: Path, environment: dict[str, str], source: str = "") -> subprocess.CompletedProcess:
    cell = CODE["install"].replace('SOURCE = ""', f"SOURCE = {source!r}")
    return subprocess.run([sys.executable, "-c", cell], cwd=folder, env=ENVIRONMENT | environment, **AS_TEXT)


def test_a_missing_helix_jax_is_installed_from_a_clone_around_or_beside_the_notebook(tmp_path: Path, without_helix_jax):
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "a clone").symlink_to(ROOT)
    for folder in (ROOT / "scripts", tmp_path / "content"):
        done = install(folder, without_helix_jax)
        assert done.returncode == 0, done.stderr
        [arguments] = re.findall(r"pip got (.*)", done.stdout)
        *options, requirement = ast.literal_eval(arguments)
        assert options == ["install", "--quiet"]
        assert re.fullmatch(rf"helix_jax\[plot(,\w+)?\] @ {re.escape(ROOT.as_uri())}", requirement)


def test_an_address_is_passed_to_pip_unchanged(tmp_path: Path, without_helix_jax):
    done = install(tmp_path, without_helix_jax, "git+https://nowhere.example/helix_jax")
    assert "@ git+https://nowhere.example/helix_jax'" in done.stdout


def test_without_a_clone_the_error_says_what_to_do(tmp_path: Path, without_helix_jax):
    done = install(tmp_path, without_helix_jax)
    assert done.returncode == 1
    assert "put one there, or set SOURCE" in done.stderr


# the file -------------------------------------------------------------------------------------------------------------


def test_no_outputs_are_stored():
    for cell in CONTENT["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_file_is_a_notebook_of_version_4_5_for_python_3():
    assert (CONTENT["nbformat"], CONTENT["nbformat_minor"]) == (4, 5)
    assert CONTENT["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in CONTENT["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    assert {cell["cell_type"] for cell in CONTENT["cells"]} == {"markdown", "code"}


@pytest.mark.parametrize("cell", CODE)
def test_a_cell_is_plain_python(cell: str):
    ast.parse(CODE[cell])
