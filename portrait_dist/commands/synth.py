"""``synth`` makes a raw AISegment tree of generated portraits.

portrait-dist synth --out raw --pairs 300
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from portrait_dist.commands import command


def _synth_summary(result: dict[str, Any]) -> str:
    megabytes = result["bytes"] / 1e6
    return (
        f"{result['pairs']} pairs, {megabytes:.0f} MB, in {result['out']} ({result['pairs_per_second']:.1f} pairs/s)\n"
        f"next: portrait-dist prepare --raw {result['out']} --out DIR"
    )


@command("synth", summary=_synth_summary)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write; new, or one to finish.",
)
@click.option("--pairs", required=True, type=int, help="How many pairs of image and matte.")
@click.option(
    "--seed", default=0, show_default=True, help="Pair i is a pure function of (seed, i)."
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes.  [default: the CPUs there are]"
)
def synth(out: Path, pairs: int, seed: int, workers: int | None) -> dict[str, Any]:
    """Make a raw AISegment tree of synthetic portraits, 600x800.

    Killed and run again it finishes: complete files are kept.

    \b
        portrait-dist synth --out raw --pairs 300
        portrait-dist synth --out raw --pairs 34427 --workers 16     as many as AISegment has
    """
    from portrait_dist.data.source.synthetic import generate

    return generate(out, pairs, seed, workers)
