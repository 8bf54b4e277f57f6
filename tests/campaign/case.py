"""One attack: what is done, in a process of its own, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

DONE, OTHER, INPUT, DAMAGED = 0, 1, 2, 3
TEMPORARY = re.compile(r"\.tmp-|\.part$|\.tmp$")


@dataclass
class Outcome:
    """How a child process ended: exit code (negative: signal), output, why it was killed."""

    code: int
    stdout: str
    stderr: str
    hang: str = ""

    @property
    def last_line(self) -> str:
        """The last line on stderr that is not empty."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else ""


Check = Callable[[Outcome], str]
"""Says what is wrong with an outcome; an empty string where nothing is."""


@dataclass
class Case:
    """An attack.

    Args:
        name: what is odd, in a few words.
        action: runs in a forked child and returns its exit code.
        allowed: exit codes that are right.
        checks: more that must hold.
        folders: where no temporary file may be left.
        cpu_seconds: of the child and its children; more of them is an endless loop. Wall time is
            no limit, so that a verdict does not depend on what else the machine does.
        idle_seconds: without a tick of CPU time and without a wait for the disk; more is a hang.
    """

    name: str
    action: Callable[[], int]
    allowed: tuple[int, ...] = (DONE, INPUT, DAMAGED)
    checks: tuple[Check, ...] = ()
    folders: tuple[Path, ...] = ()
    cpu_seconds: float = 60.0
    idle_seconds: float = 120.0


@dataclass
class Area:
    """A kind of attack with its generator of cases.

    Args:
        name: for the table and ``--area``.
        cases: yields cases without end, drawn from the generator of random numbers.
        needs_root: it mounts file systems.
        every: it has its turn in one round of so many.
        long: a case takes minutes, so that short campaigns leave it out.
    """

    name: str
    cases: Callable[[random.Random, Path], Generator[Case, None, None]]
    needs_root: bool = False
    every: int = 1
    long: bool = False


@dataclass
class Tally:
    """What an area's cases did."""

    tried: int = 0
    held: int = 0
    broken: list[str] = field(default_factory=list)


def run(case: Case, folder: Path) -> tuple[Outcome, str]:
    """Run a case in a forked child.

    Args:
        case: the attack.
        folder: for the child's output; it is the child's working directory too.

    Returns:
        The outcome, and what is wrong with it or an empty string.
    """
    outcome = _fork(case, folder)
    return outcome, _judge(case, outcome)


def _judge(case: Case, outcome: Outcome) -> str:
    if outcome.hang:
        return outcome.hang
    if outcome.code < 0:
        return f"dies of {signal.Signals(-outcome.code).name}"
    if "Traceback (most recent call last)" in outcome.stderr:
        return "shows a traceback: " + outcome.last_line[:200]
    if outcome.code not in case.allowed:
        return f"ends with {outcome.code}: {outcome.last_line[:200]}"
    if outcome.code and not outcome.last_line:
        return f"ends with {outcome.code} and says nothing"
    for folder in case.folders:
        left = [path for path in _tree(folder) if TEMPORARY.search(path.name)]
        if left:
            return f"leaves {left[0].name}"
    for check in case.checks:
        if wrong := check(outcome):
            return wrong
    return ""


def _tree(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from folder.rglob("*")


def _fork(case: Case, folder: Path) -> Outcome:
    out, err = folder / "stdout", folder / "stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os._exit(_in_child(case, folder, out, err))
    code, hang = _wait(child, case)
    texts = [path.read_text(errors="replace") if path.is_file() else "" for path in (out, err)]
    return Outcome(code, texts[0], texts[1], hang)


def _in_child(case: Case, folder: Path, out: Path, err: Path) -> int:
    os.setsid()  # a limit of time ends the children of the child too
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.chdir(folder)
    try:
        code = case.action()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(child: int, case: Case) -> tuple[int, str]:
    """Wait for the end of the child, or end it; returns its exit code and why it was ended."""
    watch = _Watch(child, case)
    pause = 0.002
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), ""
        if pause >= 0.05 and (hang := watch.hang()):
            watch.kill()
            os.waitpid(child, 0)
            return -signal.SIGKILL, hang
        time.sleep(pause)  # between two looks: a wait in waitpid could not see a hang
        pause = min(0.05, pause * 1.5)


class _Watch:
    """Whether a process and its descendants compute without end, or wait for what never comes."""

    EVERY = 1.0

    def __init__(self, process: int, case: Case) -> None:
        self._process, self._case = psutil.Process(process), case
        self._looked = self._changed = time.monotonic()
        self._cpu = 0.0

    def hang(self) -> str:
        now = time.monotonic()
        if now - self._looked < self.EVERY:
            return ""
        self._looked = now
        cpu, busy = 0.0, False
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                cpu += sum(process.cpu_times()[:4])  # with those of children that have ended
                busy |= process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        if busy or cpu != self._cpu:
            self._changed, self._cpu = now, cpu
        if cpu > self._case.cpu_seconds:
            return f"computes for more than {self._case.cpu_seconds:g} s of CPU time"
        if now - self._changed > self._case.idle_seconds:
            return f"hangs: nothing happened for {self._case.idle_seconds:g} s"
        return ""

    def kill(self) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [self._process, *self._process.children(recursive=True)]
        return [self._process]


def command(*arguments: object) -> Callable[[], int]:
    """Make the action that runs ``portrait-dist ARGUMENTS``."""

    def action() -> int:
        from portrait_dist import cli

        return cli.run([str(argument) for argument in arguments])

    return action


def clear(folder: Path) -> None:
    """Remove what a case left in the folder of its area."""
    for path in folder.iterdir():
        if path.name in ("stdout", "stderr"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
