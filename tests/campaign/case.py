"""One attack: what is done, in a process of its own, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DONE, OTHER, INPUT, DAMAGED = 0, 1, 2, 3
TEMPORARY = re.compile(r"\.tmp-|\.part$|\.tmp$")


@dataclass
class Outcome:
    """How a child process ended: exit code (negative: signal), output, seconds."""

    code: int
    stdout: str
    stderr: str
    seconds: float

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
        seconds: limit after which the child hangs.
    """

    name: str
    action: Callable[[], int]
    allowed: tuple[int, ...] = (DONE, INPUT, DAMAGED)
    checks: tuple[Check, ...] = ()
    folders: tuple[Path, ...] = ()
    seconds: float = 60.0


@dataclass
class Area:
    """A kind of attack with its generator of cases."""

    name: str
    cases: Callable[[random.Random, Path], Iterator[Case]]
    needs_root: bool = False
    slow: bool = False


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
    if outcome.code == -signal.SIGKILL:
        return f"hangs for more than {case.seconds:g} s"
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
    begin = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os._exit(_in_child(case, folder, out, err))
    code = _wait(child, case.seconds)
    return Outcome(
        code,
        out.read_text(errors="replace"),
        err.read_text(errors="replace"),
        time.monotonic() - begin,
    )


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


def _wait(child: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    pause = 0.002
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def command(*arguments: object) -> Callable[[], int]:
    """Make the action that runs ``portrait-dist ARGUMENTS``."""

    def action() -> int:
        from portrait_dist import cli

        return cli.run([str(argument) for argument in arguments])

    return action
