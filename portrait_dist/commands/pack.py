"""``pack`` writes shards of a prepared tree.

portrait-dist pack --data data --out shards
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import Size, command, options
from portrait_dist.commands.numbers import Integer

if TYPE_CHECKING:
    from portrait_dist.data.shards.writer import PackResult
    from portrait_dist.preprocessing import Fit


def _summary(result: PackResult) -> str:
    speed = (
        f", {result.pairs_per_second:.1f} pairs/s"
        if result.packed
        else ", all of them there already"
    )
    version = f", version {result.version}" if result.version > 1 else ""
    what = f"part {result.part}: " if result.part and not result.finished else ""
    done = (
        f"{what}{result.samples} samples in {result.shards} shards, {result.bytes / 1e6:.1f} MB, "
        f"in {result.out}{version}{speed}\n"
    )
    if result.finished:
        return done + f"next: portrait-dist train data.shards={result.out}"
    return (
        done + f"{result.shards_missing} shards of other parts are missing; the last part finishes"
    )


@command("pack", summary=_summary)
@click.option(
    "--data",
    required=True,
    help="Folder that 'portrait-dist prepare' wrote, or any source that it takes.",
)
@options.folder_to_fill
@click.option(
    "--size",
    type=Size(original=True),
    default="256x256",
    show_default=True,
    help="Pixels of every sample (256 is 256x256), or their own.",
)
@click.option(
    "--fit",
    type=click.Choice(["squash", "letterbox", "cover"]),
    default="squash",
    show_default=True,
    help="How images of another shape reach --size: resized whatever their shape; whole, their "
    "edge pixels continued; or filling it, the longer side cut.",
)
@click.option(
    "--samples-per-shard",
    type=Integer(1, 10**7),
    default=1024,
    show_default=True,
    help="Samples in each tar.",
)
@options.workers("Threads")
@click.option(
    "--codec",
    type=click.Choice(["jpeg", "raw"]),
    default="jpeg",
    show_default=True,
    help="JPEG and grey PNG; or pixels, about seven times as large, that need no decoding.",
)
@click.option(
    "--quality",
    type=Integer(1, 100),
    default=95,
    show_default=True,
    help="Of the JPEGs, 1 to 100; with --size original only of those that EXIF says to turn.",
)
@options.part("Pack the shards", "all shards")
@click.option(
    "--finish",
    is_flag=True,
    help="Pack nothing: write the manifest where every shard is there, else name what is missing.",
)
@click.option(
    "--append",
    is_flag=True,
    help="Add pairs whose keys are not in --out yet, as new shards behind the old ones.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Hash the shards that are there already, instead of comparing their length and time.",
)
def pack(
    data: str,
    out: Path,
    size: tuple[int, int] | None,
    fit: Fit,
    samples_per_shard: int,
    workers: int | None,
    codec: str,
    quality: int,
    part: tuple[int, int] | None,
    finish: bool,
    append: bool,
    check: bool,
) -> PackResult:
    """Pack a prepared tree into WebDataset shards with a manifest and indexes.

    \b
        portrait-dist pack --data data --out shards
        portrait-dist pack --data data --out shards-original --size original
        portrait-dist pack --data data --out shards-raw --codec raw --workers 16
        sbatch --array=0-15 --wrap "portrait-dist pack --data data --out shards --part auto"

    Parts run on any machines that share both folders, at any time and in any order; the last one
    writes the manifest. The bytes are those of one process.

    --append packs new pairs behind packed ones, which stay as they are, in their splits.

    Interrupted and run again it finishes with the bytes of an uninterrupted run. At original size
    the JPEG files are stored as they are; those that EXIF says to turn, upright.
    """
    from portrait_dist.data.shards import append as appending
    from portrait_dist.data.shards import writer

    arguments = (data, out, size, samples_per_shard, workers, codec, quality)
    if append:
        if part or finish or check:
            raise click.UsageError("--append stands alone: without --part, --finish and --check")
        return appending.append(*arguments, fit=fit)
    return writer.pack(*arguments, part=part, finish=finish, check=check, fit=fit)
