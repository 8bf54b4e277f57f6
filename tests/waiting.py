"""Wait for an event instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T], timeout: float = 120, what: str = "", pause: float = 0.02
) -> T:
    """Call a condition until it is true and return its value.

    Args:
        condition: called again and again; exceptions pass through.
        timeout: seconds after which the test fails.
        what: what is waited for, for the message.
        pause: seconds between two calls.
    """
    deadline = time.monotonic() + timeout
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or condition}")
        time.sleep(pause)
