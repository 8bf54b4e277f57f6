"""``video``: masks and cut-outs of videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from portrait_dist.commands import command, options

if TYPE_CHECKING:
    from portrait_dist.inference.segmenter import SegmenterOptions
    from portrait_dist.inference.video import VideoResult

EXAMPLES = """\b
Examples:
  portrait-dist video --checkpoint runs/first/ckpt_best.pth clip.mp4 --out clip.webm
  portrait-dist video --checkpoint runs/first/ckpt_best.pth clip.mp4 --out white.mp4 \\
    --background white
"""


def _summary(result: VideoResult) -> str:
    return (
        f"{result.file}: {result.frames} frames of {result.width}x{result.height}, "
        f"{result.frames_per_second:.1f} frames/s"
    )


@command("video", summary=_summary, epilog=EXAMPLES)
@options.checkpoint
@click.argument("source", metavar="VIDEO", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The file: .mp4 (H.264), or .webm (VP9) or .mov (ProRes 4444), which hold transparency.",
)
@click.option(
    "--only",
    "kind",
    default="cutout",
    show_default=True,
    type=click.Choice(["mask", "cutout", "side-by-side"]),
    help="What the video shows.",
)
@options.background
@click.option(
    "--smooth/--no-smooth",
    default=True,
    show_default=True,
    help="Take flicker out: a pixel that differs from two frames that agree gets their mean.",
)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
@options.batch_size(8, "Frames that go through the network together.")
@options.segmenter("auto", "fp32", "bf16")
@options.trained_size
@options.trust_code
def video(
    checkpoint: str,
    source: Path,
    out: Path,
    kind: str,
    background: str,
    smooth: bool,
    force: bool,
    batch_size: int,
    size: tuple[int, int] | None,
    trust_code: bool,
    **network: Unpack[SegmenterOptions],
) -> VideoResult:
    """Write the cut-out, the mask or both beside each other of a video.

    Frames keep their times and their resolution (sides are made even); the sound is not kept. Needs
    the extra [video].
    """
    from portrait_dist.inference import video as videos
    from portrait_dist.inference.segmenter import PortraitSegmenter

    chosen = videos.VideoOptions(kind, background, smooth, batch_size)
    videos.check_options(source, out, chosen, force)
    segmenter = PortraitSegmenter.from_checkpoint(
        checkpoint, size=size, trust_code=trust_code, **network
    )
    return videos.segment_video(segmenter, source, out, chosen, force=force)
