"""The order of several shard sets with weights: a pure function of (seed, epoch, position).

A set of n samples and weight w gives m = w·n of them, rounded, to each epoch. Its samples stand on
a circle in a shuffled order, and epoch e takes the m that follow on what epoch e-1 took:

- in every epoch each sample of the set comes floor(m/n) or ceil(m/n) times, so at most once for a
  weight up to 1, and exactly w times where w is a whole number;
- over any epochs from the first on, no sample of the set is ahead of another by more than one.

All sets' samples of an epoch are shuffled together. Nothing is stored or counted: the place on the
circle follows from the epoch's number, in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from portrait_dist.data.stream.order import (
    Ints,
    Order,
    hash64,
    permute,
    whole_number,
    within_blocks,
)
from portrait_dist.errors import InputError

MOST_POSITIONS = 3_000_000_000
"""Positions in an epoch of several sets: the square of the number fits 63 bits."""


@dataclass(frozen=True)
class Source:
    """One shard set as the order sees it.

    Args:
        samples: of the set.
        epoch_samples: of them in an epoch; more than ``samples`` where they repeat.
        shard_sizes: samples of each of its shards.
    """

    samples: int
    epoch_samples: int
    shard_sizes: Sequence[int]


class MixedOrder:
    """Position of an epoch → sample, over several sets with weights; see the module.

    It has the interface of :class:`portrait_dist.data.stream.order.Order`; ``samples`` is the
    number of positions in an epoch. Samples are numbered through all sets.

    Args:
        sources: the sets.
        seed: of the shuffle, from -2^63 to 2^63 - 1.
        kind: ``full`` shuffles all; ``block`` shuffles within blocks, in which each set has its
            part, so that few shards are open at a time. There a set whose weight is no whole
            number keeps one order of its shards for the whole run.
        block_samples: positions in a block.

    Raises:
        InputError: an argument is out of bounds, or an epoch is too long.
    """

    def __init__(
        self, sources: Sequence[Source], seed: int, kind: str, *, block_samples: int = 16384
    ) -> None:
        self.counts = [source.epoch_samples for source in sources]
        self.samples = sum(self.counts)
        if self.samples > MOST_POSITIONS:
            raise InputError(
                f"{self.samples:,} samples in an epoch of several shard sets: at most "
                f"{MOST_POSITIONS:,}; give smaller weights"
            )
        self.seed = whole_number("seed", seed, -(2**63))
        self.kind = kind
        self.block_samples = whole_number("block_samples", block_samples, 1)
        self._sources = list(sources)
        self._circles = [
            # Half of the hash: seeds are signed numbers of 64 bits.
            Order(
                source.samples,
                hash64(self.seed, 0, 3, number) >> 1,
                kind,
                shard_sizes=source.shard_sizes,
            )
            for number, source in enumerate(sources)
        ]

    def samples_at(self, epoch: int, positions: Ints) -> Ints:
        """Return the samples at the given positions of an epoch.

        Args:
            epoch: number of the epoch.
            positions: int64 array, each in 0..samples-1.
        """
        if self.kind == "full":
            line = permute(positions, self.samples, hash64(self.seed, epoch))
        else:
            secret = hash64(self.seed, epoch, 1)
            line = within_blocks(positions, self.samples, self.block_samples, secret)
        numbers, places = deal(line, self.counts)
        found = np.empty_like(line)
        first = 0
        for number, source in enumerate(self._sources):
            mine = numbers == number
            found[mine] = first + self._on_circle(number, epoch, places[mine])
            first += source.samples
        return found

    def _on_circle(self, number: int, epoch: int, places: Ints) -> Ints:
        """Map places among a set's samples of an epoch to its samples."""
        size, count = self._sources[number].samples, self._sources[number].epoch_samples
        if not places.size:
            return places
        # In Python's integers: epoch × count may exceed 64 bits.
        places = (places + epoch * count % size) % size
        circle = self._circles[number]
        if self.kind == "full":
            return circle.samples_at(0, places)
        # A whole number of rounds: every epoch may shuffle the shards anew.
        return circle.along_shuffled_shards(epoch if count % size == 0 else 0, places)


def deal(line: Ints, counts: Sequence[int]) -> tuple[Ints, Ints]:
    """Deal places of a line to sets, so that each stretch of it has its part of each set.

    Set i gets exactly ``counts[i]`` places. The first set's are spread evenly over the line, the
    second one's over what is left, and so on.

    Args:
        line: int64 array of places in 0..sum(counts)-1.
        counts: of each set; their sum squared is below 2^63.

    Returns:
        For each place the number of its set, and how many of that set come before it.
    """
    numbers = np.full(line.shape, len(counts) - 1, dtype=np.int64)
    places, left = line.copy(), sum(counts)
    rest = np.arange(line.size)
    for number, count in enumerate(counts[:-1]):
        if not rest.size:
            break
        before = places[rest] * count // left
        mine = (places[rest] + 1) * count // left > before
        numbers[rest[mine]] = number
        places[rest[mine]] = before[mine]
        places[rest[~mine]] -= before[~mine]
        rest, left = rest[~mine], left - count
    return numbers, places
