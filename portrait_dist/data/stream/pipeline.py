"""Decoding threads that work ahead of the consumer, also across the ends of epochs.

``DecodePipeline`` is sought to a position of an epoch and then asked for one batch after the other.
Up to ``prefetch`` batches are in the making at any time. When an epoch has no batches left to plan,
those of the next epoch follow, for their order is known: at the next ``seek`` they are there, and
the threads have not stopped. Where another epoch is sought than expected, they are discarded.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from portrait_dist.data.shards.prefetch import Prefetcher
from portrait_dist.data.stream.dataset import AISegmentIterableDataset
from portrait_dist.data.stream.order import Ints
from portrait_dist.errors import DamagedDataError
from portrait_dist.system.threads import switch_off_opencv_threads

MAX_SAMPLES_PER_TASK = 8
"""Samples that a thread decodes before it asks for more; 2, 8 and 16 are equally fast."""


@dataclass(slots=True)
class Batch:
    """One batch of a rank.

    Attributes:
        image: uint8 [B, H, W, 3] RGB.
        alpha: uint8 [B, H, W], 255 is the person.
        keys: B sample keys.
        epoch: number of the epoch.
        positions: int64 [B], position of each sample in the epoch's order over all ranks (numpy,
            always on the host).
    """

    image: torch.Tensor
    alpha: torch.Tensor
    keys: list[str]
    epoch: int
    positions: Ints

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Return the batch with image and alpha on a device."""
        image = self.image.to(device, non_blocking=non_blocking)
        return replace(self, image=image, alpha=self.alpha.to(device, non_blocking=non_blocking))


class BufferPool:
    """Memory for batches; what the consumer has let go is used again.

    A fresh array of 3 MB comes from the system page by page, emptied: 23 of the 320 µs that a
    sample takes at 256×256, in a system call that threads of one process wait for each other in. A
    buffer is free when no tensor or array shares its memory any more, so a batch that is kept stays
    as it was.

    Args:
        spare: free buffers that are kept at most; more are given back to the system.
        pin: page-locked memory, which torch's own allocator keeps and reuses.
    """

    def __init__(self, spare: int, pin: bool) -> None:
        self._spare, self._pin = spare, pin
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def take(self, *shape: int) -> torch.Tensor:
        """Return a uint8 tensor of this shape with any content."""
        if self._pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        free = self._free.setdefault(size, [])
        # Popped without a look at the length first: a finaliser may run between the two.
        with contextlib.suppress(IndexError):
            return self._lend(free.pop(), free, shape)
        return self._lend(np.empty(size, np.uint8), free, shape)

    def _lend(
        self, buffer: NDArray[np.uint8], free: list[NDArray[np.uint8]], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Lend a buffer by a view, which the tensor's storage holds and whose end returns it."""
        view = buffer.reshape(shape)
        # Not at the interpreter's exit: nobody takes buffers then.
        weakref.finalize(view, _give_back, buffer, free, self._spare).atexit = False
        return torch.from_numpy(view)


def _give_back(buffer: NDArray[np.uint8], free: list[NDArray[np.uint8]], spare: int) -> None:
    if len(free) < spare:
        free.append(buffer)


class PendingBatch:
    """One batch in the making.

    Args:
        epoch: number of the epoch.
        positions: int64 [B], of the epoch.
        samples: B numbers of samples.
        image: uint8 [B, H, W, 3], to be filled.
        alpha: uint8 [B, H, W], to be filled.
        rows_per_task: rows that a thread decodes at a time.
    """

    def __init__(
        self,
        epoch: int,
        positions: Ints,
        samples: list[int],
        image: torch.Tensor,
        alpha: torch.Tensor,
        rows_per_task: int,
    ) -> None:
        self.tasks = [
            (first, min(first + rows_per_task, len(samples)))
            for first in range(0, len(samples), rows_per_task)
        ]
        self.cancelled = threading.Event()
        self._epoch, self._positions, self._samples = epoch, positions, samples
        self._image, self._alpha = image, alpha
        self._keys = [""] * len(samples)
        self._errors: dict[int, BaseException] = {}
        self._skipped: set[int] = set()
        self._tasks_left = len(self.tasks)
        self._lock = threading.Lock()
        self._done = threading.Event()

    def decode(self, dataset: AISegmentIterableDataset, first: int, end: int) -> None:
        """Decode the rows [first, end).

        An error ends the task and is kept for the consumer, who meets it at its batch.
        """
        images: NDArray[np.uint8] = self._image.numpy()
        alphas: NDArray[np.uint8] = self._alpha.numpy()
        row = first
        try:
            for row in range(first, end):
                if self.cancelled.is_set():
                    break
                try:
                    self._keys[row] = dataset.read(
                        self._samples[row], images[row], alphas[row], self.cancelled
                    )
                    if dataset.transforms:
                        dataset.transforms(
                            images[row],
                            alphas[row],
                            epoch=self._epoch,
                            position=int(self._positions[row]),
                            key=self._keys[row],
                        )
                except DamagedDataError as error:
                    dataset.skip(self._samples[row], error)
                    self._skipped.add(row)
        except BaseException as error:  # of any kind: a batch that is never done hangs the consumer
            # Raised at its batch and not now: the batches before it are good, and every run stops
            # alike.
            self._errors[row] = error
        # ``-=`` is a read and a write: of two tasks that end together none might see the last one.
        with self._lock:
            self._tasks_left -= 1
            if self._tasks_left == 0:
                self._done.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every row is decoded; returns whether it is, within ``timeout`` seconds."""
        return self._done.wait(timeout)

    def batch(self, epoch: int) -> Batch:
        """Return the finished batch, without the skipped rows.

        Raises:
            BaseException: the error of the first row that has one.
            DamagedDataError: no row is left, so the ranks could not keep in step.
        """
        if self._errors:
            raise self._errors[min(self._errors)]
        if not self._skipped:
            return Batch(self._image, self._alpha, self._keys, epoch, self._positions)
        rows = [row for row in range(len(self._samples)) if row not in self._skipped]
        # A rank without a batch would take one step less than the others and leave them waiting.
        if not rows:
            raise DamagedDataError(
                f"all {len(self._samples)} samples of a batch are damaged, so it cannot be "
                "skipped; run 'portrait-dist verify' and pack the shards again"
            )
        keys = [self._keys[row] for row in rows]
        return Batch(self._image[rows], self._alpha[rows], keys, epoch, self._positions[rows])


Task = tuple[PendingBatch, int, int]


class DecodePipeline:
    """Batches of a dataset from any position on, decoded ahead by threads.

    The threads know the queue and the dataset, not this object: dropping it ends them, as ``close``
    does. OpenCV's own threads are switched off in the process, for the decoders run on threads
    already: eight ranks with a pool of all cores each would wait for one another.

    Args:
        dataset: what is read.
        threads: decoding threads; with 0 the consumer decodes each batch when it asks for it.
        prefetch: batches in the making at most.
        pin_memory: batches in page-locked memory.
    """

    def __init__(
        self, dataset: AISegmentIterableDataset, threads: int, prefetch: int, pin_memory: bool
    ) -> None:
        self._dataset = dataset
        self._threads_wanted = threads
        self._prefetch = prefetch if threads else 1
        self._buffers = BufferPool(self._prefetch + 2, pin_memory)
        in_the_making = self._prefetch * dataset.batch_size
        # At least two tasks for each thread, so that none is idle while another has a whole batch.
        self._rows_per_task = max(
            1, min(MAX_SAMPLES_PER_TASK, in_the_making // (2 * max(1, threads)))
        )
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._process = os.getpid()
        self._fetches: Prefetcher | None = None
        self._pending: deque[PendingBatch] = deque()
        self._planned: Iterator[tuple[Ints, Ints]] = iter(())
        self._epoch = 0
        self._epochs_ahead = 0  # from the consumer's epoch to the one that is planned
        self._most: int | None = None  # batches of an epoch, where it is cut short
        self._handed_out = 0
        self._at_end = False
        self.continues = False
        _OPEN.add(self)

    def seek(self, epoch: int, start: int, *, continues: bool, most: int | None = None) -> None:
        """Go to a position of an epoch, keeping what is decoded where it was expected.

        Args:
            epoch: number of the epoch.
            start: positions of it that are done.
            continues: decode the next epoch's first batches when this one's are all planned.
            most: batches that an epoch has at most, counted from its start; None for all.
        """
        # Only then the next batches in the queue are those of the position that is sought.
        expected = self._at_end and self.continues and start == 0 and most == self._most
        # Without a shuffle all epochs are the same but for the number, which transforms draw by.
        same = self._dataset.order.kind == "sequential" and not self._dataset.transforms
        if expected and (epoch == self._epoch + 1 or same):
            self._epochs_ahead -= 1
        else:
            self._discard()
            self._most = most
            self._planned = self._batches(epoch, start)
            self._epochs_ahead = 0
        self._epoch, self._handed_out = epoch, 0
        self._at_end, self.continues = False, continues and self._threads_wanted > 0
        if self._threads_wanted:
            self._fetch_shards(start)
            self._start_threads()
            self._plan_ahead()

    def ready(self, timeout: float) -> bool:
        """Wait for the next batch for at most so many seconds; returns whether it is there.

        Without threads it is always said to be: the consumer decodes it.
        """
        if self._threads:
            self._plan_ahead()
        return not self._pending or self._pending[0].wait(timeout)

    def next_batch(self) -> Batch:
        """Wait for the next batch of the epoch sought and return it.

        The caller counts the batches of the epoch; there is one more.

        Raises:
            Exception: what went wrong at its first sample that is wrong.
        """
        self._plan_ahead()
        pending = self._pending[0]
        pending.wait()
        self._pending.popleft()
        self._handed_out += 1
        if self._threads:
            self._plan_ahead()
        if self._fetches:
            self._fetches.handed_out(self._handed_out)
        return pending.batch(self._epoch)

    def finish_epoch(self) -> None:
        """Record that the consumer has all batches of the epoch: the next epoch is expected."""
        self._at_end = True

    def close(self) -> None:
        """Discard what is decoded, stop the threads and wait for them.

        Each thread ends after the sample that it decodes.
        """
        self._discard()
        self._planned = iter(())
        self._at_end = False
        self._stop.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            # The garbage collector may run __del__ on one of the decoding threads.
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []

    @property
    def usable(self) -> bool:
        """Whether its threads live in this process: a fork has none of its parent's."""
        return self._process == os.getpid()

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Ints, Ints]]:
        """Return positions and samples of the batches that are left of an epoch."""
        if self._most is None:
            return self._dataset.batches(epoch, start)
        done = self._dataset.plan(0).batches - self._dataset.plan(start).batches
        return self._dataset.batches(epoch, start, most=max(0, self._most - done))

    def _fetch_shards(self, start: int) -> None:
        """Fetch remote shards in the order in which this epoch's batches need them."""
        if self._fetches:
            self._fetches.stop()
        if self._dataset.shards.remote:
            batches = self._batches(self._epoch, start)
            self._fetches = Prefetcher(self._dataset.shards, batches)

    def _start_threads(self) -> None:
        if self._threads:
            return
        switch_off_opencv_threads()
        # New ones: a late thread of the time before must not take a task of this one.
        self._tasks, self._stop = queue.SimpleQueue(), threading.Event()
        for number in range(self._threads_wanted):
            arguments = (self._tasks, self._dataset, self._stop)
            thread = threading.Thread(
                target=_work, args=arguments, name=f"decode-{number}", daemon=True
            )
            thread.start()  # before close() may see it: what has not started cannot be joined
            self._threads.append(thread)

    def _plan_ahead(self) -> None:
        """Put batches in the making until there are enough; without threads, decode one here."""
        while len(self._pending) < self._prefetch and not self._stop.is_set():
            planned = next(self._planned, None)
            if planned is None and not self._plan_next_epoch():
                return
            if planned is not None:
                self._begin(*planned)

    def _plan_next_epoch(self) -> bool:
        """Let the next epoch's batches follow; False where they should not, or there are none."""
        if not (self.continues and self._dataset.plan(0).batches):
            return False
        self._epochs_ahead += 1
        self._planned = self._batches(self._epoch + self._epochs_ahead, 0)
        return True

    def _begin(self, positions: Ints, samples: Ints) -> None:
        """Hand the rows of one batch to the threads."""
        size, rows = self._dataset.size, len(samples)
        pending = PendingBatch(
            self._epoch + self._epochs_ahead,
            positions,
            samples.tolist(),
            self._buffers.take(rows, *size, 3),
            self._buffers.take(rows, *size),
            self._rows_per_task,
        )
        self._pending.append(pending)
        for first, end in pending.tasks:
            if self._threads:
                self._tasks.put((pending, first, end))
            else:
                pending.decode(self._dataset, first, end)

    def _discard(self) -> None:
        """Drop what is in the making; a thread that works at it stops after the sample."""
        # Not only dropped: a thread may be decoding one of them, or waiting for a server.
        for pending in self._pending:
            pending.cancelled.set()
        self._pending.clear()
        if self._fetches:
            self._fetches.stop()
            self._fetches = None

    def __del__(self) -> None:
        # The constructor may have failed before the attributes were there.
        if (getattr(self, "_threads", None) or getattr(self, "_fetches", None)) and self.usable:
            self.close()


_OPEN: weakref.WeakSet[DecodePipeline] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End all threads before the interpreter does.

    Python ends a daemon thread where it next asks for the interpreter lock; within OpenCV, which
    asks in a destructor, that aborts the process.
    """
    # A copy: closing drops references, and the weak set may shrink meanwhile.
    for pipeline in list(_OPEN):
        if pipeline.usable:
            pipeline.close()


def _work(
    tasks: queue.SimpleQueue[Task | None],
    dataset: AISegmentIterableDataset,
    stop: threading.Event,
) -> None:
    """Decode tasks until asked to stop."""
    while not stop.is_set():
        task = tasks.get()
        if task is None:
            return
        pending, first, end = task
        pending.decode(dataset, first, end)
        del task, pending  # an idle thread keeps no batch alive
