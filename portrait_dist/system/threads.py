"""Work on threads whose results come in order."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def switch_off_opencv_threads() -> None:
    """Keep OpenCV from starting threads of its own in this process, whose threads call it.

    Each call on a large image would else run on all cores, in every one of our threads and in every
    rank of a node.
    """
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)


def submit_in_order(
    pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], limit: int
) -> Generator[tuple[A, Future[B]], None, None]:
    """Call a function for each item on a pool; yield item and future in order.

    At most ``limit`` calls are running or waiting, so memory does not grow with the number of
    items.
    """
    waiting: deque[tuple[A, Future[B]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > limit:
            yield waiting.popleft()
    yield from waiting


def map_in_order(
    function: Callable[[A], B], items: Iterable[A], workers: int
) -> Generator[B, None, None]:
    """Map a function over items on threads of its own; yield results in order.

    At most four results a thread are waiting. Close the generator to cancel what has not begun.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="map-in-order")
    try:
        for _, future in submit_in_order(pool, function, items, limit=4 * workers - 1):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
