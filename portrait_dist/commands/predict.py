"""``predict``: masks and cut-outs of photos."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from portrait_dist.commands import Size, command

if TYPE_CHECKING:
    from portrait_dist.inference.batch import PredictResult
    from portrait_dist.inference.placement import Fit

EXAMPLES = """\b
Examples:
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth photo.jpg --out cutouts
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth holiday/ 'more/**/*.png' \\
    --out cutouts --background blur
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth photo.jpg --out cutouts \\
    --background beach.jpg --force
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth hazy.jpg --out cutouts \\
    --levels 0.3 0.7
"""


def _summary(result: PredictResult) -> str:
    before = f"; {result.done_before} were done before" if result.done_before else ""
    return (
        f"{len(result.files)} images of {result.photos} photos written, "
        f"{result.photos_per_second:.1f} photos/s{before}"
    )


@command("predict", summary=_summary, epilog=EXAMPLES)
@click.option("--checkpoint", required=True, help="A .pth file of a run.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--out", required=True, help="Folder for the images.")
@click.option(
    "--background",
    default="transparent",
    show_default=True,
    help="transparent, a colour (white, #1e90ff), blur, or an image.",
)
@click.option("--force", is_flag=True, help="Overwrite images that exist.")
@click.option(
    "--refine/--no-refine",
    default=True,
    show_default=True,
    help="Let alpha follow the photo's edges at full resolution.",
)
@click.option(
    "--mirror/--no-mirror",
    default=True,
    show_default=True,
    help="Average with the mirrored photo's mask.",
)
@click.option(
    "--fit",
    default="letterbox",
    show_default=True,
    type=click.Choice(["letterbox", "cover", "squash"]),
    help="How photos of other shapes than training's are brought to the network.",
)
@click.option(
    "--levels",
    default=(0.0, 1.0),
    show_default=True,
    type=(float, float),
    metavar="LOW HIGH",
    help="The network's alpha at which the mask is 0 and 1; 0.3 0.7 removes haze.",
)
@click.option(
    "--batch-size",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    help="Photos that go through the network together.",
)
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"])
)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16", "int8"]),
    help="Arithmetic of the network. auto: bf16 where the processor multiplies it, else fp32. "
    "int8, for hundreds of photos on a CPU: calibrated with 64 of them, used where masks keep IoU "
    "0.999 with fp32's.",
)
@click.option(
    "--size",
    type=Size(),
    help="Size of training, for an old checkpoint that does not say it.  [default: 256x256]",
)
def predict(
    checkpoint: str,
    paths: tuple[str, ...],
    out: str,
    background: str,
    force: bool,
    refine: bool,
    mirror: bool,
    fit: Fit,
    levels: tuple[float, float],
    batch_size: int,
    device: str,
    precision: str,
    size: tuple[int, int] | None,
) -> PredictResult:
    """Write mask, cut-out and side-by-side image of photos, at their own resolution.

    A PATH is a photo, a folder (searched to the bottom) or a pattern in quotes. For photo.jpg it
    writes photo.mask.png (8-bit grey alpha), photo.cutout.png and photo.side-by-side.png. A photo
    that cannot be done does not stop the others: it is named at the end, and the exit code is 3. An
    interrupted command continues where it stopped when it is run again.
    """
    from portrait_dist.inference.batch import predict_files

    return predict_files(
        checkpoint,
        paths,
        out,
        background=background,
        force=force,
        batch_size=batch_size,
        size=size,
        refine=refine,
        mirror=mirror,
        fit=fit,
        levels=levels,
        device=device,
        precision=precision,
    )
