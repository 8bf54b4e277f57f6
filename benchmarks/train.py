"""Measure training end to end: ``portrait-dist train`` against a batch that lies on the device.

    python benchmarks/train.py --json train.json            # CPU; generates and packs portraits
    python benchmarks/train.py --device cuda --shards shards --batch 64 --json train.json

Rows: resident (forward, loss, backward, Adam on one batch that is already normalised and on the
device), train (the whole way: read, decode, copy, augment, the trainer with its metrics), with the
fraction of time in which train waited for data. The ratio of the two says how much of the network's
speed the rest takes away.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch

from portrait_dist import config, distributed
from portrait_dist.losses import SoftIoULoss
from portrait_dist.models import UNet
from portrait_dist.system.info import cores
from portrait_dist.system.malloc import keep_freed_memory


def generated_shards(folder: Path, pairs: int, size: int) -> Path:
    """Pack shards of generated portraits, ``size`` pixels square."""
    from portrait_dist.data.shards import writer
    from portrait_dist.data.source import split, synthetic

    synthetic.generate(folder / "raw", pairs, seed=1)
    split.prepare(folder / "raw", folder / "tree")
    writer.pack(folder / "tree", folder / "shards", (size, size))
    return folder / "shards"


def last_epoch(run: Path) -> measure.Round:
    """Read from a run's ``metrics.jsonl`` what its last epoch took.

    CPU seconds are rank 0's, and count from the epoch's predecessor: validation belongs to them.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, last = [line for line in lines if line["kind"] == "epoch"][-2:]
    images = (last["samples_seen"] - before["samples_seen"]) / last["world_size"]
    cpu = last["cpu_seconds"] - before["cpu_seconds"]
    return measure.Round(float(last["images_per_second"]), cpu / images)


class EndToEnd:
    """``portrait-dist train`` for two epochs in this process; the second one counts.

    The first one pays for autotuning and compilation. ``waits`` keeps the fractions of time spent
    waiting for data.
    """

    def __init__(self, options: argparse.Namespace, shards: Path, folder: Path) -> None:
        self.options, self.shards, self.folder = options, shards, folder
        self.waits: list[float] = []
        self.runs = 0

    def __call__(self) -> measure.Round:
        from portrait_dist.training.main import train

        self.runs += 1
        options, run = self.options, f"run{self.runs}"
        settings = {
            "data.shards": self.shards,
            "data.workers": options.workers,
            "run.root": self.folder,
            "run.name": run,
            "model.init_features": options.features,
            "train.max_epochs": 2,
            "train.batch_size": options.batch,
            "train.max_batches": options.steps,
            "train.max_val_batches": 1,
            "train.precision": options.precision,
            "train.compile": str(options.compile).lower(),
            "train.device": options.device,
            "train.average_best": "false",
            "train.pictures": 0,
        }
        train(config.load(None, [f"{key}={value}" for key, value in settings.items()]))
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        epochs = [line for line in map(json.loads, lines) if line["kind"] == "epoch"]
        self.waits.append(epochs[-1]["data_wait_share"])
        return last_epoch(self.folder / run)


class Resident:
    """The same network, loss, optimiser, precision and settings, and one batch on the device."""

    def __init__(self, options: argparse.Namespace, size: int) -> None:
        self.options = options
        keep_freed_memory()  # as train does
        self.device = distributed.pick_device(options.device)
        if self.device.type == "cuda":
            # As train does, but for every round: with --quick the first one comes before train.
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        model = UNet(init_features=options.features).to(self.device)
        self.model: torch.nn.Module = model.to(memory_format=torch.channels_last)
        if options.compile:
            self.model.compile()
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True)
        self.loss = SoftIoULoss()
        images = torch.randn(options.batch, 3, size, size, device=self.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.masks = (images[:, :1] > 0).float()
        self.step()  # autotuning and compilation are not timed

    def __call__(self) -> measure.Round:
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None

        def steps() -> int:
            for _ in range(self.options.steps):
                self.step()
            return int(self.options.batch * self.options.steps)

        return measure.timed(steps, synchronize)

    def step(self) -> None:
        """Run forward, loss, backward and the optimiser."""
        bf16 = self.options.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            value = self.loss(self.model(self.images, return_logits=True), self.masks)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure both rows and their ratio."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        needed = -(-options.batch * options.steps * 10 // 8) + 16
        shards = options.shards or generated_shards(folder, needed, options.size)
        end_to_end = EndToEnd(options, shards, folder / "runs")
        cases: dict[str, measure.Case] = {
            "resident": Resident(options, _side(shards)),
            "train": end_to_end,
        }
        rounds = measure.alternate(cases, options.repeats, warm_up=not options.quick)
        rows = [measure.row(name, one, batch_size=options.batch) for name, one in rounds.items()]
        wait = statistics.median(end_to_end.waits)
    rows[1]["data_wait_share"] = round(wait, 4)
    pairs = zip(rounds["train"], rounds["resident"], strict=True)
    ratio = statistics.median(train.rate / base.rate for train, base in pairs)
    aims = {
        "train / resident": f"{ratio:.3f} (aim 0.97)",
        "fraction of time waiting for data": f"{wait:.4f}",
    }
    facts = {
        "device": options.device,
        "precision": options.precision,
        "features": options.features,
        "steps": options.steps,
    }
    found = measure.result("train", rows, aims=aims, **facts)
    measure.publish(found, options.json)
    return found


def _side(shards: Path) -> int:
    from portrait_dist.data.shards.reader import read_manifest

    size = read_manifest(shards).size
    return size[0] if size else 256


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = measure.arguments(__doc__)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument("--shards", type=Path, help="packed shards; generated when left out")
    parser.add_argument("--size", type=int, default=256, help="side of generated shards")
    parser.add_argument(
        "--features", type=int, default=32, help="channels of the network's first level"
    )
    parser.add_argument(
        "--batch", type=int, help="images per step (default 64 on a GPU, 4 on a CPU)"
    )
    parser.add_argument("--steps", type=int, help="steps in a round")
    parser.add_argument("--workers", type=int, default=min(16, cores()), help="decoding threads")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--compile", action="store_true", help="compile the network in both rows")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    options.batch = options.batch or (64 if cuda else 4)
    options.steps = options.steps or (300 if cuda else 6 if options.quick else 12)
    options.precision = options.precision or ("bf16" if cuda else "fp32")
    options.repeats = options.repeats or (2 if options.quick else 5)
    return options


if __name__ == "__main__":
    main()
