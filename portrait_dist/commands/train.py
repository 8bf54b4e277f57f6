"""``train`` and ``evaluate``."""

from __future__ import annotations

from typing import Any

import click

from portrait_dist.commands import command
from portrait_dist.completion import complete_setting

TRAIN_EXAMPLES = """\b
Examples:
  portrait-dist train data.shards=shards run.name=first train.max_epochs=20
  torchrun --nproc-per-node 2 -m portrait_dist train data.shards=shards
  portrait-dist train --recipe tutorial data.shards=shards
"""


def _train_summary(result: dict[str, Any]) -> str:
    if "keys" in result:
        return "\n".join(f"{name:28s} {default!s:16s} {text}" for name, default, text in result["keys"])
    return (
        f"trained {result['epochs']} epochs ({result['samples_seen']} samples, {result['images_per_second']} images/s)\n"
        f"best validation IoU {result['best_iou']:.4f}\n"
        f"checkpoint {result['checkpoint']}\n"
        f"look: tensorboard --logdir {result['run_dir']}, or portrait-dist report {result['run_dir']}"
    )


@command("train", summary=_train_summary, epilog=TRAIN_EXAMPLES)
@click.option("--recipe", help="Name of a recipe that comes with the package, or a YAML file.")
@click.option("--keys", is_flag=True, help="List every key with its default and meaning.")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_setting)
def train(recipe: str | None, keys: bool, settings: tuple[str, ...]) -> dict[str, Any] | None:
    """Train, alone or on every rank of a torchrun; goes on where a run of that name stopped."""
    from portrait_dist import config

    if keys:
        return {"keys": [(name, item.default, item.metadata["help"]) for name, item in config.knobs().items()]}
    from portrait_dist import slurm

    slurm.check_launch()
    loaded = config.load(recipe or "aisegment_unet", settings)
    from portrait_dist.training import run

    return run.train(loaded)


def _evaluate_summary(result: dict[str, Any]) -> str:
    return (
        f"{result['split']}: {result['samples']} samples\n"
        f"IoU {result['iou']:.4f} (all pixels), {result['mean_iou']:.4f} (mean over images)\n"
        f"precision {result['precision']:.4f}, recall {result['recall']:.4f}; IoU is largest above {result['best_threshold']:g}\n"
        f"boundary IoU {result['boundary_iou']:.4f}, gradient error {result['gradient_error']:.3f}\n"
        f"MAE {result['mae']:.5f}, MSE {result['mse']:.5f}, loss {result['loss']:.4f}"
    )


@command(
    "evaluate",
    summary=_evaluate_summary,
    epilog="\b\nExample:\n  portrait-dist evaluate --checkpoint runs/first/ckpt_best.pth --data shards --split test\n",
)
@click.option("--checkpoint", required=True, help="A .pth file of a run.")
@click.option("--data", "shards", required=True, help="Folder or address of the shards.")
@click.option("--split", default="test", show_default=True, type=click.Choice(["train", "val", "test"]))
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Samples per rank and step.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(0), help="Decoding threads.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--per-sample", "table", type=click.Path(dir_okay=False), help="CSV file for every sample's figures.")
@click.option("--curve", type=click.Path(dir_okay=False), help="CSV file for precision, recall and IoU over thresholds.")
@click.option("--pictures", type=click.Path(file_okay=False), help="Folder for pictures of the worst and the median samples.")
def evaluate(**options: Any) -> dict[str, Any] | None:
    """Score a checkpoint on a split, alone or under torchrun; every sample counts exactly once."""
    from portrait_dist import distributed, evaluation

    try:
        return evaluation.evaluate(options.pop("checkpoint"), options.pop("shards"), options.pop("split"), **options)
    finally:
        distributed.stop()
