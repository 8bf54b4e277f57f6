"""Progress of long work on stderr, on rank 0 only.

A bar on a terminal, a line every ten seconds elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def track(things: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield what ``things`` yields and show how far it is.

    Args:
        things: anything that can be iterated, in a ``for`` loop.
        total: how many they are.
        what: what they are, in the plural: ``pairs``.
    """
    from portrait_dist.distributed import rank

    if rank() != 0:
        yield from things
    elif sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(things, total=total, unit=f" {what}", file=sys.stderr, leave=False)
    else:
        yield from _lines(things, total, what)


def _lines(things: Iterable[T], total: int, what: str) -> Iterator[T]:
    begin = shown = time.monotonic()
    for done, thing in enumerate(things, start=1):
        yield thing
        now = time.monotonic()
        if now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            print(
                f"{done} of {total} {what}, {done / (now - begin):.1f} {what}/s",
                file=sys.stderr,
                flush=True,
            )
