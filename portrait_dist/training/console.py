"""Show a person how a training goes: a bar or lines within an epoch, two lines after it.

On stderr, on rank 0 only.

Epochs count from 1 here and in TensorBoard; files that programs read (metrics.jsonl, checkpoints)
count from 0.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from portrait_dist import distributed
from portrait_dist.runs.status import duration

FIELD_NAMES = {"SoftIoU": "iou"}
"""Metric classes that have a usual name in the field."""
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_BAR_FIGURES = 1.0
"""Reading a loss waits for the device: a GPU's queue drains, a few milliseconds each second."""


def field_names(names: Sequence[str], losses: Sequence[str]) -> dict[str, str]:
    """Map SuperGradients' names of losses and metrics to those of the field.

    Args:
        names: names of all values, such as ``CustomSegLoss`` and ``SoftIoU``.
        losses: which of them are losses; the first is the one that is minimised.

    Returns:
        name → ``loss`` for a single loss, ``loss_<part>`` for the parts of one, ``iou`` for
        SoftIoU, else the name itself.
    """
    short = {}
    for name in names:
        if name in losses:
            part = name.partition("/")[2]
            short[name] = f"loss_{part}" if len(losses) > 1 and part else "loss"
        else:
            short[name] = FIELD_NAMES.get(name, name)
    return short


def values_text(values: Mapping[str, float]) -> str:
    """Format values as ``loss 0.3121  iou 0.8123``."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def epoch_line(
    epoch: int,
    max_epochs: int,
    train: Mapping[str, float],
    valid: Mapping[str, float],
    *,
    best: str = "",
    images_per_second: float,
    wait_fraction: float,
    seconds_left: float | None,
) -> str:
    """Describe one epoch in two lines.

    Args:
        epoch: counted from 1.
        max_epochs: epochs of the run.
        train: losses and metrics of the training part by their names in the field.
        valid: the same of validation; empty where this epoch was not validated.
        best: what is said of the best value.
        images_per_second: over all ranks.
        wait_fraction: fraction of the time in which the loop waited for data.
        seconds_left: of the run; None after its last epoch.
    """
    head = f"epoch {epoch}/{max_epochs}"
    speed = f"{images_per_second:.1f} images/s, {wait_fraction:.0%} waiting for data"
    left = f", {duration(seconds_left)} left" if seconds_left is not None else ""
    lines = [f"{head}  train  {values_text(train)}  {speed}{left}"]
    if valid:
        lines.append(f"{' ' * len(head)}  val    {values_text(valid)}{f'  {best}' if best else ''}")
    return "\n".join(lines)


class EpochProgress:
    """A bar with live values on a terminal; elsewhere a line at least every 30 seconds.

    Args:
        title: what runs, such as ``epoch 3/100``.
        total: batches of the whole part.
        done: batches that an interrupted run has done.
        visible: whether this rank shows anything.
    """

    def __init__(self, title: str, total: int, done: int = 0, visible: bool = True) -> None:
        self.title, self.total, self.done = title, total, done
        self.visible = visible and distributed.rank() == 0
        self.on_terminal = self.visible and sys.stderr.isatty()
        self.every = SECONDS_BETWEEN_BAR_FIGURES if self.on_terminal else SECONDS_BETWEEN_LINES
        self._shown = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> EpochProgress:
        if self.on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(
                initial=self.done,
                total=self.total,
                desc=self.title,
                dynamic_ncols=True,
                leave=False,  # the epoch's line stays
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """Count one batch."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()

    @property
    def due(self) -> bool:
        """Whether values should be read and shown now; never on a rank that shows nothing."""
        return self.visible and time.monotonic() - self._shown >= self.every

    def show(self, values: Mapping[str, float], images_per_second: float | None = None) -> None:
        """Show values: in the bar, or as a line."""
        self._shown = time.monotonic()
        if self._bar is not None:
            shown = {name: f"{value:.4f}" for name, value in values.items()}
            if images_per_second is not None:
                shown["images/s"] = f"{images_per_second:.1f}"
            self._bar.set_postfix(shown)
        elif self.visible:
            speed = "" if images_per_second is None else f"  {images_per_second:.1f} images/s"
            text = f"  {values_text(values)}" if values else ""
            distributed.print0(f"{self.title}  step {self.done}/{self.total}{text}{speed}")
