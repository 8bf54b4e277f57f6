"""``verify`` checks shards against their manifest.

portrait-dist verify shards
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from portrait_dist.commands import command, options

if TYPE_CHECKING:
    from portrait_dist.data.shards.verify import VerifyResult


def _summary(result: VerifyResult) -> str:
    return f"{result.samples} samples in {result.shards} shards: all as they were packed"


@command("verify", summary=_summary)
@click.argument("shards")
@options.workers("Threads")
def verify(shards: str, workers: int | None) -> VerifyResult:
    """Check counts and hashes of SHARDS (a folder or an address), and that every sample decodes.

    \b
        portrait-dist verify shards
        portrait-dist verify https://example.org/shards

    Ends with exit code 3 and names shard and sample where something is damaged, missing, or there
    but not in the manifest.
    """
    from portrait_dist.data.shards.verify import verify as verify_shards
    from portrait_dist.errors import DamagedDataError

    result = verify_shards(shards, workers)
    if result.ok:
        return result
    for line in result.errors[1:]:
        click.echo(line, err=True)
    number = len(result.errors)
    more = f" (and {number - 1} more, above)" if number > 1 else ""
    remedy = "copy the shards again from where they are whole, or pack them again"
    raise DamagedDataError(f"{result.errors[0]}{more}; {remedy}", result=result)
