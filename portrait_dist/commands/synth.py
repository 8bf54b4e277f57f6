"""``synth`` makes a raw AISegment tree of generated portraits.

portrait-dist synth --out raw --pairs 300
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command, options
from portrait_dist.commands.numbers import LARGEST_SEED, Integer

if TYPE_CHECKING:
    from portrait_dist.data.source.synthetic import SynthResult


def _summary(result: SynthResult) -> str:
    return (
        f"{result.pairs} pairs, {result.bytes / 1e6:.0f} MB, in {result.out} "
        f"({result.pairs_per_second:.1f} pairs/s)\n"
        f"next: portrait-dist prepare --raw {result.out} --out DIR"
    )


@command("synth", summary=_summary)
@options.folder_to_fill
@click.option(
    "--pairs",
    required=True,
    type=Integer(1, 10**8),
    help="How many pairs of image and matte.",
)
@click.option(
    "--seed",
    type=Integer(0, LARGEST_SEED),
    default=0,
    show_default=True,
    help="Pair i is a pure function of (seed, i).",
)
@options.workers("Processes")
def synth(out: Path, pairs: int, seed: int, workers: int | None) -> SynthResult:
    """Make a raw AISegment tree of synthetic portraits, 600x800.

    Killed and run again it finishes: complete files are kept.

    \b
        portrait-dist synth --out raw --pairs 300
        portrait-dist synth --out raw --pairs 34427 --workers 16     as many as AISegment has
    """
    from portrait_dist.data.source.synthetic import generate

    return generate(out, pairs, seed, workers)
