"""The errors a user can cause or meet. Raised where the fact is known, caught once, in ``portrait_dist.cli``.

Every message is one line that says where (file or option), what is wrong, and what to do.
"""

from __future__ import annotations

from typing import Any


class PortraitDistError(Exception):
    """Base class. ``exit_code`` is the process's exit status.

    Args:
        message: one line.
        result: what the command has to report all the same (what was done, what was not); printed with ``--json``.
    """

    exit_code = 1

    def __init__(self, message: str = "", result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result

    agreed = False
    """True when every rank raises it at the same place."""
    quiet = False
    """True on the ranks that leave the message to another one."""


class InputError(PortraitDistError):
    """The input or the options are wrong (exit code 2)."""

    exit_code = 2


class DamagedDataError(PortraitDistError):
    """The data is damaged: a file is truncated, missing or not what the manifest says (exit code 3)."""

    exit_code = 3


class UnreachableError(PortraitDistError):
    """A server or file system was away for longer than it is waited for (exit code 1).

    Nothing is wrong with the data: the same command resumes later, a SLURM job requeues itself, and nothing is skipped.
    """


class Stopped(PortraitDistError):  # noqa: N818  nothing went wrong
    """Stopped by a signal after saving; the same command goes on (exit code 75, EX_TEMPFAIL).

    Args:
        message: where it stopped and what to do.
        place: ``epoch``, ``step`` and ``samples_seen`` of the checkpoint.
    """

    exit_code = 75

    def __init__(self, message: str, **place: int) -> None:
        super().__init__(message)
        self.place = place


def nearest(word: str, known: list[str]) -> str:
    """ " Did you mean …?" for a misspelt word, or an empty string where nothing known is near.

    Args:
        word: what the user wrote.
        known: the words that exist.
    """
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
