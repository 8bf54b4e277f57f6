"""Measure training on 1 … N ranks of this machine, and its efficiency.

    python benchmarks/scaling.py --json scaling.json              # one CPU core for each rank
    python benchmarks/scaling.py --device cuda --shards shards --json scaling.json

The efficiency is the rate on N ranks / (N × the rate on one).

Every number is the second of two epochs of ``portrait-dist train`` under torchrun, with the same
batch on each rank: the first one pays for start-up and autotuning. On a CPU each rank computes with
one thread, so that one rank does not already use all cores; the ranks share the memory bandwidth,
and the cores decode as well. CPU seconds are rank 0's, validation of one batch included.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
from train import generated_shards, last_epoch

from portrait_dist.system.info import cores


def train(options: argparse.Namespace, shards: Path, folder: Path, ranks: int) -> measure.Round:
    """Train two epochs under torchrun and measure the second."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    settings = {
        "data.shards": shards,
        "data.workers": options.workers,
        "run.root": folder,
        "run.name": "run",
        "model.init_features": options.features,
        "train.batch_size": options.batch,
        "train.max_epochs": 2,
        "train.max_batches": options.steps,
        "train.max_val_batches": 1,
        "train.average_best": "false",
        "train.pictures": 0,
        "train.device": options.device,
        "train.precision": options.precision,
    }
    if options.device == "cpu":
        settings["train.threads"] = 1
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    command = [sys.executable, *torchrun, "-m", "portrait_dist", "train", "--json"]
    command += [f"{name}={value}" for name, value in settings.items()]
    paths = [str(measure.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    measure.run_measured(command, env=environment)
    return last_epoch(folder / "run")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure all numbers of ranks."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        needed = -(-options.batch * options.steps * max(options.ranks) * 10 // 8) + 16
        shards = (options.shards or generated_shards(folder, needed, options.size)).resolve()
        cases = {
            str(n): functools.partial(train, options, shards, folder, n) for n in options.ranks
        }
        rounds = measure.alternate(cases, options.repeats, warm_up=False)
    rows = [
        measure.row(f"{n}-ranks", rounds[str(n)], ranks=n, batch_per_rank=options.batch)
        for n in options.ranks
    ]
    for line in rows:
        one = rows[0]["images_per_second"] / rows[0]["ranks"]
        line["efficiency"] = round(line["images_per_second"] / line["ranks"] / one, 3)
    found = measure.result(
        "scaling",
        rows,
        device=options.device,
        features=options.features,
        precision=options.precision,
    )
    measure.publish(found, options.json)
    return found


def _options(arguments: list[str] | None) -> argparse.Namespace:
    import torch

    parser = measure.arguments(__doc__)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        help="numbers of ranks (default 1, 2, 4 … as far as cores or GPUs go)",
    )
    parser.add_argument("--shards", type=Path, help="packed shards; generated when left out")
    parser.add_argument("--size", type=int, default=256, help="side of generated shards")
    parser.add_argument(
        "--features", type=int, default=32, help="channels of the network's first level"
    )
    parser.add_argument(
        "--batch", type=int, help="images per step and rank (default 64 on a GPU, 4 on a CPU)"
    )
    parser.add_argument("--steps", type=int, help="steps in a run")
    parser.add_argument(
        "--workers", type=int, help="decoding threads of each rank (default 2, on a CPU 1)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default bf16 on a GPU, fp32 on a CPU"
    )
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    most = torch.cuda.device_count() if cuda else cores()
    options.ranks = options.ranks or [2**n for n in range(10) if 2**n <= most]
    options.batch = options.batch or (64 if cuda else 2 if options.quick else 4)
    options.steps = options.steps or (200 if cuda else 4 if options.quick else 8)
    options.workers = options.workers or (2 if cuda else 1)
    options.precision = options.precision or ("bf16" if cuda else "fp32")
    options.repeats = options.repeats or (1 if options.quick else 3)
    return options


if __name__ == "__main__":
    main()
