"""Read picture files where they are: on a disk, or at an address that fsspec opens."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from portrait_dist.errors import DamagedDataError, InputError, UnreachableError, shorten
from portrait_dist.files import open_regular, read_regular
from portrait_dist.system.address import is_address, redact

T = TypeVar("T")

Location = Path | str
"""A path, or an address."""
LONGEST_SHOWN = 500
"""Characters of a location that a message repeats."""
ATTEMPTS = 4
FIRST_PAUSE = 0.5
"""Seconds before the second attempt at an address; each further pause is four times as long."""


def to_location(text: str) -> Location:
    """Return an address as it is, anything else as a path."""
    return text if is_address(text) else Path(text)


def suffix_of(location: Location) -> str:
    """Return the ending of a file's name with its dot, in lower case."""
    name = str(location).rpartition("/")[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def shown(location: Location) -> str:
    """Return a location for messages, without secrets and not too long for a line."""
    text = redact(location) if isinstance(location, str) else str(location)
    return text if len(text) <= LONGEST_SHOWN else shorten(text)


def read_bytes(location: Location, limit: int) -> bytes:
    """Read a whole file of at most ``limit`` bytes.

    Raises:
        OSError: a local file cannot be read, or is longer; see ``read_regular``.
        InputError: it is no file's address.
        DamagedDataError: there is nothing at the address, or something longer.
        UnreachableError: the address does not answer.
    """
    if isinstance(location, Path):
        return read_regular(location, limit)
    with open_binary(location) as file:
        data = _attempt(location, lambda: file.read(limit + 1))
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"is longer than {limit:,} bytes", shown(location))
    return bytes(data)


def open_binary(location: Location) -> IO[bytes]:
    """Open a file for reading; its end can be read without the rest.

    Raises:
        OSError, DamagedDataError, UnreachableError: as :func:`read_bytes`.
    """
    if isinstance(location, Path):
        return open(open_regular(location), "rb")
    system, path = file_system(location)
    opened: IO[bytes] = _attempt(location, lambda: system.open(path, "rb"))
    return opened


def file_system(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it.

    Raises:
        InputError: its package is not installed here, or the address is none.
    """
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(address)
    except Exception as error:  # the constructors of fsspec's file systems raise kinds of their own
        raise InputError(
            f"{redact(address)}: cannot be opened here ({reason_of(error)}); "
            "install what it names, or give a folder"
        ) from error
    return system, path


def reason_of(error: Exception) -> str:
    """Return an error's message in one line, without the secrets of addresses that it holds."""
    # Cut last: half an address would not be known as one.
    return redact(" ".join(str(error).split()))[:200]


def size_of(location: Location) -> tuple[int, int]:
    """Return bytes and time of change in ns since the epoch; 0 where an address does not say it.

    Raises:
        OSError, DamagedDataError, UnreachableError: as :func:`read_bytes`.
    """
    if isinstance(location, Path):
        status = location.stat()
        return status.st_size, status.st_mtime_ns
    system, path = file_system(location)
    return int(_attempt(location, lambda: system.info(path)).get("size") or 0), 0


def _attempt(address: str, action: Callable[[], T]) -> T:
    """Call again what an address refuses, with pauses, for a server that is restarted."""
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FileNotFoundError as error:
            raise DamagedDataError(
                f"{redact(address)}: there is no such file; prepare the data again"
            ) from error
        except ValueError as error:  # such as s3:// without a name, which stays so
            raise InputError(
                f"{redact(address)}: is no file's address ({reason_of(error)}); correct it"
            ) from error
        except Exception as error:  # fsspec's file systems raise kinds of their own
            if attempt == ATTEMPTS:
                raise UnreachableError(
                    f"{redact(address)}: cannot be read ({type(error).__name__}: "
                    f"{reason_of(error)}); run again when it answers"
                ) from error
        time.sleep(pause)
        pause *= 4
    raise AssertionError
