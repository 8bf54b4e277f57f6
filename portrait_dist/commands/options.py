"""Options that several commands share, each with one name, one default and one meaning."""

from __future__ import annotations

import functools
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
background = click.option(
    "--background",
    default="transparent",
    show_default=True,
    help="transparent, a colour (white, #1e90ff), blur, or an image.",
)
trained_size = click.option(
    "--size",
    type=Size(),
    help="Size of training, for an old checkpoint that does not say it.  [default: 256x256]",
)
trust_code = click.option(
    "--trust-code",
    is_flag=True,
    help="Import the checkpoint's network where its code is none of this package or a known "
    "library; it is executed.",
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


MASK_OPTIONS = (
    click.option(
        "--refine/--no-refine",
        default=True,
        show_default=True,
        help="Let alpha follow the photo's edges at full resolution.",
    ),
    click.option(
        "--mirror/--no-mirror",
        default=True,
        show_default=True,
        help="Average with the mirrored photo's mask.",
    ),
    click.option(
        "--fit",
        type=click.Choice(["letterbox", "cover", "squash"]),
        help="How photos of other shapes than training's are brought to the network.  [default: as "
        "in training, and letterbox where it squashed]",
    ),
    click.option(
        "--levels",
        default=(0.0, 1.0),
        show_default=True,
        type=(float, float),
        metavar="LOW HIGH",
        help="The network's alpha at which the mask is 0 and 1; 0.3 0.7 removes haze.",
    ),
    click.option("--largest", is_flag=True, help="Keep the largest person only; drop islands."),
)
"""What decides the masks, beside the network and its arithmetic."""


def segmenter(*precisions: str) -> Callable[[Function], Function]:
    """Make the options of a segmenter: what decides the masks, and where they are computed.

    Args:
        precisions: the choices of ``--precision``; the first is the default.
    """
    arithmetic = (
        "Arithmetic of the network. auto: bf16 where the processor multiplies it, else fp32."
    )
    if "int8" in precisions:
        arithmetic += (
            " int8, for hundreds of photos on a CPU: calibrated with 64 of them, used where masks "
            "keep IoU 0.999 with fp32's."
        )
    return _all(
        *MASK_OPTIONS,
        device,
        click.option(
            "--precision",
            default=precisions[0],
            show_default=True,
            type=click.Choice(precisions),
            help=arithmetic,
        ),
        click.option(
            "--engine",
            default="torch",
            show_default=True,
            type=click.Choice(["torch", "openvino"]),
            help="What runs the network. openvino, of the extra [openvino], is faster on CPUs.",
        ),
    )


def _all(
    *decorators: Callable[[Callable[..., object]], Callable[..., object]],
) -> Callable[[Function], Function]:
    """Join options into one decorator; the help shows them in the order given."""

    def decorate(function: Function) -> Function:
        return functools.reduce(lambda done, option: option(done), reversed(decorators), function)

    return decorate
