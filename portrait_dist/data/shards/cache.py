"""Keep remote shards in a bounded cache on the local disk, each downloaded once per machine.

Files are kept under the sha256 that the manifest gives them, so shards of several sets never
collide. Nothing is used before its content has been compared with that hash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import math
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from portrait_dist.data.shards.download import (
    AbsentError,
    CancelledDownloadError,
    DownloadOptions,
    FetchError,
    LocalDiskError,
    download,
    open_part,
    read_bytes,
)
from portrait_dist.data.shards.format import INDEX_HEADER_LIMIT, MANIFEST, MANIFEST_LIMIT, is_sha256
from portrait_dist.errors import InputError, PortraitDistError
from portrait_dist.files import FULL, open_regular, write_text
from portrait_dist.system.address import join, redact

__all__ = ["AbsentError", "Cache", "CancelledDownloadError", "DownloadOptions", "FetchError"]


LOCK_POLL_SECONDS = 0.05


class Cache:
    """Files from addresses, in a folder of limited size that processes and threads share.

    When the cache is full, the least recently used files are evicted. A file that a reader has open
    stays readable, and its space is free when the reader is done with it (each reader of a split
    that exceeds the limit has at most eight open). A download reserves its full size and is never
    evicted, so only concurrent downloads can exceed the limit.

    The folder must belong to this user and be writable by nobody else. All the same the content of
    each file is compared with its sha256 once, and again when the file has changed since.

    Args:
        folder: made when it is first needed; by default ``portrait-dist/shards`` in the user's
            cache folder. On a local disk: each machine has its own.
        gigabytes: limit of the files' size together, 10^9 bytes.
        parallel_downloads: shards that each loader prefetches at a time; 0 turns prefetching off.
            Several connections bring more than one and hide the wait for the first byte (100 to
            200 ms for S3, by its performance guide). Four were slower than eight, see
            benchmarks/NOTES.md.
        downloads: how long a server is waited for.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        gigabytes: float = 50.0,
        *,
        parallel_downloads: int = 8,
        downloads: DownloadOptions | None = None,
    ) -> None:
        if not (math.isfinite(gigabytes) and 0 < gigabytes <= 1e9):
            raise InputError(f"data.cache_gigabytes={gigabytes}: it is above 0 and at most 1e9")
        if parallel_downloads < 0:
            raise InputError(f"data.parallel_downloads={parallel_downloads}: it is 0 or more")
        self.folder = Path(folder) if folder else default_folder()
        self.limit = int(gigabytes * 1e9)
        self.parallel_downloads = parallel_downloads
        self.downloads = downloads or DownloadOptions()
        self._checked: dict[str, str] = {}

    def fetch(
        self,
        address: str,
        sha256: str,
        size: int | None = None,
        *,
        limit: int = INDEX_HEADER_LIMIT,
        cancelled: threading.Event | None = None,
    ) -> Path:
        """Return the local copy of the file at an address, downloaded if it is not there.

        Args:
            address: of the file.
            sha256: of its content.
            size: its bytes, where known.
            limit: its bytes at most, where ``size`` is not known.
            cancelled: ends the wait for a server when it is set.

        Raises:
            FetchError: not there, or its content is another.
            InputError: the server refuses, or the cache folder cannot be used or is too small.
            UnreachableError: the server was away for longer than it is waited for.
            CancelledDownloadError: ``cancelled`` was set.
            PortraitDistError: the disk is full.
        """
        path = self.folder / _file_name(sha256, address)
        with self.explained():
            if not self._has(path, sha256, size):
                self._download(path, address, sha256, size, limit, cancelled)
        return path

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Prepare the folder, and say what is wrong with it where something fails in the block.

        Raises:
            InputError: the folder cannot be used.
            PortraitDistError: the disk is full.
        """
        try:
            self._prepare_folder()
            yield
        except LocalDiskError as error:
            raise self._unusable(error.error) from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # the reader closes shards and asks again
            raise self._unusable(error) from error

    def _download(
        self,
        path: Path,
        address: str,
        sha256: str,
        size: int | None,
        limit: int,
        cancelled: threading.Event | None,
    ) -> None:
        """Download a file, unless another process or thread does it first."""
        if size is not None and size > self.limit:
            raise InputError(
                f"{self.folder}: the cache of {self.limit / 1e9:g} GB is smaller than one shard of "
                f"{size / 1e9:.3g} GB; raise data.cache_gigabytes"
            )
        part = self.folder / _Part(sha256, size or 0).name
        with _claimed(part, cancelled):
            if self._has(path, sha256, size):
                # The one before has renamed the part; this is a new, empty one.
                part.unlink(missing_ok=True)
                return
            self._make_room(size or 0, part)
            download(
                address,
                part,
                sha256,
                size=size,
                limit=limit,
                options=self.downloads,
                cancelled=cancelled,
            )
            part.replace(path)
            self._mark_checked(path)

    def discard(self, sha256: str) -> None:
        """Remove a file."""
        if not is_sha256(sha256):
            raise ValueError(f"{sha256!r} is not a sha256")
        for suffix in SUFFIXES:
            self._remove(self.folder / f"{sha256}{suffix}")

    def _unusable(self, error: OSError) -> PortraitDistError:
        if error.errno in FULL:
            return PortraitDistError(
                f"{self.folder}: the disk of the cache is full; free some space and run again, "
                "or give another folder as data.cache_dir"
            )
        reason = error.strerror or error
        if error.errno == errno.ELOOP:
            reason = f"{error.filename} is a link"
        return InputError(
            f"{self.folder}: the cache cannot be written ({reason}); "
            "give a local folder with room as data.cache_dir"
        )

    def _prepare_folder(self) -> None:
        """Make the folder, and see that nobody else can put files into it.

        Raises:
            InputError: somebody else can.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = self.folder.stat()
        problem = (
            "belongs to another user"
            if found.st_uid != os.geteuid()
            else "can be written by other users"
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            else ""
        )
        if problem:
            raise InputError(
                f"{self.folder}: {problem}, so its files cannot be trusted; give a folder of yours "
                f"as data.cache_dir (or 'chmod go-w' this one)"
            )

    def _has(self, path: Path, sha256: str, size: int | None) -> bool:
        """Whether a file is there with the right content; if so it counts as used now."""
        try:
            descriptor = open_regular(path)
        except FileNotFoundError:
            return False
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            state = _state(found)
            if size is not None and found.st_size != size:
                return False
            if state not in (self._checked.get(path.name), _read_marker(path)):
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return False
                self._mark_checked(path)
        self._checked[path.name] = state
        with contextlib.suppress(FileNotFoundError):
            os.utime(_marker(path))
        return True

    def _mark_checked(self, path: Path) -> None:
        """Remember, for this process and all others, that a file's content has been checked."""
        state = _state(path.stat())
        self._checked[path.name] = state
        with contextlib.suppress(PortraitDistError):  # without a marker it is checked again
            write_text(_marker(path), state)

    def _make_room(self, size: int, part: Path) -> None:
        """Evict files until there is room for ``size`` bytes, which ``part`` stands for."""
        with locked(self.folder / ".lock"):
            entries = [entry for entry in _entries(self.folder) if entry.path != part]
            total = sum(entry.bytes for entry in entries)
            for entry in sorted(entries):
                if total + size <= self.limit:
                    break
                if not entry.partial:
                    self._remove(entry.path)
                elif not _remove_abandoned(entry.path):
                    continue
                total -= entry.bytes

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        _marker(path).unlink(missing_ok=True)
        self._checked.pop(path.name, None)


SUFFIXES = (".tar", ".index")


@dataclass(frozen=True)
class _Part:
    """Name of a partial download. It holds the final size, so that every process can reserve it."""

    sha256: str
    size: int

    @property
    def name(self) -> str:
        return f".{self.sha256}.{self.size}.part"

    @classmethod
    def of(cls, name: str) -> _Part | None:
        """Parse a file's name; None for any other file."""
        match = re.fullmatch(r"\.([0-9a-f]{64})\.([0-9]{1,20})\.part", name)
        return cls(match[1], int(match[2])) if match else None


@dataclass(frozen=True, order=True)
class _Entry:
    """A file that counts towards the limit; the least recently used one sorts first."""

    used_ns: int
    path: Path
    bytes: int = field(compare=False)
    partial: bool = field(compare=False)


def _entries(folder: Path) -> Iterator[_Entry]:
    """Files of the cache. Others in the folder are neither counted nor removed."""
    for item in os.scandir(folder):
        part, path = _Part.of(item.name), Path(item.path)
        if not part and not (path.suffix in SUFFIXES and is_sha256(path.stem)):
            continue
        with contextlib.suppress(FileNotFoundError):
            found = item.stat(follow_symlinks=False)
            used = found.st_mtime_ns
            with contextlib.suppress(FileNotFoundError):
                used = max(used, _marker(path).lstat().st_mtime_ns)
            length = max(found.st_size, part.size) if part else found.st_size
            yield _Entry(used, path, length, part is not None)


def _file_name(sha256: str, address: str) -> str:
    """Name in the cache; no unchecked part of an address or manifest gets into it."""
    suffix = PurePosixPath(urlsplit(address).path).suffix
    if not is_sha256(sha256) or suffix not in SUFFIXES:
        raise ValueError(f"{redact(address)} with the hash {sha256!r} is no file of a shard")
    return sha256 + suffix


def _marker(path: Path) -> Path:
    """File that holds the state in which ``path`` was checked; its time says when it was used.

    The time of ``path`` itself stays, because a change of it says that the content may be another.
    """
    return path.with_name(f".{path.name}.checked")


def _read_marker(path: Path) -> str:
    try:
        with open(open_regular(_marker(path)), encoding="ascii", errors="replace") as file:
            return file.read(200)
    except OSError:
        return ""


def _state(found: os.stat_result) -> str:
    """Return what changes whenever the content does: file, owner, size and times."""
    return (
        f"{found.st_dev} {found.st_ino} {found.st_uid} {found.st_size} "
        f"{found.st_mtime_ns} {found.st_ctime_ns}"
    )


def _remove_abandoned(part: Path) -> bool:
    """Remove a partial download that nobody is at; the kernel releases a killed process's lock."""
    try:
        with locked(part, fcntl.LOCK_NB) as file:
            # As in _claimed: the name may lead to the part of a process that began since.
            if abandoned := _is_at(part, file):
                part.unlink(missing_ok=True)
            return abandoned
    except BlockingIOError:
        return False


@contextlib.contextmanager
def _claimed(part: Path, cancelled: threading.Event | None) -> Iterator[None]:
    """Let one thread of this machine at a time download a file.

    The lock is on the part itself: a lock that several files shared would let a download that is
    due wait for one whose server is away. The holder before may have renamed or removed what was
    locked here, so the name must still lead to it.

    Raises:
        CancelledDownloadError: ``cancelled`` was set.
    """
    while True:
        with locked(part, cancelled=cancelled) as file:
            if _is_at(part, file):
                yield
                return


def _is_at(path: Path, file: io.FileIO) -> bool:
    """Whether a path leads to an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(
    path: Path, flags: int = 0, cancelled: threading.Event | None = None
) -> Iterator[io.FileIO]:
    """Let in one thread of this machine at a time; the kernel releases a dead process's lock.

    Yields the locked file.

    Args:
        path: lock file, made if need be.
        flags: ``LOCK_NB`` to fail where another one is in.
        cancelled: ends the wait when it is set.

    Raises:
        BlockingIOError: with ``LOCK_NB``, where another one is in.
        CancelledDownloadError: ``cancelled`` was set.
    """
    with open_part(path) as file:
        if cancelled is None:
            fcntl.flock(file, fcntl.LOCK_EX | flags)
        else:
            while not _try_lock(file):  # flock itself cannot be cancelled
                if cancelled.wait(LOCK_POLL_SECONDS):
                    raise CancelledDownloadError
        yield file


def _try_lock(file: io.FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def default_folder() -> Path:
    """Return ``portrait-dist/shards`` in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "portrait-dist" / "shards"


TARS_ARE_LOCAL = (
    "WebDataset tars of others are read from a disk: download them, and give that folder"
)
_NAMES_TARS = re.compile(r"\.tar(?:$|[?#])|#(?:image|mask)=")
"""An address of one tar or of a pattern of them, or with names of members."""


def fetch_manifest(location: str, options: DownloadOptions | None = None) -> bytes:
    """Download ``manifest.json`` from a folder that is an address; it is not kept.

    Raises:
        InputError: there is none, or the server refuses.
        UnreachableError: the server was away for longer than it is waited for.
    """
    address = join(location, MANIFEST)
    if _NAMES_TARS.search(location):
        raise InputError(f"{redact(location)}: names no packed shards; {TARS_ARE_LOCAL}")
    try:
        return read_bytes(address, MANIFEST_LIMIT, options or DownloadOptions())
    except FetchError as error:
        raise InputError(
            f"{redact(address)}: {error}; "
            f"give the address of a folder that 'portrait-dist pack' wrote ({TARS_ARE_LOCAL})"
        ) from error
