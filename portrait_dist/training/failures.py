"""What a rank does when training stops or fails: who reports, and what the run keeps of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from portrait_dist import distributed
from portrait_dist.errors import PortraitDistError, Stopped
from portrait_dist.runs.folder import RunFolder
from portrait_dist.runs.health import Stall
from portrait_dist.training import health
from portrait_dist.training.preemption import StopSignals

SECONDS_FOR_THE_FIRST = 10.0


class FailureReport:
    """Writes the reason of an end into ``metrics.jsonl``, once this start owns the run folder.

    Until then (``folder`` is None) a refused start leaves no trace in a run that exists.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None

    def write(self, kind: str, error: BaseException, message: str, **details: int | str) -> None:
        """Append a line with the exit code, for ``status`` and the requeue of a SLURM job."""
        if self.folder is None:
            return
        known = error if isinstance(error, PortraitDistError) else PortraitDistError()
        try:
            RunFolder(self.folder).append(
                kind,
                message=" ".join(message.split()),
                exit_code=known.exit_code,
                requeue=known.requeue,
                world_size=distributed.world_size(),
                **details,
            )
        except PortraitDistError as unwritten:  # the first error is the one to report
            distributed.print0(str(unwritten))


@contextlib.contextmanager
def reporting_failures(report: FailureReport, signals: StopSignals) -> Iterator[None]:
    """Let one rank report why training ended, and make its error the one that users see.

    Where one rank fails, the others fail in their next collective; torchrun ends all of them when
    the first one leaves, and reports that one. So the rank that failed first leaves first.
    """
    try:
        yield
    except Stopped as stopped:
        if distributed.rank() == 0:
            report.write("stop", stopped, str(stopped), **stopped.position)
        # All ranks stop at the same step: one line and one JSON object are enough.
        stopped.quiet = stopped.secondary = distributed.rank() != 0
        distributed.stop()
        raise
    except Exception as error:
        if isinstance(error, PortraitDistError) and error.agreed:
            if distributed.rank() == 0:
                report.write("error", error, str(error))
            raise
        # The store decides: clocks of two nodes do not say who was first.
        first = distributed.first_to_fail()
        if first != distributed.rank():
            _let_another_rank_leave_first(signals)
            raise _because_of(first) from None
        if explained := _explained(error, report):
            report.write("error", explained, str(explained), host=explained.host)
            raise explained from error
        report.write("error", error, f"rank {first}: {type(error).__name__}: {error}")
        raise


class StalledError(PortraitDistError):
    """A collective timed out; the message names the ranks that the others waited for.

    Args:
        stall: what the heartbeats say.
    """

    def __init__(self, stall: Stall) -> None:
        super().__init__(f"the ranks do not advance together: {stall.message}")
        self.host = stall.missing[0].host if stall.missing else ""


def _explained(error: Exception, report: FailureReport) -> StalledError | None:
    """Return which rank the others waited for, where a collective timed out."""
    stall = health.explain(error, RunFolder(report.folder)) if report.folder else None
    return StalledError(stall) if stall else None


def _because_of(first: int) -> PortraitDistError:
    error = PortraitDistError(f"rank {distributed.rank()} ended because rank {first} failed")
    error.secondary = True
    return error


def _let_another_rank_leave_first(signals: StopSignals) -> None:
    deadline = time.monotonic() + SECONDS_FOR_THE_FIRST
    # Until torchrun, told by the first one's exit, sends this rank its signal.
    while time.monotonic() < deadline and not signals.received:
        time.sleep(0.1)
