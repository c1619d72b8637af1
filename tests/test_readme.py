"""Checks README.md: its code runs, the core it shows is the source, its figure and its file list are right."""

import re

import numpy as np

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
*EXAMPLES, CORE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_python_examples_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for block in EXAMPLES:
        exec(block, names)
    assert names["o_BTNH"].shape == (2, 7, 8, 64)
    assert names["rows"].length_B.tolist() == [7, 3]
    assert np.asarray(names["o_BTNH"], np.float32)[1, 3:].sum() == 0
    assert len(names["tokens"]) == 32
    first, second = names["tokens_of"].values()
    assert (first, len(second)) == (names["tokens"][:8], 4)
    assert [(len(sample.tokens), sample.seed) for sample in names["samples"]] == [(16, seed) for seed in range(1, 5)]


def test_the_core_shown_is_the_source():
    source = (ROOT / "helix_jax" / "helix.py").read_text()
    shown = "".join(f"    {line}" if line.strip() else line for line in CORE.splitlines(keepends=True))
    assert shown in source


def test_the_source_tree_names_every_module():
    tree = README[README.index("## The source tree") : README.index("## The demo model")]
    folder = ROOT / "helix_jax"
    paths = [path for path in folder.iterdir() if not path.name.startswith("_")]
    # Of a folder that was moved, __pycache__ may be left in a checkout.
    paths = [path for path in paths if path.is_file() or any(child.name != "__pycache__" for child in path.iterdir())]
    modules = {path.name + "/" * path.is_dir() for path in paths}
    assert modules == set(re.findall(r"^  (\S+)", tree, re.MULTILINE))


def test_the_figure_is_what_layout_reports():
    from helix_jax.layout import BlockLayout, rank_ranges

    assert "prompt 400, decode 400, block 100, cp 4" in README
    columns = {0: 10, 100: 19, 200: 28, 300: 37, 400: 51, 500: 60, 600: 69, 700: 78}
    for rank, ranges in enumerate(rank_ranges(BlockLayout(4, 100), 800, 400)):
        [line] = re.findall(rf"^rank {rank} .*$", README, re.MULTILINE)
        assert [match.start() for match in re.finditer(r"\[", line)] == [columns[first] for first, _ in ranges]
