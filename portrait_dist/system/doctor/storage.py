"""Checks of the disk, its locks, and packed shards."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from portrait_dist.errors import DamagedDataError, PortraitDistError
from portrait_dist.system.address import redact
from portrait_dist.system.doctor.check import FAIL, GB, OK, WARN, Check

if TYPE_CHECKING:
    from portrait_dist.data.shards.reader import ShardSet

LITTLE_SPACE = 5 * GB
SLOW_DISK = 50e6
"""Bytes per second."""
SLOW_FSYNC = 0.2
"""Seconds; each checkpoint waits for two."""


def check_disk(path: Path, size: int = 64 << 20) -> Check:
    """Look at free space, and write a file of ``size`` bytes through to the disk."""
    folder = _existing(path)
    try:
        usage = shutil.disk_usage(folder)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            speed, wait = _write_speed(Path(scratch) / "data", size)
    except OSError as error:
        advice = "give a folder that you can write to (--path), and free some space"
        return Check("disk", FAIL, f"{folder}: cannot write there ({error.strerror})", advice)
    found = (
        f"{folder}: writes {speed / 1e6:.0f} MB/s, fsync {wait * 1e3:.0f} ms, "
        f"{usage.free / GB:.0f} GB free"
    )
    if speed < SLOW_DISK or wait > SLOW_FSYNC:
        return Check(
            "disk", WARN, found, "put shards and runs on a local disk (--path measures another one)"
        )
    if usage.free < LITTLE_SPACE:
        return Check(
            "disk", WARN, found, "free some space; a full disk stops a run at its next checkpoint"
        )
    return Check("disk", OK, found)


def _write_speed(file: Path, size: int) -> tuple[float, float]:
    """Measure bytes/s of writing with a final fsync, and the seconds of a small write with fsync.

    The latter is the median of 5.
    """
    block = os.urandom(1 << 20)
    waits = []
    with open(file, "wb", buffering=0) as out:
        started = time.perf_counter()
        for _ in range(size >> 20):
            out.write(block)
        os.fsync(out.fileno())
        speed = size / max(time.perf_counter() - started, 1e-9)
        for _ in range(5):
            started = time.perf_counter()
            out.write(b"x")
            os.fsync(out.fileno())
            waits.append(time.perf_counter() - started)
    return speed, sorted(waits)[2]


def check_locks(path: Path) -> Check:
    """Lock a file as a run folder is locked against a second writer."""
    import fcntl

    folder = _existing(path)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                advice = (
                    "training works, but nothing keeps a second run out of the same folder; "
                    "mount with locks (Lustre: -o flock) or put run.root elsewhere"
                )
                found = f"{folder}: this file system has no locks ({error.strerror})"
                return Check("locks", WARN, found, advice)
    except OSError as error:
        advice = "give a folder that you can write to (--path)"
        found = f"{folder}: cannot write there ({error.strerror})"
        return Check("locks", FAIL, found, advice)
    return Check("locks", OK, f"{folder}: files can be locked")


def check_shards(location: str, samples: int = 64) -> Check:
    """Read the manifest, every local shard's size, and some samples of each split."""
    from portrait_dist.data.shards.cache import Cache, DownloadOptions
    from portrait_dist.data.shards.foreign import is_foreign, open_splits
    from portrait_dist.data.shards.reader import ShardSet, read_manifest

    cache = Cache(downloads=DownloadOptions(wait_for_server_seconds=10.0))
    try:
        if is_foreign(location):
            sets: dict[str, ShardSet] = {one.split: one for one in open_splits(location)}
        else:
            manifest = read_manifest(location, cache.downloads)
            sets = {split: ShardSet(location, split, cache=cache) for split in manifest.splits}
        missing = [
            text for found in sets.values() if not found.remote for text in _wrong_sizes(found)
        ]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            return Check(
                "shards",
                FAIL,
                f"{missing[0]}{more}",
                "copy them again, or run 'portrait-dist pack' again",
            )
        speed = _read_samples(sets, samples)
    except PortraitDistError as error:
        return Check("shards", FAIL, str(error), f"see 'portrait-dist verify {redact(location)}'")
    counts = ", ".join(f"{split} {found.samples}" for split, found in sets.items())
    return Check(
        "shards",
        OK,
        f"{redact(location)}: {counts} samples; reads {speed:.0f} pairs/s with one thread",
    )


def _wrong_sizes(shards: ShardSet) -> Iterator[str]:
    for number, entry in enumerate(shards.shards):
        try:
            size = os.stat(shards.folder / entry.name).st_size
        except FileNotFoundError:
            yield f"{shards.shard_name(number)} is missing"
            continue
        if size != entry.bytes:
            yield f"{shards.shard_name(number)} has {size} bytes, not {entry.bytes}"


def _read_samples(sets: dict[str, ShardSet], samples: int) -> float:
    """Read and decode samples spread evenly over each split; return pairs per second."""
    import numpy as np

    from portrait_dist.data.shards.decode import decode_pair
    from portrait_dist.preprocessing import DEFAULT_SIZE

    started, read = time.perf_counter(), 0
    for found in sets.values():
        size = found.size or DEFAULT_SIZE
        image, alpha = np.empty((*size, 3), np.uint8), np.empty(size, np.uint8)
        wanted = min(samples, found.samples)
        for number in range(wanted):
            position = number * found.samples // wanted
            stored = found.read(position)
            try:
                decode_pair(stored.image, stored.alpha, size, image, alpha, codec=stored.codec)
            except ValueError as error:
                raise DamagedDataError(
                    f"{found.name(position)}: does not decode ({error})"
                ) from error
        read += wanted
    return read / max(time.perf_counter() - started, 1e-9)


def _existing(path: Path) -> Path:
    """Return the folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
