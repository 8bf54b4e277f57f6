"""A package is imported without what it does not need, and nobody else notices."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portrait_dist.training.lean_import import lean_import

FRAMEWORK = {
    "framework/__init__.py": (
        "import neighbour\nfrom framework import body, log\nimport framework.tips.more"
    ),
    "framework/body.py": (
        "import heavy.charts as charts\nfrom heavy import Base, number\nimport absent.io\n"
        "from absent.tools import reader\n"
        "@charts.decorate(3)\n"
        "def drawn(figure: charts.Figure = charts.Figure()) -> 'charts.Figure':\n    return 7\n"
        "class Child(reader.Base):\n    pass\n"
    ),
    "framework/log.py": "raise RuntimeError('the log writes into the home folder')",
    "framework/tips/__init__.py": "raise RuntimeError('the tips wrap sys.excepthook')",
    "framework/tips/more.py": "TEXT = 'tip'",
}
NEIGHBOURS = {
    "neighbour.py": "import heavy, heavy.charts\nFOUND = heavy.number",
    "heavy/__init__.py": "number = 5\nclass Base:\n    pass\n",
    "heavy/charts.py": (
        "class Figure:\n    def width(self):\n        return 4\n"
        "def decorate(times):\n    return lambda f: f\n"
    ),
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A framework, a package beside it that imports the same heavy one, and the heavy one."""
    for name, text in (FRAMEWORK | NEIGHBOURS).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("framework", "neighbour", "heavy")
    ]:
        del sys.modules[name]


REPLACED = {"framework.log": {"write": None}, "framework.tips": {"wrap": None}}


def test_stand_ins_are_seen_by_the_framework_alone(packages: Path) -> None:
    framework = lean_import("framework", ("heavy", "absent"), REPLACED)
    assert framework.neighbour.FOUND == 5, "it got the real package while the import ran"
    assert framework.body.charts.__module__ == "portrait_dist.not_imported"
    assert sys.modules["heavy"].number == 5, "no stand-in in sys.modules"
    assert not any(name.split(".")[0] == "absent" for name in sys.modules)


def test_a_stand_in_that_is_used_is_the_real_package_or_names_the_missing_one(
    packages: Path,
) -> None:
    body = lean_import("framework", ("heavy", "absent"), REPLACED).body
    assert body.drawn() == 7
    assert body.charts.Figure().width() == 4
    assert isinstance(sys.modules["heavy"].charts.Figure(), body.charts.Figure)
    for use in (lambda: body.reader("file"), lambda: body.absent.io.load("file"), body.Child):
        with pytest.raises(ModuleNotFoundError, match=r"'absent'.*pip install absent"):
            use()


def test_replaced_modules_have_no_side_effects_and_keep_their_submodules(packages: Path) -> None:
    hook, arguments = sys.excepthook, sys.argv
    framework = lean_import("framework", ("heavy", "absent"), REPLACED)
    assert framework.log.write is None
    assert framework.tips.more.TEXT == "tip"
    assert (sys.excepthook, sys.argv) == (hook, arguments)


def test_an_import_that_failed_before_does_not_stand_in_the_way(packages: Path) -> None:
    (packages / "framework" / "log.py").write_text("")
    (packages / "framework" / "tips" / "__init__.py").write_text("")
    with pytest.raises(ModuleNotFoundError, match="absent"):
        import framework  # type: ignore[import-not-found]  # noqa: F401
    assert lean_import("framework", ("heavy", "absent"), REPLACED).body.drawn() == 7


def test_a_framework_that_is_imported_already_gets_the_replacements_too(packages: Path) -> None:
    for name in ("log.py", "tips/__init__.py"):
        (packages / "framework" / name).write_text("def write(): return 'home'")
    (packages / "framework" / "body.py").write_text("from framework.log import write")
    import framework  # noqa: F401

    def write() -> str:
        return "run folder"

    found = lean_import("framework", (), {"framework.log": {"write": write}})
    assert found.body.write() == found.log.write() == "run folder"
