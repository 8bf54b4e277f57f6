"""``portrait-dist predict --watch``: masks of photos as they arrive in folders, until a signal.

Folders are looked at again and again: that works on every file system, network ones included. A
photo is taken when its size and time are those of the look before, so that one that is still being
copied is not.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from portrait_dist import files
from portrait_dist.errors import InputError
from portrait_dist.inference.batch import (
    ImageOptions,
    PhotoWork,
    PredictResult,
    existing_outputs,
    failure_of,
)
from portrait_dist.inference.journal import Journal
from portrait_dist.inference.photos import FailedPhoto, Photo, find_photos

SECONDS_BETWEEN_LOOKS = 1.0
LOOKS_PER_TIME = 10
"""A look that takes a second is followed by ten without one: large folders cost a tenth of a
core."""


def watch(
    checkpoint: str | Path,
    folders: Sequence[str],
    out: str | Path,
    images: ImageOptions,
    *,
    force: bool = False,
    batch_size: int = 8,
) -> PredictResult:
    """Predict the photos in folders and every one that comes, until SIGINT or SIGTERM.

    Args:
        checkpoint: a .pth file of a run.
        folders: searched to the bottom, again and again.
        out: folder for the outputs; what it holds of an earlier watch is not done again.
        images: what the outputs are; not ``int8``, which needs the photos beforehand.
        force: overwrite outputs that exist.
        batch_size: photos that go through the network together, at most.

    Raises:
        InputError: a path is no folder, or wrong options; nothing was written.
        DamagedDataError: at the end, if some photos could not be done.
        PortraitDistError: the disk is full or failed.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"{folder}: no folder; --watch takes folders")
    if images.int8:
        raise InputError(
            "--watch with --precision int8: it is calibrated with the photos, which are to come; "
            "give another precision"
        )
    plan = images.plan(Path(out))
    files.check_folder_writable(plan.folder)
    segmenter = images.segmenter(checkpoint)
    journal = Journal(plan.folder, images.fingerprint(segmenter, checkpoint))
    work = PhotoWork(segmenter, plan, journal, batch_size)
    with journal, stop_by_signal() as stop:
        return _Watcher(work, folders, force).run(stop)


class _Watcher:
    """What was seen and done so far."""

    def __init__(self, work: PhotoWork, folders: Sequence[str], force: bool) -> None:
        self.work, self.folders, self.force = work, folders, force
        self.seen: dict[Path, str] = {}
        self.handled: dict[Path, str] = {}
        self.own: set[str] = set()
        self.written: list[str] = []
        self.photos = self.done_before = self.named = 0

    def run(self, stop: Stop) -> PredictResult:
        """Look and work until stopped."""
        print(f"watching {', '.join(self.folders)}, Ctrl-C ends it", file=sys.stderr, flush=True)
        began, working = time.perf_counter(), 0.0
        while not stop.asked:
            start = time.perf_counter()
            new = self._new()
            looked = time.perf_counter()
            self._do(new, stop)
            working += time.perf_counter() - looked
            # A photo that has just come is looked at again soon, to see whether it still grows.
            stop.wait(max(SECONDS_BETWEEN_LOOKS, LOOKS_PER_TIME * (looked - start)))
        result = PredictResult(
            files=self.written,
            failed=sorted(self.work.failed, key=lambda failure: failure.photo),
            photos=self.photos,
            photos_per_second=self.photos / (working or time.perf_counter() - began),
            done_before=self.done_before,
        )
        if result.failed:
            raise failure_of(result)
        return result

    def _new(self) -> list[Photo]:
        """Find photos that are new or changed, and as they were at the look before."""
        found = find_photos(self.folders, self.work.plan.folder, may_be_empty=True)
        if not self.seen and (skipped := found.describe_skipped()):
            print(skipped, file=sys.stderr, flush=True)
        identities = {photo.path: photo.identity() for photo in found.photos}
        new = [
            photo
            for photo in found.photos
            if self.seen.get(photo.path) == identities[photo.path] != self.handled.get(photo.path)
        ]
        self.seen = identities
        for failure in found.unusable:
            if self.handled.setdefault(Path(failure.photo), "") == "" and failure not in (
                self.work.failed
            ):
                self.work.failed.append(failure)
        return new

    def _do(self, new: Sequence[Photo], stop: Stop) -> None:
        again = {str(photo.path) for photo in new}
        self.named -= sum(one.photo in again for one in self.work.failed[: self.named])
        self.work.failed = [one for one in self.work.failed if one.photo not in again]
        todo = [photo for photo in new if self._is_to_do(photo)]
        before = self.photos
        for names in self.work.run(takewhile(lambda _: not stop.asked, todo)):
            self.written += names
            self.photos += 1
        self.own |= {photo.name for photo in todo}
        if not stop.asked:
            self.handled |= {photo.path: self.seen[photo.path] for photo in new}
        if self.photos > before:
            print(
                f"{self.photos - before} photos done, {self.photos} since the start",
                file=sys.stderr,
                flush=True,
            )
        for failure in self.work.failed[self.named :]:
            print(failure.error, file=sys.stderr, flush=True)
        self.named = len(self.work.failed)

    def _is_to_do(self, photo: Photo) -> bool:
        targets = list(self.work.plan.targets(photo.name).values())
        if not self.force and self.work.journal.is_done(photo, targets):
            self.done_before += 1
            return False
        ours = self.force or photo.name in self.own or self.work.journal.is_ours(photo)
        if not ours and (there := existing_outputs(targets)):
            reason = f"{there[0]} exists; add --force to overwrite, or choose another --out"
            self.work.failed.append(FailedPhoto(str(photo.path), f"{photo.path}: {reason}"))
            return False
        return True


class Stop:
    """Asked for by a signal, at any moment.

    A ``threading.Event`` may not be set by a handler: one that interrupts ``wait`` where that holds
    the event's lock waits for it for ever. A pipe has no lock.
    """

    def __init__(self) -> None:
        self.asked = False
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def ask(self, *_: object) -> None:
        """Note the signal, and end :meth:`wait`."""
        self.asked = True
        with contextlib.suppress(BlockingIOError):  # the pipe is full of signals
            os.write(self._writer, b"!")

    def wait(self, seconds: float) -> None:
        """Wait for so long, or until a signal has come."""
        select.select([self._reader], [], [], seconds)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._reader)
        os.close(self._writer)


@contextlib.contextmanager
def stop_by_signal() -> Iterator[Stop]:
    """Give what SIGINT and SIGTERM ask to stop."""
    stop = Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop.ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.close()
