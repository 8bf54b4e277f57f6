"""Processes that kill themselves at a file operation, started fast."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

FILE_OPERATIONS = ("open", "os.link", "os.remove", "os.rename")
"""Names of Python's audit events."""
_preloaded = ["torch"]


def processes(module: str) -> ForkServerContext:
    """Return what starts processes that have torch and a test's module already.

    A part of tiny pairs is then packed in milliseconds.
    """
    context = multiprocessing.get_context("forkserver")
    # The one server of this process preloads what all files have asked for before it starts.
    _preloaded.append(module)
    context.set_forkserver_preload(_preloaded)
    return context
