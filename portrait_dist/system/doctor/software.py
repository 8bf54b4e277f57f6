"""Checks of Python, packages, the trainer and the compiler."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from portrait_dist.errors import kind_and_message
from portrait_dist.system import info
from portrait_dist.system.doctor.check import FAIL, OK, WARN, Check


def check_python() -> Check:
    found = f"{info.versions()['python']} in {sys.prefix}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", WARN, found, "use Python 3.11, 3.12 or 3.13; others are not tested")
    return Check("python", OK, found)


def check_packages() -> Check:
    """Compare the requirements of portrait-dist with what is installed."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in metadata.requires("portrait-dist") or []]
    except metadata.PackageNotFoundError:
        return Check(
            "packages",
            WARN,  # as on a machine without network, with the packages on PYTHONPATH
            "portrait-dist is importable, not installed: its requirements cannot be compared",
            "run 'pip install -e .' in its folder where that is possible",
        )
    wrong = []
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Check(
            "packages", FAIL, "; ".join(wrong), "install the locked environment again: 'uv sync'"
        )
    main = [f"{name} {version}" for name, version in info.versions().items() if name != "python"]
    return Check("packages", OK, ", ".join(main))


def check_training() -> Check:
    """Import the trainer: SuperGradients is from 2024, the other packages are newer."""
    try:
        from portrait_dist.training import sg_adapter

        del sg_adapter
    except Exception as error:
        return Check(
            "training",
            FAIL,
            f"the trainer does not import ({kind_and_message(error)})",
            "install the locked environment again: 'uv sync'",
        )
    return Check("training", OK, "SuperGradients imports")


def check_compiler() -> Check:
    """Look for what ``train.compile=true`` builds with.

    That is C++ on CPUs, and a small C module with Python's headers for GPUs.
    """
    compiler = os.environ.get("CXX") or next(
        (name for name in ("g++", "c++", "clang++", "gcc") if shutil.which(name)), None
    )
    if compiler is None:
        advice = "leave train.compile=false, or install g++ (Debian: build-essential)"
        return Check("compiler", WARN, "no C++ compiler: torch.compile cannot work", advice)
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        advice = "leave train.compile=false, or install them (Debian: python3-dev)"
        return Check(
            "compiler",
            WARN,
            f"{compiler}, but Python's C headers are missing: torch.compile may fail",
            advice,
        )
    return Check("compiler", OK, f"{compiler}, for train.compile=true")
