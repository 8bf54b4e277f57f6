"""``predict``: masks and cut-outs of photos."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from portrait_dist.commands import Size, command, options
from portrait_dist.commands.numbers import Integer

if TYPE_CHECKING:
    from portrait_dist.inference.batch import ImageOptions, PredictResult
    from portrait_dist.inference.labels import Labels
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
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth photos/ --only mask --out masks \\
    --out-shards pseudo --min-confidence 0.95
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth inbox/ --out cutouts --watch
  torchrun --nproc-per-node 8 -m portrait_dist predict --checkpoint runs/first/ckpt_best.pth \\
    photos/ --out masks --only mask
"""


def _summary(result: PredictResult) -> str:
    before = f"; {result.done_before} were done before" if result.done_before else ""
    shards = ""
    if result.out_shards:
        left = f", {result.unsure} masks left out" if result.unsure else ""
        shards = f"\n{result.samples} samples in {result.out_shards}{left}"
    if not result.files and result.done_before:
        return f"all {result.done_before} photos are done{shards}"
    return (
        f"{len(result.files)} images of {result.photos} photos written, "
        f"{result.photos_per_second:.1f} photos/s{before}{shards}"
    )


def _kinds(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Split KIND,KIND; all kinds where none is given."""
    kinds = tuple(kind.strip() for value in values for kind in value.split(","))
    return kinds or ("mask", "cutout", "side-by-side")


LABEL_OPTIONS = (
    click.option(
        "--from-shards",
        metavar="SHARDS",
        default="",
        help="Take the samples of packed shards for photos, in place of PATHs.",
    ),
    click.option(
        "--split",
        default="train",
        show_default=True,
        type=click.Choice(["train", "val", "test"]),
        help="Split of --from-shards.",
    ),
    click.option(
        "--out-shards",
        type=click.Path(path_type=Path),
        help="Also pack photos and masks into shards that can be trained with.",
    ),
    click.option(
        "--min-confidence",
        default=0.0,
        show_default=True,
        type=click.FloatRange(0, 1),
        help="Leave masks out of --out-shards whose confidence, the mean of |2 alpha - 1| over the "
        "pixels, is lower.",
    ),
    click.option(
        "--shard-size",
        type=Size(original=True),
        default="256x256",
        show_default=True,
        help="Pixels of the samples of --out-shards; with --from-shards they are as they were.",
    ),
    click.option(
        "--samples-per-shard",
        type=Integer(1, 10**7),
        default=1024,
        show_default=True,
        help="Of --out-shards.",
    ),
)


LABEL_FIELDS = {
    "from_shards": "source",
    "split": "split",
    "out_shards": "out",
    "min_confidence": "min_confidence",
    "shard_size": "size",
    "samples_per_shard": "samples_per_shard",
}
"""Field of ``Labels`` for each of these options."""


def labels_of(given: Mapping[str, Any]) -> Labels:
    """Return what becomes of masks, out of the command's parameters by name."""
    from portrait_dist.inference.labels import Labels

    return Labels(**{field: given[name] for name, field in LABEL_FIELDS.items()})


def _labels(function: Callable[..., object]) -> Callable[..., object]:
    """Add the options of masks that become training data; the command gets them as ``labels``."""

    @functools.wraps(function)
    def run(**given: Any) -> object:
        others = {name: value for name, value in given.items() if name not in LABEL_FIELDS}
        return function(labels=labels_of(given), **others)

    return functools.reduce(lambda done, option: option(done), reversed(LABEL_OPTIONS), run)


@command("predict", summary=_summary, epilog=EXAMPLES)
@options.checkpoint
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option(
    "--out", required=True, help="Folder for the images; - writes one image to standard output."
)
@options.background
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
@click.option(
    "--watch",
    is_flag=True,
    help="Keep looking at the folders and do every photo that comes, until Ctrl-C or SIGTERM.",
)
@_labels
@options.trained_size
@options.trust_code
def predict(
    checkpoint: str,
    paths: tuple[str, ...],
    out: str,
    part: tuple[int, int] | None,
    finish: bool,
    watch: bool,
    force: bool,
    batch_size: int,
    background: str,
    kinds: tuple[str, ...],
    image_format: ImageFormat,
    size: tuple[int, int] | None,
    trust_code: bool,
    labels: Labels,
    **network: Unpack[SegmenterOptions],
) -> PredictResult | None:
    """Write mask, cut-out and side-by-side image of photos, at their own resolution.

    A PATH is a photo, a folder (searched to the bottom), a pattern in quotes, or - for standard
    input. For photo.jpg it writes photo.mask.png (8-bit grey alpha), photo.cutout.png and
    photo.side-by-side.png. A photo that cannot be done does not stop the others: it is named at the
    end, and the exit code is 3. An interrupted command continues where it stopped when it is run
    again. Under torchrun every rank does its part of the photos; other parts run anywhere, in any
    order, and --finish checks them, and packs --out-shards.
    """
    from portrait_dist.inference import batch

    check_options(paths, labels, kinds, image_format)
    images = batch.ImageOptions(background, kinds, image_format, size, network, trust_code)
    if watch:
        from portrait_dist.inference.watch import watch as keep_watching

        _check_watch(out, part, finish, labels)
        return keep_watching(checkpoint, paths, out, images, force=force, batch_size=batch_size)
    if out == "-":
        photo = _only_photo(paths, kinds, labels)
        sys.stdout.buffer.write(batch.predict_to_bytes(checkpoint, photo, images))
        return None
    arguments = (checkpoint, paths, out, images)
    found = _predict(arguments, part, finish, labels, force=force, batch_size=batch_size)
    if found is None or part is not None or labels.out is None:
        return found
    return batch.label(found, paths, out, images, labels)


def check_options(
    paths: Sequence[str], labels: Labels, kinds: Sequence[str], image_format: str
) -> None:
    """Check what goes together, before anything is read or queued."""
    if bool(paths) == bool(labels.source):
        raise click.UsageError(
            "Give PATHs or --from-shards, one of both." if paths else "Missing argument 'PATH...'."
        )
    labels.check(kinds, image_format)


def _predict(
    arguments: tuple[str, tuple[str, ...], str, ImageOptions],
    part: tuple[int, int] | None,
    finish: bool,
    labels: Labels,
    *,
    force: bool,
    batch_size: int,
) -> PredictResult | None:
    """Predict the photos of one part, of this rank, or all, or check that all are done.

    None on ranks whose result another one returns.
    """
    from portrait_dist import distributed
    from portrait_dist.inference import batch

    if finish:
        return batch.check_finished(*arguments, part=part, labels=labels)
    predict_part = functools.partial(
        batch.predict_files, *arguments, force=force, batch_size=batch_size, labels=labels
    )
    if part is None and distributed.world_size() > 1:
        return batch.predict_on_every_rank(predict_part)
    number, parts = part or (0, 1)
    # An array job of one task has a finishing job too, which reads what the task noted.
    return predict_part(part=number, parts=parts, keep_journal=part is not None)


def _check_watch(out: str, part: tuple[int, int] | None, finish: bool, labels: Labels) -> None:
    """Refuse what needs to know all photos, or one output."""
    from portrait_dist import distributed

    others = {
        "--out -": out == "-",
        "--part": part is not None,
        "--finish": finish,
        "--from-shards": bool(labels.source),
        "--out-shards": labels.out is not None,
        "torchrun": distributed.world_size() > 1,
    }
    if given := [name for name, present in others.items() if present]:
        raise click.UsageError(f"--watch with {given[0]}: it never has all photos; leave one out.")


def _only_photo(paths: tuple[str, ...], kinds: tuple[str, ...], labels: Labels) -> str:
    """Check that standard output gets exactly one image, and nothing else; return its photo."""
    from portrait_dist.errors import InputError

    if click.get_current_context().params.get("as_json"):
        raise InputError("--out -: standard output holds the image; leave --json out")
    if labels.out:
        raise InputError("--out -: --out-shards packs files of masks; give a folder for them")
    if len(paths) != 1 or len(kinds) != 1:
        raise InputError(
            "--out -: standard output holds one image; give one PATH, and --only mask, cutout or "
            "side-by-side"
        )
    return paths[0]
