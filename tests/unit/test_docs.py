"""The documentation names what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("portrait_dist/*/README.md"),
    ]
    if ".venv" not in path.parts
)


def _functions(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_guarantee_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 40
    assert [path for path, _ in named if not (ROOT / path).is_file()] == []
    assert [
        f"{path}::{name}" for path, name in named if name and name not in _functions(ROOT / path)
    ] == []


def test_every_module_named_in_the_architecture_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([\w/]+\.py|[\w/]+/)`", text)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / "portrait_dist" / name).exists()] == []


def test_the_answers_in_the_architecture_are_in_the_files_named() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    answers = re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)
    assert len(answers) >= 10
    assert [
        f"{file}: {name}"
        for name, file in answers
        if not re.search(
            rf"^\s*(?:def|class) {name}\b", (ROOT / "portrait_dist" / file).read_text(), re.M
        )
    ] == []


def test_no_test_file_imports_another() -> None:
    files = (ROOT / "tests").rglob("*.py")
    pattern = re.compile(r"^(?:from|import) (?:tests\.\w+\.test_|.* import test_)", re.M)
    assert [path.name for path in files if pattern.search(path.read_text())] == []


def test_every_sleep_of_a_test_says_what_it_stands_for() -> None:
    silent = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "tests").rglob("*.py")
        if path.name != "waiting.py"
        for line in path.read_text().splitlines()
        if "time.sleep(" in line and "#" not in line
    ]
    assert silent == []


def test_every_command_is_in_the_readme() -> None:
    from portrait_dist.cli import COMMANDS

    text = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"`{name}`" not in text] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
