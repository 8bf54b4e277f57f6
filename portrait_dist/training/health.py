"""Hangs and slow ranks explain themselves: heartbeats, a short timeout, and times of every rank.

The training loop tells a :class:`Health` what it is doing, five calls a step:

    health = Health.start(RunFolder(run), timeout_seconds=600)    # every rank, after the process
    group with health.training():                       # the training part of an epoch
        for batch in batches:                     # before: health.enter(Activity.DATA)
            health.begin_batch()                  # the batch is there
            ... forward, loss
            health.enter(Activity.EXCHANGE)       # backward, where ranks wait for each other
            ... backward
            health.enter(Activity.OTHER)          # optimiser, callbacks
            ... optimiser step
            health.end_batch()
            if interval: health.exchange()        # every rank, equally often
            health.enter(Activity.DATA)
    health.close()

It never waits for a device, and one rank alone only counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from portrait_dist import distributed
from portrait_dist.runs.folder import RunFolder
from portrait_dist.runs.health import Activity, Stall, find_stall

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LEAST_TIMEOUT = 60.0
"""Seconds of the shortest automatic timeout of a step."""
STEPS_OF_A_TIMEOUT = 10
BEATS_PER_SECOND = 50.0
"""Heartbeats of all ranks together; with more ranks each one writes less often."""
RECORDED = "2000"
"""Collectives that the flight recorder keeps; torchtitan keeps 20,000, where a model has more."""
KEPT = 50
"""Collectives that a rank writes down when it waits."""
SLOW = 0.75
"""A rank below this fraction of the median speed is reported."""
FIRST_WINDOW, LONGEST_WINDOW = 5.0, 60.0
"""Seconds over which the ranks' times are compared: short at first, then doubled."""
SECONDS_BETWEEN_REPORTS = 600.0
"""The same rank is reported again for the same reason after so long."""


def record_collectives(folder: Path) -> None:
    """Switch torch's flight recorder on, before the process group is made; what is set stays.

    Args:
        folder: of the run; NCCL writes its record into ``health/nccl-<rank>`` where a collective
            times out.
    """
    file = str(RunFolder(folder).health.absolute() / "nccl-")
    defaults = {
        "TORCH_FR_BUFFER_SIZE": RECORDED,
        "TORCH_FR_DUMP_ON_TIMEOUT": "1",  # older torch does so by itself
        "TORCH_FR_DUMP_TEMP_FILE": file,
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class RankTimes:
    """What a rank did with its time, in seconds per step.

    Args:
        step: the whole step; the same on all ranks, which wait for each other.
        data: waiting for data.
        compute: forward and loss, on the device where that is a GPU.
        other: optimiser, callbacks, saving; 0 on GPUs, which work meanwhile.
    """

    step: float
    data: float
    compute: float
    other: float


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the others.

    Args:
        rank: number of the rank.
        relative_speed: median of the ranks' own times per step, divided by this rank's.
        reason: what takes its time.
        own_seconds: its own time per step, without waiting for others.
        times: all that is known of it.
    """

    rank: int
    relative_speed: float
    reason: str
    own_seconds: float
    times: RankTimes

    def message(self, host: str) -> str:
        """Return one line for people."""
        return (
            f"rank {self.rank} on {host} runs at {self.relative_speed:.2g} of the median: "
            f"{self.reason} ({self.own_seconds * 1e3:.0f} ms of its own per step)"
        )


def find_straggler(times: Sequence[RankTimes], slow: float = SLOW) -> Straggler | None:
    """Find the slowest rank, None where it is not slower than ``slow`` times the median.

    All steps take equally long, because the ranks wait for each other in the backward. A rank's own
    time is therefore all that it does outside of it, and its own part of the backward: proportional
    to its forward, by the factor of the rank that waits least.

    Args:
        times: of every rank, in the order of ranks.
        slow: fraction of the median speed.
    """
    if len(times) < 2 or min(one.compute for one in times) <= 0:
        return None
    # The rank that waits least shows how long a backward is without waiting.
    backward = min((t.step - t.data - t.compute - t.other) / t.compute for t in times)
    factor = 1 + max(0.0, backward)
    own = [t.data + t.other + factor * t.compute for t in times]
    rank = max(range(len(own)), key=own.__getitem__)
    median = statistics.median_low(own)  # of two ranks the faster one
    relative = median / own[rank]
    if relative >= slow:
        return None
    typical = {
        name: statistics.median_low([getattr(t, name) for t in times])
        for name in ("data", "compute", "other")
    }
    worst = times[rank]
    excess = {
        "waits for data": worst.data - typical["data"],
        "computes slowly": factor * (worst.compute - typical["compute"]),
        "is held up between its steps": worst.other - typical["other"],
    }
    reason = max(excess, key=excess.__getitem__)
    return Straggler(rank, relative, reason, own[rank], worst)


class StepTimeout:
    """A short timeout of collectives while steps run, the long one for everything else.

    Args:
        groups: the process groups, with seconds to add for each.
        long_seconds: for start-up, validation and saving.
        step_seconds: for a step; 0 means ten times the slowest step so far, at least 60 s.
        least_seconds: of the automatic timeout; a rank that waits for a server needs longer.
    """

    def __init__(
        self,
        groups: Sequence[tuple[ProcessGroup, float]],
        long_seconds: float,
        step_seconds: float = 0.0,
        least_seconds: float = LEAST_TIMEOUT,
    ) -> None:
        self.groups = groups
        self.long_seconds = long_seconds
        self.step_seconds = step_seconds
        self.least_seconds = max(LEAST_TIMEOUT, least_seconds)
        self.slowest = 0.0
        self.seconds = long_seconds

    def note(self, seconds: float) -> None:
        """Take a step's time into account; the first one of a run is not given, it compiles."""
        if seconds > self.slowest:
            self.slowest = seconds

    def shorten(self) -> None:
        """Set the timeout of a step."""
        automatic = max(self.least_seconds, STEPS_OF_A_TIMEOUT * self.slowest)
        self._set(min(self.long_seconds, self.step_seconds or automatic))

    def lengthen(self) -> None:
        """Set the long timeout."""
        self._set(self.long_seconds)

    def _set(self, seconds: float) -> None:
        # Only where it changes by a tenth: the call takes a lock of the process group.
        if abs(seconds - self.seconds) <= 0.1 * self.seconds and seconds != self.long_seconds:
            return
        self.seconds = seconds
        for group, more in self.groups:
            _set_timeout(timedelta(seconds=seconds + more), group)


def _set_timeout(timeout: timedelta, group: ProcessGroup) -> None:
    import torch.distributed as dist

    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout, group)
    else:  # older torch
        dist.distributed_c10d._set_pg_timeout(timeout, group)


class Health:
    """What one rank knows of its own time and, on rank 0, of the others'.

    Use :meth:`start`. ``slow_ranks`` holds the reports of rank 0 that nobody has taken yet.

    Args:
        folder: of the run.
        hosts: every rank's node, in the order of ranks.
        group: gloo group for the exchange of times; None without other ranks.
        timeout: of the collectives.
        device: of this rank.
    """

    def __init__(
        self,
        folder: RunFolder,
        hosts: Sequence[str],
        group: ProcessGroup | None,
        timeout: StepTimeout,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.hosts = hosts
        self.group = group
        self.timeout = timeout
        self.device = device
        self.rank = distributed.rank()
        self.activity = Activity.OUTSIDE
        self.batches = 0
        self._spent = dict.fromkeys(Activity, 0.0)
        self._since = time.perf_counter()
        self._step_began = self._since
        self._just_waited = False
        self._steps = 0
        self._forward: tuple[Any, Any] | None = None
        self._pending: tuple[Any, list[torch.Tensor]] | None = None
        self._sums: torch.Tensor | None = None
        self._window = FIRST_WINDOW
        self._reported: tuple[int, str, float] = (-1, "", 0.0)
        self._beats = _Heart(self) if len(hosts) > 1 else None

    @classmethod
    def start(
        cls,
        folder: RunFolder,
        *,
        device: torch.device | None = None,
        group: ProcessGroup | None = None,
        timeout_seconds: float = 600.0,
        step_timeout_seconds: float = 0.0,
        least_timeout_seconds: float = LEAST_TIMEOUT,
    ) -> Health:
        """Begin on every rank of the process group; collective.

        Args:
            folder: of the run; exists.
            device: of this rank; the CPU when None.
            group: a gloo group of all ranks; the default group when None, which must be gloo then.
            timeout_seconds: for everything but steps.
            step_timeout_seconds: for a step; 0 means automatic, see :class:`StepTimeout`.
            least_timeout_seconds: of the automatic timeout.
        """
        device = device or torch.device("cpu")
        groups = _groups(group, device)
        if groups:
            group = groups[-1][0]
            if distributed.rank() == 0:
                _empty(folder.health)
            hosts = distributed.gather_objects(
                os.environ.get("SLURMD_NODENAME") or socket.gethostname()
            )
        else:
            group, hosts = None, [socket.gethostname()]
        timeout = StepTimeout(groups, timeout_seconds, step_timeout_seconds, least_timeout_seconds)
        return cls(folder, hosts, group, timeout, device)

    # What the loop says -----------------------------------------------------------------------

    def enter(self, activity: Activity) -> None:
        """Say what this rank does from now on."""
        now = time.perf_counter()
        self._spent[self.activity] += now - self._since
        self.activity, self._since = activity, now
        # The end of the forward on the device: the backward, which waits for others, comes next.
        if activity is Activity.EXCHANGE and self._forward and self._forward[1] is None:
            self._forward = (self._forward[0], _event())

    def begin_batch(self) -> None:
        """Say that the next batch is there and computing begins."""
        self.enter(Activity.COMPUTE)
        self.batches += 1
        if self.device.type == "cuda" and self._forward is None:
            self._forward = (_event(), None)  # one step an interval is timed on the device

    def end_batch(self) -> None:
        """Say that a batch is done."""
        self.enter(Activity.OTHER)
        now = self._since
        if self.batches > 1:  # the first one compiles and warms up
            self.timeout.note(now - self._step_began)
            if not self._just_waited:  # rank 0 may still be writing while the others step on
                self.timeout.shorten()
        self._just_waited = False
        self._step_began = now
        self._steps += 1

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Surround the training part of an epoch, in which the short timeout holds."""
        self._step_began = time.perf_counter()
        self.enter(Activity.DATA)
        try:
            yield
        finally:
            self.enter(Activity.OUTSIDE)
            self.timeout.lengthen()

    @contextlib.contextmanager
    def long_wait(self) -> Iterator[None]:
        """Surround what may take long within the training part: a save, a stop.

        The long timeout then holds for the next batch too.
        """
        before = self.activity
        self.timeout.lengthen()
        self.enter(Activity.OTHER)
        try:
            yield
        finally:
            self.enter(before)
            self._step_began = time.perf_counter()
            self._just_waited = True

    # What the ranks tell each other -----------------------------------------------------------

    def exchange(self) -> Straggler | None:
        """Exchange the ranks' times; every rank calls it equally often.

        The exchange runs beside the training and is read at the next call, so that nobody waits.

        Returns:
            On rank 0 a rank that is slow and was not reported lately, else None. It is written into
            metrics.jsonl.
        """
        if self.group is None:
            return None
        import torch.distributed as dist

        found = self._read()
        mine = torch.tensor([*self._times(), float(self._steps)], dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in self.hosts]
        work = dist.all_gather(everyone, mine, group=self.group, async_op=True)
        self._pending = (work, everyone)
        self._spent = dict.fromkeys(Activity, 0.0)
        self._steps = 0
        return found

    def _times(self) -> tuple[float, float, float, float]:
        """Return seconds of steps, data, compute and other since the last exchange."""
        # Books the time of what runs now, which has not ended.
        self.enter(self.activity)
        spent = self._spent
        step = sum(spent.values()) - spent[Activity.OUTSIDE]
        if self.device.type != "cuda":
            return step, spent[Activity.DATA], spent[Activity.COMPUTE], spent[Activity.OTHER]
        compute, forward = 0.0, self._forward
        # Asked, not waited for: a step that the device has not finished is simply not timed.
        if forward and forward[1] is not None and forward[1].query():
            compute = forward[0].elapsed_time(forward[1]) / 1e3 * self._steps
        self._forward = None
        return step, spent[Activity.DATA], compute, 0.0

    def _read(self) -> Straggler | None:
        """Add up the last exchange; on rank 0 look for a slow rank at the end of a window."""
        if self._pending is None:
            return None
        work, everyone = self._pending
        self._pending = None
        work.wait()
        if self.rank != 0:
            return None
        rows = torch.stack(everyone)
        self._sums = rows if self._sums is None else self._sums + rows
        # A single slow step is noise; a rank is called slow over seconds.
        if float(self._sums[0, 0]) < self._window:
            return None
        rows, self._sums = self._sums, None
        self._window = min(LONGEST_WINDOW, 2 * self._window)
        steps = rows[:, 4:].clamp(min=1)
        times = [RankTimes(*row) for row in (rows[:, :4] / steps).tolist()]
        return self._report(find_straggler(times))

    def _report(self, found: Straggler | None) -> Straggler | None:
        if found is None:
            self._reported = (-1, "", 0.0)
            return None
        rank, reason, moment = self._reported
        now = time.monotonic()
        if (rank, reason) == (found.rank, found.reason) and now - moment < SECONDS_BETWEEN_REPORTS:
            return None
        self._reported = (found.rank, found.reason, now)
        host = self.hosts[found.rank]
        self.folder.append(
            "straggler",
            rank=found.rank,
            host=host,
            message=found.message(host),
            relative_speed=found.relative_speed,
            step_seconds=found.times.step,
            data_seconds=found.times.data,
            compute_seconds=found.times.compute,
        )
        distributed.print0(found.message(host))
        return found

    def close(self) -> None:
        """End without an error, on every rank; the heartbeats are removed."""
        if self._pending:
            self._pending[0].wait()
            self._pending = None
        if self._beats:
            self._beats.stop()
        self.timeout.lengthen()
        distributed.barrier()
        if self.group is not None and self.rank == 0:
            shutil.rmtree(self.folder.health, ignore_errors=True)


def _groups(group: ProcessGroup | None, device: torch.device) -> list[tuple[ProcessGroup, float]]:
    """Return the default group and the gloo group, with seconds to add to their timeouts.

    The last one is gloo's. One rank alone has none.
    """
    if not distributed.is_initialized() or distributed.world_size() == 1:
        return []
    import torch.distributed as dist

    default = dist.distributed_c10d._get_default_group()
    grace = distributed.SECONDS_FOR_PYTHON if device.type == "cuda" else 0.0
    found = [(default, grace)]
    return found if group in (None, default) else [*found, (group, 0.0)]


class _Heart(threading.Thread):
    """Writes a rank's heartbeat from a thread of its own, also while the rank waits."""

    def __init__(self, health: Health) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.health = health
        self.seconds = max(1.0, len(health.hosts) / BEATS_PER_SECOND)
        self._end = threading.Event()
        self._file = health.folder.health / f"rank-{health.rank}.json"
        self._last: tuple[int, int] = (-1, -1)
        self._moved = time.monotonic()
        self._recorded = False
        self.start()

    def run(self) -> None:
        while True:
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # no full disk ends a run
                self._beat()
            if self._end.wait(self.seconds):
                return

    def stop(self) -> None:
        """Write no more."""
        self._end.set()
        self.join(10)

    def _beat(self) -> None:
        health = self.health
        # Read from a thread: the training thread may hang within a collective.
        at = (_collectives_begun(), health.batches)
        now = time.monotonic()
        if at != self._last:
            self._last, self._moved, self._recorded = at, now, False
        idle = now - self._moved
        beat = {
            "rank": health.rank,
            "host": health.hosts[health.rank],
            "world_size": len(health.hosts),
            "collectives": at[0],
            "batches": at[1],
            "activity": str(health.activity),
            "idle_seconds": round(idle, 1),
            "interval_seconds": self.seconds,
            "slowest_seconds": round(health.timeout.slowest, 3),
        }
        _overwrite(self._file, json.dumps(beat))
        if idle > 5 and not self._recorded:
            self._recorded = True
            write_collectives(health.folder)


def _overwrite(path: Path, text: str) -> None:
    """Write a small file in place: no rename, which would be a round trip more on a file server.

    A reader that meets a file half-written takes it for damaged and reads it at the next beat.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        # Written, then cut: the other order leaves an empty file for a moment.
        os.ftruncate(descriptor, os.pwrite(descriptor, text.encode(), 0))
    finally:
        os.close(descriptor)


def _collectives_begun() -> int:
    """Return how many collectives of the default group this rank has begun."""
    import torch.distributed as dist

    if not distributed.is_initialized():
        return 0
    group: Any = dist.distributed_c10d._get_default_group()
    return int(group._get_sequence_number_for_group())


def write_collectives(folder: RunFolder) -> None:
    """Write this rank's last collectives, as torch's flight recorder has them."""
    from torch._C import _distributed_c10d as c10d

    if hasattr(c10d, "_dump_fr_trace_json"):
        record = json.loads(c10d._dump_fr_trace_json(includeCollectives=True, onlyActive=False))
        kept = {"entries": record.get("entries", [])[-KEPT:]}
        path = folder.health / f"collectives-{distributed.rank()}.json"
        _overwrite(path, json.dumps(kept))


def _empty(folder: Path) -> None:
    """Make the folder, without what an earlier attempt left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def explain(error: BaseException, folder: RunFolder) -> Stall | None:
    """Say which rank an error of a collective is about, None where it is another error.

    Args:
        error: what a rank met; torch raises RuntimeError where a collective times out.
        folder: of the run.
    """
    if not isinstance(error, RuntimeError) or not any(
        sign in str(error).lower() for sign in ("timed out", "timeout")
    ):
        return None
    # The record is a help; without it the heartbeats still say which rank is missing.
    with contextlib.suppress(OSError, ValueError):
        write_collectives(folder)
    return find_stall(folder.health, least_seconds=0.0)
