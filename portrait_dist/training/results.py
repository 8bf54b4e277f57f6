"""What training returns; light, so that a launcher can hand it on without importing torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Args:
        epochs: complete epochs.
        steps: optimiser steps in them.
        samples_seen: training samples over all ranks.
        best_iou: best validation IoU; None where another value decides which model is the best.
        checkpoint: the best checkpoint.
        run_dir: the run's folder.
        images_per_second: over all ranks, in the last epoch.
        world_size: number of ranks.
        global_batch: samples of an optimiser step, over all ranks.
        batches_per_epoch: batches of each rank in an epoch.
        steps_per_epoch: optimiser steps in an epoch.
        watched: the value that decides which model is the best.
        best: its best value.
    """

    epochs: int
    steps: int
    samples_seen: int
    best_iou: float | None
    checkpoint: str
    run_dir: str
    images_per_second: float
    world_size: int
    global_batch: int
    batches_per_epoch: int
    steps_per_epoch: int
    watched: str = "SoftIoU"
    best: float | None = None
