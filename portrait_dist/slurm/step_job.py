"""The inside of a SLURM job of a step: packing, predicting, evaluating, reporting.

``launch/slurm.sbatch --step LOGS COMMAND ARGUMENTS…`` ends here. The command runs as it would by
hand. Before its time limit or on preemption it is ended and the job put back into the queue; after
a lost node SLURM does that itself. Every command continues where it stopped, so that nothing is
done twice.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from portrait_dist import files
from portrait_dist.errors import DamagedDataError, InputError, Stopped
from portrait_dist.runs.steps import TaskEvent, TaskState, append_event, read_events
from portrait_dist.slurm.allocation import Allocation, first_address, job_state, node_name
from portrait_dist.slurm.container import Container
from portrait_dist.slurm.job import log, requeue, srun_command

MOST_REQUEUES = 20
MOST_FAILURES = 3
"""Attempts of a task that may fail for no reason that is known: a disk, memory, a sick node."""
ON_RANKS = ("evaluate",)
"""Commands whose ranks share one result; they run under torchrun on all nodes and GPUs."""
IN_ONE_GO = ("evaluate", "report")
"""Commands that keep no record of what they have done; ``pack`` and ``predict`` look themselves."""


@dataclass(frozen=True)
class Ended:
    """How the command of one attempt ended.

    Args:
        exit_code: 128 and the signal where a signal ended it.
        message: its error, where it said one.
        signal_name: what SLURM sent, or an empty string.
        cancelled: somebody cancelled the job.
    """

    exit_code: int
    message: str = ""
    signal_name: str = ""
    cancelled: bool = False


def run_step(arguments: Sequence[str], container: Container | None = None) -> int:
    """Run ``LOGS COMMAND ARGUMENTS…``; return 0, 75 for a requeue, or the command's failure."""
    allocation = Allocation.from_environment()
    logs, command = Path(arguments[0]) / allocation.label, list(arguments[1:])
    with files.explained(logs):
        logs.mkdir(parents=True, exist_ok=True)
    log(f"{allocation.describe()}; portrait-dist {command[0]}; logs {logs}")
    if command[0] in IN_ONE_GO and (attempt := finished_before(logs, allocation)):
        log(f"finished in attempt {attempt}; nothing to do")
        return 0
    # Before it is said to run: SLURM may not answer.
    line = command_line(command, allocation, logs, container)
    _note(logs, allocation, TaskState.RUNNING)
    ended = run_command(line, allocation)
    failures = 1 + sum(event.state == TaskState.REQUEUED for event in _failed(logs))
    state, message = decide(ended, allocation.restarts, failures)
    log(f"{message or state}{'; it comes back' if state == TaskState.REQUEUED else ''}")
    _note(logs, allocation, state, ended.exit_code, message)
    if state == TaskState.REQUEUED:
        return requeue(allocation)
    return ended.exit_code


def finished_before(logs: Path, allocation: Allocation) -> int:
    """Return the attempt of this job that finished the task, or 0.

    A node that is lost after the command's end and before SLURM hears of it brings the job back.
    Outputs are on the disk before that is noted, so that what was noted need not be done again.
    """
    events = read_events(logs) if allocation.restarts else []
    return events[-1].attempt if events and events[-1].state == TaskState.FINISHED else 0


def command_line(
    command: Sequence[str], allocation: Allocation, logs: Path, container: Container | None = None
) -> list[str]:
    """Return what the job starts: the command, or one torchrun on each node."""
    if command[0] in ON_RANKS and allocation.nodes * allocation.ranks_per_node > 1:
        return srun_command(allocation, first_address(allocation), logs, command, container)
    line = ["-u", "-m", "portrait_dist", *command, "--json"]
    if container is None:
        return [sys.executable, *line]
    one = ["srun", "--nodes=1", "--ntasks=1", f"--cpus-per-task={allocation.cpus}"]
    return [*one, *container.python(allocation.gpus), *line]


def decide(ended: Ended, restarts: int, failures: int) -> tuple[TaskState, str]:
    """Say what follows from the end of an attempt.

    Args:
        ended: how it ended.
        restarts: how often the job was requeued before.
        failures: attempts of this task that failed for no known reason, this one included.

    Returns:
        The task's state, and why.
    """
    if ended.exit_code == 0:
        return TaskState.FINISHED, ""
    if ended.cancelled:
        return TaskState.CANCELLED, "cancelled; the same command again continues"
    failed = ended.message or f"exit code {ended.exit_code}"
    if ended.exit_code in (InputError.exit_code, DamagedDataError.exit_code):
        return TaskState.FAILED, failed
    stopped = bool(ended.signal_name) or ended.exit_code == Stopped.exit_code
    why = f"stopped by {ended.signal_name or 'a signal'}" if stopped else failed
    if restarts >= MOST_REQUEUES:
        return TaskState.FAILED, f"{why}, and it was requeued {restarts} times"
    if not stopped and failures >= MOST_FAILURES:
        return TaskState.FAILED, f"{why}, for the {failures}th time"
    return TaskState.REQUEUED, why


def run_command(command: Sequence[str], allocation: Allocation) -> Ended:
    """Run a command to its end; a signal of SLURM ends it, and what it has done stays."""
    received: list[str] = []

    def end(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        if child:
            child.terminate()

    child: subprocess.Popen[str] | None = None
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, end)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace")
    if received:  # between the two lines above
        child.terminate()
    printed, _ = child.communicate()
    print(printed, end="", flush=True)
    code = child.returncode
    cancelled = "SIGTERM" in received and job_state(allocation.label).startswith("CANCELLED")
    return Ended(
        code if code >= 0 else 128 - code, _error(printed), (received or [""])[0], cancelled
    )


def _error(printed: str) -> str:
    """Return the error in the JSON object that a command printed."""
    for line in reversed(printed.splitlines()):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return str(found.get("error") or "")
    return ""


def _failed(logs: Path) -> list[TaskEvent]:
    """Return ends that neither a signal nor wrong input explains."""
    return [event for event in read_events(logs) if not event.message.startswith("stopped by")]


def _note(
    logs: Path,
    allocation: Allocation,
    state: TaskState,
    exit_code: int | None = None,
    message: str = "",
) -> None:
    attempt = allocation.restarts + 1
    append_event(logs, TaskEvent(time.time(), attempt, state, node_name(), exit_code, message))
