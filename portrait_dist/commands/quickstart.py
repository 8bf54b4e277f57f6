"""``quickstart``: the whole way, from raw pictures to cut-outs."""

from __future__ import annotations

from typing import Any

import click

from portrait_dist.commands import command


def _summary(result: dict[str, Any]) -> str:
    pictures = "\n".join(f"  {path}" for path in result["pictures"])
    return (
        f"test IoU {result['test_iou']:.4f} (a constant mean mask reaches {result['baseline_iou']:.4f})\n"
        f"training speed {result['images_per_second']} images/s with {result['world_size']} processes\n"
        f"pictures\n{pictures}\n"
        f"checkpoint {result['checkpoint']}\n"
        f"logs: tensorboard --logdir {result['run_dir']}"
    )


@command(
    "quickstart",
    summary=_summary,
    epilog="\b\nExamples:\n  portrait-dist quickstart\n  portrait-dist quickstart --raw AISegment --out out/first --nproc 2\n",
)
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
    type=click.IntRange(1),
    help="Training processes; all GPUs, or 2 on a CPU, when not given.",
)
def quickstart(raw: str | None, out: str, nproc: int | None) -> dict[str, Any]:
    """Data, shards, distributed training, test score and cut-out pictures, in one go."""
    from portrait_dist import quickstart as steps

    return steps.quickstart(raw, out, nproc)
