"""Where a run stands, from its ``metrics.jsonl`` and checkpoints alone.

Needs neither SLURM nor torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from portrait_dist.errors import InputError
from portrait_dist.runs.folder import Event, Events, RunFolder
from portrait_dist.runs.health import find_stall
from portrait_dist.runs.scores import SplitScore, read_scores
from portrait_dist.runs.steps import StepStatus, steps_of

SILENT_SECONDS = 900.0
"""Longer without a line than this, and than ten usual gaps: nobody seems to be training."""


ENDS = ("start", "interval", "epoch", "stop", "error", "end")
"""Kinds of lines that say what a run is doing."""


class State(StrEnum):
    """What a run is doing."""

    EMPTY = "empty"
    RUNNING = "running"
    SILENT = "silent"
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands; what is not known is None.

    Args:
        run_dir: the run's folder.
        state: what it is doing.
        epoch: complete epochs.
        max_epochs: epochs of the whole run.
        step: optimiser steps done.
        total_steps: optimiser steps of the whole run.
        batch: batches of each rank done.
        total_batches: batches of each rank in the whole run.
        samples_seen: training samples, over all ranks.
        iou, best_iou: last and best validation IoU.
        loss: last training loss.
        images_per_second: over all ranks.
        seconds_left: at the speed of the last epoch.
        checkpoint_age_seconds: since the newest checkpoint was written.
        seconds_since_last_line: of metrics.jsonl.
        last_error, last_error_age_seconds: message of the last error, and its age.
        world_size: number of ranks.
        skipped_lines: lines of metrics.jsonl that could not be read.
        stall: which rank the others wait for, where they wait for long.
        straggler: the last report of a slow rank in this attempt.
        straggler_age_seconds: since that report.
        steps: jobs that ``submit`` queued for this run, beside or instead of a training.
        scores: that ``submit evaluate`` kept in the folder, by split, each shard set's too.
    """

    run_dir: str
    state: State
    epoch: int | None
    max_epochs: int | None
    step: int | None
    total_steps: int | None
    batch: int | None
    total_batches: int | None
    samples_seen: int | None
    iou: float | None
    best_iou: float | None
    loss: float | None
    images_per_second: float | None
    seconds_left: float | None
    checkpoint_age_seconds: float | None
    seconds_since_last_line: float | None
    last_error: str | None
    last_error_age_seconds: float | None
    world_size: int | None
    skipped_lines: int
    stall: str | None = None
    straggler: str | None = None
    straggler_age_seconds: float | None = None
    steps: list[StepStatus] = field(default_factory=list)
    scores: dict[str, SplitScore] = field(default_factory=dict)

    def table(self) -> str:
        """Return the lines that a person reads."""
        step = f"{_known(self.step)} of {_known(self.total_steps)}"
        if self.batch != self.step:
            step += f" ({_known(self.batch)} of {_known(self.total_batches)} batches)"
        rows = {
            "state": f"{self.state}, last line {duration(self.seconds_since_last_line)} ago",
            "epoch": f"{_known(self.epoch)} of {_known(self.max_epochs)} complete",
            "step": step,
            "validation IoU": f"{_number(self.iou)} (best {_number(self.best_iou)})",
            "speed": (
                f"{_number(self.images_per_second, 1)} images/s on "
                f"{_known(self.world_size)} rank(s)"
            ),
            "time left": duration(self.seconds_left),
            "last checkpoint": f"{duration(self.checkpoint_age_seconds)} ago",
        }
        for split, score in self.scores.items():
            rows[f"{split} scores"] = score.describe()
            rows |= {f"  {name}": one.describe() for name, one in score.sets.items()}
        if self.stall:
            rows["ranks wait"] = self.stall
        if self.straggler:
            rows["slow rank"] = f"{duration(self.straggler_age_seconds)} ago: {self.straggler}"
        if self.last_error:
            rows["last error"] = f"{duration(self.last_error_age_seconds)} ago: {self.last_error}"
        if self.skipped_lines:
            rows["not readable"] = f"{self.skipped_lines} line(s) of metrics.jsonl, skipped"
        lines = [f"  {name:16s} {row}" for name, row in rows.items()]
        return "\n".join([self.run_dir, *lines, *_step_lines(self.steps)])


@dataclass(frozen=True)
class StepsStatus:
    """Where jobs stand that write shards or masks, or a run that has not begun.

    Args:
        target: the folder.
        steps: the jobs, oldest submission first.
    """

    target: str
    steps: list[StepStatus]

    def table(self) -> str:
        """Return the lines that a person reads."""
        return "\n".join([self.target, *_step_lines(self.steps)])


def _step_lines(steps: list[StepStatus]) -> list[str]:
    return [f"  {step.name:16s} {step.describe()}" for step in steps]


def status(folder: Path) -> RunStatus | StepsStatus:
    """Read where a run stands, or jobs that write a folder.

    Raises:
        InputError: neither a run nor anything that ``submit`` has jobs for.
    """
    steps = steps_of(folder)
    try:
        run = run_status(folder)
    except InputError:
        if not steps:
            raise
        return StepsStatus(str(folder), steps)
    # A training writes its own events.
    steps = [
        dataclasses.replace(step, tasks={str(run.state): 1}) if step.name == "train" else step
        for step in steps
    ]
    return dataclasses.replace(run, steps=steps)


def run_status(run_dir: Path, now: float | None = None) -> RunStatus:
    """Read where a run stands.

    Args:
        run_dir: the run's folder.
        now: seconds since 1970; the clock's when None.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    folder = RunFolder(run_dir)
    if not folder.path.is_dir():
        raise InputError(f"{run_dir}: there is no such run folder; give <run.root>/<run.name>")
    history = History(folder.events(), time.time() if now is None else now)
    newest = folder.checkpoint_time()
    if not history.events and newest is None and not folder.config.exists():
        raise InputError(
            f"{run_dir}: no metrics.jsonl, no checkpoint: not a run folder; "
            "give <run.root>/<run.name>"
        )
    status = history.status(run_dir, newest)
    status = dataclasses.replace(status, scores=read_scores(folder.path))
    if status.state not in (State.RUNNING, State.SILENT):
        return status
    stall = find_stall(folder.health, now)
    return dataclasses.replace(status, stall=stall.message if stall else None)


class History:
    """What the lines of a run say at one moment.

    Args:
        events: the lines, oldest first.
        now: seconds since 1970.
    """

    def __init__(self, events: Events, now: float) -> None:
        self.events = events
        self.attempt = events.this_attempt()
        self.now = now

    def status(self, run_dir: Path, checkpoint_time: float | None) -> RunStatus:
        """Return all fields at once."""
        events, error = self.events, self.last_error
        slow = next(iter(reversed(self.attempt.of_kind("straggler"))), None)
        scores = [event.val_iou for event in events if event.val_iou is not None]
        return RunStatus(
            run_dir=str(run_dir),
            state=self.state,
            epoch=self.epochs_done,
            max_epochs=events.latest("max_epochs"),
            step=self.step,
            total_steps=self._total(self.steps_per_epoch),
            batch=events.latest("batches_done"),
            total_batches=self._total(events.latest("batches_in_epoch")),
            samples_seen=events.latest("samples_seen"),
            iou=scores[-1] if scores else None,
            best_iou=max(scores, default=None),
            loss=events.latest("loss"),
            images_per_second=events.latest("images_per_second"),
            seconds_left=self.seconds_left,
            checkpoint_age_seconds=self._age(checkpoint_time),
            seconds_since_last_line=self._age(events[-1].time if events else None),
            last_error=error.message if error else None,
            last_error_age_seconds=self._age(error.time) if error else None,
            world_size=events.latest("world_size"),
            skipped_lines=events.skipped,
            straggler=slow.message if slow else None,
            straggler_age_seconds=self._age(slow.time) if slow else None,
        )

    @property
    def state(self) -> State:
        """What the run is doing, from its last line and that line's age."""
        last = next((event for event in reversed(self.events) if event.kind in ENDS), None)
        if last is None:
            return State.EMPTY
        epochs, total = self.epochs_done, self.events.latest("max_epochs")
        complete = epochs is not None and total is not None and epochs >= total
        if last.kind == "end" or (last.kind == "epoch" and complete):
            return State.FINISHED
        if last.kind in ("stop", "error"):
            return State.STOPPED if last.kind == "stop" else State.FAILED
        times = [event.time for event in self.attempt]
        gaps = sorted(after - before for before, after in itertools.pairwise(times))
        usual = gaps[len(gaps) // 2] if gaps else 0.0
        silent = self.now - times[-1] > max(SILENT_SECONDS, 10 * usual)
        return State.SILENT if silent else State.RUNNING

    @property
    def epochs_done(self) -> int | None:
        """Complete epochs: one more than the last with a line, or where the run started from."""
        for event in reversed(self.events):
            if event.epoch is not None and event.kind in ("epoch", "start"):
                return event.epoch + (event.kind == "epoch")
        return None

    @property
    def step(self) -> int | None:
        """Optimiser steps done."""
        step: int | None = self.events.latest("step")
        return step

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps in an epoch."""
        steps: int | None = self.events.latest("steps_per_epoch")
        return steps

    @property
    def last_error(self) -> Event | None:
        """The newest line of an error."""
        return next((event for event in reversed(self.events) if event.kind == "error"), None)

    @property
    def seconds_left(self) -> float | None:
        """Time for the steps that are left, at the speed of this attempt's last epoch."""
        if self.state == State.FINISHED:
            return 0.0
        total, steps_per_epoch = self._total(self.steps_per_epoch), self.steps_per_epoch
        marks = [(event.time, event.step) for event in self.attempt if event.step is not None]
        if total is None or steps_per_epoch is None or len(marks) < 2:
            return None
        end, step = marks[-1]
        window = [mark for mark in marks[:-1] if mark[1] <= step - steps_per_epoch]
        begin, before = window[-1] if window else marks[0]
        if step <= before or end < begin:
            return None
        return round(max(0, total - step) * (end - begin) / (step - before), 1)

    def _total(self, in_epoch: int | None) -> int | None:
        epochs = self.events.latest("max_epochs")
        return None if epochs is None or in_epoch is None else epochs * in_epoch

    def _age(self, moment: float | None) -> float | None:
        # The clock of the node that wrote may be ahead of this one's.
        return None if moment is None else max(0.0, round(self.now - moment, 1))


def duration(seconds: float | None) -> str:
    """Write a duration: ``2 h 05 min``, ``5 min 00 s``, ``12 s``, or ``?`` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _known(value: int | None) -> str:
    return "?" if value is None else f"{value}"


def _number(value: float | None, digits: int = 4) -> str:
    return "?" if value is None else f"{value:.{digits}f}"
