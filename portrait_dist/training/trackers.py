"""Send a run's curves and pictures to an experiment tracker: Weights & Biases, MLflow or ClearML.

TensorBoard and ``metrics.jsonl`` are written in any case, and checkpoints never pass through a
tracker, so a run does not depend on one: where a tracker fails, one line says so and the run goes
on. Project, server and credentials come from the tracker's own environment variables. A resumed run
continues the tracker's run, whose name is kept in ``tracker.json`` of the run folder.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from portrait_dist import files
from portrait_dist.errors import PortraitDistError
from portrait_dist.system.address import redact
from portrait_dist.system.info import check_extra

log = logging.getLogger("portrait_dist.training")

PROJECT = "portrait_dist"
"""Project or experiment where the tracker's own environment names none."""
KEPT = "tracker.json"
MOST_BYTES = 10_000


class Tracker(Protocol):
    """Where curves and pictures go besides TensorBoard; called on rank 0 only."""

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """Take the values of an epoch by tag, such as ``loss/train``; epochs count from 1."""

    def image(self, tag: str, image: NDArray[np.uint8], epoch: int) -> None:
        """Take a picture, uint8 [H, W, 3] RGB."""

    def close(self) -> None:
        """Send what is left."""


class WandbTracker:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it in the run folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any], known: str) -> None:
        import wandb

        self.id = known or uuid.uuid4().hex
        self._image = wandb.Image
        self._run = wandb.init(
            project=None if _in_environment("WANDB_PROJECT") else PROJECT,
            name=folder.name,
            id=self.id,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        # Without a step of its own: those of a resumed epoch would be dropped as of the past.
        self._run.log({**values, "epoch": epoch})

    def image(self, tag: str, image: NDArray[np.uint8], epoch: int) -> None:
        self._run.log({tag: self._image(image), "epoch": epoch})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow, at ``MLFLOW_TRACKING_URI``."""

    def __init__(self, folder: Path, config: Mapping[str, Any], known: str) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        if not known:
            name = _in_environment("MLFLOW_EXPERIMENT_NAME") or PROJECT
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            known = self._client.create_run(experiment, run_name=folder.name).info.run_id
            # Parameters of a run cannot change: those of its first start stay.
            for key, value in _flat(config):
                self._client.log_param(known, key, value[:MLFLOW_LONGEST])
        self.id = known
        self._client.update_run(self.id, status="RUNNING")

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        for tag, value in values.items():
            self._client.log_metric(self.id, tag, value, step=epoch)

    def image(self, tag: str, image: NDArray[np.uint8], epoch: int) -> None:
        self._client.log_image(self.id, image, artifact_file=f"{tag}-{epoch:04d}.png")

    def close(self) -> None:
        self._client.set_terminated(self.id)


MLFLOW_LONGEST = 5000
"""Characters of a parameter at most; ``mlflow.utils.validation.MAX_PARAM_VAL_LENGTH`` is 6000."""


class ClearmlTracker:
    """A task of ClearML; ``CLEARML_OFFLINE_MODE=1`` keeps it on this machine."""

    def __init__(self, folder: Path, config: Mapping[str, Any], known: str) -> None:
        from clearml import Task

        # Its reporting would run in a fork of this process, which inherits the pipe of a git that
        # another thread of ClearML starts at that time; closing the task may then wait for ever.
        # As development.report_use_subprocess of clearml.conf.
        Task._report_subprocess_enabled = False  # type: ignore[assignment]
        self._task: Any = Task.init(
            project_name=_in_environment("CLEARML_PROJECT") or PROJECT,
            task_name=folder.name,
            continue_last_task=known or False,
            reuse_last_task_id=False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,
            auto_connect_streams=False,
            auto_resource_monitoring=False,
        )
        self.id = str(self._task.id)
        self._task.connect_configuration(dict(config), name="portrait_dist")
        # The steps of a continued task would begin behind its last one, ours are epochs.
        self._task.set_initial_iteration(0)

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        for tag, value in values.items():
            title, _, series = tag.partition("/")
            self._task.get_logger().report_scalar(title, series or title, value, epoch)

    def image(self, tag: str, image: NDArray[np.uint8], epoch: int) -> None:
        title, _, series = tag.partition("/")
        self._task.get_logger().report_image(title, series or title, epoch, image=image)

    def close(self) -> None:
        self._task.close()


KINDS: dict[str, Callable[[Path, Mapping[str, Any], str], Any]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "clearml": ClearmlTracker,
}


class GuardedTracker:
    """A tracker whose failure ends its own record, not the run.

    Args:
        kind: its name, for the message.
        make: opens the tracker.
    """

    def __init__(self, kind: str, make: Callable[[], Tracker]) -> None:
        self._kind = kind
        self._tracker: Tracker | None = None
        self._tracker = self._guarded(make)

    @property
    def id(self) -> str:
        """What names the run at the tracker; empty where it could not be opened."""
        return str(getattr(self._tracker, "id", ""))

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """See :class:`Tracker`."""
        if tracker := self._tracker:
            self._guarded(lambda: tracker.scalars(values, epoch))

    def image(self, tag: str, image: NDArray[np.uint8], epoch: int) -> None:
        """See :class:`Tracker`."""
        if tracker := self._tracker:
            self._guarded(lambda: tracker.image(tag, image, epoch))

    def close(self) -> None:
        """See :class:`Tracker`; a second call does nothing."""
        tracker, self._tracker = self._tracker, None
        if tracker:
            self._guarded(tracker.close)

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a tracker's package may raise anything
            self._tracker = None
            # Redacted: MLflow's messages hold its address, which may hold a password.
            reason = redact(" ".join(str(error).split()))[:300]
            log.warning(
                "run.logger=%s: %s: %s; the run continues without it, TensorBoard has everything",
                self._kind,
                type(error).__name__,
                reason,
            )
        return None


def check(kind: str) -> None:
    """Check that the package of a tracker is installed.

    Raises:
        InputError: it is not.
    """
    if kind in KINDS:
        check_extra(f"run.logger={kind}", [kind], kind, ", or take run.logger=tensorboard")


def open_tracker(kind: str, folder: Path, config: Mapping[str, Any]) -> GuardedTracker | None:
    """Open the tracker of a run, or continue what it has of it.

    Args:
        kind: ``wandb``, ``mlflow`` or ``clearml``; anything else is none.
        folder: of the run.
        config: the run's configuration, without secrets.
    """
    if kind not in KINDS:
        return None
    kept = folder / KEPT
    known = _known(kept, kind)
    tracker = GuardedTracker(kind, lambda: KINDS[kind](folder, config, known))
    if tracker.id and tracker.id != known:
        try:
            files.write_text(kept, json.dumps({"kind": kind, "id": tracker.id}) + "\n")
        except PortraitDistError as error:  # rank 0 alone is here: the others would wait for it
            log.warning("%s; a resumed run will be another one at run.logger=%s", error, kind)
    return tracker


def _known(kept: Path, kind: str) -> str:
    """Return what the tracker called this run before; empty where it is new to it."""
    try:
        found = json.loads(files.read_regular(kept, MOST_BYTES))
        return str(found["id"]) if found["kind"] == kind else ""
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", str(value)))
    return found


def _in_environment(name: str) -> str:
    return os.environ.get(name, "")
