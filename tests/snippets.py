"""Reads the Markdown pages of the repository: their code, links and prose."""

import re
from pathlib import Path

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def python_blocks(path: Path) -> list[str]:
    """Return the code of the python blocks of a page, in their order."""
    return blocks(path, "python")


def blocks(path: Path, language: str) -> list[str]:
    """Return the text of the blocks of a language, or with an empty language of those without one."""
    return [text for name, text in _BLOCK.findall(path.read_text()) if name == language]


def without_code(text: str) -> str:
    """Return a page without its blocks, and with each piece of inline code as one word."""
    return re.sub(r"`[^`]+`", "code", _BLOCK.sub("", text))


def relative_links(path: Path) -> list[str]:
    """Return the links of a page to files of the repository and to headings, without those to the web."""
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text()))
    return [link for link in links if not re.match(r"[a-z]+:", link)]


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub derives them."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sentences(text: str) -> list[str]:
    """Return the sentences of a page, without code, tables and headings. Items of lists are sentences of their own."""
    lines = [line for line in without_code(text).splitlines() if not line.startswith(("|", "#"))]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*\* )", "\n".join(lines))
    prose = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph) for paragraph in paragraphs)
    return [sentence for paragraph in prose for sentence in re.split(r"(?<=[.!?])\s+", paragraph.strip()) if sentence]
