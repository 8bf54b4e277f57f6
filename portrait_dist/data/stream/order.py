"""The order of samples: a pure function of (seed, epoch, position), in integer arithmetic.

``Order`` maps a position of an epoch to a sample of the split; ``Plan`` says which positions a rank takes in each of its
batches. Neither keeps state, draws random numbers or holds a table as long as the split, so every rank, worker and
interpreter computes the same order, from any point, and 10^9 samples cost no more memory than 10^3.

The shuffle is a Feistel network over ``ceil(log2 n)`` bits, keyed by (seed, epoch) and walked until the value is below n
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002); its round function is the finaliser of SplitMix64
(Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from portrait_dist.errors import InputError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 10
# Below 8 bits the halves are too narrow to mix (the 720 orders of 6 samples come out uneven by 11 %); walking a wider domain
# costs nothing at such sizes and makes them even.
MIN_BITS = 8
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of SplitMix64
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(words: Words) -> Words:
    """SplitMix64's finaliser, element by element: a bijection of 64-bit words that scatters every input bit.

    Args:
        words: uint64 array; it is overwritten and returned.
    """
    words ^= words >> np.uint64(30)
    words *= np.uint64(_MUL1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_MUL2)
    words ^= words >> np.uint64(31)
    return words


def key(*parts: int) -> int:
    """One 64-bit key out of whole numbers, such as (seed, epoch). Order matters; negative numbers are taken modulo 2^64."""
    word = 0
    for part in parts:
        word = (word ^ (part & _MASK)) + _GOLDEN & _MASK
        word = int(mix(np.array([word], dtype=np.uint64))[0])
    return word


def keys(base: int, indices: Ints) -> Words:
    """``key(base, index)`` for an array of indices, as uint64."""
    words: Words = (indices.astype(np.uint64) ^ np.uint64(key(base))) + np.uint64(_GOLDEN)
    return mix(words)


def permute(values: Ints, size: int, secret: int | Words) -> Ints:
    """Images of ``values`` under a pseudo-random permutation of 0..size-1.

    Args:
        values: int64 array of values below ``size``.
        size: number of things permuted, at least 1.
        secret: the permutation's 64-bit key, or one for each value (uint64 array of the same shape).
    """
    if size <= 1:
        return np.zeros_like(values)
    bits = max(MIN_BITS, (size - 1).bit_length())
    words = _feistel(values.astype(np.uint64), bits, secret)
    outside = np.flatnonzero(words >= np.uint64(size))
    while outside.size:
        secrets = secret if isinstance(secret, int) else secret[outside]
        words[outside] = _feistel(words[outside], bits, secrets)
        outside = outside[words[outside] >= np.uint64(size)]
    return words.astype(np.int64)


def _feistel(words: Words, bits: int, secret: int | Words) -> Words:
    """One pass of the network: a bijection of 0..2^bits-1. The two halves differ by at most one bit."""
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low = words & ((np.uint64(1) << low_bits) - np.uint64(1))
    high = words >> low_bits
    for turn in range(ROUNDS):
        step = np.uint64((turn + 1) * _GOLDEN & _MASK)
        if isinstance(secret, int):
            round_key: Words | np.uint64 = np.uint64((secret + int(step)) & _MASK)
        else:
            round_key = secret + step
        if turn % 2:
            low ^= mix((high << np.uint64(32)) ^ round_key) >> (np.uint64(64) - low_bits)
        else:
            high ^= mix((low << np.uint64(32)) ^ round_key) >> (np.uint64(64) - high_bits)
    return (high << low_bits) | low


class Order:
    """Position of an epoch → sample of the split.

    Args:
        samples: number of samples of the split.
        seed: of the shuffle.
        kind: ``full`` shuffles the whole split; ``block`` shuffles the shards, lays them end to end, cuts that line into
            blocks and shuffles within each; ``sequential`` is the order of the shards.
        block_samples: positions in a block. Any run of so many positions lies in two blocks at most, so it touches no more
            shards than two blocks do.
        shard_sizes: samples of each shard, for ``block``.
    """

    def __init__(
        self,
        samples: int,
        seed: int = 0,
        kind: str = "full",
        *,
        block_samples: int = 16384,
        shard_sizes: Sequence[int] | Ints | None = None,
    ) -> None:
        if kind not in ("full", "block", "sequential"):
            raise InputError(f"order '{kind}': it is one of full, block, sequential")
        if kind == "block" and block_samples < 1:
            raise InputError(f"block_samples={block_samples}: a block holds at least 1 sample")
        self.samples = samples
        self.seed = seed
        self.kind = kind
        self.block_samples = block_samples
        self._sizes = np.asarray([samples] if shard_sizes is None else shard_sizes, dtype=np.int64)
        if int(self._sizes.sum()) != samples:
            raise InputError(
                f"the shards hold {int(self._sizes.sum())} samples, not {samples}; pack them again"
            )
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._shuffled: tuple[int, Ints, Ints] | None = None

    def samples_at(self, epoch: int, positions: Ints) -> Ints:
        """Samples at the given positions of an epoch.

        Args:
            epoch: number of the epoch.
            positions: int64 array, each in 0..samples-1.
        """
        if self.kind == "sequential":
            return positions.copy()
        if self.kind == "full":
            return permute(positions, self.samples, key(self.seed, epoch))
        return self._along_shuffled_shards(epoch, self._within_blocks(epoch, positions))

    def _within_blocks(self, epoch: int, positions: Ints) -> Ints:
        """Positions on the line of shuffled shards; the last block may be shorter than the others."""
        blocks = positions // self.block_samples
        offsets = positions - blocks * self.block_samples
        secrets = keys(key(self.seed, epoch, 1), blocks)
        last_block = self.samples // self.block_samples
        last_size = self.samples - last_block * self.block_samples
        whole = blocks < last_block
        offsets[whole] = permute(offsets[whole], self.block_samples, secrets[whole])
        offsets[~whole] = permute(offsets[~whole], last_size, secrets[~whole])
        return blocks * self.block_samples + offsets

    def _along_shuffled_shards(self, epoch: int, line: Ints) -> Ints:
        order, ends = self._shuffled_shards(epoch)
        slot = np.searchsorted(ends, line, side="right")
        shard = order[slot]
        return self._firsts[shard] + line - (ends[slot] - self._sizes[shard])

    def _shuffled_shards(self, epoch: int) -> tuple[Ints, Ints]:
        """(shards in the epoch's order, end of each on the line); kept for the epoch asked last."""
        kept = self._shuffled
        if kept is None or kept[0] != epoch:
            order = permute(np.arange(len(self._sizes)), len(self._sizes), key(self.seed, epoch, 2))
            kept = self._shuffled = (epoch, order, np.cumsum(self._sizes[order]))
        return kept[1], kept[2]


@dataclass(frozen=True)
class Plan:
    """Which positions of an epoch a rank takes in each of its batches.

    Global batch k is the positions [k·G, (k+1)·G) with G = batch_size · world_size; rank r takes the r-th of its equal parts.
    With ``drop_last`` a tail shorter than G is left out, so every rank has the same number of batches. Without it the tail is
    dealt to the ranks as evenly as it goes: parts differ by one sample at most, and some may be empty.

    Args:
        samples: positions in the epoch.
        batch_size: samples of this rank in a whole batch.
        rank: this rank.
        world_size: number of ranks.
        drop_last: leave out the tail.
        start: positions already done; the plan is for the rest.
    """

    samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = True
    start: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: a batch holds at least 1 sample")
        if not 0 <= self.rank < self.world_size:
            raise InputError(
                f"rank={self.rank}, world_size={self.world_size}: ranks run from 0 to world_size-1"
            )
        if not 0 <= self.start <= self.samples:
            raise InputError(
                f"samples_seen={self.start}: the split has {self.samples} samples; that state is of other data"
            )

    @property
    def global_batch(self) -> int:
        """Samples of a whole batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def whole_batches(self) -> int:
        """Whole global batches that are left."""
        return (self.samples - self.start) // self.global_batch

    @property
    def tail(self) -> int:
        """Positions after the last whole global batch."""
        return (self.samples - self.start) % self.global_batch

    @property
    def left_out(self) -> int:
        """Samples that no rank sees in this epoch."""
        return self.tail if self.drop_last else 0

    @property
    def steps(self) -> int:
        """Batches of this rank."""
        first, end = self.span(self.whole_batches)
        return self.whole_batches + (end > first)

    def span(self, batch: int) -> tuple[int, int]:
        """Positions [first, end) of this rank in its batch number ``batch``, counted from ``start``."""
        begin = self.start + batch * self.global_batch
        if batch < self.whole_batches:
            return begin + self.rank * self.batch_size, begin + (self.rank + 1) * self.batch_size
        if batch > self.whole_batches or self.drop_last:
            return self.samples, self.samples
        return begin + self.tail * self.rank // self.world_size, begin + self.tail * (
            self.rank + 1
        ) // self.world_size

    def positions(self, first_batch: int, last_batch: int) -> list[Ints]:
        """Positions of this rank's batches ``first_batch`` to ``last_batch`` - 1, an int64 array each."""
        return [
            np.arange(*self.span(batch), dtype=np.int64)
            for batch in range(first_batch, min(last_batch, self.steps))
        ]

    def seen_after(self, batches: int) -> int:
        """Positions that all ranks together have done when each has done so many batches of this plan (or all it has)."""
        return min(self.start + batches * self.global_batch, self.samples)
