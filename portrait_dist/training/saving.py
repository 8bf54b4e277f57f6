"""Write checkpoints beside the training, in an order that a kill may interrupt anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portrait_dist import checkpoints
from portrait_dist import files as file_system
from portrait_dist.training.averaging import AverageOfBest
from portrait_dist.training.sg_adapter import AtomicSGLogger


class BackgroundWriter:
    """Run jobs on a thread, one at a time.

    An epoch of AISegment takes 13 s on an H100; the 124 MB of its checkpoint take 1.5 to 4 s to
    serialise, write and flush, in which the GPU would stand still.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job after the one before it has ended.

        Raises:
            Exception: of the job before it; then the new one is not started.
        """
        self.join()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of the last job if it has failed by now; do not wait."""
        # Set last by the thread, so a plain look at it is enough.
        if self._error is not None:
            self.join()

    def join(self) -> None:
        """Wait for the last job, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # raised again by the training thread
            self._error = error


@dataclass
class EpochFiles:
    """The files of one save.

    Args:
        epoch: complete epochs.
        state: the checkpoint, on the host.
        latest: name of the checkpoint that a run resumes from.
        best: name of the best checkpoint, where this one is it.
        best_state: what the best checkpoint holds where it is not ``state``.
        copy: name of a checkpoint to keep.
        average: the average of the best models, where there is one and the epoch is complete.
        averaged: whether this model belongs to it.
    """

    epoch: int
    state: dict[str, Any]
    latest: str
    best: str | None = None
    best_state: dict[str, Any] | None = None
    copy: str | None = None
    average: AverageOfBest | None = None
    averaged: bool = False

    def __post_init__(self) -> None:
        # Of this epoch: the thread writes while the next epoch changes the average.
        self.members = () if self.average is None else self.average.members

    def write(
        self,
        write: Callable[[str, dict[str, Any]], None],
        link: Callable[[str, str], None],
    ) -> None:
        """Write the files in the order that a kill may interrupt anywhere.

        ``latest`` commits the epoch. The model's snapshot is there before it, and the best
        checkpoint, whose value a resumed run takes over; the average, which can be made again from
        the snapshots, and the removal of models that left it come after it.

        Args:
            write: writes a state under a name.
            link: gives a written file (first argument) another name.
        """
        average = self.average
        if average is not None and self.averaged:
            average.save(self.epoch, self.snapshot())
        if self.best and self.best_state is None:
            write(self.best, self.state)
            # The same bytes under both names: written and flushed once (124 MB).
            link(self.best, self.latest)
        else:
            if self.best and self.best_state is not None:
                write(self.best, self.best_state)
            write(self.latest, self.state)
        if self.copy:
            link(self.latest, self.copy)
        if average is not None and self.averaged:
            average.write(self.members)
            average.discard_others(self.members)

    def snapshot(self) -> dict[str, Any]:
        """Return the model as it is validated, with the entries that the average's file takes."""
        names = ("acc", "epoch", "metrics", "packages", "processing_params")
        kept = {name: self.state[name] for name in names if name in self.state}
        kept["net"] = self.state.get("ema_net") or self.state["net"]
        own = {
            name: value for name, value in self.state["portrait_dist"].items() if name != "ranks"
        }
        return {**kept, "portrait_dist": own}


class Saver(BackgroundWriter):
    """Writes the files of an epoch beside the next one."""

    def save(self, files: EpochFiles, folder: Path, logger: Any) -> None:
        """Write the files on the thread; a foreign logger writes them itself, at once.

        Args:
            files: what to write.
            folder: of the run.
            logger: SuperGradients' logger of the run.
        """
        if not isinstance(logger, AtomicSGLogger):
            self.join()

            def add(name: str, state: dict[str, Any]) -> None:
                logger.add_checkpoint(tag=name, state_dict=state, global_step=files.epoch)

            files.write(add, lambda source, name: add(name, files.state))
            return

        def write(name: str, state: dict[str, Any]) -> None:
            checkpoints.write(folder / name, state)

        def link(source: str, name: str) -> None:
            file_system.link(folder / source, folder / name, durable=True)

        self.submit(lambda: files.write(write, link))
