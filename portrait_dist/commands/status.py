"""``status``."""

from __future__ import annotations

from typing import Any

import click

from portrait_dist.commands import command


def _status_summary(result: dict[str, Any]) -> str:
    from portrait_dist.runs.status import table

    return table(result)


@command(
    "status", summary=_status_summary, epilog="\b\nExample:\n  portrait-dist status runs/first\n"
)
@click.argument("run", type=click.Path())
def status(run: str) -> dict[str, Any]:
    """How far a run is: epoch, IoU, speed, time left, last error. Reads the run's folder only; works without SLURM."""
    from pathlib import Path

    from portrait_dist.runs.status import run_status

    return run_status(Path(run))
