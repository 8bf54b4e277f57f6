"""Batches of uint8 portraits, decoded by threads, in an order that no number of threads changes.

    loader = build_loader("shards", "train", batch_size=16, seed=0, workers=2)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            ...  # batch.image uint8 [B, H, W, 3], batch.alpha uint8 [B, H, W], batch.keys

Decoders release the interpreter lock, so threads keep the cores busy and nothing is copied between
processes: each thread decodes straight into its rows of the batch (:mod:`.pipeline`). The consumer
takes the batches in the planned order, whichever is finished first.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch

from portrait_dist import distributed
from portrait_dist.data.stream.dataset import (
    AISegmentIterableDataset,
    StreamKeywords,
    StreamOptions,
)
from portrait_dist.data.stream.order import BatchPlan, whole_number
from portrait_dist.data.stream.pipeline import Batch, DecodePipeline
from portrait_dist.errors import InputError
from portrait_dist.system import info

__all__ = ["Batch", "StreamLoader", "build_loader", "decoding_threads"]

IN_CALLER = -1
"""``workers`` that decodes in the caller, without threads."""


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
    pin_memory: bool = False,
    **stream: Unpack[StreamKeywords],
) -> StreamLoader:
    """Build the loader of one split of packed shards for this rank.

    Args:
        shards: folder or address of packed shards, or several with weights, ``a:1,b:0.3``.
        split: ``train``, ``val`` or ``test``.
        batch_size: samples per rank and batch.
        seed: of the shuffle.
        workers: decoding threads; 0 chooses by the machine (:func:`decoding_threads`), -1 decodes
            in the caller and prefetches no remote shard. Changes the speed, never the batches.
        rank: of this process; by default the process group's, else torchrun's, else 0.
        world_size: number of ranks; give both or none.
        prefetch: batches decoded ahead of the consumer; bounds the memory.
        pin_memory: batches in page-locked memory, for copies beside a GPU's work; without a GPU it
            does nothing.
        stream: ``shuffle``, ``size`` and the other fields of
            :class:`portrait_dist.data.stream.dataset.StreamOptions`.

    Raises:
        InputError: no shards there, no such split, or an option is wrong.
    """
    options = StreamOptions(**stream)
    dataset = AISegmentIterableDataset(
        shards, split, batch_size, seed, rank=rank, world_size=world_size, options=options
    )
    return StreamLoader(
        dataset, workers=workers, prefetch=prefetch, pin_memory=pin_memory, check=rank is None
    )


def decoding_threads(workers: int) -> int:
    """Return the number of decoding threads for a value of ``data.workers``.

    0 means as many as the node can spare: its cores divided by its ranks, less one for the rank
    itself; 2 at least, for on one core two threads still overlap reading and decoding, and 16 at
    most, for 16 threads decode some 30,000 images/s of 256×256, more than a GPU takes.

    Args:
        workers: 1 or more: as given; 0: automatic; -1: none, decode in the caller.

    Raises:
        InputError: not a whole number, or less than -1.
    """
    workers = whole_number("workers", workers, IN_CALLER, 4096)
    if workers != 0:
        return max(0, workers)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # A container sees all cores of its host but may use the quota only.
    cores = min(info.cores(), info.cpu_quota() or math.inf)
    return max(2, min(16, int(cores / ranks_here) - 1))


@dataclass
class _Position:
    """Where the consumer is. An iteration that was replaced writes to one that nobody reads."""

    epoch: int
    samples_seen: int = 0


class StreamLoader:
    """Iterable of :class:`Batch` with what a trainer expects of a DataLoader, and a small state.

    Each iteration yields one epoch: the one chosen by ``set_epoch``, else the one after the
    iteration before. So a loop that never calls ``set_epoch`` sees another shuffle each time, as
    with a DataLoader, and not the same order for ever, as with a DistributedSampler, where
    forgetting the call goes unnoticed. Without a shuffle all epochs have the same order. Only the
    first iteration after ``load_state_dict`` begins where the state was taken.

    From the second iteration on, the threads decode the first batches of the following epoch while
    the consumer finishes this one, so short epochs are as fast as long ones. They end with
    ``close``, with the loader, or where an iteration is left early; a single pass ends them itself.

    Where there is a process group (and ``rank`` was not given by hand), the first iteration of a
    training loader calls ``check_ranks``.

    Args:
        dataset: what is read.
        workers: see :func:`decoding_threads`.
        prefetch: batches decoded ahead.
        pin_memory: batches in page-locked memory, where there is a GPU.
        check: compare the ranks at the first iteration.

    Attributes:
        data_wait_seconds: time that the consumer has waited for batches, in total.

    Raises:
        InputError: an argument is out of bounds.
    """

    sampler = None
    batch_sampler = None

    def __init__(
        self,
        dataset: AISegmentIterableDataset,
        *,
        workers: int = 2,
        prefetch: int = 4,
        pin_memory: bool = False,
        check: bool = False,
    ) -> None:
        self.dataset = dataset
        self.num_workers = decoding_threads(workers)
        self.prefetch = whole_number("prefetch", prefetch, 1)
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.data_wait_seconds = 0.0
        self._position = _Position(0)
        self._start = 0
        self._chosen = (
            True  # the position's epoch is the next iteration's, not that of one that began
        )
        self._iterations = 0
        self._unchecked = check and dataset.drop_last
        self._idle: DecodePipeline | None = None
        # A weak reference: the iteration owns its pipeline, and dropping it must end the threads.
        self._current: Callable[[], DecodePipeline | None] = lambda: None

    @property
    def batch_size(self) -> int:
        """Samples of this rank in a whole batch."""
        return self.dataset.batch_size

    @property
    def drop_last(self) -> bool:
        """Whether a tail that does not fill a global batch is dropped."""
        return self.dataset.drop_last

    @property
    def epoch(self) -> int:
        """Epoch that was set, or that the last iteration began."""
        return self._position.epoch

    @property
    def samples_dropped(self) -> int:
        """Samples of the split that no rank sees in an epoch: they do not fill a global batch."""
        return self.plan.dropped

    @property
    def damaged(self) -> dict[str, str]:
        """Skipped under ``on_damage=skip`` so far: where the sample is → what is wrong."""
        return self.dataset.damaged

    @property
    def plan(self) -> BatchPlan:
        """The whole epoch's batches of this rank."""
        return self.dataset.plan(0)

    def __len__(self) -> int:
        """Return the batches of this rank in a whole epoch."""
        return self.plan.batches

    @property
    def batches_left(self) -> int:
        """Batches of this rank still to come in this epoch; fewer than ``len`` after a resume."""
        return self.dataset.plan(self._position.samples_seen).batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration.

        The epoch of a loaded state keeps its position, any other starts at 0.
        """
        epoch = whole_number("epoch", epoch, 0)
        if epoch != self._position.epoch:
            self._position, self._start = _Position(epoch), 0
        self._chosen = True

    def state_dict(self) -> dict[str, int]:
        """Return where the consumer is, as whole numbers.

        Batches that are decoded but not handed out do not count.
        """
        state = self.dataset.state(self._position.samples_seen)
        return {**state, "epoch": self._position.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration yield the rest of the epoch of ``state``, on any number of ranks.

        Raises:
            InputError: the state belongs to other data or another seed.
        """
        self.dataset.load_state_dict(state)
        self._position = _Position(state["epoch"], state["samples_seen"])
        self._start, self._chosen = state["samples_seen"], True

    def ready(self, timeout: float) -> bool:
        """Wait for the next batch of the last iteration for at most so many seconds.

        For a consumer that must do something else where a server of shards is away.

        Returns:
            Whether the batch is there, or there is none.
        """
        pipeline = self._current()
        if pipeline is None:
            return True
        begin = time.perf_counter()
        found = pipeline.ready(timeout)
        self.data_wait_seconds += time.perf_counter() - begin
        return found

    def close(self) -> None:
        """End the threads that wait for the next iteration; it starts others."""
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    def check_ranks(self) -> None:
        """Compare with all ranks what their batches are computed from.

        A collective: every rank calls it, or none.

        Raises:
            InputError: on every rank, when data, seed, batch size or number of batches differ.
        """
        self._unchecked = False
        dataset = self.dataset
        mine = {
            "samples": dataset.samples,
            "data": dataset.shards.identity,
            "batch_size": self.batch_size,
            "seed": dataset.seed,
            "order": dataset.order.kind,
            "batches": len(self),
        }
        everyone = distributed.gather_objects(mine)
        for name, value in everyone[0].items():
            odd = next((rank for rank, other in enumerate(everyone) if other[name] != value), None)
            if odd is not None:
                raise InputError(
                    f"{dataset.shards.shown}, {dataset.split}: {name} is {value} on rank 0 and "
                    f"{everyone[odd][name]} on rank {odd}; "
                    "give every rank the same shards and options"
                )

    def describe(self) -> str:
        """Return one line of derived numbers: samples, batches, global batch, samples dropped."""
        plan = self.plan
        dropped = f"; {plan.dropped} dropped per epoch" if plan.dropped else ""
        return (
            f"{self.dataset.split}: {plan.samples:,} samples, {plan.batches:,} batches on rank "
            f"{plan.rank}, global batch {plan.global_batch} = {plan.world_size} x "
            f"{plan.batch_size}{dropped}"
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        return self.first_batches(None)

    def first_batches(self, most: int | None) -> Generator[Batch, None, None]:
        """Iterate an epoch that is cut short, whose end is an end for the threads too.

        They decode the next epoch's first batches then, as at the end of a whole one. Leaving a
        whole iteration early ends them.

        Args:
            most: batches that an epoch has at most, counted from its start also where a state was
                loaded; None for all.
        """
        if most is not None:
            most = whole_number("most", most, 1)
            most = most if most < len(self) else None
        # Not in the constructor, which one rank alone may call: a collective would wait for ever.
        if self._unchecked and distributed.is_initialized():
            self.check_ranks()
        epoch = self._position.epoch + (not self._chosen)
        position = self._position = _Position(epoch, self._start)
        self._start, self._chosen = 0, False
        # Taken, not shared: a second iteration beside this one gets threads of its own.
        pipeline, self._idle = self._idle, None
        if pipeline is None or not pipeline.usable:
            pipeline = DecodePipeline(
                self.dataset, self.num_workers, self.prefetch, self.pin_memory
            )
        # One pass over the data may be all that is wanted (an evaluation), so nothing is decoded
        # beyond the end of the first.
        continues = self._iterations > 0
        pipeline.seek(epoch, position.samples_seen, continues=continues, most=most)
        self._iterations += 1
        self._current = weakref.ref(pipeline)
        return self._batches(pipeline, position, most)

    def _batches(
        self, pipeline: DecodePipeline, position: _Position, most: int | None
    ) -> Generator[Batch, None, None]:
        """Hand out the batches of one epoch.

        The generator owns the pipeline until it has the last batch: leaving it before, by an error,
        ``close`` or dropping it, ends the threads. With the last batch the loader gets the pipeline
        back, for a consumer who counts batches does not ask for one more.
        """
        plan = self.dataset.plan(position.samples_seen)
        done = len(self) - plan.batches
        batches = plan.batches if most is None else max(0, most - done)
        mine = True
        try:
            for handed_out in range(1, batches + 1):
                begin = time.perf_counter()
                batch = pipeline.next_batch()
                self.data_wait_seconds += time.perf_counter() - begin
                # Before the yield: who saves while holding the batch has it, and a resume must not
                # repeat it.
                position.samples_seen = plan.seen_after(handed_out)
                if handed_out == batches:
                    mine = False
                    self._keep(pipeline)
                yield batch
                del batch  # its memory may be used again while the next one is waited for
        except BaseException:
            if mine:
                pipeline.close()
            raise
        if not batches:
            self._keep(pipeline)
        if most is not None:
            return
        # All positions are done now on every rank, also where another one had a batch more.
        position.samples_seen = plan.seen_after(plan.most_batches)

    def _keep(self, pipeline: DecodePipeline) -> None:
        """Keep a pipeline whose epoch is done for the next iteration, if it is to decode for it."""
        pipeline.finish_epoch()
        if pipeline.continues and self._idle is None:
            self._idle = pipeline
        else:
            pipeline.close()
