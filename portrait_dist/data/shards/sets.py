"""Several shard sets as one: ``a:1,b:0.3``, read by one number a sample.

A weight is how many passes over a set's samples an epoch of training makes; validation and test
have every sample of every set once, whatever the weights. The order is
``portrait_dist.data.stream.mixing``'s.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from portrait_dist.data.shards.cache import Cache
from portrait_dist.data.shards.foreign import ForeignShardSet, is_foreign
from portrait_dist.data.shards.reader import Encoded, NoSplitError, ShardSet
from portrait_dist.errors import InputError
from portrait_dist.preprocessing import DEFAULT_SIZE, Fit
from portrait_dist.system.address import (
    WeightedLocation,
    is_address,
    read_locations,
    redact,
    split_members,
)

__all__ = ["AnyShards", "Part", "ShardSets", "open_shards", "shape_of_batches"]


MOST_VERSIONS = 10_000
"""Combinations of versions of several sets that are tried, the newest first: 0.1 s."""


@dataclass(frozen=True)
class Part:
    """One set of several.

    Args:
        name: last part of its location, or all of it where others end alike.
        shards: its split.
        weight: passes over its samples in an epoch of training.
        first: number of its first sample among all.
    """

    name: str
    shards: ShardSet
    weight: Fraction
    first: int

    @property
    def epoch_samples(self) -> int:
        """Samples of it in an epoch of training: weight × samples, rounded; 1 at least."""
        exact = self.weight * self.shards.samples
        return max(int(exact + Fraction(1, 2)), int(exact > 0))


class ShardSets:
    """The samples of one split of several shard sets, those of the first set first.

    It has what the stream, prefetching and reports use of :class:`ShardSet`. With more than one
    set a key is ``SET:KEY``.

    Args:
        locations: the sets.
        split: ``train``, ``val`` or ``test``. Sets that have no such split are left out, where
            another one has it.
        cache: for addresses.

    Raises:
        InputError: no shards in one of them, the same content twice, sizes that differ, or no
            sample to train with.
        DamagedDataError, UnreachableError: see :class:`ShardSet`.
    """

    def __init__(
        self, locations: Sequence[WeightedLocation], split: str, *, cache: Cache | None = None
    ) -> None:
        self.location = ",".join(f"{one.location}:{one.decimal}" for one in locations)
        self.shown = ",".join(one.shown for one in locations)
        self.split = split
        self.remote = any(is_address(one.location) for one in locations)
        if self.remote:
            self.cache = cache or Cache()
        opened = _open_each(locations, split, self.cache if self.remote else None)
        self.parts = _parts(opened)
        self._several = len(locations) > 1
        self.size, self.fit = _common_size([one for one, _ in opened])
        self.shards = [entry for one, _ in opened for entry in one.shards]
        self.shard_sizes = [entry.samples for entry in self.shards]
        self.samples = sum(self.shard_sizes)
        self._firsts = [part.first for part in self.parts]
        counts = [len(part.shards.shards) for part in self.parts]
        self._first_shards = list(itertools.accumulate(counts, initial=0))[:-1]

    def __len__(self) -> int:
        return self.samples

    @property
    def weighted(self) -> bool:
        """Whether a weight is not 1."""
        return any(part.weight != 1 for part in self.parts)

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch of training, over all ranks and sets."""
        return sum(part.epoch_samples for part in self.parts)

    @property
    def identity(self) -> str:
        """Hash of all content, its order, and the weights where they matter: in training."""
        return self._identity([part.shards.identity for part in self.parts])

    def _identity(self, identities: Sequence[str]) -> str:
        lines = [
            f"{identity} {part.weight if self.split == 'train' else 1}"
            for identity, part in zip(identities, self.parts, strict=True)
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def grown_since(self, identity: str) -> str:
        """Say which sets had an earlier version where all of them had another identity.

        Returns:
            A clause for a message; empty where no earlier versions give that identity.
        """
        versions = [
            list(enumerate([*part.shards.earlier_identities, part.shards.identity], 1))
            for part in self.parts
        ]
        newest_first = itertools.product(*(reversed(one) for one in versions))
        for chosen in itertools.islice(newest_first, MOST_VERSIONS):
            if self._identity([known for _, known in chosen]) == identity:
                return " and ".join(
                    f"version {before} of {part.shards.shown}, now it is version {len(known)}"
                    for part, known, (before, _) in zip(self.parts, versions, chosen, strict=True)
                    if before != len(known)
                )
        return ""

    @property
    def earlier_identities(self) -> list[str]:
        """None: sets that have grown are other data to a run of several sets."""
        return []

    @property
    def fits_cache(self) -> bool:
        """Whether all sets lie on the local disk, or the cache has room for them together."""
        return all(part.shards.fits_cache for part in self.parts)

    @property
    def may_wait(self) -> bool:
        """Whether a read may have to wait for a server."""
        return any(part.shards.may_wait for part in self.parts)

    def advice(self, order: str) -> str:
        """Return what :meth:`ShardSet.advice` says of the first set that it says something of."""
        return next(filter(None, (part.shards.advice(order) for part in self.parts)), "")

    def number_of(self, sample: int) -> int:
        """Return the number of a sample's set in ``parts``."""
        if not 0 <= sample < self.samples:
            raise IndexError(f"sample {sample} of {self.samples}")
        # The last one that begins there: sets before it that begin there too are empty.
        return bisect.bisect_right(self._firsts, sample) - 1

    def part_of(self, sample: int) -> Part:
        """Return the set of a sample."""
        return self.parts[self.number_of(sample)]

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (number of the shard among all, position in it) of a sample."""
        number = self.number_of(sample)
        part = self.parts[number]
        shard, position = part.shards.locate(sample - part.first)
        return self._first_shards[number] + shard, position

    def name(self, sample: int) -> str:
        """Return ``DIR/train-00003.tar, sample 17``, for messages."""
        part = self.part_of(sample)
        return part.shards.name(sample - part.first)

    def fetch(self, number: int, cancelled: threading.Event | None = None) -> None:
        """Bring a remote shard into the cache; see :meth:`ShardSet.fetch`."""
        index = bisect.bisect_right(self._first_shards, number) - 1
        self.parts[index].shards.fetch(number - self._first_shards[index], cancelled)

    def key(self, sample: int) -> str:
        """Return a sample's key; see :meth:`ShardSet.key`."""
        part = self.part_of(sample)
        return self._prefixed(part, part.shards.key(sample - part.first))

    def read(self, sample: int, cancelled: threading.Event | None = None) -> Encoded:
        """Return a sample's key and encoded members; see :meth:`ShardSet.read`."""
        part = self.part_of(sample)
        encoded = part.shards.read(sample - part.first, cancelled)
        return replace(encoded, key=self._prefixed(part, encoded.key))

    def _prefixed(self, part: Part, key: str) -> str:
        return f"{part.name}:{key}" if self._several else key


AnyShards = ShardSet | ShardSets


def open_shards(location: str | Path, split: str, *, cache: Cache | None = None) -> AnyShards:
    """Open a split of one shard set, or of a list such as ``a:1,b:0.3``.

    Args:
        location: folder, address, or a list of them with weights; also a .tar or a folder of tars
            that ``pack`` did not write.
        split: ``train``, ``val`` or ``test``.
        cache: for addresses; a cache in the user's cache folder by default.

    Raises:
        InputError: the list is wrong, no shards there, or no such split.
        DamagedDataError: a manifest is damaged.
        UnreachableError: a server was away for longer than it is waited for.
    """
    found = read_locations(str(location))
    if len(found) == 1 and found[0].weight == 1:
        return _open_one(found[0].location, split, cache)
    return ShardSets(found, split, cache=cache)


def _open_one(location: str, split: str, cache: Cache | None) -> ShardSet:
    """Open packed shards, or tars that somebody else wrote."""
    kind = ForeignShardSet if is_foreign(location) else ShardSet
    return kind(location, split, cache=cache)


def _open_each(
    locations: Sequence[WeightedLocation], split: str, cache: Cache | None
) -> list[tuple[ShardSet, WeightedLocation]]:
    """Open the split of each set that has it.

    Raises:
        InputError: none has it, or two have the same content.
    """
    opened: list[tuple[ShardSet, WeightedLocation]] = []
    refused: InputError | None = None
    for one in locations:
        try:
            opened.append((_open_one(one.location, split, cache), one))
        except NoSplitError as error:
            refused = error
    if refused and not opened:
        raise refused
    seen: dict[str, str] = {}
    for shards, one in opened:
        shown = redact(one.location)
        if shards.samples and (other := seen.get(shards.identity)):
            raise InputError(
                f"{shown}: its {split} split is that of {other}; give it once, with the sum of "
                "both weights"
            )
        seen[shards.identity] = shown
    return opened


def _parts(opened: Sequence[tuple[ShardSet, WeightedLocation]]) -> list[Part]:
    """Name and number the sets."""
    shown = [redact(split_members(one.location)[0]).rstrip("/") for _, one in opened]
    short = [text.rpartition("/")[2] for text in shown]
    names = short if len(set(short)) == len(short) else shown
    firsts = itertools.accumulate((shards.samples for shards, _ in opened), initial=0)
    return [
        Part(name, shards, one.weight, first)
        for name, (shards, one), first in zip(names, opened, firsts, strict=False)
    ]


def _common_size(sets: Sequence[ShardSet]) -> tuple[tuple[int, int] | None, Fit]:
    """Return (H, W) that sets were packed at and how; None where all keep their own size.

    Raises:
        InputError: two were packed differently.
    """
    packed = [one for one in sets if one.size is not None]
    for one in packed[1:]:
        if (one.size, one.fit) != (packed[0].size, packed[0].fit):
            first, other = (
                f"{'x'.join(map(str, each.size or ()))} ({each.fit})" for each in (packed[0], one)
            )
            raise InputError(
                f"{packed[0].shown} was packed at {first} and {one.shown} at {other}; pack one of "
                "them again as the other, or with --size original for any size"
            )
    return (packed[0].size, packed[0].fit) if packed else (None, "squash")


def shape_of_batches(
    stored: tuple[tuple[int, int] | None, Fit],
    asked: tuple[tuple[int, int] | None, Fit | None],
    where: str,
) -> tuple[tuple[int, int], Fit]:
    """Return (H, W) of the batches, and how images of another shape are, or were, brought to it.

    Args:
        stored: size and fit with which the shards are, or will be, packed; size None: original.
        asked: of the training; None: as packed.
        where: the shards, for messages.

    Raises:
        InputError: the images are stored at another size, or fitted in another way.
    """
    (packed, packed_fit), (size, fit) = stored, asked
    if packed is None:
        return size or DEFAULT_SIZE, fit or "squash"
    if size is not None and tuple(size) != tuple(packed):
        raise InputError(
            f"{where}: packed at {packed[0]}x{packed[1]}, asked for {size[0]}x{size[1]}; "
            "pack again at that size, or with --size original for any size"
        )
    if fit is not None and fit != packed_fit:
        raise InputError(
            f"{where}: packed with --fit {packed_fit}, asked for {fit}; pack again with "
            f"--fit {fit}, or with --size original for any"
        )
    return (int(packed[0]), int(packed[1])), packed_fit
