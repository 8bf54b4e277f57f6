"""The errors a user can cause or meet. Raised where the fact is known, caught once, in ``portrait_dist.cli``.

Every message is one line that says where (file or option), what is wrong, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PortraitDistError(Exception):
    """Base class. ``exit_code`` is the process's exit status.

    Args:
        message: one line.
        result: what the command has to report all the same (what was done, what was not); printed with ``--json``.
    """

    exit_code = 1
    requeue = True
    """Can the same command succeed later, so that a SLURM job that ended with it may come back?"""

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
    requeue = False


class DamagedDataError(PortraitDistError):
    """The data is damaged: a file is truncated, missing or not what the manifest says (exit code 3)."""

    exit_code = 3
    requeue = False


class DivergedError(PortraitDistError):
    """The loss or the weights are not finite (exit code 1): the same command would end in the same way.

    Args:
        message: one line with the step, the samples, the learning rate and what to try.
        keys: keys of all samples of the batch, where they are known.
        epoch: number of the epoch, from 0.
        step: number of the batch in the run, from 1.
        lr: learning rate of that step.
    """

    requeue = False

    def __init__(
        self,
        message: str,
        *,
        keys: Sequence[str] = (),
        epoch: int = 0,
        step: int = 0,
        lr: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.keys, self.epoch, self.step, self.lr = tuple(keys), epoch, step, lr


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
