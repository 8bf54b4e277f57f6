"""Read packed shards: any sample at any time, from any thread, each one checked.

``portrait_dist.data.shards.format`` says what lies on the disk, ``writer`` writes it.

Samples are read by ``pread`` and not through a memory map: a file that shrinks, or a disk that
fails, is then an error with the shard's name, where a touched page of a map would kill the process
by SIGBUS. It costs 3 µs more a sample, under 1 % of decoding one (benchmarks/NOTES.md).
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import itertools
import os
import resource
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NoReturn

from isal import isal_zlib

from portrait_dist import distributed
from portrait_dist.data.shards import format as shard_format
from portrait_dist.data.shards.cache import Cache, fetch_manifest
from portrait_dist.data.shards.download import CancelledDownloadError, DownloadOptions, FetchError
from portrait_dist.data.shards.format import (
    BLOCK,
    MANIFEST,
    MANIFEST_LIMIT,
    SUFFIXES,
    Manifest,
    ShardEntry,
    padded,
    parse_manifest,
)
from portrait_dist.errors import (
    DamagedDataError,
    InputError,
    PortraitDistError,
    UnreachableError,
    nearest,
)
from portrait_dist.files import open_regular, read_regular
from portrait_dist.system.address import check_address, is_address, join, redact
from portrait_dist.system.info import is_network_file_system

__all__ = [
    "DamageError",
    "DamagedSampleError",
    "Encoded",
    "NoSplitError",
    "OpenShard",
    "ShardSet",
    "read_manifest",
]

ADVICE = "find all damage with 'portrait-dist verify', then pack or copy the shards again"
ADVICE_FOR_A_SERVER = "see whether the address is right and its shards are whole, then run again"
RESERVED_DESCRIPTORS = 512
"""File descriptors left to everything else, besides one a rank for connections."""
MOST_OPEN = 60_000
LEAST_OPEN = 8
"""Shards open at a time where descriptors are short, or where the split exceeds the cache: there
an open shard keeps its space on the disk."""
INDEX_MEMORY = 512 << 20
"""Bytes of indexes kept in memory for each split: 20 a sample, so 26 million samples."""
ATTEMPTS_AGAINST_EVICTION = 3
SECONDS_UNTIL_RETRY = 60.0
"""Until a shard that a server did not have, or had wrong, is asked for again."""
AWAY = (
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNABORTED,
    errno.ECONNRESET,
    errno.EREMOTEIO,
    errno.ESHUTDOWN,
)
"""What a network file system sets when its server is away."""
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class DamagedSampleError(DamagedDataError):
    """A sample cannot be read.

    All arguments but the message have defaults, because worker processes pass an error on by its
    message alone.

    Args:
        message: one line.
        where: shard and sample, for messages.
        what: what is wrong.
        shard: name of its tar.
        position: of the sample in the shard, counted from 0.
    """

    def __init__(
        self, message: str, where: str = "", what: str = "", shard: str = "", position: int = -1
    ) -> None:
        super().__init__(message)
        self.where, self.what, self.shard, self.position = where, what, shard, position


class NoSplitError(InputError):
    """The shards have no such split."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as it is stored: JPEG and grey PNG, or two .npy, as ``codec`` says."""

    key: str
    image: memoryview
    alpha: memoryview
    codec: str = "jpeg"


class ShardSet:
    """All samples of one split, by number, in the order of the keys.

    Opening reads the manifest only. A shard is opened, and its index checked against the manifest,
    when a sample of it is first read. Each sample's CRC-32 is checked each time it is read (about
    10 µs for 40 kB).

    Args:
        location: folder that ``portrait-dist pack`` wrote, or its address (``https://…``,
            ``s3://…``, anything with ``://`` that fsspec opens), whose shards are downloaded into
            ``cache``.
        split: ``train``, ``val`` or ``test``.
        cache: for addresses; a cache in the user's cache folder by default.

    Attributes:
        shown: the location without secrets, for messages and files.

    Raises:
        InputError: no shards there, or no such split.
        DamagedDataError: the manifest is damaged.
        UnreachableError: the server was away for longer than it is waited for.
    """

    _alive: ClassVar[weakref.WeakSet[ShardSet]] = weakref.WeakSet()
    """They divide the process's file descriptors among them."""
    remedy: ClassVar[str] = ADVICE

    def __init__(self, location: str | Path, split: str, *, cache: Cache | None = None) -> None:
        if is_address(location):
            cache = cache or Cache()
            manifest = read_manifest(location, cache.downloads)
        else:
            manifest = read_manifest(location)
        self._open_split(str(location), split, manifest, cache)

    def _open_split(
        self, location: str, split: str, manifest: Manifest, cache: Cache | None
    ) -> None:
        """Take a split of a manifest that is read.

        Raises:
            InputError: no such split.
        """
        self.location = location
        self.shown = redact(self.location)
        self.split = split
        self.remote = is_address(self.location)
        if cache is not None:
            self.cache = cache
        self.manifest = manifest
        if split not in self.manifest.splits:
            known = list(self.manifest.splits)
            raise NoSplitError(
                f"{self.shown}: no split '{split}' in it.{nearest(split, known)} "
                f"There are {', '.join(known)}"
            )
        entry = self.manifest.splits[split]
        self.shards: list[ShardEntry] = entry.shards
        self.shard_sizes = [shard.samples for shard in entry.shards]
        self.samples = entry.samples
        self.size = self.manifest.size
        self.codec = self.manifest.codec
        self.fit = self.manifest.fit
        self._ends = list(itertools.accumulate(self.shard_sizes))
        self.bytes = sum(shard.bytes for shard in entry.shards)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._indexes = _Indexes()
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        self._absent: dict[int, tuple[float, str]] = {}  # since when, and what the server said
        self._renewed: set[int] = set()
        self._here: set[int] = set()
        ShardSet._alive.add(self)

    def __len__(self) -> int:
        return self.samples

    @property
    def folder(self) -> Path:
        """Folder of local shards, which their names are relative to."""
        return Path(self.location)

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch of training, over all ranks."""
        return self.samples

    @property
    def identity(self) -> str:
        """Hash of the split's content: equal where every byte of every shard is."""
        return self._identity(len(self.shards))

    @property
    def earlier_identities(self) -> list[str]:
        """Identities that the split had in earlier versions, the first version's first."""
        return [self._identity(one[self.split]) for one in self.manifest.versions[:-1]]

    def grown_since(self, identity: str) -> str:
        """Return nothing: :attr:`earlier_identities` tells it; see ``ShardSets.grown_since``."""
        return ""

    def _identity(self, shards: int) -> str:
        text = "\n".join(
            [
                f"{self.split} {self.manifest.settings}",
                *(shard.sha256 for shard in self.shards[:shards]),
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def fits_cache(self) -> bool:
        """Whether the split lies on the local disk, or the cache has room for it and the others.

        Those are the other splits and sets that this process has open: what stays open stays on
        the disk.
        """
        if not self.remote:
            return True
        sharing = {
            (one.location, one.split): one.bytes
            for one in list(ShardSet._alive)
            if one.remote and one.cache.folder == self.cache.folder
        }
        return sum(sharing.values()) <= self.cache.limit

    @property
    def may_wait(self) -> bool:
        """Whether a read may have to wait for a server: not every shard is in the cache to stay."""
        return self.remote and not (self.fits_cache and len(self._here) == len(self.shards))

    @property
    def most_open(self) -> int:
        """Shards that are kept open at a time.

        All of them where the limit of file descriptors (``ulimit -n``) allows it. Where it does
        not, the order ``full`` opens a shard again for almost every sample (7 times the wall time
        of a read, measured with 600 shards of which 256 were open); ``block`` does not.
        """
        if not self.fits_cache:
            return LEAST_OPEN
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # "No limit" is -1 as a number, which would leave no room at all.
        soft = MOST_OPEN * 2 if soft == resource.RLIM_INFINITY else soft
        most = min(soft - RESERVED_DESCRIPTORS - distributed.world_size(), MOST_OPEN)
        # The training and the validation split are open at the same time: each gets its part.
        everyones = sum(len(shards.shards) for shards in list(ShardSet._alive))
        if everyones > most:
            most = most * len(self.shards) // everyones
        return max(LEAST_OPEN, min(most, len(self.shards)))

    def advice(self, order: str) -> str:
        """Return a line that names the better order where shards cannot all stay open.

        Args:
            order: ``full`` or ``block``.

        Returns:
            An empty string where nothing is to be said.
        """
        most = self.most_open
        if order != "full" or len(self.shards) <= most:
            return ""
        more = "the limit of open files (ulimit -n)" if self.fits_cache else "data.cache_gigabytes"
        return (
            f"{self.shown}: {len(self.shards):,} shards, of which {most:,} stay open; data.order="
            f"full opens one again for almost every sample: set data.order=block, or raise {more}"
        )

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (number of the shard, position in it) of a sample."""
        if not 0 <= sample < self.samples:
            raise IndexError(f"sample {sample} of {self.samples}")
        shard = bisect.bisect_right(self._ends, sample)
        return shard, sample - (self._ends[shard] - self.shard_sizes[shard])

    def name(self, sample: int) -> str:
        """Return ``DIR/train-00003.tar, sample 17``, for messages."""
        shard, position = self.locate(sample)
        return f"{self.shard_name(shard)}, sample {position}"

    def shard_name(self, number: int) -> str:
        """Return ``DIR/train-00003.tar``, for messages."""
        return f"{self.shown.rstrip('/')}/{self.shards[number].name}"

    def files(self, number: int, cancelled: threading.Event | None = None) -> tuple[Path, Path]:
        """Return tar and index of a shard on the local disk; remote ones are downloaded.

        Local ones need not be there.

        Args:
            number: of the shard.
            cancelled: ends the wait for a server when it is set.

        Raises:
            FetchError: the server does not have them, or others.
            InputError, UnreachableError, CancelledDownloadError: see :meth:`Cache.fetch`.
        """
        return self._tar(number, cancelled), self._index(number, cancelled)

    def _tar(self, number: int, cancelled: threading.Event | None = None) -> Path:
        entry = self.shards[number]
        if not self.remote:
            return self.folder / entry.name
        address = join(self.location, entry.name)
        path = self.cache.fetch(address, entry.sha256, entry.bytes, cancelled=cancelled)
        self._here.add(number)
        return path

    def _index(self, number: int, cancelled: threading.Event | None = None) -> Path:
        entry = self.shards[number]
        if not self.remote:
            return Path(self.location) / entry.index_name
        return self.cache.fetch(
            join(self.location, entry.index_name),
            entry.index_sha256,
            limit=shard_format.index_limit(entry.samples),
            cancelled=cancelled,
        )

    def fetch(self, number: int, cancelled: threading.Event | None = None) -> None:
        """Bring a remote shard into the cache if it is not open yet.

        What fails is tried again, and raised, by :meth:`read`.

        Args:
            number: of the shard.
            cancelled: ends the wait for a server when it is set.
        """
        if number not in self._open and number not in self._absent:
            known = FetchError, PortraitDistError, CancelledDownloadError, OSError
            with contextlib.suppress(*known):
                self.files(number, cancelled)

    def key(self, sample: int) -> str:
        """Return a sample's key, from the tar's header alone; nothing else of it is read.

        Raises:
            DamagedSampleError, UnreachableError, InputError: see :meth:`read`.
        """
        number, position = self.locate(sample)
        try:
            return self._shard(number, None).key(position)
        except (DamageError, OSError):
            return self.read(sample).key  # which knows what to try again, and what to say

    def read(self, sample: int, cancelled: threading.Event | None = None) -> Encoded:
        """Return a sample's key and encoded members.

        Args:
            sample: number in the split.
            cancelled: ends the wait for a server when it is set.

        Raises:
            DamagedSampleError: it, or its shard, is missing or not what the manifest says.
            UnreachableError: the server or network file system is away.
            InputError: the server refuses, or the cache cannot be used.
            CancelledDownloadError: ``cancelled`` was set.
        """
        number, position = self.locate(sample)
        try:
            return self._read(number, position, cancelled)
        except DamageError as damage:
            where = self.name(sample)
            advice = ADVICE_FOR_A_SERVER if number in self._absent else self.remedy
            raise DamagedSampleError(
                f"{where}: {damage}; {advice}",
                where,
                str(damage),
                self.shards[number].name,
                position,
            ) from damage

    def _read(self, number: int, position: int, cancelled: threading.Event | None) -> Encoded:
        """Read a sample, again where another attempt can help.

        That is when another process evicted the file from the cache between its download and its
        opening, when the copy in the cache went bad, and when a network file system wants its
        files opened again.
        """
        missing = reopened = 0
        while True:
            shard = None
            try:
                shard = self._shard(number, cancelled)
                return shard.read(position)
            # The server was asked and has no such file: there is no copy to renew.
            except _AbsentError:
                raise
            except _MissingError:
                missing += 1
                if not self.remote:
                    self._check_folder()
                # A local file that is missing stays missing; in a cache it can be evicted again and
                # again.
                if not self.remote or missing == ATTEMPTS_AGAINST_EVICTION:
                    raise
            except DamageError:
                if not self._renew(number, shard):
                    raise
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS and self._close_half():
                    continue  # something else in the process took them
                reopened += 1
                # A descriptor of a mount that went away stays stale; only opening the file anew can
                # help.
                self._forget(number)
                if error.errno not in AWAY or reopened > 1:
                    self._raise_unreadable(number, error, shard)

    def _check_folder(self) -> None:
        """Tell a shard that is missing from a folder that is.

        Raises:
            UnreachableError: the folder is gone, such as one whose mount went away.
        """
        if not (Path(self.location) / MANIFEST).exists():
            raise UnreachableError(
                f"{self.location}: its {MANIFEST} is gone; "
                "mount the folder or copy the shards again, then run the same command again"
            )

    def _raise_unreadable(self, number: int, error: OSError, shard: OpenShard | None) -> NoReturn:
        """Raise what a failed open or read means.

        Raises:
            UnreachableError: a network file system is away.
            PortraitDistError: the process has no file descriptors left.
            DamageError: the disk cannot read the file.
        """
        if error.errno in OUT_OF_DESCRIPTORS:
            raise PortraitDistError(
                f"{self.shard_name(number)}: too many open files; "
                "raise the limit ('ulimit -n'), then run again"
            ) from error
        folder = self.cache.folder if self.remote else Path(self.location)
        if error.errno in AWAY or (
            error.errno == errno.EIO
            and is_network_file_system(shard.device if shard else folder.stat().st_dev)
        ):
            raise UnreachableError(
                f"{self.shard_name(number)}: its file system is away ({error.strerror}); "
                "run the same command again when it is back"
            ) from error
        raise DamageError(f"the shard cannot be read ({error.strerror})") from error

    def _renew(self, number: int, shard: OpenShard | None) -> bool:
        """Remove a damaged copy from the cache, once for each shard; whether to read again."""
        if not self.remote:
            return False
        with self._lock:
            # Several threads meet the damage at once; the second must not throw away the fresh
            # copy.
            if self._open.get(number) is not shard:
                return True  # another thread did it
            if number in self._renewed:
                return False
            self._renewed.add(number)
            self._open.pop(number, None)
            # The index may be what is damaged: both files are fetched again.
            self._indexes.pop(number)
            self.cache.discard(self.shards[number].sha256)
            self.cache.discard(self.shards[number].index_sha256)
            return True

    def _forget(self, number: int) -> None:
        with self._lock:
            self._open.pop(number, None)

    def _shard(self, number: int, cancelled: threading.Event | None) -> OpenShard:
        """Return the open shard; the first thread that asks opens and downloads it."""
        with self._lock:
            if (shard := self._open.get(number)) is not None:
                self._open.move_to_end(number)
                return shard
            # A lock for each shard: the others can be opened while this one is downloaded.
            opening = self._opening.setdefault(number, threading.Lock())
        with opening:
            with self._lock:
                # Another thread may have opened it while this one waited for the lock.
                if (shard := self._open.get(number)) is not None:
                    return shard
            shard = self._open_shard(number, cancelled)
            with self._lock:
                self._open[number] = shard
                self._opening.pop(number, None)
                self._close_down_to(self.most_open)
        return shard

    def _close_half(self) -> bool:
        """Close the shards used least recently; False where none is open."""
        with self._lock:
            found = len(self._open)
            self._close_down_to(found // 2)
        return found > 0

    def _close_down_to(self, most: int) -> None:
        while len(self._open) > most:
            self._open.popitem(last=False)  # closed when its last reader is done

    def _open_shard(self, number: int, cancelled: threading.Event | None) -> OpenShard:
        """Open a shard, downloaded where it is remote.

        Raises:
            DamageError: missing, or not what the manifest says.
            OSError: it cannot be read.
        """
        entry = self.shards[number]
        # Hundreds of samples lie in a shard; without this each of them would ask the server again.
        since, reason = self._absent.get(number, (0.0, ""))
        if reason and time.monotonic() - since < SECONDS_UNTIL_RETRY:
            raise _AbsentError(reason)
        try:
            records = self._indexes.get(number)
            if records is None:
                records = _read_index(self._index(number, cancelled), entry)
                self._indexes.put(number, records)
            tar = self._tar(number, cancelled)
        except FetchError as error:
            self._absent[number] = (time.monotonic(), str(error))
            raise _AbsentError(str(error)) from error
        self._absent.pop(number, None)
        return OpenShard(tar, records, entry, self.codec, self.size)


class DamageError(Exception):
    """What is wrong with a shard or sample."""


class _MissingError(DamageError):
    """A file of a shard is not on the local disk."""


class _AbsentError(DamageError):
    """A server has no such file, or another one."""


class _Indexes:
    """Records of the shards used last, within a bound of bytes; a shard keeps them when closed."""

    def __init__(self, limit: int = INDEX_MEMORY) -> None:
        self._limit, self._bytes = limit, 0
        self._records: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> bytes | None:
        with self._lock:
            if (records := self._records.get(number)) is not None:
                self._records.move_to_end(number)
            return records

    def put(self, number: int, records: bytes) -> None:
        with self._lock:
            self._bytes += len(records) - len(self._records.pop(number, b""))
            self._records[number] = records
            while self._bytes > self._limit:
                self._bytes -= len(self._records.popitem(last=False)[1])

    def pop(self, number: int) -> None:
        with self._lock:
            self._bytes -= len(self._records.pop(number, b""))


class OpenShard:
    """One open tar with its records; closed with the last reference to it."""

    def __init__(
        self,
        tar: Path,
        records: bytes,
        entry: ShardEntry,
        codec: str,
        size: tuple[int, int] | None,
    ) -> None:
        self._descriptor = -1
        self._records, self._entry, self._codec = records, entry, codec
        # Only JPEGs can be resized silently; the decoder of raw pixels compares every shape.
        self._size = size if codec == "jpeg" else None
        self._size_is_right = self._size is None
        try:
            self._descriptor = open_regular(tar)
        except FileNotFoundError:
            raise _MissingError("the shard is missing") from None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise DamageError(f"the shard {error.strerror}") from error
            raise
        found = os.fstat(self._descriptor)
        self.device = found.st_dev
        self._check_length(found.st_size)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, position: int) -> Encoded:
        """Read one sample and check it.

        Raises:
            DamageError: it is not what index and manifest say.
            OSError: it cannot be read.
        """
        record = shard_format.record_at(self._records, position)
        if record.offset + record.length > self._entry.bytes:
            raise DamageError("its index points behind the end of the shard")
        # pread moves no file position, so any number of threads share one descriptor.
        sample = memoryview(os.pread(self._descriptor, record.length, record.offset))
        if len(sample) != record.length:
            # A shard that was cut off since it was opened says so; else the reason is not known.
            self._check_length(os.fstat(self._descriptor).st_size)
            raise DamageError("the shard changed while it was read")
        if isal_zlib.crc32(sample) != record.crc32:
            raise DamageError("the sample is damaged (its CRC-32 differs from the index's)")
        alpha_at = BLOCK + padded(record.image)
        key = self._key(sample[:BLOCK], sample[alpha_at : alpha_at + BLOCK])
        alpha_at += BLOCK
        encoded = Encoded(
            key,
            sample[BLOCK : BLOCK + record.image],
            sample[alpha_at : alpha_at + record.alpha],
            self._codec,
        )
        if not self._size_is_right:
            self._check_size(encoded)
        return encoded

    def key(self, position: int) -> str:
        """Return a sample's key from the header of its image."""
        record = shard_format.record_at(self._records, position)
        header = os.pread(self._descriptor, BLOCK, record.offset)
        name = shard_format.member_name(header)
        key = name.removesuffix(SUFFIXES[self._codec][0])
        if len(header) != BLOCK or key == name or not key:
            raise DamageError("its header names no image")
        return key

    def _key(self, image_header: memoryview, alpha_header: memoryview) -> str:
        image_name = shard_format.member_name(image_header)
        alpha_name = shard_format.member_name(alpha_header)
        image_suffix, alpha_suffix = SUFFIXES[self._codec]
        key = image_name.removesuffix(image_suffix)
        if image_name != key + image_suffix or alpha_name != key + alpha_suffix:
            raise DamageError(
                f"the shard has {image_name} and {alpha_name} there "
                "instead of an image and its mask"
            )
        return key

    def _check_length(self, length: int) -> None:
        if length != self._entry.bytes:
            raise DamageError(f"the shard has {length:,} bytes instead of {self._entry.bytes:,}")

    def _check_size(self, encoded: Encoded) -> None:
        """Compare the manifest's size with one image: old manifests have no hash of their own."""
        from portrait_dist.data.shards.decode import jpeg_size

        try:
            height, width = jpeg_size(encoded.image)
        except ValueError:
            return  # its decoder says what is wrong with it; another sample is compared
        if (height, width) != self._size:
            raise DamageError(
                f"it has {height}x{width} pixels, the manifest says "
                f"{'x'.join(map(str, self._size or ()))}"
            )
        self._size_is_right = True


def _read_index(path: Path, entry: ShardEntry) -> bytes:
    """Read the records of a shard's index.

    Raises:
        DamageError: it is missing, or not the index of this shard.
        OSError: it cannot be read.
    """
    try:
        data = read_regular(path, shard_format.index_limit(entry.samples))
    except FileNotFoundError:
        raise _MissingError(f"its index {entry.index_name} is missing") from None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise DamageError(f"its index {entry.index_name} {error.strerror}") from error
        raise
    if hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise DamageError(
            f"{entry.index_name} is not the index of this shard "
            "(its sha256 differs from the manifest's)"
        )
    try:
        header, records = shard_format.parse_index(data, entry.index_name)
    except DamagedDataError as error:
        raise DamageError(str(error)) from error
    if header.samples != entry.samples:
        raise DamageError(
            f"{entry.index_name} has {header.samples:,} samples instead of {entry.samples:,}"
        )
    return records


def read_manifest(location: str | Path, downloads: DownloadOptions | None = None) -> Manifest:
    """Read the manifest of packed shards in a folder or at an address.

    Args:
        location: folder or address.
        downloads: how long a server is waited for.

    Raises:
        InputError: there is none.
        DamagedDataError: it is damaged.
        UnreachableError: the server was away for longer than it is waited for.
    """
    if is_address(location):
        check_address(str(location))
        where = f"{redact(str(location)).rstrip('/')}/{MANIFEST}"
        return parse_manifest(fetch_manifest(str(location), downloads), where)
    path = Path(location) / MANIFEST
    try:
        text = read_regular(path, MANIFEST_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_no_shards(Path(location))) from None
    except OSError as error:
        if not os.path.isdir(location):  # a link to itself, too long a name
            raise InputError(_no_shards(Path(location))) from error
        raise DamagedDataError(
            f"{path}: cannot be read ({error.strerror}); copy it again, or pack the shards again"
        ) from error
    except ValueError as error:  # a NUL in the path
        raise InputError(f"{str(location)!r}: is no path ({error}); give a folder") from error
    return parse_manifest(text, str(path))


def _no_shards(folder: Path) -> str:
    if not os.path.exists(folder):
        return f"{folder}: there is no such folder; give one that 'portrait-dist pack' wrote"
    if (folder / "split.json").is_file():
        return (
            f"{folder}: not packed yet; "
            f"run 'portrait-dist pack --data {folder} --out DIR' and give that DIR"
        )
    if (folder / "clip_img").is_dir():
        return (
            f"{folder}: is a raw tree; run 'portrait-dist prepare' on it, then 'portrait-dist pack'"
        )
    if (folder / ".pack.json").is_file():
        return (
            f"{folder}: packing was not finished; run the same 'portrait-dist pack' command again"
        )
    return f"{folder}: no {MANIFEST} in it; give a folder that 'portrait-dist pack' wrote"
