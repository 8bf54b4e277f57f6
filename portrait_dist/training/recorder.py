"""Record a run: lines in ``metrics.jsonl``, speed and a grid of samples in TensorBoard."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from portrait_dist import distributed
from portrait_dist.metrics import sample_iou
from portrait_dist.runs.folder import RunFolder
from portrait_dist.system.info import machine
from portrait_dist.training.plan import steps_of
from portrait_dist.training.sg_adapter import Callback, PhaseContext

if TYPE_CHECKING:
    from portrait_dist.training.trainer import PortraitTrainer


@dataclass(frozen=True)
class Progress:
    """How far a run is; :class:`portrait_dist.runs.folder.Event` says what the fields are."""

    epoch: int
    batch: int
    batches_per_epoch: int
    step: int
    steps_per_epoch: int
    max_epochs: int
    samples_seen: int
    world_size: int


class RunRecorder(Callback):
    """Records each interval and epoch, on rank 0.

    TensorBoard counts epochs from 1, ``metrics.jsonl`` from 0. The grid's tag ``examples/…`` sorts
    before the curves, the speed's ``speed/…`` behind them.

    Args:
        trainer: the PortraitTrainer it belongs to.
        pictures: validation samples in the grid of each epoch; 0 for no grid.
        shards: absolute path or address of the shards, for reports that are made elsewhere.
    """

    def __init__(self, trainer: PortraitTrainer, pictures: int, shards: str = "") -> None:
        self.trainer = trainer
        self.shards = shards
        self.pictures = pictures
        self.train_values: dict[str, float] = {}
        self.speed: dict[str, float] = {}
        self.grid: Any = None
        self.folder: RunFolder | None = None

    def on_training_start(self, context: PhaseContext) -> None:
        """Write the line of this start."""
        if distributed.rank() == 0:
            self.folder = RunFolder(self.trainer.checkpoints_dir_path)
            progress = asdict(self._progress(self.trainer.start_epoch, 0))
            location = {"shards": self.shards} if self.shards else {}
            version = _versions(self.trainer.train_loader)
            self.folder.append(
                "start", machine=asdict(machine()), **location, **version, **progress
            )

    def on_interval(
        self,
        trainer: PortraitTrainer,
        context: PhaseContext,
        batch_idx: int,
        losses: dict[str, float],
    ) -> None:
        """Write a line within the epoch: this rank's mean loss so far and the speed."""
        if self.folder:
            self.folder.append(
                "interval",
                **asdict(self._progress(context.epoch, batch_idx + 1)),
                loss=next(iter(losses.values()), None),
                lr=self._lr(),
                **self._speed(),
            )

    def on_train_loader_end(self, context: PhaseContext) -> None:
        """Keep the values of the training part; an epoch without validation has its line now."""
        self.train_values = dict(context.metrics_dict)
        self.speed = self._speed()
        if self.folder and not self.trainer._should_run_validation_for_epoch(context.epoch):
            self._record_epoch(context.epoch, {})

    def on_validation_loader_start(self, context: PhaseContext) -> None:
        """Forget the grid of the epoch before."""
        self.grid = None

    def on_validation_batch_end(self, context: PhaseContext) -> None:
        """Keep samples of rank 0's first validation batch."""
        batch: Any = getattr(context, "batch", None)
        if not self.folder or not self.pictures or self.grid is not None:
            return
        if hasattr(batch, "image") and hasattr(batch, "alpha"):
            count = min(self.pictures, len(batch.image))
            preds, alpha = context.preds[:count, 0], batch.alpha[:count]
            self.grid = (
                batch.image[:count].cpu().numpy(),
                alpha.cpu().numpy(),
                preds.float().cpu().numpy(),
                sample_iou(preds, alpha.float() / 255).tolist(),
            )

    def on_validation_loader_end(self, context: PhaseContext) -> None:
        """Record the epoch with its validation."""
        if self.folder:
            self._record_epoch(context.epoch, dict(context.metrics_dict))
            self._add_grid(context.epoch)

    def _record_epoch(self, epoch: int, valid_values: dict[str, float]) -> None:
        """Write the epoch's line and its speed in TensorBoard."""
        assert self.folder is not None
        trainer = self.trainer
        loss = trainer.loss_logging_items_names[0]
        self.folder.append(
            "epoch",
            **asdict(self._progress(epoch, trainer.steps_per_epoch)),
            loss=self.train_values.get(loss),
            iou=self.train_values.get("SoftIoU"),
            val_loss=valid_values.get(loss),
            val_iou=valid_values.get("SoftIoU"),
            lr=self._lr(),
            **self.speed,
        )
        scalars = {
            "speed/images_per_second": self.speed["images_per_second"],
            "speed/data_wait_fraction": self.speed["data_wait_share"],
        }
        if self.speed["gpu_memory_bytes"]:
            scalars["speed/gpu_memory_gb"] = self.speed["gpu_memory_bytes"] / 1e9
        for tag, value in scalars.items():
            trainer.sg_logger.add_scalar(tag=tag, scalar_value=value, global_step=epoch + 1)

    def _add_grid(self, epoch: int) -> None:
        if self.grid is None:
            return
        import numpy as np

        from portrait_dist.visualize import picture_grid

        grid = np.asarray(picture_grid(*self.grid))
        self.trainer.sg_logger.add_image(
            tag="examples/validation", image=grid, data_format="HWC", global_step=epoch + 1
        )

    def _progress(self, epoch: int, batches: int) -> Progress:
        """Return how far the run is, ``batches`` of each rank into an epoch."""
        trainer = self.trainer
        per_epoch, accumulate = trainer.steps_per_epoch, trainer.batch_accumulate
        steps_per_epoch = steps_of(per_epoch, accumulate)
        return Progress(
            epoch=epoch,
            batch=epoch * per_epoch + batches,
            batches_per_epoch=per_epoch,
            step=epoch * steps_per_epoch + steps_of(batches, accumulate),
            steps_per_epoch=steps_per_epoch,
            max_epochs=trainer.max_epochs,
            samples_seen=trainer.samples_seen,
            world_size=distributed.world_size(),
        )

    def _speed(self) -> dict[str, float]:
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return {
            "images_per_second": self.trainer.images_per_second,
            "data_wait_share": self.trainer.data_wait_share,
            "gpu_memory_bytes": memory,
            "cpu_seconds": time.process_time(),  # of this rank, all threads
        }

    def _lr(self) -> float:
        return float(self.trainer.optimizer.param_groups[0]["lr"])


def _versions(loader: Any) -> dict[str, Any]:
    """Return the versions of packed shards that training reads, as fields of an event."""
    shards = getattr(getattr(loader, "dataset", None), "shards", None)
    if (manifest := getattr(shards, "manifest", None)) is not None:
        return {"shards_version": manifest.version}
    parts = getattr(shards, "parts", None)
    versions = {part.name: part.shards.manifest.version for part in parts or ()}
    return {"shards_versions": versions} if versions else {}
