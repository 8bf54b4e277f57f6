"""Fetches remote shards before the decoding threads ask for them, so that an epoch does not stop at each new shard."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from portrait_dist.data.shards.reader import ShardSet

FETCHES = 8
"""Shards that a rank fetches at a time: several connections bring more than one, and hide the wait for the first byte (100 to
200 ms for S3, by its performance guide). Four were slower, see benchmarks/NOTES.md."""
SHARE_OF_CACHE = 1 / 4
"""How far ahead, where the split does not fit into the cache: the rest is for what is being read."""


class FetchAhead:
    """Threads that fetch the shards of one epoch in the order in which a rank's batches need them.

    They stay as far ahead as the cache has room: by the whole split where it fits, else by a quarter of the cache, or one shard.
    What cannot be fetched is left to the thread that needs it, which tries again and says what is wrong.

    Args:
        shards: of an address.
        batches: (positions, samples) of the rank's batches, as :meth:`AISegmentIterableDataset.batches` gives them.
    """

    def __init__(
        self, shards: ShardSet, batches: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> None:
        self._shards = shards
        self._needs = _first_needs(shards, batches)
        self._need = next(self._needs, None)
        self._room = None if shards.fits_cache else int(shards.cache.limit * SHARE_OF_CACHE)
        self._ahead: list[
            tuple[int, int]
        ] = []  # (first batch that needs it, bytes) of shards that no batch has used yet
        self._handed_out = 0
        self._stopped = False
        self._changed = threading.Condition()
        for number in range(min(FETCHES, len(shards.shards))):
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True).start()

    def handed_out(self, batches: int) -> None:
        """The consumer has so many batches: what they needed is no longer ahead."""
        if self._room is not None:
            with self._changed:
                self._handed_out = batches
                self._ahead = [(batch, size) for batch, size in self._ahead if batch >= batches]
                self._changed.notify_all()

    def stop(self) -> None:
        """Let the threads end after the shard that each is fetching; they are not waited for."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        while (number := self._next()) is not None:
            self._shards.fetch(number)

    def _next(self) -> int | None:
        """The next shard, when there is room for it; None at the end."""
        with self._changed:
            self._changed.wait_for(self._may_go_on)
            if self._stopped or self._need is None:
                return None
            batch, number = self._need
            if self._room is not None:
                self._ahead.append((batch, self._shards.shards[number].bytes))
            self._need = next(self._needs, None)
            return number

    def _may_go_on(self) -> bool:
        if self._stopped or self._need is None or self._room is None or not self._ahead:
            return True
        batch, number = self._need
        taken = sum(size for _, size in self._ahead)
        return batch < self._handed_out or taken + self._shards.shards[number].bytes <= self._room


def _first_needs(
    shards: ShardSet, batches: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> Iterator[tuple[int, int]]:
    """(batch, shard) for each shard at the first batch that needs it; planning ends with the last shard."""
    seen: set[int] = set()
    for batch, (_, samples) in enumerate(batches):
        for sample in samples.tolist():
            number, _ = shards.locate(sample)
            if number not in seen:
                seen.add(number)
                yield batch, number
        if len(seen) == len(shards.shards):
            return
