"""``train``: from shards to a trained model."""

from __future__ import annotations

from typing import Any

import click

from portrait_dist.commands import command
from portrait_dist.commands.completion import complete_setting

TRAIN_EXAMPLES = """\b
Examples:
  portrait-dist train data.shards=shards run.name=first train.max_epochs=20
  portrait-dist train --recipe tutorial data.shards=shards
  portrait-dist train --keys --recipe tutorial
"""


def _train_summary(result: dict[str, Any]) -> str:
    if "keys" in result:
        return _table(result["recipe"], result["keys"])
    trained = f"{result['epochs']} epochs ({result['samples_seen']} samples"
    first = (
        f"trained {trained}, {result['images_per_second']} images/s)"
        if result["images_per_second"]
        else f"trained before, nothing to do now: {trained})"
    )
    return (
        f"{first}\n"
        f"best validation IoU {result['best_iou']:.4f}\n"
        f"checkpoint {result['checkpoint']}\n"
        f"look: tensorboard --logdir {result['run_dir']}, "
        f"or portrait-dist report {result['run_dir']}"
    )


def _table(recipe: str, keys: list[dict[str, Any]]) -> str:
    """Lay out the settings: key, default, the recipe's value where it differs, values, meaning."""
    header = ("key", "default", recipe, "values", "meaning")
    rows = [header]
    for one in keys:
        default, value = _shown(one["default"]), _shown(one["value"])
        allowed = one["allowed"]
        rows.append((one["name"], default, "" if value == default else value, allowed, one["help"]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _keys(recipe: str) -> dict[str, Any]:
    from portrait_dist import config

    loaded = config.load(recipe)
    return {
        "recipe": recipe,
        "keys": [
            {
                "name": name,
                "default": setting.default,
                "value": config.value_of(loaded, name),
                "allowed": setting.allowed,
                "help": setting.help,
            }
            for name, setting in config.settings().items()
        ],
    }


@command("train", summary=_train_summary, epilog=TRAIN_EXAMPLES)
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="Recipe that comes with the package, or a YAML file; aisegment_unet when not given.",
)
@click.option(
    "--keys", is_flag=True, help="List every key: default, recipe's value, values, meaning."
)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_setting)
def train(recipe: str | None, keys: bool, settings: tuple[str, ...]) -> dict[str, Any] | None:
    """Train; resume a run of that name where it stopped."""
    from portrait_dist import config, recipes

    recipe = recipe if recipe is not None else recipes.DEFAULT
    if keys:
        return _keys(recipe)
    from portrait_dist.slurm.launch_checks import check_launch

    check_launch()
    loaded = config.load(recipe, settings)
    from portrait_dist.training import main

    return main.train(loaded)
