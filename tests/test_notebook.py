"""The notebook, run from its first cell to its last in one process, as Jupyter would: a cell that fails fails here."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_cli import ENVIRONMENT

NOTEBOOK = ROOT / "scripts" / "helix_colab.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text())
CODE = {cell["id"]: "".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "code"}
AS_TEXT: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 500}

# What Jupyter does, without Jupyter: one namespace, a cell after the other, and each cell's figures drawn at its end.
RUNNER = """
import json, sys
from pathlib import Path

notebook, seen = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
names = {"__name__": "__main__"}
for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
        pyplot = sys.modules.get("matplotlib.pyplot")
        figures = pyplot.get_fignums() if pyplot else []
        for number in figures:
            pyplot.figure(number).savefig(seen / f"{cell['id']}-{number}.png")
        if figures:
            pyplot.close("all")
        (seen / cell["id"]).touch()
"""


def run(notebook: Path, seen: Path) -> subprocess.CompletedProcess:
    """Leaves a file in `seen` for every cell that came to its end, and a picture for every figure."""
    return subprocess.run(
        [sys.executable, "-c", RUNNER, str(notebook), str(seen)],
        cwd=seen,
        env=ENVIRONMENT | {"MPLBACKEND": "Agg", "PIP_NO_INDEX": "1"},
        **AS_TEXT,
    )


def written(file: Path, *sources: str) -> Path:
    """A notebook of these code cells, called cell-0, cell-1 and so on."""
    cells = [{"cell_type": "code", "id": f"cell-{i}", "source": [source]} for i, source in enumerate(sources)]
    file.write_text(json.dumps({"cells": cells}))
    return file


def test_every_cell_runs_and_every_figure_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = run(NOTEBOOK, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout  # helix_jax is there
    assert {path.name for path in tmp_path.iterdir() if not path.suffix} == set(CODE)
    drawing = {name for name, source in CODE.items() if "plt.show()" in source}
    assert {path.stem.rsplit("-", 1)[0] for path in tmp_path.glob("*.png")} == drawing
    assert len(drawing) >= 3


def test_a_cell_that_fails_stops_the_run_and_is_named(tmp_path: Path):
    notebook = written(tmp_path / "bad.ipynb", "token = 1", "assert token == 2, 'a wrong token'", "never = True")
    done = run(notebook, tmp_path)
    assert done.returncode == 1
    assert 'File "cell cell-1"' in done.stderr
    assert "a wrong token" in done.stderr
    assert [(tmp_path / f"cell-{i}").exists() for i in range(3)] == [True, False, False]


def shortened(*names: str, lie: str) -> list[str]:
    """These cells, after a `stream` that computes nothing and whose last token is wrong where `lie` holds."""
    stream = f"""
import importlib.util
from pathlib import Path

def stream(model, prompts, plan, *, max_new_tokens, **options):
    for left in reversed(range(max_new_tokens)):
        yield Decoded((65 + (left == 0 and ({lie})),), np.zeros((1, 256)), 0.0)

hx.stream = stream
"""
    return [CODE["devices"], stream, *(CODE[name] for name in names)]


def test_a_wrong_token_fails_the_cell_that_finds_it(tmp_path: Path):
    pytest.importorskip("matplotlib")
    sharded = "plan.mesh.size > 1"
    for names, lie in [
        (["decode"], sharded),
        (["decode", "swap"], f"{sharded} and plan.layout.placement == 'striped'"),
        (["decode", "swap"], f"{sharded} and plan.combine == 'all_to_all'"),
        (["decode", "folder"], f"{sharded} and model.config.family == 'mistral'"),
    ]:
        done = run(written(tmp_path / "lie.ipynb", *shortened(*names, lie=lie)), tmp_path)
        assert done.returncode == 1
        assert f'File "cell cell-{len(names) + 1}"' in done.stderr
        assert "AssertionError" in done.stderr
        assert "than one" in done.stderr
    done = run(written(tmp_path / "truth.ipynb", *shortened("decode", "swap", lie="False")), tmp_path)
    assert done.returncode == 0, done.stderr


# installing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_helix_jax(tmp_path: Path) -> dict[str, str]:
    """A helix_jax that cannot be imported, and a pip that says what it was asked for."""
    broken, pip = tmp_path / "instead" / "helix_jax.py", tmp_path / "instead" / "pip.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError")
    pip.write_text("import sys; print('pip got', sys.argv[1:])")
    return {"PYTHONPATH": str(tmp_path / "instead")}


def install(folder: Path, environment: dict[str, str], source: str = "") -> subprocess.CompletedProcess:
    cell = CODE["install"].replace('SOURCE = ""', f"SOURCE = {source!r}")
    return subprocess.run([sys.executable, "-c", cell], cwd=folder, env=ENVIRONMENT | environment, **AS_TEXT)


def test_what_is_missing_is_installed_from_the_clone_around_or_beside(tmp_path: Path, without_helix_jax):
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "a clone").symlink_to(ROOT)
    for folder in (ROOT / "scripts", tmp_path / "content"):
        done = install(folder, without_helix_jax)
        assert done.returncode == 0, done.stderr
        [asked] = re.findall(r"pip got (.*)", done.stdout)
        *options, wanted = ast.literal_eval(asked)
        assert options == ["install", "--quiet"]
        assert re.fullmatch(rf"helix_jax\[plot(,\w+)?\] @ {re.escape(ROOT.as_uri())}", wanted)


def test_an_address_goes_to_pip_as_it_is(tmp_path: Path, without_helix_jax):
    done = install(tmp_path, without_helix_jax, "git+https://nowhere.example/helix_jax")
    assert "@ git+https://nowhere.example/helix_jax'" in done.stdout


def test_without_a_clone_the_reader_is_told_what_to_do(tmp_path: Path, without_helix_jax):
    done = install(tmp_path, without_helix_jax)
    assert done.returncode == 1
    assert "put one there, or name one in SOURCE" in done.stderr


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
def test_cells_are_plain_python(cell: str):
    ast.parse(CODE[cell])
