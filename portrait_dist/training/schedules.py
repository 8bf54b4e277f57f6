"""Learning rates that count optimiser steps, where SuperGradients' own count batches.

With ``batch_accumulate=2`` its warm-up and its cosine run over the batches of the loader, so a run
whose batches are half as large would have another learning rate at each step. Here they get the
number of steps of an epoch for the length of the loader, and the number of the step for the number
of the batch. An epoch that ``max_train_batches`` cuts short counts as short, so the learning rate
comes down to its end in a trial too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

BATCH_METHODS = (
    "on_train_batch_start",
    "on_train_batch_loss_end",
    "on_train_batch_backward_end",
    "on_train_batch_gradient_step_start",
    "on_train_batch_gradient_step_end",
    "on_train_batch_end",
)
"""Methods of a callback of SuperGradients that are called around a training batch."""


def in_steps(callback: Any, accumulate: int) -> Any:
    """Let a callback see the number of the optimiser step as ``context.batch_idx``.

    Args:
        callback: of SuperGradients; it is changed.
        accumulate: batches of a step.
    """
    if accumulate > 1:
        for name in BATCH_METHODS:
            setattr(callback, name, _with_step(getattr(callback, name), accumulate))
    return callback


def _with_step(method: Callable[[Any], None], accumulate: int) -> Callable[[Any], None]:
    def call(context: Any) -> None:
        seen = copy.copy(context)
        seen.batch_idx = context.batch_idx // accumulate
        method(seen)

    return call
