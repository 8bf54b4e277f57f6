"""Options that several commands share, each with one name, one default and one meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from portrait_dist import recipes
from portrait_dist.commands import Part, Size
from portrait_dist.commands.numbers import MOST_WORKERS, Integer

Function = TypeVar("Function", bound=Callable[..., object])

checkpoint = click.option("--checkpoint", required=True, help="A .pth file of a run.")
device = click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"])
)
trained_size = click.option(
    "--size",
    type=Size(),
    help="Size of training, for an old checkpoint that does not say it.  [default: 256x256]",
)
folder_to_fill = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write; new, or one to finish.",
)


def recipe(what: str) -> Callable[[Function], Function]:
    """Make ``--recipe``.

    Args:
        what: what the command does with it.
    """
    return click.option(
        "--recipe",
        metavar="NAME|FILE",
        default=recipes.DEFAULT,
        show_default=True,
        help=f"{what}: one that comes with the package, or a YAML file.",
    )


def workers(what: str) -> Callable[[Function], Function]:
    """Make ``--workers``, None for as many as there are CPUs.

    Args:
        what: threads or processes.
    """
    return click.option(
        "--workers",
        type=Integer(1, MOST_WORKERS),
        help=f"{what}.  [default: the CPUs there are]",
    )


def batch_size(default: int, what: str) -> Callable[[Function], Function]:
    """Make ``--batch-size``.

    Args:
        default: the size without the option.
        what: what a batch holds.
    """
    return click.option(
        "--batch-size", default=default, show_default=True, type=click.IntRange(1), help=what
    )


def part(what: str, default: str) -> Callable[[Function], Function]:
    """Make ``--part``, a pair (number, of how many) or None.

    Args:
        what: the command's verb and what is divided.
        default: what is done without the option.
    """
    return click.option(
        "--part",
        type=Part(),
        help=f"{what} of one part, I from 0 to N - 1; auto: as SLURM's array, srun or torchrun "
        f"say.  [default: {default}]",
    )
