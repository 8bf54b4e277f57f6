"""``status``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command

if TYPE_CHECKING:
    from portrait_dist.runs.status import RunStatus, StepsStatus

EXAMPLE = """\b
Examples:
  portrait-dist status runs/first
  portrait-dist status shards
"""


@command("status", summary=lambda result: result.table(), epilog=EXAMPLE)
@click.argument("run", type=click.Path(path_type=Path))
def status(run: Path) -> RunStatus | StepsStatus:
    """Show where a run stands: epoch, IoU, speed, time left, last error.

    RUN may also be shards or masks that 'portrait-dist submit' has jobs for: then it shows the
    jobs. Reads files only; works without SLURM.
    """
    from portrait_dist.runs.status import status

    return status(run)
