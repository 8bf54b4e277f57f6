"""The wheel resolves without SuperGradients; what is missing is named with what installs it."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
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
