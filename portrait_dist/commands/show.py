"""``show`` draws samples of a prepared folder or of shards, and what augmentation makes of them.

portrait-dist show --data shards --split train --out sheet.png
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import Size, command, options
from portrait_dist.commands.numbers import LARGEST_SEED, Integer

if TYPE_CHECKING:
    from portrait_dist.data.contact_sheet import Sheet


@command(
    "show",
    summary=lambda sheet: f"{sheet.samples} samples of {sheet.split} in {sheet.out}",
)
@click.option(
    "--data",
    required=True,
    metavar="DIR|SHARDS",
    help="What 'prepare' or 'pack' wrote; also a remote address.",
)
@click.option(
    "--split", default="train", show_default=True, metavar="train|val|test", help="Which split."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Picture to write, .png or .jpg."
)
@click.option(
    "--samples",
    type=Integer(1, 200),
    default=8,
    show_default=True,
    help="Rows, evenly spread over the split.",
)
@click.option(
    "--augmented",
    type=Integer(0, 20),
    default=3,
    show_default=True,
    help="Augmented versions of each.",
)
@click.option(
    "--size",
    type=Size(),
    help="Each picture is drawn as large as fits into it.  [default: the shards' own, or 256x256]",
)
@options.recipe("Take the augmentation from this recipe")
@click.option(
    "--seed",
    type=Integer(0, LARGEST_SEED),
    default=42,
    show_default=True,
    help="Of the augmentation.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def show(
    data: str,
    split: str,
    out: Path,
    samples: int,
    augmented: int,
    size: tuple[int, int] | None,
    recipe: str,
    seed: int,
    overrides: tuple[str, ...],
) -> Sheet:
    """Draw a contact sheet: image, matte, overlay, cut-out, and augmented versions.

    The augmentation is that of the recipe that 'train' takes by default.

    \b
        portrait-dist show --data shards --out sheet.png
        portrait-dist show --data data --split val --augmented 0 --out sheet.png
        portrait-dist show --data shards --out sheet.png augment.rotation=15 augment.background=1
    """
    from portrait_dist import config
    from portrait_dist.data import contact_sheet

    return contact_sheet.write(
        data,
        split,
        out,
        config.load(recipe, overrides).augment,
        samples=samples,
        augmented=augmented,
        size=size,
        seed=seed,
    )
