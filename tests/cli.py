"""Call the command line in this process, as a user's shell would see it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portrait_dist import cli

PORTRAIT_DIST = (sys.executable, "-m", "portrait_dist")


@dataclass(frozen=True)
class Result:
    """Exit code and output of one command line."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one JSON value on stdout; fails where stdout holds anything else."""
        return json.loads(self.stdout)

    @property
    def lines(self) -> list[str]:
        """The lines of stderr that are not empty."""
        return [line for line in self.stderr.splitlines() if line.strip()]


def call(*arguments: str | Path) -> Result:
    """Run ``portrait-dist ARGUMENTS`` in this process.

    Output is captured at the level of file descriptors, because ``--json`` redirects descriptor 1.
    """
    with _captured(1) as out, _captured(2) as err:
        code = cli.run([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


def call_process(
    *arguments: str | Path,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = 300,
) -> Result:
    """Run ``python -m portrait_dist ARGUMENTS`` in a process of its own."""
    done = subprocess.run(
        [*PORTRAIT_DIST, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_one_line(result: Result, exit_code: int, *parts: str) -> None:
    """Assert that a command refused with this exit code and one clear line that has all parts."""
    assert result.exit_code == exit_code, result
    assert "Traceback" not in result.stderr, result.stderr
    assert result.lines, "nothing on stderr"
    last = result.lines[-1]
    missing: Sequence[str] = [part for part in parts if part not in last]
    assert not missing, f"{missing} not in the last line of {result.stderr!r}"


class _Text(io.StringIO):
    """A buffer that is filled when the capture ends."""


@contextlib.contextmanager
def _captured(descriptor: int) -> Any:
    import tempfile

    text = _Text()
    stream = sys.stdout if descriptor == 1 else sys.stderr
    stream.flush()
    saved = os.dup(descriptor)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), descriptor)
        mirror = open(descriptor, "w", buffering=1, closefd=False)  # noqa: SIM115  pytest replaces the stream
        name = "stdout" if descriptor == 1 else "stderr"
        setattr(sys, name, mirror)
        try:
            yield text
        finally:
            mirror.flush()
            setattr(sys, name, stream)
            os.dup2(saved, descriptor)
            os.close(saved)
            file.seek(0)
            text.write(file.read().decode(errors="replace"))
