"""``status``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command

if TYPE_CHECKING:
    from portrait_dist.runs.status import RunStatus

EXAMPLE = "\b\nExample:\n  portrait-dist status runs/first\n"


@command("status", summary=lambda result: result.table(), epilog=EXAMPLE)
@click.argument("run", type=click.Path(path_type=Path))
def status(run: Path) -> RunStatus:
    """Show where a run stands: epoch, IoU, speed, time left, last error.

    Reads the run's folder only; works without SLURM.
    """
    from portrait_dist.runs.status import run_status

    return run_status(run)
