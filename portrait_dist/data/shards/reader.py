"""Reads packed shards: any sample at any time, from any thread, each one checked.

``portrait_dist.data.shards.format`` says what lies on the disk, ``pack`` (in ``writer``) writes it.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import mmap
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from portrait_dist.data.shards import format as shard_format
from portrait_dist.data.shards.cache import Cache, FetchError, fetch_manifest, join
from portrait_dist.data.shards.format import (
    BLOCK,
    MANIFEST,
    SUFFIXES,
    Manifest,
    ShardEntry,
    padded,
    parse_manifest,
)
from portrait_dist.errors import DamagedDataError, InputError, nearest

__all__ = ["DamagedSampleError", "Encoded", "ShardSet", "read_manifest"]

MEND = "find all damage with 'portrait-dist verify', then pack or copy the shards again"
REACH = "look whether the address is right and its server is up, then run again"
MOST_OPEN = 256
"""Shards mapped at a time; each takes a file descriptor, and 1,024 are what a process usually may have."""
MOST_OPEN_BEYOND_CACHE = 8
"""The same, where the split does not fit into the cache: what is open takes room on the disk."""


class DamagedSampleError(DamagedDataError):
    """A sample cannot be read. ``shard`` is its tar's name, ``position`` its place in it, counted from 0.

    All but the message have defaults, because worker processes pass an error on by its message alone.
    """

    def __init__(
        self, message: str, where: str = "", what: str = "", shard: str = "", position: int = -1
    ) -> None:
        super().__init__(message)
        self.where, self.what, self.shard, self.position = where, what, shard, position


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as it is stored: JPEG and grey PNG, or two .npy. The views keep the shard mapped."""

    key: str
    image: memoryview
    alpha: memoryview


class ShardSet:
    """All samples of one split, by number, in the order of the keys.

    Opening reads the manifest only. A shard is opened, and its index checked against the manifest, when a sample of it is
    first read; each sample's CRC-32 is checked each time it is read (about 10 µs for 40 kB).

    Args:
        location: folder that ``portrait-dist pack`` wrote, or its address (``https://…``, ``s3://…``, anything with ``://``
            that fsspec opens), whose shards are fetched into ``cache``.
        split: ``train``, ``val`` or ``test``.
        cache: for addresses; a cache in the user's cache folder by default.

    Raises:
        InputError: no shards there, or no such split.
        DamagedDataError: the manifest is damaged.
    """

    def __init__(self, location: str | Path, split: str, *, cache: Cache | None = None) -> None:
        self.location = str(location)
        self.split = split
        self.remote = "://" in self.location
        self.manifest = read_manifest(location)
        if split not in self.manifest.splits:
            known = list(self.manifest.splits)
            raise InputError(
                f"{location}: no split '{split}' in it.{nearest(split, known)} There are {', '.join(known)}"
            )
        entry = self.manifest.splits[split]
        self.shards: list[ShardEntry] = entry.shards
        self.shard_sizes = [shard.samples for shard in entry.shards]
        self.samples = entry.samples
        self.size = self.manifest.size
        self.codec = self.manifest.codec
        self._ends = list(itertools.accumulate(self.shard_sizes))
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        self._unreachable: dict[int, str] = {}
        if self.remote:
            self.cache = cache or Cache()
        self._most_open = MOST_OPEN if self.fits_cache else MOST_OPEN_BEYOND_CACHE

    def __len__(self) -> int:
        return self.samples

    @property
    def identity(self) -> str:
        """Hash of the split's content: equal where every byte of every shard is."""
        text = "\n".join(
            [f"{self.split} {self.manifest.settings}", *(shard.sha256 for shard in self.shards)]
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def fits_cache(self) -> bool:
        """Does the whole split lie on the local disk, or has the cache room for it?"""
        return not self.remote or sum(shard.bytes for shard in self.shards) <= self.cache.limit

    def locate(self, sample: int) -> tuple[int, int]:
        """(number of the shard, position in it) of a sample."""
        if not 0 <= sample < self.samples:
            raise IndexError(f"sample {sample} of {self.samples}")
        shard = bisect.bisect_right(self._ends, sample)
        return shard, sample - (self._ends[shard] - self.shard_sizes[shard])

    def name(self, sample: int) -> str:
        """``DIR/train-00003.tar, sample 17``, for messages."""
        shard, position = self.locate(sample)
        return f"{self.shard_name(shard)}, sample {position}"

    def shard_name(self, number: int) -> str:
        """``DIR/train-00003.tar``, for messages."""
        return f"{self.location.rstrip('/')}/{self.shards[number].name}"

    def files(self, number: int) -> tuple[Path, Path]:
        """Tar and index of a shard on the local disk, fetched where they are remote; local ones need not be there.

        Raises:
            FetchError: they cannot be fetched.
        """
        entry = self.shards[number]
        if not self.remote:
            return Path(self.location) / entry.name, Path(self.location) / entry.index_name
        tar = self.cache.fetch(join(self.location, entry.name), entry.sha256, entry.bytes)
        return tar, self.cache.fetch(join(self.location, entry.index_name), entry.index_sha256)

    def fetch(self, number: int) -> None:
        """Bring a remote shard into the cache if it is not open yet. What fails is tried again, and raised, by ``read``."""
        if number not in self._open and number not in self._unreachable:
            with contextlib.suppress(FetchError, InputError):
                self.files(number)

    def read(self, sample: int) -> Encoded:
        """A sample's key and encoded members, without a copy.

        Raises:
            DamagedSampleError: it, or its shard, is missing or not what the manifest says.
        """
        number, position = self.locate(sample)
        try:
            shard = self._shard(number)
            try:
                return shard.read(position)
            except _DamageError:
                if not self.remote:
                    raise
                return self._read_again(number, position)
        except _DamageError as damage:
            where, mend = self.name(sample), REACH if number in self._unreachable else MEND
            message = f"{where}: {damage}; {mend}"
            raise DamagedSampleError(
                message, where, str(damage), self.shards[number].name, position
            ) from damage

    def _shard(self, number: int) -> _OpenShard:
        """The shard, opened, and fetched where it is remote, by the first thread that asks."""
        with self._lock:
            if (shard := self._open.get(number)) is not None:
                self._open.move_to_end(number)
                return shard
            opening = self._opening.setdefault(number, threading.Lock())
        with opening:
            with self._lock:
                if (shard := self._open.get(number)) is not None:
                    return shard
            shard = self._open_shard(number)
            with self._lock:
                self._open[number] = shard
                self._opening.pop(number, None)
                if len(self._open) > self._most_open:
                    self._open.popitem(last=False)  # closed when its last reader is done
        return shard

    def _open_shard(self, number: int) -> _OpenShard:
        entry = self.shards[number]
        if number in self._unreachable:
            raise _DamageError(self._unreachable[number])
        for last in (not self.remote, False, True):
            try:
                return _OpenShard(*self.files(number), entry, SUFFIXES[self.codec])
            except (
                FetchError
            ) as error:  # attempts were made already, so do not try for every sample
                self._unreachable[number] = str(error)
                raise _DamageError(str(error)) from error
            except (
                _DamageError
            ):  # another process needed the room between fetching and opening, or the copy went bad
                if last:
                    raise
                self.cache.discard(entry.index_sha256)
        raise AssertionError

    def _read_again(self, number: int, position: int) -> Encoded:
        """Fetch a remote shard anew whose local copy turned out to be damaged."""
        entry = self.shards[number]
        with self._lock:
            self._open.pop(number, None)
            self.cache.discard(entry.sha256)
            self.cache.discard(entry.index_sha256)
        return self._shard(number).read(position)


class _DamageError(Exception):
    """What is wrong with a shard or sample."""


class _OpenShard:
    """One mapped tar with its index."""

    def __init__(
        self, tar: Path, index: Path, entry: ShardEntry, suffixes: tuple[str, str]
    ) -> None:
        self.entry, self.suffixes = entry, suffixes
        data = _read_index(index)
        if hashlib.sha256(data).hexdigest() != entry.index_sha256:
            raise _DamageError(
                f"{index.name} is not the index of this shard (its sha256 differs from the manifest's)"
            )
        _, self.records = shard_format.parse_index(data)
        try:
            with tar.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise _DamageError("the shard is missing") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise _DamageError(f"the shard cannot be read ({error})") from error
        self.view = memoryview(self.map)

    def read(self, position: int) -> Encoded:
        # Touching a mapped page behind the end of a file kills the process, so look at the length first, each time.
        if self.map.size() != self.entry.bytes or len(self.view) != self.entry.bytes:
            raise _DamageError(
                f"the shard has {self.map.size():,} bytes instead of {self.entry.bytes:,}"
            )
        record = shard_format.record_at(self.records, position)
        sample = self.view[record.offset : record.offset + record.length]
        if isal_zlib.crc32(sample) != record.crc32:
            raise _DamageError("the sample is damaged (its CRC-32 differs from the index's)")
        alpha_at = BLOCK + padded(record.image)
        image_name = shard_format.member_name(sample[:BLOCK])
        alpha_name = shard_format.member_name(sample[alpha_at : alpha_at + BLOCK])
        key = image_name.removesuffix(self.suffixes[0])
        if image_name != key + self.suffixes[0] or alpha_name != key + self.suffixes[1]:
            raise _DamageError(
                f"the shard has {image_name} and {alpha_name} there instead of an image and its mask"
            )
        alpha_at += BLOCK
        return Encoded(
            key, sample[BLOCK : BLOCK + record.image], sample[alpha_at : alpha_at + record.alpha]
        )


def _read_index(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _DamageError(f"its index {path.name} is missing") from None
    except OSError as error:
        raise _DamageError(f"its index {path.name} cannot be read ({error.strerror})") from error


def read_manifest(location: str | Path) -> Manifest:
    """Read the manifest of packed shards in a folder or at an address.

    Raises:
        InputError: there is none.
        DamagedDataError: it is damaged.
    """
    if "://" in str(location):
        return parse_manifest(
            fetch_manifest(str(location)), f"{str(location).rstrip('/')}/{MANIFEST}"
        )
    path = Path(location) / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_no_shards(Path(location))) from None
    except OSError as error:
        raise DamagedDataError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_manifest(text, str(path))


def _no_shards(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: there is no such folder; give one that 'portrait-dist pack' wrote"
    if (folder / "split.json").is_file():
        return f"{folder}: not packed yet; run 'portrait-dist pack --data {folder} --out DIR' and give that DIR"
    if (folder / "clip_img").is_dir():
        return (
            f"{folder}: is a raw tree; run 'portrait-dist prepare' on it, then 'portrait-dist pack'"
        )
    if (folder / ".pack.json").is_file():
        return (
            f"{folder}: packing was not finished; run the same 'portrait-dist pack' command again"
        )
    return f"{folder}: no {MANIFEST} in it; give a folder that 'portrait-dist pack' wrote"
