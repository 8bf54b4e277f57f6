"""One finding of ``doctor``, and what all checks share."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"
GB = 1e9


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        name: what was looked at.
        status: ``ok``; ``warn``, it works but slowly or not everywhere; ``fail``, it will not work.
        found: what was seen.
        advice: what to do; empty where there is nothing to do.
    """

    name: str
    status: str
    found: str
    advice: str = ""


def output(*command: str) -> str:
    """Return what a program prints; empty where it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
