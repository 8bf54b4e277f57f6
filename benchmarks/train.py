"""Training end to end: ``portrait-dist train`` on real shards against the same network on batches that lie on the device.

    python benchmarks/train.py --json train.json                                        # CPU; generates and packs portraits
    python benchmarks/train.py --device cuda --shards shards --batch 64 --json train.json

Rows: resident (forward, loss, backward, Adam on one batch that is already normalised and on the device), train (the whole way:
read, decode, copy, augment, the trainer with its metrics), with the share of time in which train waited for data. The ratio of
the two says how much of the network's speed the rest takes away.
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
from portrait_dist.system.malloc import keep_freed_memory


def generated_shards(folder: Path, pairs: int, size: int) -> Path:
    """Shards of generated portraits, ``size`` pixels square."""
    from portrait_dist.data.shards import writer
    from portrait_dist.data.source import split, synthetic

    synthetic.generate(folder / "raw", pairs, seed=1)
    split.prepare(folder / "raw", folder / "tree")
    writer.pack(folder / "tree", folder / "shards", (size, size))
    return folder / "shards"


class EndToEnd:
    """``portrait-dist train`` for a number of steps, in this process; keeps the share of time spent waiting for data."""

    def __init__(self, options: argparse.Namespace, shards: Path, folder: Path) -> None:
        self.options, self.shards, self.folder = options, shards, folder
        self.waits: list[float] = []
        self.runs = 0

    def __call__(self) -> float:
        from portrait_dist.training.main import train

        self.runs += 1
        keys = {
            "data.shards": self.shards,
            "data.workers": self.options.workers,
            "run.root": self.folder,
        }
        keys |= {
            "run.name": f"run{self.runs}",
            "model.init_features": self.options.features,
            "train.max_epochs": 1,
        }
        keys |= {
            "train.batch_size": self.options.batch,
            "train.max_batches": self.options.steps,
            "train.max_val_batches": 1,
        }
        keys |= {
            "train.precision": self.options.precision,
            "train.compile": str(self.options.compile).lower(),
        }
        keys |= {
            "train.device": self.options.device,
            "train.average_best": "false",
            "train.pictures": 0,
        }
        result = train(config.load(None, [f"{key}={value}" for key, value in keys.items()]))
        assert result is not None
        lines = [
            json.loads(line)
            for line in (self.folder / f"run{self.runs}" / "metrics.jsonl").read_text().splitlines()
        ]
        self.waits += [line["data_wait_share"] for line in lines if line["kind"] == "epoch"]
        return float(result.images_per_second)


class Resident:
    """The same network, loss, optimiser and precision, and one batch on the device."""

    def __init__(self, options: argparse.Namespace, size: int) -> None:
        self.options = options
        keep_freed_memory()  # as train does
        self.device = distributed.pick_device(options.device)
        self.model = UNet(init_features=options.features).to(
            self.device, memory_format=torch.channels_last
        )
        if options.compile:
            self.model.compile()
        self.optimizer, self.loss = torch.optim.Adam(self.model.parameters(), 1e-3), SoftIoULoss()
        images = torch.randn(options.batch, 3, size, size, device=self.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.masks = (images[:, :1] > 0).float()
        self.step()

    def __call__(self) -> float:
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        seconds = measure.seconds_of(
            lambda: [self.step() for _ in range(self.options.steps)], synchronize
        )
        return self.options.batch * self.options.steps / seconds

    def step(self) -> None:
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"
        ):
            value = self.loss(self.model(self.images, return_logits=True), self.masks)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()


def main(words: list[str] | None = None) -> dict[str, Any]:
    options = _options(words)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        needed = -(-options.batch * options.steps * 10 // 8) + 16
        shards = options.shards or generated_shards(folder, needed, options.size)
        end_to_end, resident = (
            EndToEnd(options, shards, folder / "runs"),
            Resident(options, _side(shards)),
        )
        rates = measure.alternate(
            {"resident": resident, "train": end_to_end}, options.repeats, warm_up=not options.quick
        )
        rows = [
            measure.row(name, values, batch_size=options.batch) for name, values in rates.items()
        ]
        wait = statistics.median(end_to_end.waits)
    rows[1]["data_wait_share"] = round(wait, 4)
    ratios = [train / base for train, base in zip(rates["train"], rates["resident"], strict=True)]
    aims = {
        "train / resident": f"{statistics.median(ratios):.3f} (aim 0.97)",
        "share of time waiting for data": f"{wait:.4f}",
    }
    about = {
        "device": options.device,
        "precision": options.precision,
        "features": options.features,
        "steps": options.steps,
    }
    found = measure.result("train", rows, aims=aims, **about)
    measure.publish(found, options.json)
    return found


def _side(shards: Path) -> int:
    from portrait_dist.data.shards.reader import read_manifest

    size = read_manifest(shards).size
    return size[0] if size else 256


def _options(words: list[str] | None) -> argparse.Namespace:
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
        "--batch", type=int, help="pictures per step (default 64 on a GPU, 4 on a CPU)"
    )
    parser.add_argument("--steps", type=int, help="steps in a round")
    parser.add_argument(
        "--workers", type=int, default=min(16, measure.cores()), help="decoding threads"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--compile", action="store_true", help="compile the network in both rows")
    options = parser.parse_args(words)
    cuda = options.device == "cuda"
    options.batch = options.batch or (64 if cuda else 4)
    options.steps = options.steps or (300 if cuda else 6 if options.quick else 12)
    options.precision = options.precision or ("bf16" if cuda else "fp32")
    options.repeats = options.repeats or (2 if options.quick else 5)
    return options


if __name__ == "__main__":
    main()
