#!/usr/bin/env python3
"""Executes helix_colab.ipynb in an empty folder, and stores its outputs in it.

pip install '.[notebook]'
python scripts/run_notebook.py

The notebook runs on a CPU that is split into fake devices, and without ipywidgets, so that drawings take the place of
sliders. Stored are what the cells print and draw, without warnings and the times of cells, and a hash of the code that
was executed. `--check` only tells whether the stored outputs are those of the code.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "scripts" / "helix_colab.ipynb"
HASH = "executed_code_sha256"  # in the metadata of the notebook
TIMEOUT_S = 1800  # of a cell
MAX_COLORS = 128  # of a picture

Json = Any  # a notebook, or a part of one


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute the notebook, and store its outputs in it.")
    parser.add_argument("--check", action="store_true", help="only check that the stored outputs are those of the code")
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK, help="the notebook (default: helix_colab.ipynb)")
    options = parser.parse_args()
    if options.check:
        fault = find_fault(json.loads(options.notebook.read_text()))
        if fault:
            print(f"{fault}: run python scripts/run_notebook.py", file=sys.stderr)
        return 1 if fault else 0
    store_outputs(options.notebook)
    return 0


def find_fault(notebook: Json) -> str | None:
    """Return why the stored outputs are not those of the code, or None if they are."""
    for cell in code_cells(notebook):
        if not cell["outputs"]:
            return f"cell '{cell['id']}' has no output"
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            return f"cell '{cell['id']}' failed"
    if notebook["metadata"].get(HASH) != hash_code(notebook):
        return "the code of the notebook is not the code that was executed"
    return None


def code_cells(notebook: Json) -> list[Json]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def hash_code(notebook: Json) -> str:
    """Return a hash of the code of all cells, in their order."""
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def store_outputs(path: Path) -> None:
    """Execute a notebook and write it back with its outputs. If a cell fails, the file does not change."""
    import nbformat  # pyright: ignore[reportMissingImports]

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    for cell in code_cells(notebook):
        cell["metadata"] = {}
        cell["outputs"] = [clean for output in cell["outputs"] if (clean := clean_output(output))]
    notebook["metadata"][HASH] = hash_code(notebook)
    notebook["metadata"]["language_info"] = {"name": "python"}  # without the version, which differs by machine
    nbformat.write(notebook, path)


def execute(notebook: Json, folder: Path) -> None:
    """Execute a notebook with this copy of helix_jax, in an empty subfolder of `folder`."""
    from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

    modules, empty = folder / "modules", folder / "empty"
    modules.mkdir()
    empty.mkdir()
    (modules / "ipywidgets.py").write_text("raise ImportError\n")
    os.environ |= {"PYTHONPATH": os.pathsep.join([str(modules), str(ROOT)]), "JAX_PLATFORMS": "cpu"}
    where = {"metadata": {"path": str(empty)}}
    NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=where, record_timing=False).execute()


def clean_output(output: Json) -> Json | None:
    """Return an output as it is stored, or None if it is a warning or a message of a library."""
    if output["output_type"] == "stream":
        return output if output["name"] == "stdout" else None
    data = output["data"]
    if "image/png" in data:
        data["image/png"] = reduce_png(data["image/png"])
    return output


def reduce_png(encoded: str) -> str:
    """Return a picture with fewer colours, which takes less space."""
    from PIL import Image  # pyright: ignore[reportMissingImports] - a dependency of matplotlib

    written = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    picture.quantize(MAX_COLORS).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
