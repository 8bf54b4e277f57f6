"""What a run leaves to look at: ``metrics.jsonl``, TensorBoard scalars and a picture grid of validation samples."""

from __future__ import annotations

from typing import Any

import torch

from portrait_dist import distributed
from portrait_dist.metrics import sample_iou
from portrait_dist.runs.folder import RunFolder
from portrait_dist.system.info import machine
from portrait_dist.training.sg_adapter import Callback, PhaseContext


class RunRecorder(Callback):
    """Writes the figures of each interval and epoch, on rank 0.

    Args:
        trainer: the PortraitTrainer it belongs to.
        pictures: validation samples in the picture grid of each epoch.
    """

    def __init__(self, trainer: Any, pictures: int) -> None:
        self.trainer = trainer
        self.pictures = pictures
        self.train_values: dict[str, float] = {}
        self.speed: dict[str, float] = {}
        self.grid: Any = None
        self.folder: RunFolder | None = None

    def on_training_start(self, context: PhaseContext) -> None:
        """Write the line of this start."""
        if distributed.rank() == 0:
            self.folder = RunFolder(self.trainer.checkpoints_dir_path)
            self.folder.append(
                "start", machine=machine(), **self._place(self.trainer.start_epoch, 0)
            )

    def on_interval(
        self, trainer: Any, context: PhaseContext, batch_idx: int, losses: dict[str, float]
    ) -> None:
        """A line within the epoch: this rank's mean loss so far and the speed."""
        if self.folder:
            loss = next(iter(losses.values()), None)
            self.folder.append(
                "interval",
                **self._place(context.epoch, batch_idx + 1),
                loss=loss,
                lr=self._lr(),
                **self._speed(),
            )

    def on_train_loader_end(self, context: PhaseContext) -> None:
        """Keep the training figures for the epoch's line."""
        self.train_values = dict(context.metrics_dict)
        self.speed = self._speed()

    def on_validation_loader_start(self, context: PhaseContext) -> None:
        """Forget the pictures of the epoch before."""
        self.grid = None

    def on_validation_batch_end(self, context: PhaseContext) -> None:
        """Keep pictures of the first validation batch of rank 0."""
        if (
            self.pictures
            and self.grid is None
            and distributed.rank() == 0
            and hasattr(context, "batch")
        ):
            batch = context.batch
            if hasattr(batch, "image"):
                count = min(self.pictures, len(batch.image))
                self.grid = (
                    batch.image[:count].cpu().numpy(),
                    batch.alpha[:count].cpu().numpy(),
                    context.preds[:count, 0].float().cpu().numpy(),
                    sample_iou(
                        context.preds[:count, 0], batch.alpha[:count].float() / 255
                    ).tolist(),
                )

    def on_validation_loader_end(self, context: PhaseContext) -> None:
        """Write the epoch's line, TensorBoard scalars and picture grid."""
        if not self.folder:
            return
        trainer, epoch = self.trainer, context.epoch
        values = dict(context.metrics_dict)
        loss = trainer.loss_logging_items_names[0]
        self.folder.append(
            "epoch",
            **self._place(epoch, trainer.steps_per_epoch),
            loss=self.train_values.get(loss),
            iou=self.train_values.get("SoftIoU"),
            val_loss=values.get(loss),
            val_iou=values.get("SoftIoU"),
            lr=self._lr(),
            **self.speed,
        )
        scalars = {
            "Images per second": self.speed["images_per_second"],
            "Data wait share": self.speed["data_wait_share"],
        }
        if self.speed["gpu_memory_bytes"]:
            scalars["GPU memory GB"] = self.speed["gpu_memory_bytes"] / 1e9
        for tag, value in scalars.items():
            trainer.sg_logger.add_scalar(tag=tag, scalar_value=value, global_step=epoch)
        if self.grid is not None:
            import numpy as np

            from portrait_dist.visualize import picture_grid

            grid = np.asarray(picture_grid(*self.grid))
            trainer.sg_logger.add_image(
                tag="validation", image=grid, data_format="HWC", global_step=epoch
            )

    def _place(self, epoch: int, step: int) -> dict[str, Any]:
        trainer = self.trainer
        batches, accumulate = trainer.steps_per_epoch, trainer.batch_accumulate
        return {
            "epoch": epoch,
            "batch": epoch * batches + step,
            "batches_per_epoch": batches,
            "step": epoch * -(-batches // accumulate) + -(-step // accumulate),
            "steps_per_epoch": -(-batches // accumulate),
            "max_epochs": trainer.max_epochs,
            "samples_seen": trainer.samples_seen,
            "world_size": distributed.world_size(),
        }

    def _speed(self) -> dict[str, float]:
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return {
            "images_per_second": self.trainer.images_per_second,
            "data_wait_share": self.trainer.data_wait_share,
            "gpu_memory_bytes": memory,
        }

    def _lr(self) -> float:
        return float(self.trainer.optimizer.param_groups[0]["lr"])
