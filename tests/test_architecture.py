"""The rooms and what may lead to which: read from the source, so that the house keeps its shape."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "helix_jax"
CORE = {"numerics", "layout", "mesh", "attention"}
MAY_IMPORT = {
    "numerics": set(),
    "layout": set(),
    "mesh": set(),
    "processes": set(),
    "config": set(),
    "attention": {"numerics"},
    "combine": {"attention"},
    "kernels": {"mesh", "attention", "numerics", "kernels"},
    "plan": {"layout", "mesh", "combine", "config", "kernels"},
    "cache": {"layout", "mesh", "plan"},
    "helix": CORE | {"combine", "plan", "cache", "kernels"},
    "models": {"config", "mesh", "numerics", "combine", "models"},
    "ring": {"attention", "combine", "layout", "mesh", "numerics"},
    "sampling": set(),
    "families": {"config", "families"},
    "abstract": {"cache", "checkpoint", "config", "mesh", "models", "plan", "sampling"},
    "checkpoint": {"config", "mesh", "models", "families", "checkpoint", "processes"},
    "step": {"cache", "config", "plan", "helix", "mesh", "models", "sampling"},
    "engine": {
        *("cache", "config", "engine", "generation", "layout", "mesh", "models", "plan", "processes", "sampling"),
        *("step", "text"),
    },
    "generation": {"cache", "config", "plan", "mesh", "models", "sampling", "step"},
    "text": {"config"},
    "data": {"text"},
    "recall": set(),
    "train": {"config", "layout", "mesh", "models", "ring", "train"},
}
ANYTHING = {"cli", "__init__", "__main__"}

COLLECTIVES = {"psum", "pmax", "pmin", "pmean", "psum_scatter", "all_gather", "all_to_all", "ppermute", "pshuffle"}
ONLY_IN = {  # a name -> the rooms that may use it
    **{name: {"combine"} for name in COLLECTIVES},
    "shard_map": {"helix", "ring", "models/moe.py"},
    "PartitionSpec": {"mesh"},
}

files = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("helix_jax.")}


def used_names(tree: ast.AST) -> set[str]:
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return attributes | {alias.name for node in imports for alias in node.names}


@pytest.mark.parametrize("file", files, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_each_room_keeps_to_its_place(file: Path):
    tree = ast.parse(file.read_text())
    name = room(file)
    assert ast.get_docstring(tree), "a module opens with the sentence it is about"
    if name not in ANYTHING:
        surplus = imported(tree) - MAY_IMPORT[name]
        assert not surplus, f"{name} may not import {surplus}"
    for word, rooms in ONLY_IN.items():
        if word in used_names(tree):
            assert rooms & {name, str(file.relative_to(PACKAGE))}, f"{word} belongs in {rooms}"


def test_the_tables_above_can_fail():
    tree = ast.parse("from helix_jax.step import step\nfrom jax import lax\nlax.psum(1, 'cp')\nimport helix_jax.cli")
    assert imported(tree) == {"step", "cli"}
    assert "psum" in used_names(tree)
    assert "PartitionSpec" in used_names(ast.parse("from jax.sharding import PartitionSpec as P"))


def test_nothing_in_the_table_is_missing():
    assert set(MAY_IMPORT) == {room(file) for file in files} - ANYTHING


def test_the_public_names_exist_and_are_documented():
    import helix_jax

    for name in helix_jax.__all__:
        found = getattr(helix_jax, name)
        # A dataclass or NamedTuple without one gets its own signature for a docstring.
        documented = found.__doc__ and not found.__doc__.startswith(f"{name}(")
        assert isinstance(found, tuple) or documented, f"{name} has no docstring"
