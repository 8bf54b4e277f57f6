"""Images per second on 1 … N ranks of this machine, and the efficiency: rate on N ranks / (N × rate on one).

    python benchmarks/scaling.py --json scaling.json                         # one CPU core for each rank
    python benchmarks/scaling.py --device cuda --shards shards --json scaling.json

Every figure is ``portrait-dist train`` under torchrun, with the same batch on each rank. On a CPU each rank computes with one
thread, so that one rank does not already use all cores; ranks share the memory bandwidth and the cores decode as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
from train import generated_shards


def train(options: argparse.Namespace, shards: Path, folder: Path, ranks: int) -> float:
    """Images per second of one run."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    words += [
        "-m",
        "portrait_dist",
        "train",
        "--json",
        f"data.shards={shards}",
        f"run.root={folder}",
        "run.name=run",
    ]
    words += [
        f"model.init_features={options.features}",
        f"train.batch_size={options.batch}",
        "train.max_epochs=1",
    ]
    words += [
        f"train.max_batches={options.steps}",
        "train.max_val_batches=1",
        "train.average_best=false",
    ]
    words += [
        "train.pictures=0",
        f"train.device={options.device}",
        f"train.precision={options.precision}",
    ]
    words += [
        f"data.workers={options.workers}",
        *(["train.threads=1"] if options.device == "cpu" else []),
    ]
    paths = [str(measure.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout)["images_per_second"])


def main(words: list[str] | None = None) -> dict[str, Any]:
    options = _options(words)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        needed = -(-options.batch * options.steps * max(options.ranks) * 10 // 8) + 16
        shards = (options.shards or generated_shards(folder, needed, options.size)).resolve()
        cases = {str(n): (lambda n=n: train(options, shards, folder, n)) for n in options.ranks}
        rates = measure.alternate(cases, options.repeats, warm_up=False)
    rows = [
        measure.row(f"{n}-ranks", rates[str(n)], ranks=n, batch_per_rank=options.batch)
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


def _options(words: list[str] | None) -> argparse.Namespace:
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
        "--batch", type=int, help="pictures per step and rank (default 64 on a GPU, 4 on a CPU)"
    )
    parser.add_argument("--steps", type=int, help="steps in a run")
    parser.add_argument(
        "--workers", type=int, help="decoding threads of each rank (default 2, on a CPU 1)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default bf16 on a GPU, fp32 on a CPU"
    )
    options = parser.parse_args(words)
    cuda = options.device == "cuda"
    most = torch.cuda.device_count() if cuda else measure.cores()
    options.ranks = options.ranks or [2**n for n in range(10) if 2**n <= most]
    options.batch = options.batch or (64 if cuda else 2 if options.quick else 4)
    options.steps = options.steps or (200 if cuda else 4 if options.quick else 8)
    options.workers = options.workers or (2 if cuda else 1)
    options.precision = options.precision or ("bf16" if cuda else "fp32")
    options.repeats = options.repeats or (1 if options.quick else 3)
    return options


if __name__ == "__main__":
    main()
