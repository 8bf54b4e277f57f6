"""``quickstart``: the whole way, from raw photos to cut-outs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command

if TYPE_CHECKING:
    from portrait_dist.quickstart import QuickstartResult

EXAMPLES = """\b
Examples:
  portrait-dist quickstart
  portrait-dist quickstart --raw AISegment --out out/first --nproc 2
"""


def _summary(result: QuickstartResult) -> str:
    pictures = "\n".join(f"  {path}" for path in result.pictures)
    return (
        f"test IoU {result.test_iou:.4f} "
        f"(a constant mean mask reaches {result.baseline_iou:.4f})\n"
        f"training speed {result.images_per_second} images/s on {result.world_size} ranks\n"
        f"cut-outs and contact sheets\n{pictures}\n"
        f"checkpoint {result.checkpoint}\n"
        f"logs: tensorboard --logdir {result.run_dir}"
    )


@command("quickstart", summary=_summary, epilog=EXAMPLES)
@click.option(
    "--raw",
    type=click.Path(file_okay=False),
    help="A raw AISegment tree; a small generated one when not given.",
)
@click.option(
    "--out",
    default="out/quickstart",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Folder for everything.",
)
@click.option(
    "--nproc",
    metavar="N|auto|gpu",
    default="auto",
    help="Training ranks: a number, or auto: one for each GPU, or 2 without.",
)
def quickstart(raw: str | None, out: str, nproc: str) -> QuickstartResult:
    """Go the whole way: data, shards, distributed training, test score, cut-outs."""
    from portrait_dist import quickstart as steps

    return steps.quickstart(raw, out, nproc)
