"""``train``: from shards to a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from portrait_dist.commands import command, options
from portrait_dist.commands.completion import complete_setting

if TYPE_CHECKING:
    from portrait_dist.training.results import TrainResult

TRAIN_EXAMPLES = """\b
Examples:
  portrait-dist train data.shards=shards run.name=first train.max_epochs=20
  portrait-dist train --nproc gpu data.shards=shards run.name=first
  portrait-dist train --recipe tutorial data.shards=shards
  portrait-dist train --keys --recipe tutorial
"""


@dataclass(frozen=True)
class Key:
    """One setting, as ``train --keys`` lists it.

    Args:
        name: such as ``train.lr``.
        default: its value without recipe and arguments.
        value: its value in the recipe.
        allowed: what values it takes.
        help: its meaning.
    """

    name: str
    default: Any
    value: Any
    allowed: str
    help: str


@dataclass(frozen=True)
class Keys:
    """All settings, and their values in a recipe."""

    recipe: str
    keys: list[Key]


def _train_summary(result: Keys | TrainResult) -> str:
    if isinstance(result, Keys):
        return _table(result)
    best = "unknown" if result.best is None else f"{result.best:.4f}"
    watched = "IoU" if result.watched == "SoftIoU" else result.watched
    trained = f"{result.epochs} epochs, {result.steps} steps ({result.samples_seen} samples"
    first = (
        f"trained {trained}, {result.images_per_second} images/s)"
        if result.images_per_second
        else f"trained before, nothing to do now: {trained})"
    )
    return (
        f"{first}\n"
        f"best validation {watched} {best}\n"
        f"checkpoint {result.checkpoint}\n"
        f"look: tensorboard --logdir {result.run_dir}, "
        f"or portrait-dist report {result.run_dir}"
    )


def _table(listed: Keys) -> str:
    """Lay out the settings: key, default, the recipe's value where it differs, values, meaning."""
    rows = [("key", "default", listed.recipe, "values", "meaning")]
    for one in listed.keys:
        value = "" if one.value == one.default else _shown(one.value)
        rows.append((one.name, _shown(one.default), value, one.allowed, one.help))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _keys(recipe: str) -> Keys:
    from portrait_dist import config

    loaded = config.load(recipe)
    return Keys(
        recipe,
        [
            Key(name, one.default, config.value_of(loaded, name), one.allowed, one.help)
            for name, one in config.settings().items()
        ],
    )


@command("train", summary=_train_summary, epilog=TRAIN_EXAMPLES)
@options.recipe("Recipe")
@click.option(
    "--nproc",
    metavar="N|auto|gpu",
    help="Ranks to start on this machine: a number, one for each GPU (gpu), or auto: one for each "
    "GPU, or 2 without. One process when not given.",
)
@click.option(
    "--keys", is_flag=True, help="List every key: default, recipe's value, values, meaning."
)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_setting)
def train(
    recipe: str, nproc: str | None, keys: bool, settings: tuple[str, ...]
) -> Keys | TrainResult | None:
    """Train; resume a run of that name where it stopped."""
    from portrait_dist import config

    if keys:
        return _keys(recipe)
    from portrait_dist.slurm.launch_checks import check_launch

    check_launch()
    loaded = config.load(recipe, settings)  # before any rank starts: a typing error costs nothing
    if nproc is not None:
        from portrait_dist.training import launch

        if (ranks := launch.ranks_here(nproc)) > 1:
            return launch.run(ranks, ["--recipe", recipe, *settings])
    from portrait_dist.training import main

    return main.train(loaded)
