"""``doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command

if TYPE_CHECKING:
    from portrait_dist.system.doctor import Check

EXAMPLES = """\b
Examples:
  portrait-dist doctor
  portrait-dist doctor --path /scratch/runs --shards /scratch/shards
  srun --gpus 1 portrait-dist doctor --gpu --json

\b
Exit code: 0 nothing fails (warnings do not count), 1 something fails.
"""


@dataclass(frozen=True)
class Diagnosis:
    """What all checks found; ``ok`` where none failed."""

    ok: bool
    checks: list[Check]


def _line(check: Check) -> str:
    advice = f"\n{'':21s}-> {check.advice}" if check.advice else ""
    return f"{check.status:5s} {check.name:14s} {check.found}{advice}"


def _summary(result: Diagnosis) -> str:
    warnings = sum(check.status == "warn" for check in result.checks)
    return "everything works" + (
        f", {warnings} thing{'s' * (warnings > 1)} could be better" if warnings else ""
    )


@command("doctor", summary=_summary, epilog=EXAMPLES)
@click.option(
    "--path",
    default=".",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder whose disk is measured.",
)
@click.option(
    "--shards", metavar="SHARDS", help="Packed shards to look at: a folder or an address."
)
@click.option("--gpu", is_flag=True, help="No usable GPU is a failure.")
def doctor(path: Path, shards: str | None, gpu: bool) -> Diagnosis:
    """Say what this machine can run, what is missing or slow, and what to do about it.

    Looks at Python and packages, GPU and driver, NCCL, compiler, cores, memory, file handles, disk,
    locks, decoders and SLURM. It takes some seconds and writes one file of 64 MB for a moment.
    --json gives ok and checks: name, status (ok, warn or fail), found, advice.
    """
    from portrait_dist.errors import PortraitDistError
    from portrait_dist.system.doctor import FAIL, diagnose

    checks = []
    for finding in diagnose(path, shards, gpu_required=gpu):
        checks.append(finding)
        click.echo(_line(finding))  # goes to stderr with --json
    failed = [check.name for check in checks if check.status == FAIL]
    result = Diagnosis(not failed, checks)
    if failed:
        raise PortraitDistError(
            f"doctor: {', '.join(failed)} failed; do what the arrows above say", result=result
        )
    return result
