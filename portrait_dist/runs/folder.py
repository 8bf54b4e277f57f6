"""A run's folder: the names of its files, its events, and the lock that admits one writer.

Everything that is written into ``metrics.jsonl`` or read from it passes through this module, so
that no other code meets a line that is not UTF-8, not JSON or not what it should be.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portrait_dist import files
from portrait_dist.errors import InputError
from portrait_dist.files import SECONDS_FOR_A_DEAD_NODE
from portrait_dist.system.info import environment_number

LATEST = "ckpt_latest.pth"
BEST = "ckpt_best.pth"
AVERAGE = "average_model.pth"
CONFIG = "config.yaml"
EVENTS = "metrics.jsonl"
REPORT = "report.html"
LOCK = ".lock"

LARGEST_TIME = 253_402_300_799.0
"""The last second of the year 9999, after which neither ``time.gmtime`` nor ``datetime`` works."""
LARGEST_NUMBER = 2**63
MOST_BYTES = 1 << 30
"""A metrics.jsonl of a run of a year is a hundredth of this."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of ``metrics.jsonl``. What a line does not have is None.

    Args:
        kind: ``start``, ``interval``, ``epoch``, ``stop``, ``error``, ``end`` or ``straggler``.
        time: seconds since 1970.
        epoch: number of the epoch, from 0.
        step: optimiser steps since the run began; in lines without ``batch`` (before 0.2) it counts
            batches.
        steps_per_epoch: optimiser steps in an epoch; in lines without ``batch`` it counts batches.
        batch: batches of each rank since the run began.
        batches_per_epoch: batches of each rank in an epoch.
        max_epochs: epochs of the whole run.
        samples_seen: training samples since the run began, over all ranks.
        world_size: number of ranks.
        loss: of the epoch, or of it so far.
        iou: likewise.
        val_loss: of the validation after the epoch.
        val_iou: likewise.
        lr: learning rate.
        images_per_second: over all ranks.
        data_wait_share: fraction of the time that rank 0 waited for data.
        gpu_memory_bytes: largest allocation on rank 0's GPU.
        message: why the run stopped or failed.
        exit_code: exit code of the process that failed or stopped.
        requeue: whether another attempt of a SLURM job can help; None where the exit code decides.
        machine: the fields of :class:`portrait_dist.system.info.Machine`.
        shards: absolute path or address of the shards.
        shards_version: of their manifest; ``pack --append`` makes a new one.
        shards_versions: of the manifests of several sets, by name.
        rank: the rank that the line is about.
        host: its node.
        relative_speed: of a slow rank, as a fraction of the median.
        step_seconds: of a step.
        data_seconds: that the slow rank waited for data in a step.
        compute_seconds: that it took for forward and loss.
    """

    kind: str
    time: float
    epoch: int | None = None
    step: int | None = None
    steps_per_epoch: int | None = None
    batch: int | None = None
    batches_per_epoch: int | None = None
    max_epochs: int | None = None
    samples_seen: int | None = None
    world_size: int | None = None
    loss: float | None = None
    iou: float | None = None
    val_loss: float | None = None
    val_iou: float | None = None
    lr: float | None = None
    images_per_second: float | None = None
    data_wait_share: float | None = None
    gpu_memory_bytes: float | None = None
    message: str | None = None
    exit_code: int | None = None
    requeue: bool | None = None
    machine: dict[str, Any] | None = None
    shards: str | None = None
    shards_version: int | None = None
    shards_versions: dict[str, Any] | None = None
    rank: int | None = None
    host: str | None = None
    relative_speed: float | None = None
    step_seconds: float | None = None
    data_seconds: float | None = None
    compute_seconds: float | None = None

    @property
    def batches_done(self) -> int | None:
        """Batches of each rank since the run began, also in lines of old runs."""
        return self.step if self.batch is None else self.batch

    @property
    def batches_in_epoch(self) -> int | None:
        """Batches of each rank in an epoch, also in lines of old runs."""
        return self.steps_per_epoch if self.batches_per_epoch is None else self.batches_per_epoch


REQUIRED = {
    "start": ("epoch", "step"),
    "interval": ("epoch", "step"),
    "epoch": ("epoch", "step"),
}
"""Fields without which a line of a kind says nothing. Every line has ``kind`` and ``time``."""


@dataclass(frozen=True)
class Events(Sequence[Event]):
    """The readable lines of a run, oldest first, and how many lines could not be read."""

    lines: tuple[Event, ...] = ()
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        return self.lines[index]

    def of_kind(self, *kinds: str) -> list[Event]:
        """Return the lines of these kinds."""
        return [event for event in self.lines if event.kind in kinds]

    def latest(self, field: str) -> Any:
        """Return the newest known value of a field, None without one."""
        values = (getattr(event, field) for event in reversed(self.lines))
        return next((value for value in values if value is not None), None)

    def this_attempt(self) -> Events:
        """Return the lines since the run was last started."""
        starts = [number for number, event in enumerate(self.lines) if event.kind == "start"]
        return Events(self.lines[starts[-1] :]) if starts else self


class RunFolder:
    """The folder of a run, ``<run.root>/<run.name>``; it need not exist.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.latest = self.path / LATEST
        self.best = self.path / BEST
        self.average = self.path / AVERAGE
        self.config = self.path / CONFIG
        self.metrics = self.path / EVENTS
        self.report = self.path / REPORT
        self.health = self.path / "health"

    def keys_file(self, rank: int) -> Path:
        """Return the file for the keys of a rank's training batches (``data.log_keys``)."""
        return self.path / f"keys-rank{rank}.jsonl"

    @property
    def checkpoint(self) -> Path | None:
        """The best checkpoint, else the latest, else None."""
        return next((path for path in (self.best, self.latest) if path.exists()), None)

    def checkpoint_time(self) -> float | None:
        """Return when the newest checkpoint was written, in seconds since 1970, or None."""
        times = []
        for path in (self.best, self.latest):
            try:
                times.append(path.stat().st_mtime)
            except OSError:
                continue
        return max(times, default=None)

    def events(self) -> Events:
        """Read ``metrics.jsonl``.

        Lines that are not UTF-8, not JSON, of wrong types or without what their kind needs are
        skipped and counted. So is a last line that a crash cut short. Numbers that are not finite
        count as unknown.

        Raises:
            InputError: ``metrics.jsonl`` is no regular file, cannot be read, or is too large.
        """
        try:
            data = files.read_regular(self.metrics, MOST_BYTES)
        except FileNotFoundError:
            return Events()
        except OSError as error:
            raise InputError(
                f"{self.metrics}: cannot be read ({error.strerror}); restore it, or move it away"
            ) from error
        found, skipped = [], 0
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            event = parse_event(line)
            if event is None:
                skipped += 1
            else:
                found.append(event)
        return Events(tuple(found), skipped)

    def append(self, kind: str, **values: Any) -> None:
        """Append a line to ``metrics.jsonl``.

        One write per line, so that lines of several processes do not mix on a local disk.

        Args:
            kind: see :class:`Event`.
            values: its other fields, without ``time``. Numbers that are not finite are written as
                null.

        Raises:
            InputError: the file cannot be written.
            PortraitDistError: the disk is full.
        """
        line = finite({"kind": kind, "time": time.time(), **values})
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with files.explained(self.metrics):
            # O_APPEND: the kernel puts each write behind those of other processes.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(self.metrics, flags, 0o666)
            try:
                # A line that a crash or a full disk cut short must not swallow this one.
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    data = b"\n" + data
                while data:
                    data = data[os.write(descriptor, data) :]
            finally:
                os.close(descriptor)


def parse_event(line: bytes | str) -> Event | None:
    """Read a line of ``metrics.jsonl``; None where it is not what it should be."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            return None
        values = finite(values)
    except (ValueError, RecursionError):
        return None
    # Fields of newer releases are passed over: an old status reads a new run.
    known = {name: values[name] for name in _checks() if values.get(name) is not None}
    if not all(_checks()[name](value) for name, value in known.items()):
        return None
    if any(
        name not in known for name in ("kind", "time", *REQUIRED.get(str(known.get("kind")), ()))
    ):
        return None
    return Event(**known) if 0 <= known["time"] <= LARGEST_TIME else None


def finite(value: object) -> Any:
    """Replace numbers that are not finite by None, in dicts and lists too: JSON has none such."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _is_number(value: object) -> bool:
    # Larger ones become infinite or cannot become a float at all.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < LARGEST_NUMBER


@functools.cache
def _checks() -> dict[str, Callable[[object], bool]]:
    """Each field of an event with the check of its type."""
    checks: dict[object, Callable[[object], bool]] = {
        int: _is_whole,
        float: _is_number,
        str: lambda value: isinstance(value, str),
        bool: lambda value: isinstance(value, bool),
        dict: lambda value: isinstance(value, dict),
    }
    found = {}
    hints = typing.get_type_hints(Event)
    for field in dataclasses.fields(Event):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):
            hint = typing.get_args(hint)[0]
        found[field.name] = checks[typing.get_origin(hint) or hint]
    return found


class RunLock(files.ExclusiveLock):
    """One writer for a run folder, on any number of nodes.

    A job that SLURM or torchrun started again waits for the lock of its own earlier attempt, whose
    node may have died with it.

    Args:
        folder: the run's folder; made if it is missing.

    Raises:
        InputError: another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        with files.explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        job = os.environ.get("SLURM_JOB_ID", "")
        restarted = environment_number("SLURM_RESTART_COUNT") or environment_number(
            "TORCHELASTIC_RESTART_COUNT"
        )

        def seconds_to_wait(holder: str) -> float:
            # Only its own earlier attempt can be dead; another job's lock is held by a live one.
            of_another_job = "SLURM job " in holder and not holder.endswith(f"SLURM job {job}")
            return SECONDS_FOR_A_DEAD_NODE if restarted and not of_another_job else 0.0

        super().__init__(
            folder / LOCK,
            lambda holder: (
                f"{folder}: {holder} is training into this folder; stop it, or choose another "
                "run.name"
            ),
            note=f", SLURM job {job}" if job else "",
            wait=seconds_to_wait,
        )
        files.remove_temporary_files(folder)
