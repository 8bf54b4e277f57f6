"""``report``: one HTML file about a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command, options
from portrait_dist.runs.scores import sets_lines

if TYPE_CHECKING:
    from portrait_dist.runs.report import Report

EXAMPLES = """\b
Examples:
  portrait-dist report runs/first
  portrait-dist report runs/first --out first.html --data /scratch/shards --samples 16
"""


def _summary(result: Report) -> str:
    if result.val_iou is None:
        text = f"{result.file}, without images: {result.no_pictures}"
    else:
        text = f"{result.file}: validation IoU {result.val_iou:.4f} on {result.samples} samples"
        text += sets_lines(result.sets)
    return f"{text}\nwithout settings: {result.no_settings}" if result.no_settings else text


@command("report", summary=_summary, epilog=EXAMPLES)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The HTML file.  [default: RUN/report.html]",
)
@click.option(
    "--data",
    "shards",
    metavar="SHARDS",
    help="The shards, where they are no longer where the run found them.",
)
@click.option(
    "--samples",
    default=8,
    show_default=True,
    type=click.IntRange(0, 100),
    help="Images in the gallery, and as many worst cases.",
)
@click.option(
    "--at-most",
    default=0,
    type=click.IntRange(0),
    help="Score only so many validation samples.  [default: all]",
)
@options.device
@options.trust_code
def report(
    run: Path,
    out: Path | None,
    shards: str | None,
    samples: int,
    at_most: int,
    device: str,
    trust_code: bool,
) -> Report:
    """Write curves, images, worst cases and settings of a run into one HTML file.

    The file needs no network. RUN is the run's folder, also of a run that is still training. Every
    validation sample is scored with the best checkpoint.
    """
    from portrait_dist.runs.report import write_report

    return write_report(
        run,
        out,
        shards=shards,
        samples=samples,
        at_most=at_most,
        device=device,
        trust_code=trust_code,
    )
