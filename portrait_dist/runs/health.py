"""Which rank holds up a run: heartbeats and records of collectives in ``<run>/health``.

Each rank of a run with several ranks writes there (:mod:`portrait_dist.training.health`):

- ``rank-3.json``: its heartbeat, written once a second in small runs: how many collectives it has
  begun, and since when nothing has happened;
- ``collectives-3.json``: its last collectives, once it has waited for a while;
- ``nccl-3``: NCCL's own record (flight recorder), where a collective of a GPU timed out.

A rank that has begun fewer collectives than the others is the one that they wait for. Everything
here is read without torch, also while the ranks hang.
"""

from __future__ import annotations

import json
import pickle
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from portrait_dist import files

STALLED_SECONDS = 15.0
"""Ranks that wait for less than this, or than five of their slowest steps, are no news."""
MISSED_BEATS = 5
"""A rank that missed so many heartbeats is stopped, or its node is gone."""
SECONDS_OF_LIFE = 120.0
"""Where no rank wrote for so long, the processes are gone and nobody waits."""
MOST_BYTES = 64 << 20
LARGEST = 2**63
MOST_NAMED = 4
"""Ranks that a message names; of more it says how many."""


class Activity(StrEnum):
    """What a rank is doing."""

    DATA = "waits for data"
    COMPUTE = "computes"
    EXCHANGE = "averages gradients"
    OTHER = "is between two steps"
    OUTSIDE = "is not in a training step"


@dataclass(frozen=True)
class Heartbeat:
    """What one rank said last.

    Args:
        rank: number of the rank.
        host: its node.
        world_size: number of ranks.
        collectives: how many it has begun, over all ranks' default group.
        batches: batches of the run that it has begun.
        activity: what it is doing, such as ``waits for data``.
        idle_seconds: how long nothing had happened when it wrote this.
        interval_seconds: how often it writes.
        slowest_seconds: its slowest step so far.
        written: when, in seconds since 1970 by the clock of the file system, which all nodes share.
    """

    rank: int
    host: str
    world_size: int
    collectives: int
    batches: int
    activity: str
    idle_seconds: float
    interval_seconds: float
    slowest_seconds: float
    written: float


@dataclass(frozen=True)
class MissingRank:
    """A rank that the others wait for.

    Args:
        rank: number of the rank.
        host: its node; empty where it never wrote.
        message: ``rank 5 on node7 did not reach all_reduce 1,204 (waits for data)``.
    """

    rank: int
    host: str
    message: str


@dataclass(frozen=True)
class Stall:
    """A wait of ranks for each other that takes too long.

    Args:
        seconds: how long it has taken.
        missing: the ranks that the others wait for; none where all are in the same collective.
        message: all of it in one line.
    """

    seconds: float
    missing: tuple[MissingRank, ...]
    message: str


def find_stall(
    folder: Path, now: float | None = None, least_seconds: float = STALLED_SECONDS
) -> Stall | None:
    """Find the ranks that the others wait for; None where all continue, or nobody says anything.

    Args:
        folder: ``health`` in the run's folder.
        now: seconds since 1970; the clock's when None.
        least_seconds: shorter waits are none; for validation and saving four times as much. With
            0 every wait is one, for a collective that has failed already.
    """
    beats = read_heartbeats(folder)
    if not beats:
        return None
    front = max(beat.collectives for beat in beats.values())
    waiting = [beat for beat in beats.values() if beat.collectives == front]
    now = time.time() if now is None else now
    if now - max(beat.written for beat in beats.values()) > SECONDS_OF_LIFE:
        return None
    # The shortest wait of those in front: it began when the last of them arrived.
    seconds = min(beat.idle_seconds + max(0.0, now - beat.written) for beat in waiting)
    world = max(beat.world_size for beat in beats.values())
    late = [rank for rank in range(world) if rank not in beats or beats[rank].collectives < front]
    # Validation and saving take long and are no hang; nor is a shard server that all wait for.
    if not late and all(beat.activity in (Activity.OUTSIDE, Activity.DATA) for beat in waiting):
        return None
    newest = max(beat.written for beat in waiting)
    outside = any(
        beats[rank].activity == Activity.OUTSIDE and not _is_silent(beats[rank], newest)
        for rank in late
        if rank in beats
    )
    slowest = max(beat.slowest_seconds for beat in beats.values())
    if seconds < max(least_seconds * (4 if outside else 1), 5 * slowest if least_seconds else 0):
        return None
    operations = read_operations(folder)
    missing = tuple(_missing_rank(rank, beats.get(rank), operations, newest) for rank in late)
    return Stall(seconds, missing, _message(missing, front, operations, seconds))


def _is_silent(beat: Heartbeat, newest: float) -> bool:
    """Say whether a rank has stopped to write while others still did; what it said last is old."""
    return newest - beat.written > MISSED_BEATS * beat.interval_seconds


def _missing_rank(
    rank: int, beat: Heartbeat | None, operations: Mapping[int, str], newest: float
) -> MissingRank:
    if beat is None:
        return MissingRank(rank, "", f"rank {rank} never reported")
    operation = operations.get(beat.collectives + 1, "collective")
    doing = beat.activity
    if _is_silent(beat, newest):
        doing = f"its process does not run, silent for {newest - beat.written:.0f} s"
    message = (
        f"rank {rank} on {beat.host} did not reach {operation} {beat.collectives + 1:,} ({doing})"
    )
    return MissingRank(rank, beat.host, message)


def _message(
    missing: tuple[MissingRank, ...], front: int, operations: Mapping[int, str], seconds: float
) -> str:
    since = f"the others have waited for {seconds:.0f} s"
    if not missing:
        operation = operations.get(front, "collective")
        return (
            f"all ranks are in {operation} {front:,}, which has not ended for {seconds:.0f} s; "
            "see the network between the nodes"
        )
    named = "; ".join(one.message for one in missing[:MOST_NAMED])
    more = f"; and {len(missing) - MOST_NAMED} more ranks" if len(missing) > MOST_NAMED else ""
    return f"{named}{more}; {since}"


def read_heartbeats(folder: Path) -> dict[int, Heartbeat]:
    """Read every rank's heartbeat; files that are damaged are left out."""
    found = {}
    for path in _numbered(folder, r"rank-(\d+)\.json"):
        try:
            # The file server's time: the clocks of two nodes may differ by more than a stall takes.
            written = path.stat().st_mtime
            values = json.loads(files.read_regular(path, MOST_BYTES))
            beat = Heartbeat(**{**values, "written": written})
        except (OSError, ValueError, TypeError, RecursionError):
            continue
        if _is_sound(beat):
            found[beat.rank] = beat
    # An earlier attempt may have had more ranks and left their files.
    world = max((beat.world_size for beat in found.values()), default=0)
    return {rank: beat for rank, beat in sorted(found.items()) if rank < world}


def _is_sound(beat: Heartbeat) -> bool:
    whole = (beat.rank, beat.world_size, beat.collectives, beat.batches)
    real = (beat.idle_seconds, beat.interval_seconds, beat.slowest_seconds)
    return (
        all(type(value) is int and 0 <= value < LARGEST for value in whole)
        and beat.world_size < 1 << 20
        and all(isinstance(value, int | float) and 0 <= value < 1e9 for value in real)
        and isinstance(beat.host, str)
        and isinstance(beat.activity, str)
    )


def read_operations(folder: Path) -> dict[int, str]:
    """Return the names of the last collectives by number, such as ``all_reduce``, of any rank."""
    found: dict[int, str] = {}
    for path in _numbered(folder, r"collectives-(\d+)\.json"):
        try:
            found |= operations_of(json.loads(files.read_regular(path, MOST_BYTES)))
        except (OSError, ValueError, RecursionError):
            continue
    for path in _numbered(folder, r"nccl-(\d+)"):
        try:
            found |= operations_of(_unpickle(files.read_regular(path, MOST_BYTES)))
        except (OSError, ValueError, RecursionError):
            continue
    return found


def operations_of(record: object) -> dict[int, str]:
    """Return number → name of the collectives of the default group in a flight recorder's dump."""
    entries = record.get("entries") if isinstance(record, Mapping) else None
    if not isinstance(entries, list):
        return {}
    found = {}
    for entry in entries:
        if not isinstance(entry, Mapping):
            continue
        number, name = entry.get("collective_seq_id"), entry.get("profiling_name")
        group = entry.get("process_group")
        # Only those of the default group, "0", are counted by the heartbeats.
        of_all_ranks = isinstance(group, list | tuple) and list(group)[:1] == ["0"]
        if of_all_ranks and type(number) is int and isinstance(name, str):
            found[number] = name.rpartition(":")[2][:40]  # gloo:all_reduce, nccl:all_reduce
    return found


class _NoObjects(pickle.Unpickler):
    """Reads pickles of plain values and refuses all others, so that none executes code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a record of collectives")


def _unpickle(data: bytes) -> object:
    import io

    try:
        return _NoObjects(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"not a record of collectives ({error})") from error


def _numbered(folder: Path, pattern: str) -> Iterable[Path]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
    return [folder / name for name in names if re.fullmatch(pattern, name)]
