"""Stopping without loss: signals set a flag, and all ranks agree on the step at which they act on it.

SIGTERM, SIGINT and SIGUSR2 (which SLURM sends before a time limit) ask for a stop. The handler does nothing but note it.
At every step the ranks exchange one small number over a gloo group of its own, a step ahead: the sum of the wishes of
step k is read at step k + 1, so nobody waits for the exchange, and every rank reads the same number at the same step.
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch

from portrait_dist import distributed

NOTHING, SAVE, STOP = 0, 1, 2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignals:
    """Context manager that notes stop signals instead of dying of them.

    ``received`` is the name of the first one (``SIGTERM``), or an empty string.
    """

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = signal.Signals(number).name


class Agreement:
    """What all ranks do at a step boundary: the greatest wish of any rank, one step later.

    One rank alone needs no exchange and acts at once.
    """

    def __init__(self) -> None:
        self.group: Any = None
        self.pending: tuple[Any, torch.Tensor] | None = None
        if distributed.is_initialized() and distributed.world_size() > 1:
            import torch.distributed as dist

            self.group = dist.new_group(backend="gloo")

    def exchange(self, wish: int) -> int:
        """Give this rank's wish; get the greatest wish that the ranks gave at the step before.

        Every rank must call it equally often.
        """
        if self.group is None:
            return wish
        import torch.distributed as dist

        agreed = self.finish()
        tensor = torch.tensor([wish], dtype=torch.int32)
        self.pending = (
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group, async_op=True),
            tensor,
        )
        return agreed

    def finish(self) -> int:
        """The outcome of the last exchange, if one is open."""
        if self.pending is None:
            return NOTHING
        work, tensor = self.pending
        self.pending = None
        work.wait()
        return int(tensor)


class StopNotice:
    """A stop told to all ranks where they take different numbers of steps (validation), through the job's key-value store."""

    KEY = "portrait_dist/stop"

    def __init__(self, every_seconds: float = 0.5) -> None:
        self.every_seconds = every_seconds
        self.last = 0.0
        self.told = False

    def raised(self, wish: bool) -> bool:
        """Has any rank asked for a stop? ``wish``: does this one?"""
        if not distributed.is_initialized() or distributed.world_size() == 1:
            return wish
        from torch.distributed.distributed_c10d import _get_default_store

        if wish and not self.told:
            _get_default_store().set(self.KEY, "1")
            self.told = True
        if time.monotonic() - self.last < self.every_seconds:
            return wish
        self.last = time.monotonic()
        return wish or bool(_get_default_store().check([self.KEY]))
