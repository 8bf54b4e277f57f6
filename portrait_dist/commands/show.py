"""``show``: a contact sheet of what is in a prepared folder or in shards, and what augmentation does to it.

portrait-dist show --data shards --split train --out sheet.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from portrait_dist.commands import Size, command


@command(
    "show",
    summary=lambda result: f"{result['samples']} samples of {result['split']} in {result['out']}",
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
    type=click.IntRange(1, 200),
    default=8,
    show_default=True,
    help="Rows, evenly spread over the split.",
)
@click.option(
    "--augmented",
    type=click.IntRange(0, 20),
    default=3,
    show_default=True,
    help="Augmented versions of each.",
)
@click.option(
    "--size", type=Size(), help="Of each picture.  [default: the shards' own, or 256x256]"
)
@click.option("--recipe", metavar="NAME|FILE", help="Take the augmentation from this recipe.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Of the augmentation."
)
@click.argument("words", nargs=-1, metavar="[key=value …]")
def show(
    data: str,
    split: str,
    out: Path,
    samples: int,
    augmented: int,
    size: tuple[int, int] | None,
    recipe: str | None,
    seed: int,
    words: tuple[str, ...],
) -> dict[str, Any]:
    """Draw a contact sheet: image, matte, overlay, cut-out, and augmented versions.

    \b
        portrait-dist show --data shards --out sheet.png
        portrait-dist show --data data --split val --augmented 0 --out sheet.png
        portrait-dist show --data shards --out sheet.png augment.rotation=15 augment.background=1
    """
    from portrait_dist.data import contact_sheet

    return contact_sheet.write(
        data,
        split,
        out,
        samples=samples,
        augmented=augmented,
        size=size,
        recipe=recipe,
        words=words,
        seed=seed,
    )
