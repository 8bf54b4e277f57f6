"""Fetches shards from an address into a bounded cache on the local disk, once per machine.

Addresses are http and https, and whatever fsspec opens: ``file://``, ``memory://``, ``s3://`` (with the extra ``s3``), ….

Files are kept under the sha256 that the manifest gives them. So what is in the cache is always what was asked for, whatever
happened to the address or the connection, and shards of several sets never collide.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from portrait_dist.data.shards.format import MANIFEST
from portrait_dist.errors import InputError

ATTEMPTS = 5
FIRST_DELAY = 0.5
"""Seconds before the second attempt; each further delay is twice as long. An attempt that got further starts the count anew."""
TIMEOUT = 60.0
CHUNK = 1 << 20
REFUSED = {400, 401, 403, 405, 451}
"""HTTP answers that stay the same."""

T = TypeVar("T")


class Stream(Protocol):
    """What is read from an address."""

    def read(self, size: int = -1, /) -> bytes: ...
    def close(self) -> None: ...


class FetchError(Exception):
    """A file could not be fetched, and trying again does not help. The message says what and why."""


class AbsentError(FetchError):
    """There is no such file."""


class Cache:
    """Files from addresses, in a folder of limited size that processes and threads share.

    When there is no room, the files that were not opened for longest go. One that a reader has open stays readable; its space
    is free when the reader is done with it (each reader of a split that exceeds the limit has at most eight open). A file that
    is being fetched has its whole size set aside, and never goes; only where all of these together exceed the limit, it is
    exceeded.

    Args:
        folder: made when it is first needed; by default ``portrait-dist/shards`` in the user's cache folder. On a local disk:
            each machine has its own.
        gigabytes: limit of the files' size together, 10^9 bytes.
    """

    def __init__(self, folder: str | Path | None = None, gigabytes: float = 50.0) -> None:
        self.folder = Path(folder) if folder else default_folder()
        self.limit = int(gigabytes * 1e9)

    def fetch(self, address: str, sha256: str, size: int | None = None) -> Path:
        """Local copy of the file at an address, fetched if it is not there.

        Args:
            sha256: of its content.
            size: its bytes, where known.

        Raises:
            FetchError: not there, cannot be reached after several attempts, or its content is another.
            InputError: the cache folder cannot be used, or is too small.
        """
        path = self.folder / f"{sha256}{PurePosixPath(urlsplit(address).path).suffix}"
        try:
            if self._has(path, size):
                return path
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / _lock_name(sha256)):
                if not self._has(path, size):
                    part = self.folder / f".{sha256}.{size or 0}.part"
                    self._make_room(size or 0, part)
                    _download(address, part, sha256, size)
                    part.replace(path)
            return path
        except OSError as error:
            raise InputError(
                f"{self.folder}: the cache cannot be written ({error.strerror}); give a local folder with room as data.cache_dir"
            ) from error

    def discard(self, sha256: str) -> None:
        """Forget a file."""
        for path in self.folder.glob(f"{sha256}.*"):
            path.unlink(missing_ok=True)

    def _has(self, path: Path, size: int | None) -> bool:
        """Is it there? Then it counts as used now."""
        try:
            if size is not None and path.stat().st_size != size:
                return False
            os.utime(path)
            return True
        except FileNotFoundError:
            return False

    def _make_room(self, size: int, part: Path) -> None:
        """Let files go until there is room for ``size`` bytes, and set it aside by an empty ``part``."""
        if size > self.limit:
            raise InputError(
                f"{self.folder}: the cache of {self.limit / 1e9:g} GB is smaller than one shard of {size / 1e9:.3g} GB; "
                "raise data.cache_gigabytes"
            )
        with _locked(self.folder / ".lock"):
            files = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.endswith((".tar", ".index", ".part")) and entry.name != part.name:
                        files.append((entry.stat().st_mtime_ns, _room_of(entry), Path(entry.path)))
            total = sum(length for _, length, _ in files)
            for _, length, path in sorted(files):
                if total + size <= self.limit:
                    break
                if not _is_being_fetched(path):
                    path.unlink(missing_ok=True)
                    total -= length
            part.touch()


def _room_of(entry: os.DirEntry[str]) -> int:
    """Bytes of a file in the cache; for one that is being fetched, those it will have, which stand in its name."""
    promised = entry.name.split(".")[-2]
    length = entry.stat().st_size
    return (
        max(length, int(promised))
        if entry.name.endswith(".part") and promised.isdecimal()
        else length
    )


def _is_being_fetched(path: Path) -> bool:
    """Is a living process at it? What a killed one left behind is locked by nobody."""
    if path.suffix != ".part":
        return False
    try:
        with _locked(path.with_name(_lock_name(path.name[1:])), fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True


def _lock_name(sha256: str) -> str:
    return f".lock-{sha256[:2]}"


def default_folder() -> Path:
    """``portrait-dist/shards`` in the user's cache folder."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        / "portrait-dist"
        / "shards"
    )


def join(location: str, name: str) -> str:
    """Address of a file in a folder that is an address; a query, such as a signature, stays at the end."""
    parts = urlsplit(location)
    if parts.scheme not in ("http", "https"):
        return f"{location.rstrip('/')}/{name}"
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def fetch_manifest(location: str) -> bytes:
    """Content of ``manifest.json`` at an address; it is not kept.

    Raises:
        InputError: there is none, or the address cannot be reached.
    """
    address = join(location, MANIFEST)

    def read() -> bytes:
        with _open(address, 0) as (stream, _):
            return stream.read()

    try:
        return _try_again(read, lambda: 0)
    except AbsentError as error:
        raise InputError(
            f"{address}: {error}; give the address of a folder that 'portrait-dist pack' wrote"
        ) from error
    except FetchError as error:
        raise InputError(f"{address}: {error}") from error


def _download(address: str, part: Path, sha256: str, size: int | None) -> None:
    """Bring a file to ``part``, going on where an earlier attempt, also of a killed process, was cut off.

    Raises:
        FetchError: see :meth:`Cache.fetch`.
    """
    _try_again(lambda: _copy(address, part, size), lambda: _length(part))
    if (
        _sha256(part) != sha256
    ):  # cut where nobody could see it, or a beginning of another file: once more, from the start
        part.unlink()
        _try_again(lambda: _copy(address, part, size), lambda: _length(part))
        found = _sha256(part)
        if found != sha256:
            length = _length(part)
            part.unlink()
            raise FetchError(
                f"the file there is not the one in the manifest ({length:,} bytes, sha256 {found[:12]}…)"
            )


def _copy(address: str, part: Path, size: int | None) -> None:
    with _open(address, _length(part)) as (stream, start), part.open("ab") as file:
        file.truncate(start)
        while chunk := stream.read(CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if size is not None and _length(part) < size:
        raise ConnectionError(f"cut off after {_length(part):,} of {size:,} bytes")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _try_again(attempt: Callable[[], T], reached: Callable[[], int]) -> T:
    """Call ``attempt`` until it works; give up after several failures in a row that got no further.

    Raises:
        FetchError: with the last failure. OSError: the local disk is full or cannot be written.
    """
    failures, furthest = 0, reached()
    while True:
        try:
            return attempt()
        except (FetchError, InputError):
            raise
        except Exception as error:  # fsspec's file systems raise their own kinds
            if isinstance(error, OSError) and error.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EROFS,
            ):
                raise
            failures = 1 if reached() > furthest else failures + 1
            furthest = max(furthest, reached())
            if failures >= ATTEMPTS:
                raise FetchError(
                    f"cannot be fetched, {failures} attempts failed ({_reason(error)})"
                ) from error
            time.sleep(FIRST_DELAY * 2 ** (failures - 1))


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"


@contextlib.contextmanager
def _open(address: str, start: int) -> Iterator[tuple[Stream, int]]:
    """A stream of a file from ``start``, or from where the server begins, and that place."""
    opened = (
        _open_http(address, start)
        if urlsplit(address).scheme in ("http", "https")
        else _open_fsspec(address, start)
    )
    stream, place = opened
    with contextlib.closing(stream):
        yield stream, place


def _open_http(address: str, start: int) -> tuple[Stream, int]:
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing behind our bytes: they are whole, or of another file
            return io.BytesIO(), start
        if error.code in (404, 410):
            raise AbsentError(f"is not there (HTTP {error.code})") from error
        if error.code in REFUSED:
            raise FetchError(f"the server refuses it (HTTP {error.code} {error.reason})") from error
        raise
    place = response.headers.get("Content-Range", "") if response.status == 206 else ""
    return response, start if place.startswith(f"bytes {start}-") else 0


def _open_fsspec(address: str, start: int) -> tuple[Stream, int]:
    import fsspec.core

    scheme = urlsplit(address).scheme
    try:
        system, path = fsspec.core.url_to_fs(address)
        stream = system.open(path, "rb")
    except (ImportError, ValueError) as error:
        hint = (
            "install the extra 's3': pip install 'portrait-dist[s3]'"
            if scheme == "s3"
            else "use http, https, s3 or a folder"
        )
        raise InputError(
            f"{address}: {scheme}:// cannot be opened here ({error}); {hint}"
        ) from error
    except FileNotFoundError as error:
        raise AbsentError("is not there") from error
    except PermissionError as error:
        raise FetchError("may not be read") from error
    stream.seek(start)
    return stream, start


@contextlib.contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    """Only one process and thread of this machine at a time; released by the system when the process dies.

    Raises:
        BlockingIOError: with ``LOCK_NB`` as flags, where another one is in.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield
