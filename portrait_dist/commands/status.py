"""``status``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from portrait_dist.commands import command

EXAMPLE = "\b\nExample:\n  portrait-dist status runs/first\n"


def _summary(result: dict[str, Any]) -> str:
    from portrait_dist.runs.status import RunStatus

    return RunStatus(**result).table()


@command("status", summary=_summary, epilog=EXAMPLE)
@click.argument("run", type=click.Path(path_type=Path))
def status(run: Path) -> dict[str, Any]:
    """Show where a run stands: epoch, IoU, speed, time left, last error.

    Reads the run's folder only; works without SLURM.
    """
    import dataclasses

    from portrait_dist.runs.status import run_status

    return dataclasses.asdict(run_status(run))
