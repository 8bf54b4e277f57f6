"""How glibc's malloc treats freed memory, on which the speed of large arrays on a CPU depends."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""


def keep_freed_memory() -> None:
    """Keep freed memory for the next arrays, for the rest of this process.

    By default glibc returns large blocks to the system at once, and the system hands them out again
        page by page, zeroed: at
    256×256 pixels a third of the time of a training step on a CPU. The process then keeps its peak
    of memory, and the gaps in it. Other C libraries are left as they are.
    """
    set_thresholds(trim=2**31 - 1, mmap=2**25)
    set_thresholds(trim=2**31 - 1, mmap=2**28)  # 256 MiB; older versions refuse it and stay at 32


def set_thresholds(trim: int, mmap: int) -> None:
    """Set M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes; do nothing without glibc.

    Args:
        trim: free bytes at the end of the heap above which they are returned to the system.
        mmap: size from which a block is mapped on its own, outside the heap.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(TRIM_THRESHOLD, trim)
        mallopt(MMAP_THRESHOLD, mmap)
