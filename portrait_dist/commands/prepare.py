"""``prepare`` splits a raw tree into train, val and test.

portrait-dist prepare --raw raw --out data
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command
from portrait_dist.commands.numbers import LARGEST_SEED, Fraction, Integer

if TYPE_CHECKING:
    from portrait_dist.data.source.pairs import PairReport

MOST_NAMES = 10
"""File names of a kind that are listed on stderr."""


@dataclass(frozen=True)
class PrepareResult:
    """What the prepared tree holds, and what was not used.

    Args:
        pairs: in all splits.
        train: pairs of the split; val and test likewise.
        images_without_matte: images that were not used.
        mattes_without_image: mattes that were not used.
        identical_files: files that were not used because one of their name and content is.
        other_pictures: files among the images that are no JPEG.
        out: the tree.
    """

    pairs: int
    train: int
    val: int
    test: int
    images_without_matte: int
    mattes_without_image: int
    identical_files: int
    other_pictures: int
    out: str


def _summary(result: PrepareResult) -> str:
    lines = [
        f"{result.pairs} pairs: train {result.train}, val {result.val}, test {result.test}, "
        f"in {result.out}",
        f"not used: {result.images_without_matte} images without a matte, "
        f"{result.mattes_without_image} mattes without an image",
        f"next: portrait-dist pack --data {result.out} --out DIR",
    ]
    return "\n".join(lines)


@command("prepare", summary=_summary)
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
    type=Fraction(),
    default=0.1,
    show_default=True,
    help="Fraction of the pairs for validation, rounded down.",
)
@click.option(
    "--test-fraction",
    type=Fraction(),
    default=0.1,
    show_default=True,
    help="Fraction of the pairs for the test, rounded down.",
)
@click.option(
    "--seed",
    type=Integer(-LARGEST_SEED, LARGEST_SEED),
    default=1,
    show_default=True,
    help="The split is a pure function of the names and this.",
)
@click.option(
    "--split-by",
    type=click.Choice(["sample", "group"]),
    default="sample",
    show_default=True,
    help="Assign single pairs, or whole groups: no group in two splits, sizes only near the "
    "fractions.",
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
) -> PrepareResult:
    """Pair the images and mattes of a raw AISegment tree and arrange them in train, val and test.

    \b
        portrait-dist prepare --raw raw --out data
        portrait-dist prepare --raw raw --out data --split-by group --seed 7

    Checks that every matte has alpha and its image's size, and that no file is cut off.
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
    _name_unused(report)
    return PrepareResult(
        pairs=len(report.pairs),
        train=len(made.keys("train")),
        val=len(made.keys("val")),
        test=len(made.keys("test")),
        images_without_matte=len(report.images_without_matte),
        mattes_without_image=len(report.mattes_without_image),
        identical_files=len(report.identical),
        other_pictures=len(report.other_pictures),
        out=str(out),
    )


def _name_unused(report: PairReport) -> None:
    """Print on stderr what was found and not used."""
    _name("image without a matte", report.images_without_matte)
    _name("matte without an image", report.mattes_without_image)
    _name(
        "not used, the same as a file of its name that is used",
        [other for _, other in report.identical],
    )
    _name("not used, no JPEG by its name", report.other_pictures)


def _name(what: str, paths: list[Path]) -> None:
    """Print file names on stderr, the first ten."""
    for path in paths[:MOST_NAMES]:
        click.echo(f"{what}: {path}", err=True)
    if len(paths) > MOST_NAMES:
        click.echo(f"{what}: and {len(paths) - MOST_NAMES} more", err=True)
