"""The errors a user can cause or meet: raised where the fact is known, caught once, in the CLI.

Every message is one line that says where (file or option), what is wrong, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_VALUE = 100
"""Characters of a user's value that a message repeats."""


class PortraitDistError(Exception):
    """Base class.

    Args:
        message: one line.
        result: what the command has to report all the same (what was done, what was not), a
            dataclass or a mapping; printed with ``--json``.
    """

    exit_code = 1
    """Exit status of the process."""
    requeue = True
    """Whether another attempt of a SLURM job can help."""

    def __init__(self, message: str = "", result: object = None) -> None:
        super().__init__(message)
        self.result = result

    agreed = False
    """True when every rank raises it at the same place."""
    quiet = False
    """True where another process has printed the message, or will."""
    secondary = False
    """True on a rank that leaves the JSON to another one."""


class InputError(PortraitDistError):
    """The input or the options are wrong (exit code 2)."""

    exit_code = 2
    requeue = False


class DamagedDataError(PortraitDistError):
    """A file is truncated, missing or not what the manifest says (exit code 3)."""

    exit_code = 3
    requeue = False


class DivergedError(PortraitDistError):
    """The loss or the weights are not finite (exit code 1).

    The same command would end in the same way.

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

    Nothing is wrong with the data: the same command resumes later, a SLURM job requeues itself, and
    nothing is skipped.
    """


class Stopped(PortraitDistError):  # noqa: N818  nothing went wrong
    """Stopped by a signal after saving; the same command resumes (exit code 75, EX_TEMPFAIL).

    Args:
        message: where it stopped and what to do.
        position: ``epoch``, ``batch``, ``step`` and ``samples_seen`` of the checkpoint.
    """

    exit_code = 75

    def __init__(self, message: str, **position: int) -> None:
        super().__init__(message)
        self.position = position


def nearest(given: str, known: list[str]) -> str:
    """Return " Did you mean …?" for a misspelt name, or an empty string.

    Args:
        given: what the user wrote.
        known: the names that exist.
    """
    from difflib import get_close_matches

    close = get_close_matches(given[:LONGEST_VALUE], known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def shorten(value: object) -> str:
    """Return a value as text that fits a message: on one line, printable, long ones cut."""
    text = str(value)
    length = len(text)
    if length > LONGEST_VALUE:
        half = LONGEST_VALUE // 2 - 10
        text = f"{text[:half]}…{text[-half:]} ({length:,} characters)"
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def one_line(error: BaseException, most: int = 200) -> str:
    """Return an error's message in one line of at most ``most`` characters, or else its type."""
    return _joined(str(error), most) or type(error).__name__


def kind_and_message(error: BaseException, most: int = 300) -> str:
    """Return the class and message of an error in one line of at most ``most`` characters.

    For errors of foreign code, whose messages alone may say little: ``KeyError: 'mask'``.
    """
    return _joined(f"{type(error).__name__}: {error}", most)


def _joined(lines: str, most: int) -> str:
    text = " ".join(lines.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def printable(text: str) -> str:
    """Return a text that every stream takes: halves of surrogate pairs are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
