"""Prefetch remote shards, so that an epoch does not stop at each new shard."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from portrait_dist.data.shards.sets import AnyShards

CACHE_FRACTION = 1 / 4
"""Part of the cache for prefetched shards, where the split does not fit into it."""


class Prefetcher:
    """Threads that download the shards of one epoch in the order in which a rank needs them.

    They run as far ahead as the cache has room: by the whole split where it fits, else by a quarter
    of the cache, or one shard. What cannot be downloaded is left to the thread that needs it, which
    tries again and says what is wrong.

    Args:
        shards: of an address; ``shards.cache.parallel_downloads`` threads are started.
        batches: (positions, samples) of the rank's batches, int64 arrays, as
            :meth:`AISegmentIterableDataset.batches` gives them.
    """

    def __init__(
        self, shards: AnyShards, batches: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> None:
        self._shards = shards
        self._needs = _first_needs(shards, batches)
        self._need = next(self._needs, None)
        self._room = None if shards.fits_cache else int(shards.cache.limit * CACHE_FRACTION)
        # (first batch that needs it, bytes) of each prefetched shard that no batch has used yet
        self._unused: list[tuple[int, int]] = []
        self._handed_out = 0
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        for number in range(min(shards.cache.parallel_downloads, len(shards.shards))):
            threading.Thread(target=self._work, name=f"prefetch-{number}", daemon=True).start()

    def handed_out(self, batches: int) -> None:
        """Note how many batches the consumer has: the shards of these make room for others."""
        # Without a bound nothing waits for room, and nothing has to be counted.
        if self._room is not None:
            with self._changed:
                self._handed_out = batches
                self._unused = [(batch, size) for batch, size in self._unused if batch >= batches]
                self._changed.notify_all()

    def stop(self) -> None:
        """End the threads after the shard that each is downloading; they are not waited for.

        A thread that waits for a server ends at once.
        """
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        while (number := self._next()) is not None:
            self._shards.fetch(number, self._stopped)

    def _next(self) -> int | None:
        """Wait for room for the next shard and return its number; None at the end."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            if self._stopped.is_set() or self._need is None:
                return None
            batch, number = self._need
            if self._room is not None:
                self._unused.append((batch, self._shards.shards[number].bytes))
            self._need = next(self._needs, None)
            return number

    def _has_room(self) -> bool:
        if self._stopped.is_set() or self._need is None or self._room is None or not self._unused:
            return True
        batch, number = self._need
        taken = sum(size for _, size in self._unused)
        return batch < self._handed_out or taken + self._shards.shards[number].bytes <= self._room


def _first_needs(
    shards: AnyShards, batches: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> Iterator[tuple[int, int]]:
    """Yield (batch, shard) for each shard at the first batch that needs it."""
    seen: set[int] = set()
    for batch, (_, samples) in enumerate(batches):
        for sample in samples.tolist():
            number, _ = shards.locate(sample)
            if number not in seen:
                seen.add(number)
                yield batch, number
        if len(seen) == len(shards.shards):
            return
