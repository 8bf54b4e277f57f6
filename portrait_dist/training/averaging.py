"""The mean of the best models of a run.

Each model is a file of its own in ``averaging_snapshots/``, written before the checkpoint that
names it. Which files belong to the average stands in ``ckpt_latest.pth`` alone, so the set changes
exactly when that file is renamed, and a process that is killed at any moment leaves a set that is
whole. The mean is a function of the set: after any schedule of kills it has the bits of an
undisturbed run.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from portrait_dist import checkpoints, distributed
from portrait_dist.checkpoints import Snapshot
from portrait_dist.errors import DamagedDataError, InputError
from portrait_dist.runs.folder import AVERAGE, LATEST

SNAPSHOTS = "averaging_snapshots"
OLD_FILE = "averaging_snapshots.pkl"
"""Where releases before 0.2 kept all snapshots, rewritten at each epoch (310 MB for ten)."""


class AverageOfBest:
    """Mean of the best models of a run.

    Args:
        folder: the run's folder.
        greater_is_better: whether a greater value of the watched metric is better.
        number: how many models are averaged (10, as SuperGradients does).

    Attributes:
        members: the models of the average, by epoch.
    """

    def __init__(self, folder: str | Path, greater_is_better: bool, number: int = 10) -> None:
        self.folder = Path(folder)
        self.sign = 1.0 if greater_is_better else -1.0
        self.number = number
        self.members: tuple[Snapshot, ...] = ()

    def resume(self, members: Sequence[Snapshot] | None) -> None:
        """Continue with the models that the latest checkpoint names; complete an interrupted epoch.

        Args:
            members: from the checkpoint; None in checkpoints of releases before 0.2.

        Raises:
            DamagedDataError: a snapshot is damaged.
        """
        if members is None:
            members = self._adopt_old_file()
        missing = [member for member in members if not self.path(member.epoch).exists()]
        for member in missing:
            distributed.print0(
                f"{self.path(member.epoch)}: missing; the average continues without it"
            )
        self.members = tuple(member for member in members if member not in missing)
        if self.members and not self._is_current():
            self.write()

    def check_files(self, members: Sequence[Snapshot]) -> None:
        """Check the models' files to the last byte; one that is missing is done without.

        Raises:
            DamagedDataError: a file is damaged.
            InputError: a folder is where the average is to be written, or a file where its models.
        """
        average, snapshots = self.folder / AVERAGE, self.folder / SNAPSHOTS
        if average.is_dir() or (snapshots.exists() and not snapshots.is_dir()):
            wrong, kind = (average, "folder") if average.is_dir() else (snapshots, "file")
            raise InputError(f"{wrong}: is a {kind}; move it away and resume")
        for path in map(self.path, (member.epoch for member in members)):
            try:
                if path.exists():
                    checkpoints.check_whole(path)
            except (InputError, DamagedDataError) as error:
                raise DamagedDataError(
                    f"{path}: is damaged; remove it and resume: the average continues without it"
                ) from error

    def path(self, epoch: int) -> Path:
        """Return the file of the model after so many epochs."""
        return self.folder / SNAPSHOTS / f"epoch-{epoch}.pth"

    def consider(self, epoch: int, value: float) -> bool:
        """Add the model if it ranks among the best. Returns whether it does; then call ``save``."""
        if not math.isfinite(value):
            return False
        ranked = sorted(self.members, key=lambda member: self.sign * member.value)
        if len(ranked) >= self.number:
            if self.sign * value <= self.sign * ranked[0].value:
                return False
            ranked = ranked[1:]
        # An epoch that was run twice after a crash counts once.
        kept = [member for member in ranked if member.epoch != epoch]
        self.members = tuple(sorted([*kept, Snapshot(epoch, value)], key=lambda one: one.epoch))
        return True

    def save(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Write a model's file. It belongs to the average once a checkpoint names it.

        Args:
            epoch: complete epochs.
            state: ``net`` and the entries that the average's file takes over, on the host.
        """
        path = self.path(epoch)
        path.parent.mkdir(exist_ok=True)
        checkpoints.write(path, dict(state))

    def write(self, members: Sequence[Snapshot] | None = None) -> None:
        """Write ``average_model.pth`` from the members' files.

        Raises:
            DamagedDataError: a member's file is damaged; its name is in the message.
        """
        members = self.members if members is None else members
        states = [self.path(member.epoch) for member in members]
        # Read from the files, not from memory: a resumed run averages to the same bit.
        mean, newest = mean_of_files(states)
        own = dict(newest.get("portrait_dist") or {})
        own["averaged"] = [asdict(member) for member in members]
        entries = {key: value for key, value in newest.items() if key != "net"}
        checkpoints.write(self.folder / AVERAGE, {"net": mean, **entries, "portrait_dist": own})

    def discard_others(self, members: Iterable[Snapshot]) -> None:
        """Remove the files of models that the latest checkpoint no longer names."""
        kept = {self.path(member.epoch).name for member in members}
        for path in (self.folder / SNAPSHOTS).glob("*"):
            if path.name not in kept:
                with contextlib.suppress(OSError):  # a foreign folder stays
                    path.unlink()
        (self.folder / OLD_FILE).unlink(missing_ok=True)

    def cleanup(self) -> None:
        """Remove the snapshots; the average stays."""
        self.members = ()
        shutil.rmtree(self.folder / SNAPSHOTS, ignore_errors=True)
        (self.folder / OLD_FILE).unlink(missing_ok=True)

    def _is_current(self) -> bool:
        try:
            return checkpoints.read_info(self.folder / AVERAGE).averaged == self.members
        except (InputError, DamagedDataError):
            return False

    def _adopt_old_file(self) -> tuple[Snapshot, ...]:
        """Split the one file of older releases; its models count as epochs -10 to -1."""
        path = self.folder / OLD_FILE
        if not path.exists():
            return ()
        found = checkpoints.load_foreign(path)
        snapshots = found.get("snapshots") if isinstance(found, dict) else None
        if not isinstance(snapshots, list) or not all(map(_is_old_snapshot, snapshots)):
            raise DamagedDataError(
                f"{path}: holds no snapshots of an average; remove it to continue without its "
                "models"
            )
        members = []
        for epoch, snapshot in enumerate(snapshots, start=-len(snapshots)):
            value = float(snapshot["value"])
            self.save(epoch, {"net": snapshot["net"], "acc": value, "epoch": 0})
            members.append(Snapshot(epoch, value))
        return tuple(members)


def _is_old_snapshot(snapshot: object) -> bool:
    return (
        isinstance(snapshot, dict)
        and isinstance(snapshot.get("value"), float)
        and isinstance(snapshot.get("net"), dict)
        and all(isinstance(tensor, torch.Tensor) for tensor in snapshot["net"].values())
    )


def mean_of_files(paths: Sequence[Path]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Average the ``net`` of checkpoints, oldest first.

    Summed in float64 in the order of the epochs, anew each time: a sum that is kept and corrected
    when a model leaves depends on its history in the last bit. Ten U-Nets take 0.4 s of the writing
    thread.

    Args:
        paths: at least one checkpoint.

    Returns:
        The mean of each floating-point tensor (others are the last file's), and the last file.

    Raises:
        DamagedDataError: a file is damaged, or its tensors are not those of the first one.
    """
    sums: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {}
    for path in paths:
        state = checkpoints.read(path)
        net = state["net"]
        if sums and {name: tensor.shape for name, tensor in sums.items()} != {
            name: net[name].shape for name in net
        }:
            raise DamagedDataError(
                f"{path}: a model of another form than {paths[0].name}; remove it"
            )
        for name, tensor in net.items():
            if not tensor.is_floating_point():
                sums[name] = tensor
            elif name in sums:
                sums[name] += tensor
            else:
                sums[name] = tensor.to(torch.float64, copy=True)  # tied ones are two sums
    mean = {
        name: (sums[name] / len(paths)).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state["net"].items()
    }
    return mean, state


def complete(folder: str | Path) -> bool:
    """Finish what a run left undone that was killed after its last checkpoint.

    Args:
        folder: of a run whose epochs are all done.

    Returns:
        Whether there was anything to do.

    Raises:
        DamagedDataError: a snapshot is damaged.
        InputError: the average cannot be written; the snapshots stay.
    """
    folder = Path(folder)
    if not (folder / SNAPSHOTS).exists() and not (folder / OLD_FILE).exists():
        return False
    average, latest = AverageOfBest(folder, greater_is_better=True), folder / LATEST
    if latest.exists():  # without a checkpoint nothing belongs to an average
        members = checkpoints.read_info(latest).averaged
        average.check_files(members or ())
        average.resume(members)
    average.cleanup()
    return True
