"""``predict``: masks and cut-outs of photos."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Unpack

import click

from portrait_dist.commands import command, options

if TYPE_CHECKING:
    from portrait_dist.inference.batch import PredictResult
    from portrait_dist.inference.outputs import ImageFormat
    from portrait_dist.inference.segmenter import SegmenterOptions

EXAMPLES = """\b
Examples:
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth photo.jpg --out cutouts
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth holiday/ 'more/**/*.png' \\
    --out cutouts --background blur
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth photo.jpg --out cutouts \\
    --background beach.jpg --force
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth hazy.jpg --out cutouts \\
    --levels 0.3 0.7
  cat photo.jpg | portrait-dist predict --checkpoint runs/first/ckpt_best.pth - \\
    --only cutout --out - > cutout.png
  torchrun --nproc-per-node 8 -m portrait_dist predict --checkpoint runs/first/ckpt_best.pth \\
    photos/ --out masks --only mask
"""


def _summary(result: PredictResult) -> str:
    before = f"; {result.done_before} were done before" if result.done_before else ""
    if not result.files and result.done_before:
        return f"all {result.done_before} photos are done"
    return (
        f"{len(result.files)} images of {result.photos} photos written, "
        f"{result.photos_per_second:.1f} photos/s{before}"
    )


def _kinds(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Split KIND,KIND; all kinds where none is given."""
    kinds = tuple(kind.strip() for value in values for kind in value.split(","))
    return kinds or ("mask", "cutout", "side-by-side")


@command("predict", summary=_summary, epilog=EXAMPLES)
@options.checkpoint
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--out", required=True, help="Folder for the images; - writes one image to standard output."
)
@click.option(
    "--background",
    default="transparent",
    show_default=True,
    help="transparent, a colour (white, #1e90ff), blur, or an image.",
)
@click.option(
    "--only",
    "kinds",
    multiple=True,
    callback=_kinds,
    metavar="KIND[,KIND]",
    help="mask, cutout or side-by-side, or several of them.  [default: all three]",
)
@click.option(
    "--format",
    "image_format",
    default="png",
    show_default=True,
    type=click.Choice(["png", "webp", "jpeg"]),
    help="png is exact. webp is smaller, its masks exact and colours nearly. jpeg holds no "
    "transparency, its masks are nearly exact.",
)
@click.option("--force", is_flag=True, help="Overwrite images that exist.")
@options.batch_size(8, "Photos that go through the network together.")
@options.segmenter("auto", "fp32", "bf16", "int8")
@options.part("Do the photos", "all; under torchrun, auto")
@click.option(
    "--finish",
    is_flag=True,
    help="Do nothing: check that every photo is done, else name what is missing.",
)
@options.trained_size
@options.trust_code
def predict(
    checkpoint: str,
    paths: tuple[str, ...],
    out: str,
    part: tuple[int, int] | None,
    finish: bool,
    force: bool,
    batch_size: int,
    background: str,
    kinds: tuple[str, ...],
    image_format: ImageFormat,
    size: tuple[int, int] | None,
    trust_code: bool,
    **network: Unpack[SegmenterOptions],
) -> PredictResult | None:
    """Write mask, cut-out and side-by-side image of photos, at their own resolution.

    A PATH is a photo, a folder (searched to the bottom), a pattern in quotes, or - for standard
    input. For photo.jpg it writes photo.mask.png (8-bit grey alpha), photo.cutout.png and
    photo.side-by-side.png. A photo that cannot be done does not stop the others: it is named at the
    end, and the exit code is 3. An interrupted command continues where it stopped when it is run
    again. Under torchrun every rank does its part of the photos.
    """
    from portrait_dist import distributed
    from portrait_dist.inference import batch

    images = batch.ImageOptions(background, kinds, image_format, size, network, trust_code)
    if out == "-":
        photo = _only_photo(paths, kinds)
        sys.stdout.buffer.write(batch.predict_to_bytes(checkpoint, photo, images))
        return None
    if finish:
        return batch.check_finished(checkpoint, paths, out, images, part=part)
    predict_part = functools.partial(
        batch.predict_files, checkpoint, paths, out, images, force=force, batch_size=batch_size
    )
    if part is None and distributed.world_size() > 1:
        return batch.predict_on_every_rank(predict_part)
    number, parts = part or (0, 1)
    return predict_part(part=number, parts=parts)


def _only_photo(paths: tuple[str, ...], kinds: tuple[str, ...]) -> str:
    """Check that standard output gets exactly one image, and nothing else; return its photo."""
    from portrait_dist.errors import InputError

    if click.get_current_context().params.get("as_json"):
        raise InputError("--out -: standard output holds the image; leave --json out")
    if len(paths) != 1 or len(kinds) != 1:
        raise InputError(
            "--out -: standard output holds one image; give one PATH, and --only mask, cutout or "
            "side-by-side"
        )
    return paths[0]
