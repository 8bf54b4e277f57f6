"""Batches of uint8 portraits, decoded by threads inside the rank, in an order that no number of threads changes.

    loader = build_loader("shards", "train", batch_size=16, seed=0, workers=2)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            ...  # batch.image uint8 [B, H, W, 3], batch.alpha uint8 [B, H, W], batch.keys

Decoders release the interpreter lock, so threads keep the cores busy and nothing is copied between processes: each thread
decodes straight into its rows of the batch. The consumer takes the batches in the planned order, whoever finishes first.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from portrait_dist import distributed
from portrait_dist.data.shards.prefetch import FetchAhead
from portrait_dist.data.stream.dataset import AISegmentIterableDataset
from portrait_dist.data.stream.order import Ints, Plan
from portrait_dist.errors import DamagedDataError, InputError

MAX_SAMPLES_PER_TASK = 8


@dataclass(slots=True)
class Batch:
    """One batch of a rank.

    Attributes:
        image: uint8 [B, H, W, 3] RGB.
        alpha: uint8 [B, H, W], 255 is the person.
        keys: B keys.
        epoch: number of the epoch.
        positions: int64 [B], place of each sample in the epoch's order over all ranks (numpy, always on the host).
    """

    image: torch.Tensor
    alpha: torch.Tensor
    keys: list[str]
    epoch: int
    positions: Ints

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with its pictures on a device."""
        image = self.image.to(device, non_blocking=non_blocking)
        return replace(self, image=image, alpha=self.alpha.to(device, non_blocking=non_blocking))


def build_loader(
    shards: str | Path,
    split: str,
    batch_size: int = 16,
    seed: int = 0,
    workers: int = 2,
    rank: int | None = None,
    world_size: int | None = None,
    *,
    prefetch: int = 4,
    pin_memory: bool | None = None,
    **options: Any,
) -> StreamLoader:
    """Loader of one split of packed shards for this rank.

    Args:
        shards: folder or address that ``portrait-dist pack`` wrote.
        split: ``train``, ``val`` or ``test``.
        batch_size: samples per rank and batch.
        seed: of the shuffle.
        workers: decoding threads; 0 decodes in the caller. Changes the speed, never the batches. With threads, remote shards
            are fetched before they are needed (:class:`portrait_dist.data.shards.prefetch.FetchAhead`).
        rank, world_size: this process's place; the process group's by default, else torchrun's, else 0 of 1.
        prefetch: batches decoded ahead; with them the memory is bounded.
        pin_memory: batches in page-locked memory, for copies that run beside the GPU's work; by default where a GPU is.
        options: shuffle, size, exact, order, block_samples, on_damage, drop_last, cache: see
            :class:`portrait_dist.data.stream.dataset.AISegmentIterableDataset`.

    Raises:
        InputError: no shards there, no such split, or an option is wrong.
    """
    given = rank is not None
    dataset = AISegmentIterableDataset(
        shards, split, batch_size, seed, rank=rank, world_size=world_size, **options
    )
    return StreamLoader(
        dataset, workers=workers, prefetch=prefetch, pin_memory=pin_memory, check=not given
    )


class StreamLoader:
    """Iterable of :class:`Batch`: what a trainer expects of a DataLoader, and a state of a few integers.

    Iterating starts the epoch set by ``set_epoch`` from its beginning; only the first iteration after ``load_state_dict`` goes
    on where the state was taken. Without ``set_epoch`` every iteration repeats the same epoch. Where there is a process group
    (and ``rank`` was not given by hand), the first iteration of a training loader calls ``check_ranks``.

    Attributes:
        damaged: what was skipped so far under ``on_damage=skip``: place of the sample → what is wrong.
        data_wait_seconds: time that the consumer has waited for batches, in total.
    """

    sampler = None
    batch_sampler = None

    def __init__(
        self,
        dataset: AISegmentIterableDataset,
        *,
        workers: int = 2,
        prefetch: int = 4,
        pin_memory: bool | None = None,
        check: bool = False,
    ) -> None:
        if workers < 0:
            raise InputError(f"workers={workers}: it is 0 or more")
        if prefetch < 1:
            raise InputError(f"prefetch={prefetch}: it is at least 1")
        self.dataset = dataset
        self.num_workers = workers
        self.prefetch = prefetch
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.data_wait_seconds = 0.0
        self._epoch = 0
        self._seen = 0
        self._resume_at = 0
        self._unchecked = check and dataset.drop_last
        self._live: weakref.ref[_Batches] | None = None

    @property
    def batch_size(self) -> int:
        """Samples of this rank in a whole batch."""
        return self.dataset.batch_size

    @property
    def drop_last(self) -> bool:
        return self.dataset.drop_last

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def samples_left_out(self) -> int:
        """Samples of the split that no rank sees in an epoch, because they do not fill a global batch."""
        return self.plan.left_out

    @property
    def damaged(self) -> dict[str, str]:
        return self.dataset.damaged

    @property
    def plan(self) -> Plan:
        """The whole epoch's batches of this rank."""
        return self.dataset.plan(0)

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return self.plan.steps

    @property
    def batches_left(self) -> int:
        """Batches of this rank that are still to come in this epoch; fewer than ``len`` after ``load_state_dict``."""
        return self.dataset.plan(self._seen).steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. The epoch of a loaded state keeps its place, any other starts at 0."""
        if epoch != self._epoch:
            self._epoch, self._seen, self._resume_at, self._live = epoch, 0, 0, None

    def state_dict(self) -> dict[str, int]:
        """Where the consumer is, as whole numbers; batches decoded ahead but not handed out do not count."""
        return {**self.dataset.state(self._seen), "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration yield the rest of the epoch of ``state``, also with another number of ranks.

        Raises:
            InputError: the state belongs to other data or another seed.
        """
        self.dataset.load_state_dict(state)
        self._epoch, self._seen, self._resume_at, self._live = (
            state["epoch"],
            state["samples_seen"],
            state["samples_seen"],
            None,
        )

    def check_ranks(self) -> None:
        """Compare with all ranks what their batches are computed from. A collective: every rank calls it, or none.

        Raises:
            InputError: on every rank, when data, seed, batch size or number of steps differ.
        """
        self._unchecked = False
        names = ("samples", "data", "batch_size", "seed", "order", "steps")
        dataset = self.dataset
        mine = (
            dataset.samples,
            dataset.shards.identity,
            self.batch_size,
            dataset.seed,
            dataset.order.kind,
            len(self),
        )
        everyone = distributed.gather_objects(mine)
        for index, name in enumerate(names):
            values = [row[index] for row in everyone]
            odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if odd is not None:
                raise InputError(
                    f"{dataset.location}, {dataset.split}: {name} is {values[0]} on rank 0 and {values[odd]} on rank {odd}; "
                    "give every rank the same shards and options"
                )

    def describe(self) -> str:
        """One line of derived numbers: samples, batches, global batch, samples left out."""
        plan = self.plan
        left_out = f"; {plan.left_out} left out, others in each epoch" if plan.left_out else ""
        return (
            f"{self.dataset.split}: {plan.samples:,} samples, {plan.steps:,} batches on rank {plan.rank}, "
            f"global batch {plan.global_batch} = {plan.world_size} x {plan.batch_size}{left_out}"
        )

    def __iter__(self) -> Iterator[Batch]:
        if self._unchecked and distributed.is_initialized():
            self.check_ranks()
        self._seen, self._resume_at = self._resume_at, 0
        batches = _Batches(self, self._epoch, self._seen)
        self._live = weakref.ref(batches)
        return batches

    def _handed_out(self, batches: _Batches, seen: int, waited: float) -> None:
        """An iterator gave a batch to the consumer. One that ``set_epoch`` or another iteration replaced no longer counts."""
        self.data_wait_seconds += waited
        if self._live is not None and self._live() is batches:
            self._seen = seen


class _Job:
    """One batch in the making: its arrays, the tasks that still fill it, and what went wrong in which row."""

    __slots__ = (
        "alpha",
        "done",
        "errors",
        "image",
        "keys",
        "lock",
        "positions",
        "samples",
        "skipped",
        "tasks_left",
    )

    def __init__(
        self, positions: Ints, samples: list[int], size: tuple[int, int], pin: bool, tasks: int
    ) -> None:
        self.positions, self.samples, self.tasks_left = positions, samples, tasks
        self.image = torch.empty((len(samples), *size, 3), dtype=torch.uint8, pin_memory=pin)
        self.alpha = torch.empty((len(samples), *size), dtype=torch.uint8, pin_memory=pin)
        self.keys: list[str] = [""] * len(samples)
        self.errors: dict[int, Exception] = {}
        self.skipped: set[int] = set()
        self.lock = threading.Lock()
        self.done = threading.Lock()
        self.done.acquire()

    def run(self, dataset: AISegmentIterableDataset, first: int, end: int) -> None:
        """Decode rows [first, end). Errors are kept for the consumer, who meets them in the order of the samples."""
        images: NDArray[np.uint8] = self.image.numpy()
        alphas: NDArray[np.uint8] = self.alpha.numpy()
        row = first
        try:
            for row in range(first, end):
                try:
                    self.keys[row] = dataset.read(self.samples[row], images[row], alphas[row])
                except DamagedDataError as error:
                    dataset.skip(self.samples[row], error)
                    self.skipped.add(row)
        except Exception as error:
            self.errors[row] = error
        self.finish_task()

    def finish_task(self) -> None:
        with self.lock:
            self.tasks_left -= 1
            if self.tasks_left == 0:
                self.done.release()

    def batch(self, epoch: int) -> Batch:
        """The finished batch, without the skipped rows.

        Raises:
            Exception: the error of the first row that has one.
            DamagedDataError: no row is left, so the ranks could not keep in step.
        """
        if self.errors:
            raise self.errors[min(self.errors)]
        if not self.skipped:
            return Batch(self.image, self.alpha, self.keys, epoch, self.positions)
        rows = [row for row in range(len(self.samples)) if row not in self.skipped]
        if not rows:
            raise DamagedDataError(
                f"all {len(self.samples)} samples of a batch are damaged, so it cannot be skipped; "
                "run 'portrait-dist verify' and pack the shards again"
            )
        return Batch(
            self.image[rows],
            self.alpha[rows],
            [self.keys[row] for row in rows],
            epoch,
            self.positions[rows],
        )


class _Batches:
    """One iteration: plans ahead, keeps ``prefetch`` batches in the making, hands them out in order.

    The threads know the queue and the dataset, not this object, so dropping it ends them.
    """

    def __init__(self, loader: StreamLoader, epoch: int, start: int) -> None:
        self._loader = loader
        self._epoch = epoch
        self._plan = loader.dataset.plan(start)
        self._planned = loader.dataset.batches(epoch, start)
        self._handed = 0
        self._jobs: deque[_Job] = deque()
        self._tasks: queue.SimpleQueue[tuple[_Job, int, int] | None] = queue.SimpleQueue()
        ahead = loader.prefetch * loader.batch_size
        self._rows_per_task = max(
            1, min(MAX_SAMPLES_PER_TASK, ahead // (2 * max(1, loader.num_workers)))
        )
        self._stop = threading.Event()
        self._fetches: FetchAhead | None = None
        self._threads: list[threading.Thread] = []
        for number in range(min(loader.num_workers, self._plan.steps)):
            arguments = (self._tasks, loader.dataset, self._stop)
            self._threads.append(
                threading.Thread(target=_work, args=arguments, name=f"decode-{number}", daemon=True)
            )
            self._threads[-1].start()
        if self._threads:
            if loader.dataset.shards.remote:
                self._fetches = FetchAhead(
                    loader.dataset.shards, loader.dataset.batches(epoch, start)
                )
            self._plan_ahead()

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        if not self._jobs:
            self._plan_ahead()
        if not self._jobs:
            if not self._stop.is_set():
                self._loader._handed_out(self, self._plan.seen_after(self._longest()), 0.0)
            self.close()
            raise StopIteration
        try:
            job = self._jobs.popleft()
            job.done.acquire()
            batch = job.batch(self._epoch)
        except BaseException:
            self.close()
            raise
        if self._threads:
            self._plan_ahead()
        self._handed += 1
        if self._fetches:
            self._fetches.handed_out(self._handed)
        self._loader._handed_out(
            self, self._plan.seen_after(self._handed), time.perf_counter() - begin
        )
        return batch

    def _longest(self) -> int:
        """Batches of the rank that has most: at the end of an epoch all positions are done, on every rank."""
        return self._plan.whole_batches + (not self._plan.drop_last)

    def _plan_ahead(self) -> None:
        """Put batches in the making until there are ``prefetch``; without threads, decode one here."""
        dataset = self._loader.dataset
        while not self._stop.is_set() and len(self._jobs) < (
            self._loader.prefetch if self._threads else 1
        ):
            planned = next(self._planned, None)
            if planned is None:
                return
            positions, samples = planned
            starts = range(0, len(samples), self._rows_per_task)
            job = _Job(
                positions, samples.tolist(), dataset.size, self._loader.pin_memory, len(starts)
            )
            self._jobs.append(job)
            for first in starts:
                task = (job, first, min(first + self._rows_per_task, len(samples)))
                if self._threads:
                    self._tasks.put(task)
                else:
                    job.run(dataset, *task[1:])

    def close(self) -> None:
        """Stop the threads and wait for them: each ends after the few samples of its task."""
        self._stop.set()
        if self._fetches:
            self._fetches.stop()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []
        self._jobs.clear()

    def __del__(self) -> None:
        if hasattr(self, "_threads"):
            self.close()


def _work(
    tasks: queue.SimpleQueue[tuple[_Job, int, int] | None],
    dataset: AISegmentIterableDataset,
    stop: threading.Event,
) -> None:
    """What a decoding thread does until it is told to stop."""
    while not stop.is_set():
        task = tasks.get()
        if task is None:
            return
        job, first, end = task
        job.run(dataset, first, end)
