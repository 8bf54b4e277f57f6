"""What ``submit`` queued beside a training, and how far each step is; needs no SLURM.

    <folder>/slurm/<first job>.steps.json      the steps of one submission, written by submit
    <folder>/slurm/<job>_<task>/step.jsonl     starts and ends of one task, written by the task

The folder is the one that holds the outputs: the parent of the shards, of the masks or of the run.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from portrait_dist import files

RECORD = ".steps.json"
TASK_EVENTS = "step.jsonl"
MOST_BYTES = 16 << 20
MOST_TASKS = 1_000_000
"""Of an array job; SLURM's own limit is 4,000,000, and 1,001 where nobody raised it."""
MOST_RECORDS = 50
"""Submissions of one folder that are looked at, the newest."""


class TaskState(StrEnum):
    """What a task is doing."""

    WAITING = "waiting"
    RUNNING = "running"
    REQUEUED = "requeued"
    FAILED = "failed"
    CANCELLED = "cancelled"
    FINISHED = "finished"


@dataclass(frozen=True)
class QueuedStep:
    """One job of a submission.

    Args:
        name: ``pack``, ``pack --finish``, ``train``, ``evaluate`` and so on.
        job_id: SLURM's number; None in a dry run.
        tasks: of an array job; 0 for a job that is none.
        command: the sbatch command as a shell line.
        logs: its log, with SLURM's ``%A`` and ``%a`` where it is an array job.
    """

    name: str
    job_id: int | None
    tasks: int
    command: str
    logs: str

    @property
    def labels(self) -> list[str]:
        """Names of its tasks in file names: ``120_3`` for task 3 of the array job 120."""
        return [f"{self.job_id}_{task}" for task in range(self.tasks)] or [str(self.job_id)]


@dataclass(frozen=True)
class TaskEvent:
    """A line of ``step.jsonl``.

    Args:
        time: seconds since 1970.
        attempt: from 1; one more after each requeue.
        state: ``running`` at the start, another one at the end.
        node: where.
        exit_code: of the command, at the end.
        message: why it ended so.
    """

    time: float
    attempt: int
    state: str
    node: str
    exit_code: int | None = None
    message: str = ""


@dataclass(frozen=True)
class StepStatus:
    """Where one step of a submission stands.

    Args:
        name: of the step.
        job_id: SLURM's number.
        tasks: how many tasks are in each state.
        attempts: most attempts of a task.
        message: the newest message of a task that failed or comes back.
    """

    name: str
    job_id: int
    tasks: dict[str, int]
    attempts: int
    message: str = ""

    def describe(self) -> str:
        """Return one line for people."""
        states = ", ".join(
            f"{count} {state}" if sum(self.tasks.values()) > 1 else state
            for state, count in self.tasks.items()
        )
        again = f", attempt {self.attempts}" if self.attempts > 1 else ""
        return f"job {self.job_id}: {states}{again}{f'; {self.message}' if self.message else ''}"


def write_record(folder: Path, targets: list[Path], steps: list[QueuedStep]) -> Path:
    """Write what was queued, for :func:`steps_of`.

    Args:
        folder: ``slurm`` beside the outputs.
        targets: what the steps write; ``portrait-dist status`` takes any of them.
        steps: in order; all have a number.
    """
    path = folder / f"{steps[0].job_id}{RECORD}"
    content = {
        "time": time.time(),
        "targets": [os.path.realpath(target) for target in targets],
        "steps": [asdict(step) for step in steps],
    }
    files.write_text(path, json.dumps(content))
    return path


def append_event(logs: Path, event: TaskEvent) -> None:
    """Append a line about a task; ``logs`` is the task's folder."""
    with files.explained(logs), open(logs / TASK_EVENTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(event)) + "\n")


def read_events(logs: Path) -> list[TaskEvent]:
    """Read a task's lines; damaged ones are skipped."""
    found = []
    for line in files.json_objects(_read(logs / TASK_EVENTS)):
        try:
            event = TaskEvent(**line)
        except TypeError:
            continue
        numbers = isinstance(event.time, int | float) and isinstance(event.attempt, int)
        if numbers and isinstance(event.state, str) and isinstance(event.message, str):
            found.append(event)
    return found


def steps_of(target: Path) -> list[StepStatus]:
    """Return the steps that were queued to write a folder, oldest first.

    Args:
        target: shards, masks or a run.
    """
    real = os.path.realpath(target)
    folder = Path(real).parent / "slurm"
    try:
        paths = sorted(folder.glob(f"*{RECORD}"), key=lambda path: path.stat().st_mtime)
    except OSError:
        return []
    return [_status(step, folder) for path in paths[-MOST_RECORDS:] for step in _queued(path, real)]


def _queued(path: Path, target: str) -> list[QueuedStep]:
    try:
        found = json.loads(_read(path))
        if target not in found["targets"]:
            return []
        steps = [QueuedStep(**step) for step in found["steps"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return [step for step in steps if _is_queued(step)]


def _is_queued(step: QueuedStep) -> bool:
    """Whether a step that was read has a number, and a name and tasks that can be shown."""
    return (
        isinstance(step.job_id, int)
        and isinstance(step.name, str)
        and isinstance(step.tasks, int)
        and step.tasks <= MOST_TASKS
    )


def _status(step: QueuedStep, folder: Path) -> StepStatus:
    states: Counter[str] = Counter()
    last: list[TaskEvent] = []
    for label in step.labels:
        events = read_events(folder / label)
        states[events[-1].state if events else TaskState.WAITING] += 1
        last += events[-1:]
    told = [event for event in last if event.message]
    return StepStatus(
        name=step.name,
        job_id=step.job_id or 0,
        tasks=dict(states),
        attempts=max((event.attempt for event in last), default=0),
        message=max(told, key=lambda event: event.time).message if told else "",
    )


def _read(path: Path) -> bytes:
    try:
        return files.read_regular(path, MOST_BYTES)
    except OSError:
        return b""
