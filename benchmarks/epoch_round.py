"""One round of epoch_ends.py, with the package that PYTHONPATH names.

    python benchmarks/epoch_round.py OUT.json EPOCHS STEPS FEATURES "no files"|"at once"|saved

It imports nothing of this folder, so that it measures any tree.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from portrait_dist.losses import SoftIoULoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import UNet
from portrait_dist.training import PortraitTrainer
from portrait_dist.training.sg_adapter import Callback, use_device


class Clock(Callback):
    """Times the gap between two epochs' steps, and counts the bytes written in each epoch."""

    def __init__(self) -> None:
        self.last_step = 0.0
        self.gaps: list[float] = []
        self.written: list[int] = []

    def on_train_batch_start(self, context: Any) -> None:
        if context.batch_idx == 0 and self.last_step:
            self.gaps.append(time.perf_counter() - self.last_step)

    def on_train_batch_end(self, context: Any) -> None:
        self.last_step = time.perf_counter()

    def on_train_loader_end(self, context: Any) -> None:
        self.written.append(bytes_written())


def bytes_written() -> int:
    """Return what this process has given to write(2) so far; 0 where the kernel does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def train(epochs: int, steps: int, *, saving: bool, at_once: bool, features: int) -> Clock:
    """Train for some epochs and return the times of their ends."""
    use_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    images = torch.randn(2 * steps, 3, 64, 64)
    data = TensorDataset(images, (images[:, :1] > 0).float())
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PortraitTrainer("run", folder)
        if at_once:
            submit = trainer.saver.submit

            def submit_and_wait(job: Any) -> None:
                submit(job)
                trainer.saver.join()

            trainer.saver.submit = submit_and_wait  # type: ignore[method-assign]
        params = {
            "max_epochs": epochs,
            "initial_lr": 1e-3,
            "optimizer": "Adam",
            "loss": SoftIoULoss(0.5, 0.5),
            "train_metrics_list": [SoftIoU()],
            "valid_metrics_list": [SoftIoU()],
            "metric_to_watch": "SoftIoU",
            "average_best_models": saving,
            "save_model": saving,
            "silent_mode": True,
            "phase_callbacks": [clock],
            "log_installed_packages": False,
        }
        loaders = DataLoader(data, 2), DataLoader(TensorDataset(*data[:2]), 2)
        trainer.train(UNet(init_features=features), params, *loaders)
    return clock


def main() -> None:
    """Train as the command line says."""
    out, epochs, steps, features, kind = sys.argv[1:]
    saving, at_once = kind != "no files", kind == "at once"
    counts = int(epochs), int(steps)
    clock = train(*counts, saving=saving, at_once=at_once, features=int(features))
    found = {"gaps": clock.gaps, "written": clock.written}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
