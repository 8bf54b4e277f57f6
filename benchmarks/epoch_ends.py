"""What the end of an epoch costs: seconds between two epochs' steps, and bytes written.

    python benchmarks/epoch_ends.py --json epoch_ends.json
    python benchmarks/epoch_ends.py --quick

Trains the full U-Net (32 features) on few small images, validates one batch, and reports per epoch
the seconds between the last training step and the first one of the next epoch. Rows: ``background``
is the trainer; ``at once`` waits for each save before the next epoch, as the trainer did before
files were written by a thread; ``no files`` trains without saving: the floor. ``bytes_written`` is
what the process gave to write(2) per epoch (/proc/self/io), so it counts every file.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
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


def main(arguments: list[str] | None = None) -> None:
    """Measure all rows, round after round."""
    parser = measure.arguments(__doc__)
    parser.add_argument("--features", type=int, default=32, help="channels of the first level")
    options = parser.parse_args(arguments)
    epochs, steps = (4, 2) if options.quick else (12, 10)
    cases = {
        "no files": {"saving": False, "at_once": False},
        "at once": {"saving": True, "at_once": True},
        "background": {"saving": True, "at_once": False},
    }
    gaps: dict[str, list[float]] = {name: [] for name in cases}
    written: dict[str, list[int]] = {name: [] for name in cases}
    for _ in range(options.repeats or (1 if options.quick else 3)):
        for name, case in cases.items():
            clock = train(epochs, steps, features=options.features, **case)
            gaps[name] += clock.gaps
            pairs = zip(clock.written, clock.written[1:], strict=False)
            written[name] += [after - before for before, after in pairs]
    rows = [
        measure.row(
            name, gaps[name], "seconds", megabytes_written=statistics.median(written[name]) / 1e6
        )
        for name in cases
    ]
    measure.publish(measure.result("epoch ends", rows), options.json)


if __name__ == "__main__":
    main()
