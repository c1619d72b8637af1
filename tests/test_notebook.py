"""Tests the notebook: its cells, its stored outputs, and the script that stores them.

The cells that only draw run in this process. A long test runs all cells in order in one process, as Jupyter does.
"""

import ast
import base64
import copy
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import helix_jax as hx
from tests import test_readme
from tests.conftest import ROOT
from tests.snippets import anchors
from tests.test_cli import ENVIRONMENT

NOTEBOOK = ROOT / "scripts" / "helix_colab.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text())
CODE = {cell["id"]: "".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "code"}
DRAWING = {name for name, source in CODE.items() if "plt.show()" in source}
AS_TEXT: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 500}
OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # the notebook runs longer than it compiles
MAX_CELLS, MAX_BYTES = 20, 250_000

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
        env=ENVIRONMENT | {"MPLBACKEND": "Agg", "PIP_NO_INDEX": "1", "PYTHONPATH": str(ROOT)} | OPTIMISED,
        **AS_TEXT,
    )


@pytest.mark.slow
def test_every_cell_runs_and_every_figure_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = run(NOTEBOOK, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout  # helix_jax is already installed
    assert {path.name for path in tmp_path.iterdir() if not path.suffix} == set(CODE)
    assert {path.stem.rsplit("-", 1)[0] for path in tmp_path.glob("*.png")} == DRAWING


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


# the cells that draw --------------------------------------------------------------------------------------------------

RunCells = Callable[..., dict[str, Any]]


@pytest.fixture
def run_cells(monkeypatch: pytest.MonkeyPatch) -> RunCells:
    """Return a function that runs cells in this process, after the cell "devices", and returns their names."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: None)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # so that it cannot be imported

    def run_cells(*cells: str, **given: Any) -> dict[str, Any]:
        names = {"__name__": "__main__"}
        with matplotlib.rc_context():
            for cell in ("devices", *cells):
                exec(compile(CODE[cell], f"cell {cell}", "exec"), names)
                names |= given
            for number in pyplot.get_fignums():
                pyplot.figure(number).savefig(io.BytesIO())  # only then is everything drawn
        pyplot.close("all")
        return names

    return run_cells


def test_the_first_figure_shows_that_tensor_parallelism_copies_and_helix_divides(run_cells: RunCells):
    names = run_cells("problem")
    assert names["counts"] == [1, 2, 4, 8, 16, 32]
    whole = 2**20 * 32 * 2 * 8 * 128 * 2 / 1e9  # tokens, layers, keys and values, heads, width, bytes
    assert names["helix"] == pytest.approx([whole / n for n in names["counts"]])
    assert names["tensor"] == pytest.approx([whole / min(n, 8) for n in names["counts"]])
    assert f"{whole:.0f} GB" in json.dumps(CONTENT)


def chip(index: int) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", device_kind="a chip", id=index)


@pytest.mark.parametrize(
    ("chips", "cp", "printed"),
    [
        ([], 8, "parts of one CPU"),
        ([chip(0)], 8, "One chip cannot"),
        ([chip(0), chip(1)], 2, "among 2 devices: a chip"),
    ],
    ids=["a CPU", "one chip", "two chips"],
)
def test_all_chips_are_used_or_else_the_parts_of_the_cpu(run_cells: RunCells, monkeypatch, capsys, chips, cp, printed):
    cpus = jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda platform=None: chips if chips and platform is None else cpus)
    names = run_cells("ownership", "sliders", "exact")
    assert (names["cp"], len(names["devices"])) == (cp, cp)
    assert printed in capsys.readouterr().out


def test_sliders_choose_block_cp_and_placement(run_cells: RunCells, monkeypatch):
    drawn: list[dict[str, Any]] = []
    widgets = ModuleType("ipywidgets")
    monkeypatch.setattr(
        widgets, "interact", lambda draw, **ranges: drawn.append({"draw": draw, **ranges}), raising=False
    )
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    run_cells("ownership", "sliders")
    [ranges] = drawn
    draw = ranges.pop("draw")
    assert ranges == {"block": (8, 64, 8), "cp": (1, 8), "placement": list(hx.PLACEMENTS)}
    for placement in hx.PLACEMENTS:
        draw(64, 1, placement)
        draw(8, 8, placement)


class Session:
    """A `CacheSession` whose model forgets the passkey if `forgets(erased rank)`, and that never stores a token."""

    def __init__(self, forgets: Callable[[int | None], bool], plan: hx.Plan):
        self.forgets, self.erased = forgets, None
        shards = [SimpleNamespace(device=device, data=np.zeros((4, 1, 2, 1))) for device in plan.mesh.devices.flat]
        self.caches: Any = [SimpleNamespace(addressable_shards=shards, pages=16)]

    def zero_rank(self, rank: int) -> None:
        self.erased = rank

    def answer(self, questions: list[list[int]], count: int) -> np.ndarray:
        answer = b"0" * count if self.forgets(self.erased) else b"48213"
        return np.frombuffer(answer, np.uint8)[None]

    def decode(self, count: int) -> None:
        pass


def run_with(run_cells: RunCells, monkeypatch, forgets: Callable[[int | None], bool], *cells: str) -> dict[str, Any]:
    monkeypatch.setattr(hx, "load", lambda *_: None)
    monkeypatch.setattr(jax.tree, "map", lambda _, caches: caches)
    return run_cells("ownership", *cells, CacheSession=lambda model, plan, *_, **__: Session(forgets, plan))


def test_the_owner_of_the_passkey_is_highlighted(run_cells: RunCells, monkeypatch):
    names = run_with(run_cells, monkeypatch, lambda erased: erased == 3, "recall")
    assert names["owners"] == {3}
    assert len(names["TEXT"]) == 1024
    texts = [text.get_text() for text in names["axes"].texts]
    assert [text for text in texts if "\u2717" in text] == ["00000 \u2717"]
    assert texts.count("48213 \u2713") == 7


def test_a_forgotten_passkey_stops_the_cell(run_cells: RunCells, monkeypatch):
    with pytest.raises(AssertionError, match="does not recall the passkey"):
        run_with(run_cells, monkeypatch, lambda erased: True, "recall")


def test_a_memory_that_differs_from_the_layout_stops_the_cell(run_cells: RunCells, monkeypatch):
    with pytest.raises(AssertionError, match="the memory differs from the layout"):
        run_with(run_cells, monkeypatch, lambda erased: False, "recall", "growth")


# installing -----------------------------------------------------------------------------------------------------------

PIP = """
import json, os, sys
from pathlib import Path
Path(__file__).with_name('arguments.json').write_text(json.dumps(sys.argv[1:]))
sys.exit(os.environ.get('PIP_ERROR'))
"""


@pytest.fixture
def without_helix_jax(tmp_path: Path) -> dict[str, str]:
    """Return an environment where helix_jax cannot be imported and pip only writes down its arguments."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "helix_jax.py").write_text("raise ImportError")
    (modules / "pip.py").write_text(PIP)
    return {"PYTHONPATH": str(modules)}


def install(folder: Path, environment: dict[str, str], before: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", before + CODE["install"]]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT | environment, **AS_TEXT)


def pip_arguments(environment: dict[str, str]) -> list[str]:
    return json.loads((Path(environment["PYTHONPATH"]) / "arguments.json").read_text())


def make_clone(folder: Path) -> Path:
    (folder / "helix_jax").mkdir(parents=True)
    (folder / "helix_jax" / "__init__.py").touch()
    (folder / "pyproject.toml").touch()
    return folder


def make_file(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(
    "make_source",
    [
        lambda folder: make_clone(folder / "helix-main"),
        lambda folder: make_clone(folder.parent),
        lambda folder: make_file(folder / "helix_jax-0.1.0-py3-none-any.whl"),
        lambda folder: make_file(folder.parent / "helix_jax-0.1.0.tar.gz"),
        lambda folder: make_file(folder / "helix-jax-main.zip"),
    ],
    ids=["a clone beside", "a clone around", "a wheel", "an archive above", "a zip"],
)
def test_a_missing_helix_jax_is_installed_from_what_exists(tmp_path: Path, without_helix_jax, make_source):
    folder = tmp_path / "project" / "scripts"
    folder.mkdir(parents=True)
    source = make_source(folder)
    done = install(folder, without_helix_jax)
    assert done.returncode == 0, done.stderr
    *options, requirement = pip_arguments(without_helix_jax)
    assert options == ["install", "--quiet"]
    assert re.fullmatch(rf"helix_jax\[plot(,\w+)?\] @ {re.escape(source.as_uri())}", requirement)


def test_without_a_source_it_comes_from_the_package_index(tmp_path: Path, without_helix_jax):
    done = install(tmp_path, without_helix_jax)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"helix_jax\[plot(,\w+)?\]", pip_arguments(without_helix_jax)[-1])


def test_if_there_is_nothing_to_install_one_line_says_what_to_do(tmp_path: Path, without_helix_jax):
    done = install(tmp_path, without_helix_jax | {"PIP_ERROR": "ERROR: No matching distribution found for helix_jax"})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: helix_jax was not found: put its wheel, archive or clone here")
    assert "No matching distribution" not in done.stdout


def test_what_pip_says_is_shown(tmp_path: Path, without_helix_jax):
    done = install(tmp_path, without_helix_jax | {"PIP_ERROR": "ERROR: no space left"})
    assert done.returncode == 1
    assert "ERROR: no space left" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: pip failed")


def test_a_jax_that_is_in_use_and_was_replaced_needs_a_restart(tmp_path: Path, without_helix_jax):
    old = "import sys, types\nsys.modules['jax'] = types.ModuleType('jax')\nsys.modules['jax'].__version__ = '0.7.2'\n"
    done = install(tmp_path, without_helix_jax, old)
    assert done.returncode == 1
    assert "restart the runtime" in done.stderr.splitlines()[-1]


# the stored outputs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the script that stores the outputs."""
    spec = importlib.util.spec_from_file_location("run_notebook", ROOT / "scripts" / "run_notebook.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs() -> list[dict[str, Any]]:
    return [output for cell in CONTENT["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_the_stored_outputs_are_those_of_the_code(script: ModuleType):
    fault = script.find_fault(CONTENT)
    assert fault is None, f"{fault}: run python scripts/run_notebook.py"


def test_other_code_and_missing_outputs_are_found(script: ModuleType, tmp_path: Path, monkeypatch, capsys):
    changed, empty, failed = (copy.deepcopy(CONTENT) for _ in range(3))
    script.code_cells(changed)[-1]["source"].append("\n")
    script.code_cells(empty)[0]["outputs"] = []
    script.code_cells(failed)[0]["outputs"][0]["output_type"] = "error"
    assert script.find_fault(changed) == "the code of the notebook is not the code that was executed"
    assert script.find_fault(empty) == "cell 'install' has no output"
    assert script.find_fault(failed) == "cell 'install' failed"

    notebook = tmp_path / "changed.ipynb"
    notebook.write_text(json.dumps(changed))
    for path, status in ((notebook, 1), (NOTEBOOK, 0)):
        monkeypatch.setattr(sys, "argv", ["run_notebook.py", "--check", "--notebook", str(path)])
        assert script.main() == status
    assert capsys.readouterr().err.count("run python scripts/run_notebook.py") == 1


def test_every_drawing_is_stored_and_no_warning_or_path(script: ModuleType):
    for cell in script.code_cells(CONTENT):
        pictures = ["image/png" in output.get("data", {}) for output in cell["outputs"]]
        assert any(pictures) == (cell["id"] in DRAWING)
    assert len(DRAWING) >= 6
    printed = ["".join(output["text"]) for output in outputs() if output["output_type"] == "stream"]
    assert {output.get("name", "stdout") for output in outputs()} == {"stdout"}
    assert not re.search(r"(?<!\w)/(tmp|home|root|usr|work)\b|Warning", "".join(printed))
    assert len(NOTEBOOK.read_bytes()) < MAX_BYTES


def test_outputs_are_cleaned_and_pictures_reduced(script: ModuleType):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, written = pyplot.figure(), io.BytesIO()
    figure.add_subplot().plot([1, 3, 2])
    figure.savefig(written, format="png")
    pyplot.close(figure)
    picture = base64.b64encode(written.getvalue()).decode()
    drawn = script.clean_output({"output_type": "display_data", "data": {"image/png": picture}, "metadata": {}})
    assert base64.b64decode(drawn["data"]["image/png"]).startswith(b"\x89PNG")
    assert len(drawn["data"]["image/png"]) < len(picture)
    assert script.clean_output({"output_type": "stream", "name": "stderr", "text": "a warning"}) is None
    assert script.clean_output({"output_type": "stream", "name": "stdout", "text": "x"})["text"] == "x"


@pytest.mark.slow
def test_the_script_executes_a_notebook_in_an_empty_folder(script: ModuleType, tmp_path: Path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setattr("os.environ", dict(ENVIRONMENT))
    code = "import os, helix_jax, sys\nprint(os.listdir(), helix_jax.__version__)\nprint('a warning', file=sys.stderr)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    path = tmp_path / "small.ipynb"
    nbformat.write(notebook, path)
    script.store_outputs(path)
    stored = json.loads(path.read_text())
    assert script.find_fault(stored) is None
    [output] = stored["cells"][0]["outputs"]
    assert output["text"] == [f"[] {hx.__version__}\n"]


# the file -------------------------------------------------------------------------------------------------------------


def test_the_file_is_a_short_notebook_of_version_4_5_for_python_3():
    assert (CONTENT["nbformat"], CONTENT["nbformat_minor"]) == (4, 5)
    assert CONTENT["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in CONTENT["cells"]]
    assert len(set(ids)) == len(ids) <= MAX_CELLS
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    assert {cell["cell_type"] for cell in CONTENT["cells"]} == {"markdown", "code"}


@pytest.mark.parametrize("cell", CODE)
def test_a_cell_is_plain_python(cell: str):
    ast.parse(CODE[cell])


def test_links_lead_to_files_and_headings():
    texts = ["".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(links) >= 5
    for link in links:
        name, _, anchor = link.partition("#")
        page = NOTEBOOK.parent / name
        assert page.is_file() or page.resolve() in getattr(test_readme, "LATER", ()), link
        assert not anchor or anchor in anchors(page), link
