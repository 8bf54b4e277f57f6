"""One writer for a folder: a second command on the same folder is told so, and disturbs nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from portrait_dist.errors import InputError


@contextlib.contextmanager
def sole_writer(folder: Path, command: str, out: Path) -> Iterator[None]:
    """Hold a lock on an existing folder; it goes with the process, however that ends.

    Args:
        folder: to lock.
        command, out: for the message: what else is writing, and where.

    Raises:
        InputError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out}: another 'portrait-dist {command}' is writing there; wait for it, or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
