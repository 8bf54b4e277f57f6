"""Compare networks that train for the same time on the same images.

    python benchmarks/equal_time.py --raw RAW --minutes 5 --json equal_time.json
    python benchmarks/equal_time.py --pairs 109 --minutes 1      # generated portraits

Time is CPU time of the training alone, ``minutes`` on each core, for on shared machines the clock
also counts what neighbours do. A short and a longer training give the seconds of an epoch, imports
left out; as many epochs as fit are the length of the schedule, so that every network ends with the
smallest learning rate. ``ckpt_best.pth`` (best on validation) is scored on the test images.
Weights are random at first, and all settings but the network's are the recipe's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import recipes
from recipes import call, raw_tree, scores_of, shards_of

from portrait_dist.inference import PortraitSegmenter
from portrait_dist.system.info import cores

NETWORKS: dict[str, list[str]] = {
    "unet, 8 features": ["model.name=unet", "model.args.init_features=8"],
    "unet, 16 features": ["model.name=unet", "model.args.init_features=16"],
    "sg:pp_lite_t_seg": ["model.name=sg:pp_lite_t_seg"],
    "segmentation_models_pytorch.Unet, mobilenet_v2": [
        "model.name=segmentation_models_pytorch.Unet",
        "model.args.encoder_name=mobilenet_v2",
        "model.args.encoder_weights=null",
    ],
}
CALIBRATION = 1, 3
"""Epochs of the two trainings that give the seconds of one."""


def train(
    name: str, epochs: int, run: str, shards: Path, options: argparse.Namespace, work: Path
) -> Any:
    """Train a network for so many epochs; return its result and its CPU seconds."""
    own = [f"data.shards={shards}", f"run.root={work}", f"run.name={run}"]
    return call(
        *("train", "--recipe", options.recipe, *NETWORKS[name], *own),
        *(f"train.seed={options.seed}", f"train.max_epochs={epochs}", "train.pictures=0"),
        f"train.precision={options.precision}",
    )


def epochs_that_fit(minutes: float, cpu_of: Callable[[int], float]) -> tuple[int, float]:
    """Find how many epochs fit into CPU minutes on each core.

    Args:
        minutes: on each core.
        cpu_of: trains for so many epochs, at most three; returns the CPU seconds.

    Returns:
        Epochs, at least one, and the CPU seconds of a training that are not its epochs'.
    """
    few, more = (cpu_of(epochs) for epochs in CALIBRATION)
    epoch = (more - few) / (CALIBRATION[1] - CALIBRATION[0])
    return max(1, int(minutes * 60 * cores() / epoch)), few - epoch * CALIBRATION[0]


def compare(name: str, shards: Path, options: argparse.Namespace, work: Path) -> measure.Row:
    """Find the epochs that fit, train, and score the best checkpoint."""
    number = list(NETWORKS).index(name)
    epochs, around = epochs_that_fit(
        options.minutes,
        lambda few: train(name, few, f"{number}-calibration-{few}", shards, options, work)[1],
    )
    trained, cpu = train(name, epochs, f"{number}", shards, options, work)
    scores = scores_of(trained["checkpoint"], shards, "test")
    segmenter = PortraitSegmenter.from_checkpoint(trained["checkpoint"], device="cpu")
    spent = cpu - around
    row = {
        "name": name,
        **{name: round(score, 4) for name, score in scores.items()},
        "parameters": sum(one.numel() for one in segmenter.model.parameters()),
        "epochs": epochs,
        "cpu_minutes": round(spent / 60, 2),
        "cpu_seconds_per_image": float(f"{spent / trained['samples_seen']:.4g}"),
    }
    print(f"  {name}: test IoU {row['test_iou']:.4f}, {epochs} epochs", flush=True)
    return row


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train all networks, one after the other, and write the table."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = options.work or Path(temporary)
        shards = shards_of(options.seed, raw_tree(options, work), options.side, work)
        rows = [compare(name, shards, options, work) for name in options.only]
    images = options.raw.name if options.raw else f"{options.pairs} generated pairs"
    about = {
        "images": f"{images}, {options.side}x{options.side}",
        "minutes": options.minutes,
        "precision": options.precision,
        "recipe": options.recipe,
        "seed": options.seed,
    }
    found = measure.result("equal_time", rows, **about)
    measure.publish(found, options.json)
    return found


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = recipes.arguments(__doc__, NETWORKS)
    parser.add_argument("--minutes", type=float, default=5, help="CPU minutes on each core")
    parser.add_argument("--recipe", default="unet_small", help="everything but the network")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--seed", type=int, default=1, help="of split, weights and order")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
