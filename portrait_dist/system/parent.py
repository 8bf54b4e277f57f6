"""The process that started this one, as it was when the package was first imported.

Imported by the command line before anything that takes seconds: a rank whose torchrun process is
killed while it imports torch would otherwise take the process that adopted it for its parent.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

SECONDS_BETWEEN_LOOKS = 0.5
_first = os.getppid()


def _remember() -> None:
    global _first
    _first = os.getppid()


os.register_at_fork(after_in_child=_remember)


def is_gone() -> bool:
    """Return whether the process that started this one has ended."""
    return os.getppid() != _first


@contextlib.contextmanager
def ending_with_it(what: str, *, if_true: bool = True) -> Iterator[None]:
    """End this process within a second, wherever it waits, when its parent ends in the block.

    For waits in native code that no Python signal handler interrupts, where there is nothing to
    save yet: a rank looks for the key-value store of a killed torchrun for ten minutes and more.

    Args:
        what: the parent, for the message.
        if_true: False does nothing.
    """
    if not if_true:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            if is_gone():
                line = f"portrait-dist: {what} has ended, so this process ends before its start\n"
                with contextlib.suppress(OSError):
                    os.write(2, line.encode())
                # Not sys.exit: this is a thread, and the main one hangs in native code.
                os._exit(1)

    watcher = threading.Thread(target=watch, name="parent-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
