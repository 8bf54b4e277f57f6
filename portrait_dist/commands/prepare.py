"""``prepare`` splits a raw tree into train, val and test.

portrait-dist prepare --raw raw --out data
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from portrait_dist.commands import command


def _prepare_summary(result: dict[str, Any]) -> str:
    lines = [
        f"{result['pairs']} pairs: train {result['train']}, val {result['val']}, test {result['test']}, in {result['out']}",
        f"left out: {result['images_without_matte']} images without a matte, "
        f"{result['mattes_without_image']} mattes without an image",
        f"next: portrait-dist pack --data {result['out']} --out DIR",
    ]
    return "\n".join(lines)


@command("prepare", summary=_prepare_summary)
@click.option(
    "--raw",
    required=True,
    type=click.Path(path_type=Path),
    help="Raw tree that holds clip_img and matting.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write; new, or of the same settings.",
)
@click.option(
    "--val-fraction",
    default=0.1,
    show_default=True,
    help="Share of the pairs for validation, rounded down.",
)
@click.option(
    "--test-fraction",
    default=0.1,
    show_default=True,
    help="Share of the pairs for the test, rounded down.",
)
@click.option(
    "--seed",
    default=1,
    show_default=True,
    help="The split is a pure function of the names and this.",
)
@click.option(
    "--split-by",
    type=click.Choice(["sample", "group"]),
    default="sample",
    show_default=True,
    help="Deal single pairs, or whole groups: no group in two splits, sizes only near the fractions.",
)
@click.option(
    "--mode",
    type=click.Choice(["link", "copy"]),
    default="link",
    show_default=True,
    help="Hard links where the file system allows, copies otherwise; or always copies.",
)
def prepare(
    raw: Path,
    out: Path,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    split_by: str,
    mode: str,
) -> dict[str, Any]:
    """Pair the images and mattes of a raw AISegment tree and arrange them in train, val and test.

    \b
        portrait-dist prepare --raw raw --out data
        portrait-dist prepare --raw raw --out data --split-by group --seed 7

    Checks that every matte has an alpha channel and the size of its image, and that no file is cut off.
    """
    from portrait_dist.data.source import split

    made, report = split.prepare(
        raw,
        out,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        split_by=split_by,
        mode=mode,
    )
    _name("image without a matte", report.images_without_matte)
    _name("matte without an image", report.mattes_without_image)
    _name(
        "left out, the same as a file of its name that is taken",
        [other for _, other in report.identical],
    )
    return {
        "pairs": len(report.pairs),
        **{name: len(made.keys(name)) for name in split.SPLITS},
        "images_without_matte": len(report.images_without_matte),
        "mattes_without_image": len(report.mattes_without_image),
        "identical_files": len(report.identical),
        "out": str(out),
    }


def _name(what: str, paths: list[Path], limit: int = 10) -> None:
    """Name files on stderr, the first ten."""
    for path in paths[:limit]:
        click.echo(f"{what}: {path}", err=True)
    if len(paths) > limit:
        click.echo(f"{what}: and {len(paths) - limit} more", err=True)
