"""The README tells the truth: its code runs, its island is the one in the source, its files exist."""

import re

import numpy as np
import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_code_in_someones_own_model_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for block in BLOCKS[:3]:
        exec(block, names)
    assert names["o_BTNH"].shape == (2, 7, 8, 64)
    assert names["rows"].length_B.tolist() == [7, 3]
    assert np.asarray(names["o_BTNH"], np.float32)[1, 3:].sum() == 0
    assert len(names["tokens"]) == 32
    first, second = names["said"].values()
    assert (first, len(second)) == (names["tokens"][:8], 4)


def test_the_island_shown_is_the_one_that_runs():
    source = (ROOT / "helix_jax" / "helix.py").read_text()
    shown = "".join(f"    {line}" if line.strip() else line for line in BLOCKS[3].splitlines(keepends=True))
    assert shown in source


@pytest.mark.parametrize("folder", ["helix_jax"])
def test_the_tree_names_every_room(folder: str):
    tree = README[README.index("## The tree") : README.index("## The model that ships")]
    rooms = {path.name + "/" * path.is_dir() for path in (ROOT / folder).iterdir() if not path.name.startswith("_")}
    assert rooms == set(re.findall(r"^  (\S+)", tree, re.MULTILINE))


def test_the_picture_is_what_layout_says():
    from helix_jax.layout import BlockLayout, rank_ranges

    assert "prompt 400, decode 400, block 100, cp 4" in README
    columns = {0: 10, 100: 19, 200: 28, 300: 37, 400: 51, 500: 60, 600: 69, 700: 78}
    for rank, ranges in enumerate(rank_ranges(BlockLayout(4, 100), 800, 400)):
        [line] = re.findall(rf"^rank {rank} .*$", README, re.MULTILINE)
        assert [match.start() for match in re.finditer(r"\[", line)] == [columns[first] for first, _ in ranges]
