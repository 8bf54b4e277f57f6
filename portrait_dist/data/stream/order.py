"""The order of samples: a pure function of (seed, epoch, position), in integer arithmetic.

``Order`` maps a position of an epoch to a sample of the split; ``BatchPlan`` says which positions a
rank takes in each of its batches. Neither draws random numbers or holds a table as long as the
split, and what is kept between calls changes no answer: every rank, worker and interpreter computes
the same order, from any point, and 10^9 samples cost no more memory than 10^3.

The shuffle is a Feistel network over ``ceil(log2 n)`` bits, keyed by (seed, epoch) and applied
again until the value is below n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002);
its round function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from portrait_dist.errors import InputError

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

ROUNDS = 10
MIN_BITS = 8
"""Smallest domain of the network. Below 8 bits the halves are too narrow to mix (the 720 orders of
6 samples come out uneven by 11 %); walking a wider domain costs nothing at such sizes."""
ORDERS = ("full", "block", "sequential")
POSITIONS_AHEAD = 512
"""Positions that are mapped at once where epochs are short: a call of ``permute`` takes 0.1 ms for
5 values and for 500."""
MAX_INT = 2**63 - 1
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of SplitMix64
_STEPS, _LAST_SHIFT = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31


def _operand(value: int) -> Hashes:
    """Return a number as an array without dimensions: twice as fast as a scalar with few values."""
    return np.array(value, dtype=np.uint64)


_OPERANDS = [(_operand(shift), _operand(factor)) for shift, factor in _STEPS]
_LAST_OPERAND, _HALF = _operand(_LAST_SHIFT), _operand(32)
_OFFSETS = np.array([number * _GOLDEN & _MASK for number in range(1, ROUNDS + 1)], dtype=np.uint64)
"""A key of its own for each round: two equal rounds on equal halves would undo each other."""


def whole_number(name: str, value: int, least: int, most: int = MAX_INT) -> int:
    """Return a whole number within bounds as an int.

    Raises:
        InputError: it is not whole (a fraction, infinite, no number), or out of bounds.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name}={value}: give a whole number") from None
    if not least <= number <= most:
        bounds = f"at least {least}" if most == MAX_INT else f"from {least} to {most}"
        if abs(number) > MAX_INT:
            bounds = f"{bounds}, below 2^63"
        raise InputError(f"{name}={number}: it must be {bounds}")
    return number


def mix(values: Hashes, scratch: Hashes | None = None) -> Hashes:
    """Scatter every bit of each value by SplitMix64's finaliser, a bijection of 64-bit numbers.

    Args:
        values: uint64 array; it is overwritten and returned.
        scratch: uint64 array of the same shape, which is overwritten too.
    """
    if scratch is None:
        scratch = np.empty_like(values)
    for shift, factor in _OPERANDS:
        np.right_shift(values, shift, out=scratch)
        values ^= scratch
        values *= factor
    np.right_shift(values, _LAST_OPERAND, out=scratch)
    values ^= scratch
    return values


def _mix_one(value: int) -> int:
    """Do the same for one number below 2^64."""
    for shift, factor in _STEPS:
        value = (value ^ value >> shift) * factor & _MASK
    return value ^ value >> _LAST_SHIFT


def hash64(*parts: int) -> int:
    """Hash whole numbers, such as (seed, epoch), to 64 bits.

    Their order matters; negative numbers are taken modulo 2^64.
    """
    result = 0
    for part in parts:
        result = _mix_one((result ^ (part & _MASK)) + _GOLDEN & _MASK)
    return result


def hash64_each(base: int, indices: Ints) -> Hashes:
    """Compute ``hash64(base, index)`` for an array of indices, as uint64."""
    mixed: Hashes = (indices.astype(np.uint64) ^ np.uint64(hash64(base))) + np.uint64(_GOLDEN)
    return mix(mixed)


def permute(values: Ints, size: int, secret: int | Hashes) -> Ints:
    """Map values by a pseudo-random permutation of 0..size-1.

    Args:
        values: int64 array of values below ``size``.
        size: how many things are permuted, at least 1.
        secret: the permutation's 64-bit key, or one for each value (uint64 array of the same
            shape).
    """
    if size <= 1:
        return np.zeros_like(values)
    bits = max(MIN_BITS, (size - 1).bit_length())
    images = _feistel(values.astype(np.uint64), bits, secret)
    # Cycle walking: the network permutes 2^bits values; one that leaves 0..size-1 is mapped again
    # until it comes back, which keeps the map a bijection. Fewer than half leave in each pass, so
    # the number still outside halves and no table is needed.
    outside = np.flatnonzero(images >= np.uint64(size))
    while outside.size:
        secrets = secret if isinstance(secret, int) else secret[outside]
        images[outside] = _feistel(images[outside], bits, secrets)
        outside = outside[images[outside] >= np.uint64(size)]
    return images.astype(np.int64)


def _feistel(values: Hashes, bits: int, secret: int | Hashes) -> Hashes:
    """Apply the network once: a bijection of 0..2^bits-1. Its halves differ by at most one bit."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    low, high = values & np.uint64((1 << low_bits) - 1), values >> np.uint64(low_bits)
    # Of each round; the sums wrap around 2^64, which arrays do without a word, unlike scalars.
    keys = np.array(secret, dtype=np.uint64, ndmin=1) + _OFFSETS[:, None]
    rounds = (high, low, _operand(64 - high_bits)), (low, high, _operand(64 - low_bits))
    hashes, scratch = np.empty_like(low), np.empty_like(low)
    # Each round changes one half by a hash of the other. The same round undoes that, whatever the
    # hash, so any rounds together are a bijection; more rounds only mix better.
    for number, key in enumerate(keys):
        half, other, shift = rounds[number % 2]
        np.left_shift(other, _HALF, out=hashes)
        hashes ^= key
        mix(hashes, scratch)
        hashes >>= shift
        half ^= hashes
    return (high << np.uint64(low_bits)) | low


def within_blocks(positions: Ints, samples: int, block_samples: int, secret: int) -> Ints:
    """Shuffle within each block; the last block may be shorter than the others.

    Args:
        positions: int64 array, each in 0..samples-1.
        samples: positions in all.
        block_samples: positions in a block.
        secret: of the epoch; each block has one of its own by it.
    """
    blocks = positions // block_samples
    offsets = positions - blocks * block_samples
    secrets = hash64_each(secret, blocks)
    last_block = samples // block_samples
    last_size = samples - last_block * block_samples
    whole = blocks < last_block
    offsets[whole] = permute(offsets[whole], block_samples, secrets[whole])
    offsets[~whole] = permute(offsets[~whole], last_size, secrets[~whole])
    return blocks * block_samples + offsets


class Order:
    """Position of an epoch → sample of the split.

    Args:
        samples: number of samples of the split.
        seed: of the shuffle, from -2^63 to 2^63 - 1.
        kind: ``full`` shuffles the whole split; ``block`` shuffles the shards, lays them end to
            end, cuts that line into blocks and shuffles within each; ``sequential`` keeps the order
            of the shards.
        block_samples: positions in a block. Any run of so many positions lies in two blocks at
            most, so it touches no more shards than two blocks do.
        shard_sizes: samples of each shard, for ``block``.

    Raises:
        InputError: an argument is out of bounds, or the shards do not add up to ``samples``.
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
        if kind not in ORDERS:
            raise InputError(f"order '{kind}': it is one of {', '.join(ORDERS)}")
        self.samples = whole_number("samples", samples, 0)
        self.seed = whole_number("seed", seed, -MAX_INT - 1)
        self.kind = kind
        self.block_samples = whole_number("block_samples", block_samples, 1)
        self._sizes = np.asarray([samples] if shard_sizes is None else shard_sizes, dtype=np.int64)
        if int(self._sizes.sum()) != samples:
            raise InputError(
                f"the shards hold {int(self._sizes.sum())} samples, not {samples}; pack them again"
            )
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._shuffled: tuple[int, Ints, Ints] | None = None
        self._ahead: tuple[int, Ints, Ints] | None = None

    def samples_at(self, epoch: int, positions: Ints) -> Ints:
        """Return the samples at the given positions of an epoch.

        Args:
            epoch: number of the epoch.
            positions: int64 array, each in 0..samples-1.
        """
        if self.kind == "sequential":
            return positions.copy()
        if self.kind == "full":
            return self._shuffled_samples(epoch, positions)
        line = within_blocks(
            positions, self.samples, self.block_samples, hash64(self.seed, epoch, 1)
        )
        return self.along_shuffled_shards(epoch, line)

    def _shuffled_samples(self, epoch: int, positions: Ints) -> Ints:
        """Return the samples of a full shuffle.

        When the epoch after the one asked last is asked for the same few positions, those of
        several epochs more are found with them and kept, as one tuple that is replaced whole: with
        epochs of five batches the decoders would wait for one such call after the other.
        """
        epochs = 1
        ahead = self._ahead  # read once: another thread may replace it
        if ahead is not None and np.array_equal(ahead[1], positions):
            first, _, kept = ahead
            if first <= epoch < first + len(kept):
                return kept[epoch - first].copy()
            if epoch == first + len(kept):
                epochs = max(1, POSITIONS_AHEAD // max(1, len(positions)))
        if epochs == 1:
            found = permute(positions, self.samples, hash64(self.seed, epoch))[None]
        else:
            hashes = [hash64(self.seed, number) for number in range(epoch, epoch + epochs)]
            secrets = np.repeat(np.array(hashes, dtype=np.uint64), len(positions))
            found = permute(np.tile(positions, epochs), self.samples, secrets)
            found = found.reshape(epochs, len(positions))
        if len(positions) <= POSITIONS_AHEAD // 2:
            self._ahead = epoch, positions.copy(), found
        return found[0].copy()

    def along_shuffled_shards(self, epoch: int, line: Ints) -> Ints:
        """Map positions on the line of shuffled shards to samples."""
        order, ends = self._shuffled_shards(epoch)
        slot = np.searchsorted(ends, line, side="right")
        shard = order[slot]
        return self._firsts[shard] + line - (ends[slot] - self._sizes[shard])

    def _shuffled_shards(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the shards in the epoch's order and the end of each on the line.

        The answer for the epoch asked last is kept: all batches of an epoch need the same. It is
        one tuple, replaced whole, so threads that ask for two epochs at once both get a right one.
        """
        kept = self._shuffled
        if kept is None or kept[0] != epoch:
            shards = np.arange(len(self._sizes))
            order = permute(shards, len(self._sizes), hash64(self.seed, epoch, 2))
            kept = self._shuffled = (epoch, order, np.cumsum(self._sizes[order]))
        return kept[1], kept[2]


@dataclass(frozen=True)
class BatchPlan:
    """Which positions of an epoch a rank takes in each of its batches.

    Global batch k is the positions [k·G, (k+1)·G) with G = batch_size · world_size; rank r takes
    the r-th of its equal parts. With ``drop_last`` a tail shorter than G is dropped, so every rank
    has the same number of batches. Without it the tail is dealt to the ranks as evenly as possible:
    parts differ by one sample at most, and some may be empty.

    Args:
        samples: positions in the epoch.
        batch_size: samples of this rank in a whole batch.
        rank: this rank.
        world_size: number of ranks.
        drop_last: drop the tail.
        start: positions already done; the plan is for the rest.

    Raises:
        InputError: an argument is out of bounds.
    """

    samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = True
    start: int = 0

    def __post_init__(self) -> None:
        whole_number("batch_size", self.batch_size, 1)
        whole_number("world_size", self.world_size, 1)
        if not 0 <= whole_number("rank", self.rank, 0) < self.world_size:
            raise InputError(
                f"rank={self.rank}, world_size={self.world_size}: ranks are 0 to world_size-1"
            )
        if whole_number("samples_seen", self.start, 0) > self.samples:
            raise InputError(
                f"samples_seen={self.start}: the split has {self.samples} samples; "
                "that state is of other data"
            )

    @property
    def global_batch(self) -> int:
        """Samples of a whole batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def whole_batches(self) -> int:
        """Whole global batches that remain."""
        return (self.samples - self.start) // self.global_batch

    @property
    def tail(self) -> int:
        """Positions after the last whole global batch."""
        return (self.samples - self.start) % self.global_batch

    @property
    def dropped(self) -> int:
        """Samples that no rank sees in this epoch."""
        return self.tail if self.drop_last else 0

    @property
    def batches(self) -> int:
        """Batches of this rank."""
        first, end = self.span(self.whole_batches)
        return self.whole_batches + (end > first)

    @property
    def most_batches(self) -> int:
        """Batches of the rank that has most: after so many, all positions are done on all ranks."""
        return self.whole_batches + (not self.drop_last)

    def span(self, batch: int) -> tuple[int, int]:
        """Return the positions [first, end) of a batch of this rank, counted from ``start``."""
        begin = self.start + batch * self.global_batch
        if batch < self.whole_batches:
            return begin + self.rank * self.batch_size, begin + (self.rank + 1) * self.batch_size
        if batch > self.whole_batches or self.drop_last:
            return self.samples, self.samples
        first, end = (self.tail * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return begin + first, begin + end

    def seen_after(self, batches: int) -> int:
        """Return the positions that all ranks together have done after so many batches each."""
        return min(self.start + batches * self.global_batch, self.samples)
