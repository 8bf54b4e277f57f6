"""Stop without loss: signals set a flag, and all ranks agree on the step at which they act on it.

SIGTERM, SIGINT and SIGUSR2 (which SLURM sends before a time limit) ask for a stop. The handler only
records the signal. Every k steps the ranks exchange one small number over a gloo group of its own
and read the result k steps later, so that nobody waits for the exchange, and every rank reads the
same number at the same step.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch

from portrait_dist import distributed
from portrait_dist.system import parent

T = TypeVar("T")

NOTHING, SAVE, STOP, FAIL = range(4)
"""What a rank requests; the highest request of any rank wins."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1
MOST_STEPS_BETWEEN_EXCHANGES = 64
"""With steps of 10 ms a stop is agreed within 64 to 128 steps, about a second."""


class StopSignals:
    """Record stop signals instead of terminating; a context manager.

    A rank of torchrun also asks the kernel for SIGTERM when its torchrun process dies: without it a
    rank whose agent was killed would train on alone, holding its GPU and the run's lock.
    """

    def __init__(self) -> None:
        self._first = ""
        self._before: dict[signal.Signals, Any] = {}
        self._has_agent = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._record) for number in SIGNALS}
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._has_agent = True
            _request_signal_at_parents_death(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_agent:
            _request_signal_at_parents_death(None)
            self._has_agent = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def received(self) -> str:
        """The first signal's name (``SIGTERM``) or another reason to stop; else an empty string."""
        if not self._orphaned():
            return self._first
        # Looked at here and not in the handler: the kernel sends the signal when the agent's main
        # thread ends, and until its last thread has ended it is still the parent.
        if self._first in ("", "SIGTERM"):
            return "the end of its torchrun process"
        return self._first

    def _record(self, number: int, frame: FrameType | None) -> None:
        # The first one says why; what follows it (torchrun sends TERM after any of them) does not.
        if not self._first:
            self._first = signal.Signals(number).name

    def _orphaned(self) -> bool:
        return self._has_agent and parent.is_gone()


def _request_signal_at_parents_death(number: signal.Signals | None) -> None:
    """Set PR_SET_PDEATHSIG of this process, or clear it with None. Linux only."""
    if sys.platform == "linux":
        # Python has no wrapper for prctl.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number or 0), 0, 0, 0)


def exchange_interval(world_size: int, steps: int) -> int:
    """Return the number of steps between two exchanges.

    Gloo sends the number around a ring of 2 (N - 1) hops of 50 to 100 µs each: 1 ms for 8 ranks, 50
    to 100 ms for 512, longer than a step. N / 8 steps later the result has arrived at any size.

    Args:
        world_size: number of ranks.
        steps: optimiser steps that the epoch still has.
    """
    return max(1, min(world_size // 8, MOST_STEPS_BETWEEN_EXCHANGES, steps))


class Agreement:
    """What all ranks do between two steps: the highest request of any rank, some steps later.

    One rank alone needs no exchange and acts at once.

    Args:
        timeout_seconds: a rank that does not answer for so long ends the run.
    """

    def __init__(self, timeout_seconds: float = 600.0) -> None:
        self.group: Any = None
        self.interval = 1
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._request = NOTHING
        self._calls = 0
        self._ignore_save = False
        if distributed.is_initialized() and distributed.world_size() > 1:
            import torch.distributed as dist

            timeout = timedelta(seconds=timeout_seconds)
            # Of its own: on NCCL the number would queue behind the gradients, and reading it would
            # wait for the device.
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    def start_epoch(self, steps: int) -> None:
        """Begin an epoch, or the rest of one, that has so many steps on every rank."""
        self.interval = exchange_interval(distributed.world_size(), steps)
        self._calls = 0

    def exchange(self, request: int) -> int:
        """Submit this rank's request; return the highest request of any rank an interval ago.

        Every rank must call it equally often.
        """
        if self.group is None:
            return request
        self._request = max(self._request, request)
        self._calls += 1
        if (self._calls - 1) % self.interval:
            return NOTHING
        agreed = self.finish()
        self.submit()
        # A rank that waits for a save keeps requesting it until it happens. What was submitted
        # just now was requested before the save that follows, and must not lead to a second one.
        self._ignore_save = agreed == SAVE
        return agreed

    def any_rank(self, request: bool) -> bool:
        """Return whether any rank requests something now. A collective, which waits for all."""
        if self.group is None:
            return request
        import torch.distributed as dist

        tensor = torch.tensor([int(request)], dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return bool(tensor)

    def submit(self) -> None:
        """Start an exchange of the requests since the last one, for ``finish``."""
        import torch.distributed as dist

        tensor = torch.tensor([self._request], dtype=torch.int32)
        # Taken over by this exchange; a STOP is asked again at the next step, for its signal stays.
        self._request = NOTHING
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        self._pending = (work, tensor)

    def finish(self) -> int:
        """Return the outcome of the last exchange, if one is open."""
        if self._pending is None:
            return NOTHING
        work, tensor = self._pending
        self._pending = None
        work.wait()
        agreed, ignored = int(tensor), self._ignore_save
        self._ignore_save = False
        return NOTHING if agreed == SAVE and ignored else agreed


class StopNotice:
    """A stop announced to all ranks where they take different numbers of steps, as in validation.

    It travels through the job's key-value store, asked at most every ``every_seconds``.
    """

    KEY = "portrait_dist/stop"

    def __init__(self, every_seconds: float = 0.5) -> None:
        self.every_seconds = every_seconds
        self._last = 0.0
        self._announced = False

    def raised(self, request: bool) -> bool:
        """Return whether any rank asked for a stop. ``request``: does this one?"""
        if not distributed.is_initialized() or distributed.world_size() == 1:
            return request
        # Written once; the key stays, for every rank to find whenever it looks.
        if request and not self._announced:
            self._announced = True
            _asked(lambda store: store.set(self.KEY, "1"))
        if request or time.monotonic() - self._last < self.every_seconds:
            return request
        self._last = time.monotonic()
        return bool(_asked(lambda store: store.check([self.KEY])))


def _asked(question: Callable[[Any], T]) -> T | bool:
    """Ask the job's store; True where it is gone with the torchrun process that kept it."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return question(_get_default_store())
    except RuntimeError:
        return True
