"""``predict``."""

from __future__ import annotations

from typing import Any

import click

from portrait_dist.commands import command

PREDICT_EXAMPLES = """\b
Examples:
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth photo.jpg --out cutouts
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth holiday/ 'more/**/*.png' --out cutouts --background blur
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth photo.jpg --out cutouts --background beach.jpg --force
  portrait-dist predict --checkpoint runs/first/ckpt_best.pth hazy.jpg --out cutouts --levels 0.3 0.7
"""


def _predict_summary(result: dict[str, Any]) -> str:
    return f"{len(result['files'])} pictures of {result['photos']} photos written, {result['photos_per_second']:.1f} photos/s"


@command("predict", summary=_predict_summary, epilog=PREDICT_EXAMPLES)
@click.option("--checkpoint", required=True, help="A .pth file of a run.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--out", required=True, type=click.Path(file_okay=False), help="Folder for the pictures."
)
@click.option(
    "--background",
    default="transparent",
    show_default=True,
    help="transparent, a colour (white, #1e90ff), blur, or a picture.",
)
@click.option("--force", is_flag=True, help="Overwrite pictures that exist.")
@click.option(
    "--refine/--no-refine",
    default=None,
    help="Let alpha follow the photo's edges at full resolution; on unless switched off.",
)
@click.option(
    "--mirror/--no-mirror",
    default=None,
    help="Average with the mirrored photo's mask; on unless switched off.",
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
    help="Arithmetic of the network. auto: bf16 where the processor multiplies it, else fp32. int8, for hundreds of photos on "
    "a CPU: calibrated with 64 of them, used where masks keep IoU 0.999 with fp32's.",
)
def predict(checkpoint: str, paths: tuple[str, ...], out: str, **options: Any) -> dict[str, Any]:
    """Mask, cut-out and side-by-side picture of photos, at their own resolution.

    A PATH is a photo, a folder (looked through to the bottom) or a pattern in quotes. For photo.jpg it writes photo.mask.png
    (8-bit grey alpha), photo.cutout.png and photo.side-by-side.png. A photo that cannot be read does not stop the others: it is
    named at the end, and the exit code is 3.
    """
    from portrait_dist.inference.batch import predict_files

    return predict_files(checkpoint, paths, out, **options)
