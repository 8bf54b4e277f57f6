"""The wheel resolves without SuperGradients; what is missing is named with what installs it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from portrait_dist.errors import InputError
from portrait_dist.inference import export

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Let the named packages look as if they were not installed."""
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name in missing else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_the_wheel_does_not_name_supergradients_whose_pins_nothing_can_fulfil() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    named = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    assert [line for line in named if line.lower().startswith("super")] == []
    assert PROJECT["dependency-groups"]["supergradients"] == ["super-gradients==3.7.1"]
    assert "supergradients" in PROJECT["tool"]["uv"]["default-groups"]


def test_onnx_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _without(monkeypatch, "onnxscript")
    with pytest.raises(
        InputError, match=r"needs onnxscript: pip install 'portrait-dist\[export\]'"
    ):
        export.check_onnx_installed()


def test_every_package_of_the_extra_export_is_checked_for() -> None:
    extra = PROJECT["project"]["optional-dependencies"]["export"]
    assert sorted(line.partition(">")[0] for line in extra) == sorted(export.ONNX_PACKAGES)


def test_the_lock_fulfils_what_the_package_asks_for_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    locked: dict[str, list[str]] = {}
    for line in text.splitlines():
        pinned = Requirement(line)
        locked.setdefault(canonicalize_name(pinned.name), []).append(str(pinned.specifier)[2:])
    wanted = [*PROJECT["project"]["dependencies"]]
    wanted += PROJECT["project"]["optional-dependencies"]["export"]
    for line in [*wanted, *PROJECT["dependency-groups"]["supergradients"]]:
        one = Requirement(line)
        versions = locked[canonicalize_name(one.name)]
        assert all(one.specifier.contains(version) for version in versions), line
    assert "://" not in text


@pytest.fixture(scope="module")
def matrix() -> Any:
    """The script of .ci that runs tests on every Python."""
    path = ROOT / ".ci" / "matrix"
    loader = importlib.machinery.SourceFileLoader("matrix", str(path))
    spec = importlib.util.spec_from_loader("matrix", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["matrix"] = module  # dataclasses look their module up
    loader.exec_module(module)
    yield module
    del sys.modules["matrix"]


def test_the_matrix_has_every_python_that_the_package_supports(matrix: Any) -> None:
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    possible = [f"3.{minor}" for minor in range(8, 30)]
    assert list(matrix.PYTHONS) == [one for one in possible if supported.contains(f"{one}.0")]
    assert all((ROOT / test).is_file() for test in matrix.QUICK)
    image = (ROOT / "launch" / "Dockerfile").read_text()
    (locked,) = (name for name in matrix.ENVIRONMENTS if name.startswith("locked"))
    assert f"FROM python:{locked.removeprefix('locked-')}-slim" in image, "the image's Python"
    slice_of_ci = (ROOT / ".ci" / "run").read_text()
    assert f"--only {locked} newest-3.13" in slice_of_ci, "the pins are used in CI"


def test_the_matrix_takes_only_a_python_that_runs_and_is_of_that_version(
    matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying = tmp_path / "python3.99"
    lying.write_text('#!/bin/sh\necho "$0 3.11"\n')
    broken = tmp_path / "python3.98"
    broken.write_text("#!/bin/sh\necho no such version >&2; exit 127\n")
    right = tmp_path / "python3.97"
    right.write_text('#!/bin/sh\necho "$0 3.97"\n')
    for path in (lying, broken, right):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert matrix.find_python("3.99") is None
    assert matrix.find_python("3.98") is None
    assert matrix.find_python("3.97") == str(right)


def test_a_failure_and_an_absent_python_are_rows_of_the_matrix(
    matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "find_python", lambda version: None)
    absent = matrix.one_row("newest-3.13", tmp_path, ["tests/unit/test_order.py"])
    failed = matrix.Row("floors-3.11", "failed", {"torch": "2.11.0"}, ["t.py"], 3, 1, 0, ["t::x"])
    matrix.write([absent, failed], tmp_path / "out")
    text = (tmp_path / "out.md").read_text()
    assert "| newest-3.13 | this Python is not on the machine | 0 |" in text
    assert "| floors-3.11 | failed | 3 | 1 |" in text
    assert "- floors-3.11: `t::x`" in text
    assert "Ran: `t.py`" in text
