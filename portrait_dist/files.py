"""Files and folders: the only atomic writer, exclusive lock and claim of an output folder.

Every file that the package writes appears under its name whole or not at all, and every failure to
write becomes one line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import re
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from portrait_dist.errors import InputError, PortraitDistError

log = logging.getLogger("portrait_dist.files")

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}-[0-9]+-[0-9]+(\.[a-z0-9]+)?|\..*\.(tmp|part)")
"""Names of temporary files: of this module, and what releases before 0.2 left behind."""

FULL = (errno.ENOSPC, errno.EDQUOT)
HELD = (errno.EAGAIN, errno.EACCES)
"""What lockf and flock set where somebody else holds the lock."""
SECONDS_BETWEEN_TRIES = 0.5
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""Another file system, one without links, a file of another user, too many links."""
LEASE = 900.0
"""Seconds after which a temporary file of another host that does not grow is abandoned."""
_numbers = itertools.count()


def temporary_path(path: Path, suffix: str = "") -> Path:
    """Return an unused name in the folder of ``path``.

    Its length does not depend on the name of ``path``, so that it fits every file system's limit
    (255 bytes), and it names host and process, so that two processes never share one.

    Args:
        path: the file to be written.
        suffix: ending for writers that choose a format by it, such as ``.onnx``.
    """
    host = zlib.crc32(socket.gethostname().encode())
    return path.with_name(f".tmp-{host:08x}-{os.getpid()}-{next(_numbers)}{suffix}")


@contextlib.contextmanager
def atomic_path(path: str | Path, *, durable: bool = False, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path in the same folder and rename it to ``path`` at the end of the block.

    On an error the temporary file is removed, the old file stays, and the error is the block's own.

    Args:
        path: the file that appears.
        durable: flush the file and its folder to the disk before and after the rename.
        suffix: ending of the temporary name.

    Raises:
        InputError: the folder is missing, is no folder, or may not be written (exit code 2).
        PortraitDistError: the disk is full or failed (exit code 1).
    """
    path = Path(path)
    temporary = temporary_path(path, suffix)
    try:
        # Here the block fails and the rename: both mean that the file was not written.
        with explained(path):
            yield temporary
            if durable:
                # Content before name: after a crash of the machine the new name must not lead to an
                # empty file.
                _flush(temporary)
            os.replace(temporary, path)
            if durable:
                # The rename itself is an entry of the folder; without this a crash may undo it.
                _flush(path.parent)
    finally:
        # The reason of a failure is the first error, not the clean-up's.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_open(path: str | Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a binary file that appears when the block ends; see :func:`atomic_path`."""
    with atomic_path(path, durable=durable) as temporary, open(temporary, "wb") as file:
        yield file


def link(source: str | Path, path: str | Path, *, durable: bool = False) -> None:
    """Give a file a second name, whole or not at all; a copy where the file system has no links.

    For files that are only ever replaced: a change in place would change both.

    Raises:
        InputError, PortraitDistError: see :func:`atomic_path`.
    """
    with atomic_path(path, durable=durable) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_bytes(path: str | Path, data: bytes | memoryview, *, durable: bool = False) -> None:
    """Write a file whole or not at all; see :func:`atomic_path` for the errors."""
    with atomic_open(path, durable=durable) as file:
        file.write(data)


def write_text(path: str | Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 text file whole or not at all; see :func:`atomic_path` for the errors."""
    write_bytes(path, text.encode(), durable=durable)


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` about writing ``path`` into one line with the right exit code.

    Raises:
        InputError: wrong path or no permission.
        PortraitDistError: full disk, failed disk.
    """
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: str | Path, error: OSError) -> PortraitDistError:
    """Make the exception that says why ``path`` was not written and what to do."""
    if error.errno in FULL:
        return PortraitDistError(
            f"{path}: not written, the disk is full; free some space and run again"
        )
    parent = Path(path).parent
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not parent.is_dir():
        return InputError(f"{path}: there is no folder {parent}; make it, or give another path")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"{path}: cannot be written ({error.strerror}); give a folder of yours")
    if error.errno in (
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EINVAL,
        errno.ELOOP,
        errno.EEXIST,  # where a folder should be: a link to nowhere
    ):
        return InputError(f"{path}: cannot be written ({error.strerror}); give another path")
    return PortraitDistError(
        f"{path}: cannot be written ({error.strerror or error}); see the disk, then run again"
    )


def check_writable(path: str | Path) -> None:
    """Check before long work that a file can be written, by making and removing one beside it.

    Raises:
        InputError: the folder is missing, is no folder, or may not be written; or ``path`` is a
            folder.
        PortraitDistError: the disk is full or failed.
    """
    path = Path(path)
    with explained(path):
        folder = path.is_dir()
    if folder:
        raise InputError(f"{path}: is a folder; give the path of a file")
    with explained(path):
        temporary = temporary_path(path)
        temporary.touch()
        temporary.unlink()


def check_folder_writable(folder: str | Path) -> None:
    """Check before long work that files can be written into a folder, which may not exist yet.

    Nothing is made: the nearest folder above that exists is tried.

    Raises:
        InputError: ``folder`` or one above it is a file, or may not be written.
        PortraitDistError: the disk is full or failed.
    """
    folder = Path(folder)
    with explained(folder):
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        above = "" if nearest == folder else f"{nearest} "
        raise InputError(f"{folder}: {above}is a file; give the path of a folder")
    with explained(folder):
        temporary = temporary_path(nearest / "any")
        temporary.touch()
        temporary.unlink()


def create_text(path: str | Path, text: str) -> bool:
    """Write a UTF-8 text file whole, unless there is one.

    Of several processes that try at once, on any number of nodes, one makes the file: a link fails
    where the name is taken. A file system without links has no such promise.

    Returns:
        Whether this call made the file.

    Raises:
        InputError: see :func:`atomic_path`.
        PortraitDistError: likewise.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with explained(path):
            temporary.write_text(text, encoding="utf-8")
            _flush(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                # Not atomic, and the best that is left: see the docstring.
                if path.exists():
                    return False
                os.replace(temporary, path)
            return True
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_abandoned_files(folder: Path) -> None:
    """Remove the temporary files of killed processes, and nothing that one still writes.

    For folders that several machines write, also where the file system has no locks: a file of this
    host goes if its process is gone, one of another host if it was not written for ``LEASE``
    seconds by the file system's clock.
    """
    clock = temporary_path(folder / "any")
    with explained(clock):
        # Not this host's clock: the file server's may be minutes off, and its times are compared.
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink()
    ours = clock.name.split("-")[1]
    for path in folder.iterdir():
        if not TEMPORARY.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            named = re.match(r"\.tmp-([0-9a-f]{8})-([0-9]+)-", path.name)
            if named and named[1] == ours:
                abandoned = not _is_alive(int(named[2]))
            elif named:
                abandoned = now - path.stat().st_mtime > LEASE
            else:  # of a release before 0.2, which locked the folder
                abandoned = True
            if abandoned:
                path.unlink()


def _is_alive(process: int) -> bool:
    try:
        # Signal 0 only asks whether there is such a process.
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of killed processes; only for the holder of the folder's lock."""
    for leftover in folder.iterdir():
        if TEMPORARY.fullmatch(leftover.name):
            with contextlib.suppress(OSError):
                leftover.unlink()


def open_regular(path: str | Path) -> int:
    """Open an existing regular file for reading and return its descriptor.

    A FIFO, device, socket or folder is refused at once, where a plain ``open`` would hang or
    read without end.

    Raises:
        OSError: the file is missing or cannot be opened; ``EINVAL`` with "is not a regular file"
            for anything else.
    """
    # Looked at when it is open, not before: a name can be exchanged between a stat and an open.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "is not a regular file", str(path))


def read_regular(path: str | Path, limit: int) -> bytes:
    """Read a whole regular file of at most ``limit`` bytes; see :func:`open_regular`.

    Raises:
        OSError: it cannot be read, or is none; ``EFBIG`` where it is longer.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"is longer than {limit:,} bytes", str(path))
    return data


def json_objects(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file with one a line.

    Other lines are skipped: a kill or a full disk may have cut one short.
    """
    for line in data.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SECONDS_FOR_A_DEAD_NODE = 120.0
"""NFSv4 keeps the lock of a node that died for its lease, 90 s by default."""


class ExclusiveLock:
    """An advisory lock; the kernel releases it when the process exits, however it exits.

    A folder is locked by ``flock`` and gets no file; a path that is no folder is opened, locked by
    ``lockf`` (which NFS carries to other nodes) and holds who has it. Where the file system has no
    locks a warning says so and the work continues.

    Args:
        path: an existing folder, or a lock file to open or make.
        held: makes the error for the user out of who holds the lock.
        note: stands in the lock file behind the process and its host.
        wait: seconds to try before giving up, from who holds the lock.
        folder: the path must be a folder; no lock file is made where it has just gone.

    Raises:
        InputError: somebody else holds it, or there is no such folder.
        PortraitDistError: the lock file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        held: Callable[[str], str],
        *,
        note: str = "",
        wait: Callable[[str], float] = lambda holder: 0.0,
        folder: bool = False,
    ) -> None:
        self.path = path
        self._folder = folder or path.is_dir()
        # lockf wants a descriptor that may write; O_NOFOLLOW keeps a link from leading it
        # elsewhere.
        flags = os.O_RDONLY if self._folder else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with explained(path):
            self._descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        begin = time.monotonic()
        while not self._try():
            holder = self._holder()
            if time.monotonic() - begin >= wait(holder):
                # Closed before the error: what is raised may be kept, and the descriptor with it.
                self.release()
                raise InputError(held(holder or "another process"))
            time.sleep(SECONDS_BETWEEN_TRIES)
        if not self._folder:
            text = f"process {os.getpid()} on {socket.gethostname()}{note}"
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, text.encode(), 0)

    def _try(self) -> bool:
        """Take the lock; False where somebody else holds it."""
        operation = fcntl.flock if self._folder else fcntl.lockf
        try:
            operation(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                return False
            # ENOSYS (Lustre without -o flock), ENOLCK (NFS without lockd), EOPNOTSUPP
            log.warning(
                "%s: this file system has no locks (%s); see that no other process writes here",
                self.path,
                error,
            )
        return True

    def _holder(self) -> str:
        """Who holds the lock, as it says itself."""
        if self._folder:
            return ""
        with contextlib.suppress(OSError):
            return os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
        return ""

    def release(self) -> None:
        """Let another process write."""
        if self._descriptor >= 0:
            # Closing releases the lock; an unlocked file that still exists is what the next one
            # takes.
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ExclusiveLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_holder(path: Path) -> str | None:
    """Return who holds a lock file of :class:`ExclusiveLock`, without a wait.

    Not for a file that this process has locked: closing it again would release that lock.

    Returns:
        None where nobody holds it, where there is no such file, or where the file system has no
        locks.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "a process"
    finally:
        os.close(descriptor)
    return None


def lock_output(folder: Path, command: str, out: Path) -> ExclusiveLock:
    """Lock a folder that a command writes; a context manager.

    Args:
        folder: an existing folder.
        command: what else is writing, for the message.
        out: where, for the message.

    Raises:
        InputError: another process holds the lock.
    """
    return ExclusiveLock(
        folder,
        lambda _: (
            f"{out}: another 'portrait-dist {command}' is writing there; "
            "wait for it, or give another --out"
        ),
        folder=True,
    )


def read_marker(out: Path, name: str, command: str) -> dict[str, Any] | None:
    """Read what an output folder is for.

    Args:
        out: the output folder.
        name: the marker's file name, such as ``.pack.json``.
        command: whose marker it is, for the message.

    Returns:
        The marker's object; None where the folder is new or empty.

    Raises:
        InputError: ``out`` is a file, holds something without a marker, or a marker that is none.
    """
    with explained(out):
        is_folder, exists = out.is_dir(), out.exists()
    if exists and not is_folder:
        raise InputError(f"{out}: is a file; give a folder as --out")
    marker = out / name
    if marker.is_file():
        try:
            found = json.loads(marker.read_bytes())
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise InputError(
                f"{marker}: not written by 'portrait-dist {command}'; give another --out"
            )
        return found
    # Another process that looks whether it may write here makes a temporary file for a moment.
    if out.is_dir() and not all(TEMPORARY.fullmatch(path.name) for path in out.iterdir()):
        raise InputError(f"{out}: already holds something else; give a new folder as --out")
    return None


def claim_folder(out: Path, name: str, content: Mapping[str, Any]) -> None:
    """Make an output folder and write into it what it is for; see :func:`read_marker`.

    What a process left that was killed while it did the same goes.

    Raises:
        InputError: the folder cannot be made or written.
        PortraitDistError: the disk is full.
    """
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    remove_abandoned_files(out)
    write_text(out / name, json.dumps(content))
