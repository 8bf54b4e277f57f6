"""``report``: one HTML file about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from portrait_dist.commands import command

EXAMPLES = """\b
Examples:
  portrait-dist report runs/first
  portrait-dist report runs/first --out first.html --data /scratch/shards --samples 16
"""


def _summary(result: dict[str, Any]) -> str:
    if result["val_iou"] is None:
        return f"{result['file']}, without pictures: {result['no_pictures']}"
    return (
        f"{result['file']}: validation IoU {result['val_iou']:.4f} on {result['samples']} samples"
    )


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
    help="Pictures, and as many worst cases.",
)
@click.option(
    "--at-most",
    default=0,
    type=click.IntRange(0),
    help="Score only so many validation samples.  [default: all]",
)
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"])
)
def report(run: Path, out: Path | None, **options: Any) -> dict[str, Any]:
    """Curves, pictures, worst cases and settings of a run, in one HTML file that needs no network.

    RUN is the run's folder, also of a run that is still going on. Every validation sample is scored with the best checkpoint.
    """
    from portrait_dist.runs.report.collect import write_report

    return write_report(run, out, **options)
