"""``prepare`` splits pictures and masks of any layout into train, val and test.

portrait-dist prepare --raw raw --out data
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command
from portrait_dist.commands.numbers import LARGEST_SEED, Fraction, Integer

if TYPE_CHECKING:
    from portrait_dist.data.source.pairs import PairReport
    from portrait_dist.data.source.split import Split

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
        other_pictures: files among the images that are not used for their type.
        out: the folder.
        layout: what the source was taken for, in words.
        not_in_split_file: pairs that were not used because the split file does not name them.
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
    layout: str
    not_in_split_file: int


def _summary(result: PrepareResult) -> str:
    lines = [
        f"taken for {result.layout}",
        f"{result.pairs} pairs: train {result.train}, val {result.val}, test {result.test}, "
        f"in {result.out}",
        f"not used: {result.images_without_matte} images without a matte, "
        f"{result.mattes_without_image} mattes without an image"
        + (
            f", {result.not_in_split_file} pairs that the split file does not name"
            if result.not_in_split_file
            else ""
        ),
        f"next: portrait-dist pack --data {result.out} --out DIR",
    ]
    return "\n".join(lines)


@command("prepare", summary=_summary)
@click.option(
    "--raw",
    required=True,
    help="Folder of images and masks in a known layout, a .csv, .tsv or .jsonl list of them, or "
    "the address of one.",
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
    type=click.Choice(["sample", "group", "given"]),
    help="Assign single pairs, or whole groups: no group in two splits, sizes only near the "
    "fractions; or as the source says.  [default: given where it says it, else sample]",
)
@click.option(
    "--mode",
    type=click.Choice(["link", "copy", "reference"]),
    help="Hard links where the file system allows, copies otherwise; always copies; or leave the "
    "files where they are and list them.  [default: link; reference for an address]",
)
@click.option(
    "--split-file",
    type=click.Path(path_type=Path),
    help="Your own split: JSON of lists of keys, or a CSV of key and split; others are not used.",
)
@click.option(
    "--list",
    "names",
    type=click.Path(path_type=Path),
    help="File that names the files below --raw, one a line, in place of listing them.",
)
@click.option(
    "--check/--no-check",
    default=None,
    help="Read the headers and ends of all files.  [default: unless --mode reference]",
)
def prepare(
    raw: str,
    out: Path,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    split_by: str | None,
    mode: str | None,
    split_file: Path | None,
    names: Path | None,
    check: bool | None,
) -> PrepareResult:
    """Pair images and masks and arrange them in train, val and test.

    \b
        portrait-dist prepare --raw raw --out data
        portrait-dist prepare --raw pictures.csv --out data --split-file my-split.json
        portrait-dist prepare --raw s3://bucket/portraits --out data

    Takes AISegment's tree, images/ and masks/ with the same names, the tutorial's arranged tree,
    Supervisely and P3M trees, and lists; says what it took the source for. Checks that every mask
    has the size of its image, and that no file is cut off.
    """
    from portrait_dist.data.source import split
    from portrait_dist.system.address import is_address

    made, report = split.prepare(
        raw if is_address(raw) else Path(raw),
        out,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        split_by=split_by,
        mode=mode,
        split_file=split_file,
        names=names,
        check=check,
    )
    _name_unused(report)
    return _result(made, report, str(out))


def _result(made: Split, report: PairReport, out: str) -> PrepareResult:
    return PrepareResult(
        pairs=len(report.pairs),
        train=len(made.keys("train")),
        val=len(made.keys("val")),
        test=len(made.keys("test")),
        images_without_matte=len(report.images_without_matte),
        mattes_without_image=len(report.mattes_without_image),
        identical_files=len(report.identical),
        other_pictures=len(report.other_pictures),
        out=out,
        layout=report.layout,
        not_in_split_file=len(report.not_in_split_file),
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
    _name("not in the split file", report.not_in_split_file)


def _name(what: str, paths: Sequence[Path | str]) -> None:
    """Print file names on stderr, the first ten."""
    from portrait_dist.system.address import redact

    for path in paths[:MOST_NAMES]:
        click.echo(f"{what}: {redact(str(path))}", err=True)
    if len(paths) > MOST_NAMES:
        click.echo(f"{what}: and {len(paths) - MOST_NAMES} more", err=True)
