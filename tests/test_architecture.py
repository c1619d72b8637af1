"""Checks the source itself: imports, the use of collectives, docstrings, old names, lengths, and repeated code.

Every check returns a list of findings, `file:line: what is wrong`, and has a negative control that shows that it can
fail.
"""

import ast
import inspect
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "helix_jax"

# What each module or subpackage of helix_jax may import from the others. Imports go one way.
MAY_IMPORT = {
    "numerics": set(),
    "quantisation": set(),
    "validation": set(),
    "processes": set(),
    "devices": {"mesh", "processes", "validation"},
    "parsing": {"validation"},
    "layout": {"validation"},
    "mesh": {"validation"},
    "config": {"validation"},
    "sampling": {"validation"},
    "heads": {"config", "mesh"},
    "arrays": {"mesh"},
    "text": {"config", "validation"},
    "chat": {"validation"},
    "folder": {"chat", "checkpoint", "config", "text", "validation"},
    "attention": {"numerics", "quantisation"},
    "combine": {"attention", "validation"},
    "kernels": {"attention", "mesh", "numerics", "quantisation", "validation"},
    "plan": {"combine", "config", "heads", "kernels", "layout", "mesh", "quantisation", "validation"},
    "cache": {
        "arrays",
        "config",
        "heads",
        "kernels",
        "layout",
        "mesh",
        "numerics",
        "plan",
        "quantisation",
        "validation",
    },
    "helix": {"attention", "cache", "combine", "kernels", "mesh", "plan", "validation"},
    "models": {"combine", "config", "mesh", "numerics"},
    "families": {"config", "parsing", "validation"},
    "checkpoint": {"arrays", "config", "families", "heads", "mesh", "models", "plan", "processes", "validation"},
    "abstract": {"cache", "checkpoint", "config", "heads", "kernels", "mesh", "models", "plan", "sampling"},
    "step": {"cache", "config", "helix", "mesh", "models", "plan", "sampling", "validation"},
    "speculation": {"validation"},
    "drafting": {"cache", "config", "models", "plan", "sampling", "speculation", "step"},
    "decoding": {"cache", "config", "drafting", "mesh", "models", "plan", "sampling", "speculation", "step"},
    "engine": {
        *("arrays", "cache", "config", "decoding", "drafting", "helix", "layout", "mesh", "models", "plan"),
        *("processes", "quantisation", "sampling", "speculation", "step", "text", "validation"),
    },
    "draft_folder": {"drafting", "folder", "plan", "speculation"},
    "planner": {"cache", "config", "heads", "mesh", "parsing", "quantisation", "validation"},
    "generation": {"engine", "mesh", "models", "plan", "validation"},
    "llm": {"chat", "checkpoint", "devices", "draft_folder", "engine", "folder", "generation", "plan"},
    "training": {
        *("arrays", "attention", "checkpoint", "combine", "config", "layout", "mesh", "models", "numerics", "parsing"),
        *("processes", "text", "validation"),
    },
    "evaluation": {
        *("arrays", "cache", "checkpoint", "config", "decoding", "devices", "engine", "folder", "layout", "mesh"),
        *("models", "parsing", "plan", "sampling", "step", "text", "training", "validation"),
    },
}
MAY_IMPORT_ANYTHING = {"cli", "__init__", "__main__"}

COLLECTIVES = {"psum", "pmax", "pmin", "pmean", "psum_scatter", "all_gather", "all_to_all", "ppermute", "pshuffle"}
ONLY_IN = {  # a name -> the files that may use it
    **{name: {"combine.py"} for name in COLLECTIVES},
    "shard_map": {"helix.py", "training/ring.py", "models/moe.py"},
    "PartitionSpec": {"mesh.py"},
}

SECTIONS = {"Args", "Returns", "Raises", "Yields", "Attributes", "Source", "Example"}
FRAGMENT_OPENINGS = {"What", "Which", "How", "Whether", "Of", "As", "By", "If", "Where", "When", "That", "Also"}

OLD_WORDS = (
    *("Said", "Ended", "Figures", "Told", "Twin", "TextStream", "ManyOutput", "WrittenElsewhere"),
    *("hand_over", "surprise", "stop_ids", "settle", "hear", "heard", "said", "told", "mend", "mended", "island"),
    *("chosen_groups", "choice_bias", "cache_shape", "held_ranges", "slots_needed", "from_mapping", "on_one_device"),
    *("attend_by", "with_sink", "pass_on", "by_first", "twin", "twins", "whoever", "nobody", "seat"),
)
OLD_IDENTIFIERS = {"held", "Held", "Seat", "Flight", "flight", "Result", "dealt", "widened", "room", "house"}

MAX_LINES, MAX_MEDIAN_LINES, MAX_PARAMETERS, MAX_REPEATED_LINES = 60, 10, 8, 9
Function = ast.FunctionDef | ast.AsyncFunctionDef

FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in (*FILES, *SCRIPTS, *TESTS)}


def show(file: Path) -> str:
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


def assert_none(findings: Iterable[str]) -> None:
    if findings := list(findings):
        pytest.fail(f"{len(findings)} findings:\n" + "\n".join(findings), pytrace=False)


# Imports, and the names that belong in one module


def part_of(file: Path) -> str:
    """Return the module or subpackage of helix_jax to which a file belongs."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the module or subpackage of every import from helix_jax."""
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "helix_jax":
            modules = [f"helix_jax.{alias.name}" if alias.name in MAY_IMPORT else "helix_jax" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            if module.split(".")[0] == "helix_jax":
                yield node.lineno, [*module.split("."), "__init__"][1]


def used_names(tree: ast.AST) -> set[str]:
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return attributes | {alias.name for node in imports for alias in node.names}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_and_collectives_follow_the_tables(file: Path):
    tree, part = TREES[file], part_of(file)
    assert ast.get_docstring(tree), f"{show(file)}:1: the module has no docstring"
    if part not in MAY_IMPORT_ANYTHING:
        allowed = MAY_IMPORT[part] | {part}
        findings = [f"{show(file)}:{line}: {part} may not import {name}" for line, name in imported_parts(tree)]
        assert_none(finding for finding in findings if finding.split()[-1] not in allowed)
    for name, places in ONLY_IN.items():
        if name in used_names(tree):
            assert str(file.relative_to(PACKAGE)) in places, f"{show(file)}: {name} may only be used in {places}"


def test_the_import_checks_can_fail():
    source = "from helix_jax.step import step\nfrom jax import lax\nlax.psum(1, 'cp')\nimport helix_jax.cli\n"
    source += "from helix_jax import processes, load\nimport helix_jax"
    tree = ast.parse(source)
    assert list(imported_parts(tree)) == [(1, "step"), (4, "cli"), (5, "processes"), (5, "__init__"), (6, "__init__")]
    assert "psum" in used_names(tree)
    assert "PartitionSpec" in used_names(ast.parse("from jax.sharding import PartitionSpec as P"))


def test_the_import_table_names_every_module():
    assert set(MAY_IMPORT) == {part_of(file) for file in FILES} - MAY_IMPORT_ANYTHING


def test_imports_go_one_way():
    """No module imports itself through others: the rows of the table can be ordered."""
    left = {part: set(parts) for part, parts in MAY_IMPORT.items()}
    while free := {part for part, parts in left.items() if not parts & set(left)}:
        left = {part: parts for part, parts in left.items() if part not in free}
    assert not left, f"these import each other: {sorted(left)}"


# Placement names


def placement_comparisons(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that compare something with the name of a placement."""
    placements = {"helix", "striped", "last_rank"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            constants = [c for side in (node.left, *node.comparators) for c in ast.walk(side)]
        elif isinstance(node, ast.MatchValue):
            constants = [node.value]
        else:
            continue
        if any(isinstance(c, ast.Constant) and c.value in placements for c in constants):
            yield node.lineno if isinstance(node, ast.Compare) else node.value.lineno


def test_only_the_layout_compares_placement_names():
    files = [file for file in (*FILES, *SCRIPTS) if file != PACKAGE / "layout.py"]
    assert_none(
        f"{show(file)}:{line}: use a property of BlockLayout instead of the name of a placement"
        for file in files
        for line in placement_comparisons(TREES[file])
    )


def test_the_check_of_placement_names_can_fail():
    source = "a = 'helix'\nif a != 'striped': pass\nb = a in ('last_rank', 'x')\nmatch a:\n    case 'helix': pass"
    assert sorted(placement_comparisons(ast.parse(source))) == [2, 3, 5]
    assert list(placement_comparisons(TREES[PACKAGE / "layout.py"]))


# Docstrings


def exported_names(file: Path) -> list[str]:
    """Return the `__all__` of a module."""
    for node in TREES[file].body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    return []


def definition(file: Path, name: str) -> tuple[Path, ast.AST | None]:
    """Return where a name that a module exports is defined, and its function or class, or None if it is a value."""
    for node in TREES[file].body:
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return file, node
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            module = ROOT.joinpath(*(node.module or "").split("."))
            target = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            return definition(target, name) if target in TREES else (file, None)
    return file, None


def public_definitions(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the public functions and classes of a module, and the public methods of these classes."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from public_methods(node)


def public_methods(node: ast.AST) -> list[ast.AST]:
    body = node.body if isinstance(node, ast.ClassDef) else []
    methods = [method for method in body if isinstance(method, Function) and not method.name.startswith("_")]
    return [method for method in methods if "overload" not in map(ast.unparse, method.decorator_list)]


def parameters(node: ast.AST) -> list[str]:
    """Return the parameters of a function, or the fields and the parameters of `__init__` of a class."""
    if isinstance(node, ast.ClassDef):
        fields = [child.target.id for child in node.body if isinstance(child, ast.AnnAssign)]
        constructors = [child for child in node.body if isinstance(child, Function) and child.name == "__init__"]
        return fields + [name for constructor in constructors for name in parameters(constructor)]
    arguments = node.args
    variadic = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    names = [x.arg for x in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic)]
    return [name for name in names if name not in ("self", "cls")]


def assigned_attributes(node: ast.AST) -> set[str]:
    """Return the attributes of `self` that a class assigns; a base class may assign some of them."""
    targets = (target for target in ast.walk(node) if isinstance(target, ast.Attribute))
    return (
        {target.attr for target in targets if isinstance(target.ctx, ast.Store)}
        if isinstance(node, ast.ClassDef)
        else set()
    )


def docstring_faults(node: ast.AST) -> Iterator[str]:
    """Yield what is wrong with the docstring of a function or class: its summary, its sections or their arguments."""
    text = ast.get_docstring(node) or ""
    summary, *lines = text.splitlines() or [""]
    if not re.match(r"[A-Z`\"(].*[.:]$", summary):
        yield f"the first line is no sentence with a capital and a period: {summary[:60]!r}"
    if isinstance(node, Function) and not node.decorator_list and summary.split(" ")[0] in FRAGMENT_OPENINGS:
        yield f"the summary does not start with a verb: {summary[:60]!r}"
    section = None
    for line in lines:
        if header := re.match(r"(\w+):( .*)?$", line):
            section = header[1]
            if section not in SECTIONS:
                yield f"unknown section or argument outside of Args: {line[:60]!r}"
        entry = re.match(r" {4}\*{0,2}(\w+):", line) if section in ("Args", "Attributes") else None
        if entry and entry[1] not in (*parameters(node), *assigned_attributes(node), "cls"):
            yield f"{section} describes {entry[1]!r}, which is not a parameter"


def docstring_findings(file: Path, node: ast.AST) -> Iterator[str]:
    return (f"{show(file)}:{node.lineno}: {node.name}: {fault}" for fault in docstring_faults(node))


def test_every_exported_name_has_a_docstring():
    packages = [file for file in FILES if exported_names(file)]
    assert PACKAGE / "__init__.py" in packages
    nodes = {definition(file, name) for file in packages for name in exported_names(file)}
    assert len(nodes) > 60
    exported = [(file, node) for file, node in nodes if node is not None]
    documented = [(file, n) for file, node in exported for n in (node, *public_methods(node))]
    assert_none(sorted(finding for file, node in documented for finding in docstring_findings(file, node)))


def test_docstrings_of_public_functions_and_classes_have_the_form():
    nodes = [(file, node) for file in FILES for node in public_definitions(TREES[file]) if ast.get_docstring(node)]
    assert_none(finding for file, node in nodes for finding in docstring_findings(file, node))


@pytest.mark.parametrize(
    ("docstring", "faults"),
    [
        ("Return a.\n\n    Args:\n        a: A number.\n\n    Raises:\n        ValueError: It is 0.\n", 0),
        ("Return a.\n\n    Source: a book.\n", 0),
        ("", 1),
        ("return a.", 1),
        ("Return a", 1),
        ("What a is.", 1),
        ("Return a.\n\n    a: a number.\n", 1),
        ("Return a.\n\n    Arguments:\n        a: A number.\n", 1),
        ("Return a.\n\n    Args:\n        b: A number.\n", 1),
    ],
)
def test_the_check_of_docstrings_can_fail(docstring: str, faults: int):
    [node] = ast.parse(f'def f(a):\n    """{docstring}"""').body
    assert len(list(docstring_faults(node))) == faults


# Old names


def prose_files() -> list[Path]:
    """Return the files that people read: code, documentation and configs, without the data."""
    found = [file for folder in ("helix_jax", "scripts", "tests", "configs") for file in (ROOT / folder).rglob("*")]
    excluded = (ROOT / "scripts" / "data", PACKAGE / "demo", ROOT / "tests" / "golden", Path(__file__).resolve())
    text = {".py", ".md", ".toml", ".ipynb", ".sh", ".yaml", ""}
    kept = [
        file
        for file in (*found, ROOT / "README.md", ROOT / "CONTRIBUTING.md")
        if file.is_file() and file.suffix in text and not any(file.is_relative_to(folder) for folder in excluded)
    ]
    return sorted(kept)


def old_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the word wherever a word of OLD_WORDS occurs."""
    pattern = re.compile(rf"\b({'|'.join(OLD_WORDS)})\b")
    for number, line in enumerate(text.splitlines(), 1):
        yield from ((number, match[1]) for match in pattern.finditer(line))


def old_identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name wherever a name of OLD_IDENTIFIERS is defined or used."""
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name"):
            if getattr(node, field, None) in OLD_IDENTIFIERS and hasattr(node, "lineno"):
                yield node.lineno, getattr(node, field)


def test_old_names_do_not_occur():
    words = [(file, *hit) for file in prose_files() for hit in old_words(file.read_text())]
    words += [(file, *hit) for file, tree in TREES.items() for hit in old_identifiers(tree)]
    assert_none(f"{show(file)}:{line}: old name or word {word!r}" for file, line, word in words)


def test_the_check_of_old_names_can_fail():
    assert list(old_words("a Told b\nretold, told_x\nstop_ids=3")) == [(1, "Told"), (3, "stop_ids")]
    assert list(old_words(Path(__file__).read_text()))
    assert list(old_identifiers(ast.parse("x = 1\nheld = x.room"))) == [(2, "held"), (2, "room")]
    assert ROOT / "helix_jax" / "helix.py" in prose_files()


# Lengths


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def line_count(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def length_findings(file: Path, tree: ast.AST) -> Iterator[str]:
    for node in functions(tree):
        if line_count(node) > MAX_LINES:
            yield f"{show(file)}:{node.lineno}: {node.name} has {line_count(node)} lines, at most {MAX_LINES}"
        if len(parameters(node)) > MAX_PARAMETERS and node.name != "helix_attention":
            count = len(parameters(node))
            yield f"{show(file)}:{node.lineno}: {node.name} has {count} parameters, at most {MAX_PARAMETERS}"


def test_functions_are_short():
    trees = {file: tree for file, tree in TREES.items() if PACKAGE / "kernels" not in file.parents}
    assert_none(finding for file, tree in trees.items() for finding in length_findings(file, tree))
    assert (
        statistics.median(line_count(node) for tree in trees.values() for node in functions(tree)) <= MAX_MEDIAN_LINES
    )


def test_the_check_of_lengths_can_fail():
    source = f"def f(a, b, c, d, *e, f, g, h, **i):\n{MAX_LINES * '    pass' + chr(10)}"
    tree = ast.parse(source.replace("    pass", "    pass\n"))
    assert len(list(length_findings(Path("x.py"), tree))) == 2
    assert not list(length_findings(Path("x.py"), ast.parse("def f(self, a, b, c, d, e, f, g, h): pass")))


# Repeated code


def code_lines(tree: ast.Module, text: str) -> list[tuple[int, str]]:
    """Return the numbers and texts of all lines that are neither blank nor part of an import."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    skipped = {number for node in imports for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = enumerate(text.splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip() and number not in skipped]


def repetitions(sources: dict[Path, str]) -> Iterator[str]:
    """Yield the first line of every run of lines that stands in two places, and both places."""
    places = defaultdict(list)
    size = MAX_REPEATED_LINES + 1
    for file, text in sources.items():
        lines = code_lines(ast.parse(text), text)
        for first in range(len(lines) - size + 1):
            places[tuple(line for _, line in lines[first : first + size])].append((file, lines[first][0]))
    reported: set[tuple[Path, Path]] = set()
    for run, (start, *others) in places.items():
        for file, line in others:
            overlapping = file == start[0] and line < start[1] + size
            if not overlapping and (start[0], file) not in reported:
                reported.add((start[0], file))  # the next lines of the same run are the next windows
                yield f"{show(start[0])}:{start[1]} and {show(file)}:{line}: {size} equal lines from {run[0][:60]!r} on"


def test_no_run_of_ten_lines_stands_in_two_places():
    assert_none(repetitions({file: file.read_text() for file in TREES}))


def test_the_check_of_repetitions_can_fail():
    run = "\n".join(f"a{number} = {number}" for number in range(10))
    assert len(list(repetitions({Path("x.py"): run, Path("y.py"): f"import x\n\nif x:\n    b = 1\n{run}"}))) == 1
    assert len(list(repetitions({Path("x.py"): f"{run}\n{run}"}))) == 1
    assert not list(repetitions({Path("x.py"): run, Path("y.py"): run.replace("a5", "b")}))
    assert inspect.getsource(repetitions) in Path(__file__).read_text()
