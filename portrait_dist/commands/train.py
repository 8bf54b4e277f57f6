"""``train``."""

from __future__ import annotations

from typing import Any

import click

from portrait_dist.commands import command
from portrait_dist.commands.completion import complete_setting

TRAIN_EXAMPLES = """\b
Examples:
  portrait-dist train data.shards=shards run.name=first train.max_epochs=20
  torchrun --nproc-per-node 2 -m portrait_dist train data.shards=shards
  portrait-dist train --recipe tutorial data.shards=shards
"""


def _train_summary(result: dict[str, Any]) -> str:
    if "keys" in result:
        return "\n".join(
            f"{name:28s} {default!s:16s} {text}" for name, default, text in result["keys"]
        )
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
        return {
            "keys": [
                (name, item.default, item.metadata["help"]) for name, item in config.knobs().items()
            ]
        }
    from portrait_dist.slurm.launch_checks import check_launch

    check_launch()
    loaded = config.load(recipe or "aisegment_unet", settings)
    from portrait_dist.training import main

    return main.train(loaded)
