"""Measure a trainer's cost per step: PortraitTrainer and stock SuperGradients, and a bare loop.

    python benchmarks/train_step.py --json step.json              # one process, CPU or GPU
    torchrun --nproc-per-node 8 benchmarks/train_step.py --device cuda --json step.json

The bare loop is load, forward, loss, backward, optimiser step (with DistributedDataParallel under
torchrun), and nothing else: no metrics, no callbacks, no shown losses. All three read one
DataLoader over tensors in memory and train the same network with the same loss and Adam.

The cost of a trainer is its own work per step, in milliseconds, whatever the network: it is
measured with a small network, where it exceeds the noise, and given as a fraction of a
real step (``--features 32 --size 256``). Rows: bare, portrait_dist, supergradients for both
(``network`` small or real). Under torchrun without GPUs stock SuperGradients does not train one
model, so its row stays empty there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from portrait_dist import distributed
from portrait_dist.losses import CustomSegLoss
from portrait_dist.metrics import SoftIoU
from portrait_dist.models import UNet
from portrait_dist.training import PortraitTrainer
from portrait_dist.training.sg_adapter import Callback, Trainer, use_device


@dataclass
class Setting:
    """One network, its batches, the steps that are timed and those before them that are not."""

    network: str
    features: int
    size: int
    batch: int
    steps: int
    skipped: int
    device: torch.device

    def loader(self, steps: int) -> DataLoader[Any]:
        count = steps * self.batch
        images = torch.randn(self.batch, 3, self.size, self.size).repeat(steps, 1, 1, 1)
        return DataLoader(TensorDataset(images, (images[:count, :1] > 0).float()), self.batch)

    def model(self) -> UNet:
        torch.manual_seed(0)
        return UNet(init_features=self.features)


class Clock(Callback):
    """Times the steps after the first ones. The device is waited for at both ends only."""

    def __init__(self, setting: Setting) -> None:
        self.first, self.last = setting.skipped, setting.skipped + setting.steps - 1
        self.images = setting.steps * setting.batch
        self.begin, self.cpu = 0.0, 0.0
        self.round = measure.Round(0.0)

    def start_of(self, step: int) -> None:
        """Start at the first timed step."""
        if step == self.first:
            self.begin, self.cpu = _now(), measure.cpu_seconds()

    def end_of(self, step: int) -> None:
        """Stop at the last timed step."""
        if step == self.last:
            seconds, cpu = _now() - self.begin, measure.cpu_seconds() - self.cpu
            rate = self.images * distributed.world_size() / seconds
            self.round = measure.Round(rate, cpu / self.images)

    def on_train_batch_start(self, context: Any) -> None:
        self.start_of(context.batch_idx)

    def on_train_batch_end(self, context: Any) -> None:
        self.end_of(context.batch_idx)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bare(setting: Setting) -> measure.Round:
    """Measure the loop that everybody would write."""
    model: nn.Module = setting.model().to(setting.device).train()
    if distributed.is_initialized():
        gpu = [setting.device.index] if setting.device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=gpu, gradient_as_bucket_view=True, static_graph=True
        )
    optimizer, loss, clock = (
        torch.optim.Adam(model.parameters(), 1e-3),
        CustomSegLoss(0.5, 0.5),
        Clock(setting),
    )
    batches: Iterable[Any] = setting.loader(setting.steps + setting.skipped)
    for step, (images, masks) in enumerate(batches):
        clock.start_of(step)
        x, y = (
            images.to(setting.device, non_blocking=True),
            masks.to(setting.device, non_blocking=True),
        )
        loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.end_of(step)
    return clock.round


def with_trainer(kind: Callable[..., Any], setting: Setting, folder: Path) -> measure.Round:
    """Measure a Trainer of SuperGradients, ours or the stock one."""
    clock = Clock(setting)
    params = {
        "max_epochs": 1,
        "initial_lr": 1e-3,
        "lr_mode": "CosineLRScheduler",
        "optimizer": "Adam",
        "loss": CustomSegLoss(0.5, 0.5),
        "train_metrics_list": [SoftIoU()],
        "valid_metrics_list": [SoftIoU()],
        "metric_to_watch": "SoftIoU",
        "average_best_models": False,
        "save_model": False,
        "phase_callbacks": [clock],
        "silent_mode": True,
        "log_installed_packages": False,
        "kill_ddp_pgroup_on_end": False,
    }
    trainer = kind(f"{kind.__name__}-{time.time_ns()}", ckpt_root_dir=str(folder))
    trainer.train(
        setting.model(), params, setting.loader(setting.steps + setting.skipped), setting.loader(1)
    )
    return clock.round


def rows_of(setting: Setting, folder: Path, repeats: int) -> list[measure.Row]:
    """Measure all trainers with one network."""
    cases: dict[str, measure.Case] = {
        "bare": lambda: bare(setting),
        "portrait_dist": lambda: with_trainer(PortraitTrainer, setting, folder),
    }
    if setting.device.type == "cuda" or not distributed.is_initialized():
        cases["supergradients"] = lambda: with_trainer(Trainer, setting, folder)
    rounds = measure.alternate(cases, repeats)
    ranks = distributed.world_size()
    ms = {
        name: [1e3 * setting.batch * ranks / rate for rate in measure.rates(values)]
        for name, values in rounds.items()
    }
    rows = []
    for name, values in rounds.items():
        row = measure.row(name, values, network=setting.network, ranks=ranks)
        # Each round against the bare loop of the same round: what slows the machine slows both.
        extra = [own - base for own, base in zip(ms[name], ms["bare"], strict=True)]
        row |= {
            "ms_per_step": round(statistics.median(ms[name]), 3),
            "overhead_ms": round(statistics.median(extra), 3),
        }
        rows.append(row)
    if "supergradients" not in cases:
        rows.append(
            measure.absent(
                "supergradients", "trains separate models on CPU ranks", network=setting.network
            )
        )
    return rows


def overheads(rows: list[measure.Row]) -> dict[str, str]:
    """Relate the overhead per step, of the small network, to the bare step of the real one."""
    by = {(row["name"], row["network"]): row for row in rows}
    real = by["bare", "real"]["ms_per_step"]
    found = {}
    for name in ("portrait_dist", "supergradients"):
        overhead = by[name, "small"].get("overhead_ms")
        if overhead is not None:
            aim = " (aim at most 3 %)" if name == "portrait_dist" else ""
            found[f"{name} over the bare loop"] = (
                f"{overhead:.2f} ms per step, {100 * overhead / real:.2f} % of a real step{aim}"
            )
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Measure the small and the real network."""
    options = _options(arguments)
    device = distributed.pick_device(options.device)
    distributed.start(device)
    use_device(device)
    cuda = device.type == "cuda"
    batch = options.batch or (16 if cuda else 2)
    steps = options.steps or (60 if cuda else 20 if options.quick else 40)
    settings = [
        Setting("small", 4, min(64, options.size), 4, steps, 3, device),
        Setting(
            "real",
            options.features,
            options.size,
            batch,
            steps if cuda else 2 if options.quick else 5,
            3 if cuda else 1,
            device,
        ),
    ]
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for setting in settings:
            few = 2 if setting.network == "real" else 3
            repeats = options.repeats or (few if options.quick and not cuda else 5)
            rows += rows_of(setting, Path(folder), repeats)
    found = None
    if distributed.rank() == 0:
        about = {
            "device": str(device),
            "features": options.features,
            "size": options.size,
            "batch_size": batch,
        }
        found = measure.result("train_step", rows, aims=overheads(rows), **about)
        measure.publish(found, options.json)
    distributed.stop()
    return found


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = measure.arguments(__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--features", type=int, default=32, help="channels of the real network's first level"
    )
    parser.add_argument("--size", type=int, default=256, help="side of its images")
    parser.add_argument(
        "--batch", type=int, help="its images per step and rank (default 16 on a GPU, 2 on a CPU)"
    )
    parser.add_argument("--steps", type=int, help="timed steps of the small network in a round")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
