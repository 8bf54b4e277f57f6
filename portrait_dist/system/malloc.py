"""How glibc's malloc treats freed memory, on which the speed of large arrays on a CPU depends."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""


def keep_freed_memory() -> None:
    """Keep freed memory for the next arrays, for the rest of this process.

    By default glibc gives large blocks back to the system at once, and the system hands them out anew page by page, emptied:
    at 256×256 pixels a third of the time of a training step on a CPU. What is kept is what was in use at one time, and what
    lies between it. Other C libraries are left as they are.
    """
    set_thresholds(trim=2**31 - 1, mmap=2**25)
    set_thresholds(trim=2**31 - 1, mmap=2**28)  # 256 MiB; older versions refuse it and stay at 32


def set_thresholds(trim: int, mmap: int) -> None:
    """Free bytes at the end of the heap above which they are given back, and the size from which a block is not of the heap."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(TRIM_THRESHOLD, trim)
        mallopt(MMAP_THRESHOLD, mmap)
