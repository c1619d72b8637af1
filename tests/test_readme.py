"""Checks README.md and the other pages: their code runs, their links exist, and what they show is in the source."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FAST_COMPILATION, ROOT
from tests.snippets import anchors, blocks, python_blocks, relative_links, sentences
from tests.test_cli import ENVIRONMENT, call

README, LIBRARY = ROOT / "README.md", ROOT / "helix_jax" / "README.md"
ENGINE = ROOT / "helix_jax" / "engine" / "README.md"
TRAINING = ROOT / "helix_jax" / "training" / "README.md"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "helix_jax").rglob("*.md"), *(ROOT / "scripts").glob("*.md")]
MAX_LINES, MAX_WORDS, MAX_WORDS_PER_SENTENCE = 150, 1200, 30
*TUTORIAL, CORE = python_blocks(LIBRARY)


def run_blocks(code: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run blocks one after the other in an empty folder, and return their names."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    return names


def test_the_snippet_of_readme_runs(tmp_path: Path, monkeypatch, capsys):
    names = run_blocks(python_blocks(README), tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()
    assert names["llm"]


def test_the_tutorial_of_helix_attention_runs(tmp_path: Path, monkeypatch):
    names = run_blocks(TUTORIAL, tmp_path, monkeypatch)  # which compares with attention without a cache
    assert [len(text) for text in names["texts"]] == names["rows"].length_B.tolist() == [70, 39]


@pytest.mark.slow
def test_the_snippets_of_the_engine_run(tmp_path: Path, monkeypatch):
    names = run_blocks(python_blocks(ENGINE), tmp_path, monkeypatch)
    assert len(names["tokens"]) == 32
    first, second = names["tokens_of"].values()
    assert (first, len(second)) == (names["tokens"][:8], 4)
    assert [(len(sample.tokens), sample.seed) for sample in names["samples"]] == [(16, seed) for seed in range(1, 5)]
    assert names["scores"].logprobs_S.shape == (len("In the beginning") - 1,)


def test_the_snippets_of_training_run(tmp_path: Path, monkeypatch, capsys):
    run_blocks(python_blocks(TRAINING), tmp_path, monkeypatch)
    *steps, answer = capsys.readouterr().out.strip().splitlines()
    losses = [float(line.split()[-1]) for line in steps]
    assert len(losses) == 3
    assert losses[-1] < 0.1
    assert answer == "Eight."


def run_commands(commands: str, folder: Path) -> str:
    """Run the commands of a page in an empty folder, and return what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Optimised, unlike other tests: they run many steps.
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in FAST_COMPILATION} | {"PATH": path}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 900}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tutorial_of_the_commands_runs(tmp_path: Path):
    results = run_commands(*blocks(ENGINE, "bash"), tmp_path).splitlines()[-2:]
    assert {line.split('"')[3] for line in results} == {"psalm", "genesis"}
    assert all('"finish_reason"' in line for line in results)


def test_the_config_of_the_training_tutorial_is_that_of_the_repository():
    [commands] = blocks(TRAINING, "bash")
    shown = tomllib.loads(commands.split("END'\n")[1].split("END\n")[0])
    config = tomllib.loads((ROOT / "configs" / "tiny.toml").read_text())
    assert shown.pop("data") | {"files": 0} == config.pop("data") | {"files": 0}
    assert shown == config


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_tutorial_of_training_learns_to_copy(tmp_path: Path):
    table = run_commands(*blocks(TRAINING, "bash"), tmp_path)
    assert (tmp_path / "runs" / "tiny" / "curve.png").exists()
    found = [float(row.split("│")[-2].strip().rstrip("%")) for row in table.splitlines() if "one device" in row]
    assert found[0] >= 80


def test_the_core_shown_is_the_source():
    source = (ROOT / "helix_jax" / "helix.py").read_text()
    shown = "".join(f"    {line}" if line.strip() else line for line in CORE.splitlines(keepends=True))
    assert shown in source


def test_the_source_tree_names_every_module():
    tree = LIBRARY.read_text().split("## The source tree")[1]
    folder = ROOT / "helix_jax"
    paths = [path for path in folder.iterdir() if not path.name.startswith("_") and path != LIBRARY]
    # Of a folder that was moved, __pycache__ may be left in a checkout.
    paths = [path for path in paths if path.is_file() or any(child.name != "__pycache__" for child in path.iterdir())]
    modules = {path.name + "/" * path.is_dir() for path in paths}
    assert modules == set(re.findall(r"^  (\S+)", tree, re.MULTILINE))


def test_every_script_is_described():
    described = (ROOT / "scripts" / "README.md").read_text()
    names = {path.name for path in (ROOT / "scripts").iterdir() if not path.name.startswith(("_", "."))}
    assert {name for name in names - {"README.md"} if name not in described} == set()


def test_the_figure_is_what_layout_reports():
    from helix_jax.layout import BlockLayout, rank_ranges

    readme = README.read_text()
    assert "prompt 400, decode 400, block 100, cp 4" in readme
    columns = {0: 10, 100: 19, 200: 28, 300: 37, 400: 51, 500: 60, 600: 69, 700: 78}
    for rank, ranges in enumerate(rank_ranges(BlockLayout(4, 100), 800, 400)):
        [line] = re.findall(rf"^rank {rank} .*$", readme, re.MULTILINE)
        assert [match.start() for match in re.finditer(r"\[", line)] == [columns[first] for first, _ in ranges]


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS
    long = [sentence for sentence in sentences(text) if len(sentence.split()) > MAX_WORDS_PER_SENTENCE]
    assert not long, f"sentences of more than {MAX_WORDS_PER_SENTENCE} words: {long}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path):
    for link in relative_links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} is no file"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def test_the_commands_shown_have_their_options():
    """Every option of `helix-jax` in a page is one of its subcommand, and every script and config exists."""
    helps: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ") if page.name != "CHANGELOG.md" else ""
        for name in re.findall(r"\b(?:scripts|configs)/[\w.-]+\.(?:py|sh|yaml|ipynb|toml)\b", text):
            assert (ROOT / name).is_file(), f"{page}: {name}"
        for line in re.findall(r"helix-jax ((?:eval )?[a-z]+)\b([^`\n]*)", text):
            command = tuple(line[0].split())
            if command not in helps:
                helps[command] = call(*command, "--help").stdout
            unknown = [option for option in re.findall(r"--[a-z][\w-]*", line[1]) if option not in helps[command]]
            assert not unknown, f"{page}: helix-jax {' '.join(line)}"


def test_the_readers_of_pages_can_fail(tmp_path: Path):
    page = tmp_path / "page.md"
    text = "# A `b`: c\n\nOne [two](x.md#a) three. `4 5`!\n* six\n\n```python\nx = 1\n```\n| a. b. |\n```\ny\n```\n"
    page.write_text(text)
    assert (python_blocks(page), blocks(page, "")) == (["x = 1\n"], ["y\n"])
    assert (relative_links(page), anchors(page)) == (["x.md#a"], {"a-b-c"})
    assert sentences(text) == ["One two three.", "code!", "* six"]
