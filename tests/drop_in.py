"""Run SuperGradients' own unit tests with PortraitTrainer in place of its Trainer.

python -m tests.drop_in CHECKOUT --out tests/drop_in.md     all files; CHECKOUT has its tag 3.7.1
python -m tests.drop_in CHECKOUT --only resume --only ema   files with one of these in their names

The tests run in a copy, each file in a process of its own, and no connection leaves this machine.
Rows that OUT has of other files stay.
Where a file has failures it runs again with SuperGradients' own Trainer, which tells a difference
from what cannot run here at all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics

UNIT_TESTS = "tests/unit_tests"
DIFFERS = {
    "pretrained_models_unit_test.py": (
        "it loads a file of pickled objects, which torch refuses unless told otherwise"
    ),
    "resume_training_test.py": "they count RUN_ folders; the first run of a name has none here",
    "test_model_weight_averaging.py": (
        "ModelWeightAveraging reads pickled arrays, which torch refuses unless told otherwise; "
        "PortraitTrainer has an average of its own"
    ),
    "test_mixed_precision_cpu.py": "mixed precision is bf16, which CPUs have; it is not refused",
}
"""File → why a test of it differs on purpose."""


@dataclass(frozen=True)
class Case:
    """What became of one test.

    Attributes:
        name: class and function.
        passed: whether it did.
        reason: first line of its error; empty where it passed.
        host: where it wanted to connect to; empty where it did not.
    """

    name: str
    passed: bool
    reason: str = ""
    host: str = ""


class Recorder:
    """A plugin of pytest that records cases, and exchanges the trainers in test modules.

    Args:
        exchanged: what stands in for what, by identity.
        hosts: where the running test wanted to connect to.
    """

    def __init__(self, exchanged: dict[Any, Any], hosts: list[str]) -> None:
        self.exchanged, self.hosts = exchanged, hosts
        self.cases: dict[str, Case] = {}

    def pytest_pycollect_makeitem(self, obj: Any) -> None:
        """Let a test whose name only ends in ``_test`` be found."""
        if isinstance(obj, type) and hasattr(obj, "assertEqual"):
            for name in [one for one in vars(obj) if one.endswith("_test")]:
                if not name.startswith("test"):
                    setattr(obj, f"test_{name}", vars(obj)[name])

    def pytest_collection_modifyitems(self) -> None:
        from super_gradients.training.metrics import Accuracy

        # Some tests take torchmetrics', which today has no Accuracy without a task.
        exchange("tests", self.exchanged | {torchmetrics.Accuracy: Accuracy})

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._record("collection", False, str(report.longrepr))

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.partition("::")[2]
        if report.when == "setup":
            self.hosts.clear()
        if report.failed or (report.when == "call" and report.outcome == "passed"):
            self._record(name, report.passed, str(report.longrepr or ""))
        elif report.skipped:
            self._record(name, False, "skipped by itself")

    def _record(self, name: str, passed: bool, text: str) -> None:
        if name in self.cases and passed:
            return
        errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
        lines = errors or text.splitlines() or [""]
        host = self.hosts[0] if self.hosts and not passed else ""
        reason = re.sub(r"\x1b\[\d*m", "", lines[0])[:200]
        self.cases[name] = Case(name, passed, "" if passed else reason, host)


def exchange(package: str, exchanged: dict[Any, Any]) -> None:
    """Exchange objects in all loaded modules of a package, but for those that define them."""
    defining = {one.__module__ for one in exchanged}
    for name, module in list(sys.modules.items()):
        if (name == package or name.startswith(f"{package}.")) and name not in defining:
            for member, value in list(vars(module).items()):
                if isinstance(value, type) and value in exchanged:
                    setattr(module, member, exchanged[value])


@contextmanager
def no_connections(hosts: list[str]) -> Iterator[None]:
    """Refuse every address but this machine's, and note who was asked for."""
    look_up = socket.getaddrinfo

    def refuse(host: Any, *arguments: Any, **more: Any) -> Any:
        if host in (None, "localhost", "127.0.0.1", "::1"):
            return look_up(host, *arguments, **more)
        hosts.append(str(host))
        raise socket.gaierror(f"no connection leaves this machine: {host}")

    socket.getaddrinfo = refuse
    try:
        yield
    finally:
        socket.getaddrinfo = look_up


def _run_here(file: str, folder: Path, ours: bool, out: Path) -> None:
    """Run a file of tests in this process, which is forked for it."""
    from super_gradients.training import Trainer
    from super_gradients.training.kd_trainer import KDTrainer

    from portrait_dist.training import PortraitKDTrainer, PortraitTrainer

    os.setsid()
    if not ours:  # its own checkpoints hold arrays of numpy
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    # Its tests import each other as tests.…, as ours do.
    for name in [one for one in sys.modules if one.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(one for one in sys.path if one not in ("", os.getcwd()))]
    os.chdir(folder)
    exchanged = {Trainer: PortraitTrainer, KDTrainer: PortraitKDTrainer} if ours else {}
    exchange("super_gradients", exchanged)
    hosts: list[str] = []
    recorder = Recorder(exchanged, hosts)
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={folder}"]
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with no_connections(hosts):
        pytest.main([*options, f"{UNIT_TESTS}/{file}"], plugins=[recorder])
    out.write_text(json.dumps([asdict(case) for case in recorder.cases.values()]))
    os._exit(0)  # threads of loggers may hold it up


def run(file: str, folder: Path, *, ours: bool, seconds: float) -> list[Case]:
    """Run a file of tests in a process of its own.

    Args:
        file: of ``tests/unit_tests``.
        folder: copy of the checkout.
        ours: whether PortraitTrainer stands in for the Trainer.
        seconds: it is ended after.
    """
    out = folder / f"{file}.{'ours' if ours else 'theirs'}.json"
    process = multiprocessing.get_context("fork").Process(
        target=_run_here, args=(file, folder, ours, out)
    )
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return [Case("file", False, f"not done after {seconds:.0f} s")]
    if not out.exists():
        return [Case("file", False, f"its process ended with {process.exitcode}")]
    return [Case(**one) for one in json.loads(out.read_text())]


def verdict(case: Case, theirs: dict[str, Case]) -> tuple[str, str]:
    """Return what became of a case (passed, cannot run, differs) and why."""
    if case.passed:
        return "passed", ""
    if case.host:
        return "cannot run", f"asks {case.host}"
    other = theirs.get(case.name)
    if case.name == "file" or other is None or other.passed:
        return "cannot run" if case.name == "file" else "differs", case.reason
    if other.reason == case.reason:
        return "cannot run", case.reason
    return "cannot run", f"{other.reason} (here: {case.reason})"


def row(file: str, folder: Path, seconds: float) -> list[str]:
    """Run a file and return its row: file, passed, cannot run, differs, why."""
    cases = run(file, folder, ours=True, seconds=seconds)
    theirs: dict[str, Case] = {}
    if not all(case.passed or case.host for case in cases):
        theirs = {case.name: case for case in run(file, folder, ours=False, seconds=seconds)}
    found = [verdict(case, theirs) for case in cases]
    counts = [sum(one == kind for one, _ in found) for kind in ("passed", "cannot run", "differs")]
    reasons = list(dict.fromkeys(reason for _, reason in found if reason))
    if file in DIFFERS and counts[2]:
        reasons = [DIFFERS[file]]
    why = "; ".join(reasons).replace("|", "/").replace(str(folder), "")
    return [file, *map(str, counts), why[:400]]


HEAD = """\
# SuperGradients' own unit tests with PortraitTrainer

`python -m tests.drop_in CHECKOUT --out tests/drop_in.md` writes this page: tag 3.7.1 of SuperGradients, each file of `tests/unit_tests` in
a process of its own, `PortraitTrainer` and `PortraitKDTrainer` in place of its trainers, no connection to other machines. *Cannot run*: the test
asks another machine, or fails with SuperGradients' own Trainer here too. *Differs*: it passes with that one alone. Files that are missing have
not been run. Most of what cannot run wants pretrained weights, data sets, or packages for detection and pose that this package does not need.

| file | passed | cannot run | differs | why |
|---|---|---|---|---|
"""  # noqa: E501


def rows_of(page: Path | None) -> dict[str, list[str]]:
    """Return the rows that a page has, by file."""
    lines = page.read_text().splitlines() if page and page.exists() else []
    rows = [line.strip("| ").split(" | ") for line in lines if ".py | " in line]
    return {cells[0]: [*cells, ""][:5] for cells in rows}


def write(page: Path, rows: dict[str, list[str]]) -> None:
    """Write the page: a row for each file, and their sums."""
    ordered = [rows[file] for file in sorted(rows)]
    sums = [str(sum(int(one[column]) for one in ordered)) for column in (1, 2, 3)]
    table = [f"| {' | '.join(one)} |" for one in [*ordered, ["all", *sums, ""]]]
    page.write_text(HEAD + "\n".join(table) + "\n")


def copy_of(checkout: Path, folder: Path) -> None:
    """Copy the tests, without the list in their package, which imports half of them at once."""
    shutil.copytree(checkout / "tests", folder / "tests")
    (folder / UNIT_TESTS / "__init__.py").write_text("")
    for name in ("requirements.txt", "setup.py", "version.txt"):
        if (checkout / name).is_file():
            shutil.copy(checkout / name, folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args(arguments)
    checkout, out = options.checkout.resolve(), options.out and options.out.resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        # Before SuperGradients is imported: it takes its folders from these.
        os.chdir(folder)
        os.environ |= {"HOME": name, "CKPT_ROOT_DIR": str(folder / "runs"), "WANDB_MODE": "offline"}
        # Once, for all processes that are forked.
        importlib.import_module("portrait_dist.training.trainer")

        copy_of(checkout, folder)
        files = sorted(path.name for path in (folder / UNIT_TESTS).glob("*_test*.py"))
        files += sorted(path.name for path in (folder / UNIT_TESTS).glob("test_*.py"))
        rows = rows_of(out)
        for file in dict.fromkeys(files):
            if not options.only or any(part in file for part in options.only):
                rows[file] = row(file, folder, options.seconds)
                print(" | ".join(rows[file]), flush=True)
                if out:
                    write(out, rows)


if __name__ == "__main__":
    main()
