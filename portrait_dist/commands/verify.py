"""``verify`` checks shards against their manifest.

portrait-dist verify shards
"""

from __future__ import annotations

from typing import Any

import click

from portrait_dist.commands import command


def _verify_summary(result: dict[str, Any]) -> str:
    return f"{result['samples']} samples in {result['shards']} shards: all as they were packed"


@command("verify", summary=_verify_summary)
@click.argument("shards")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Threads.  [default: the CPUs there are]"
)
def verify(shards: str, workers: int | None) -> dict[str, Any]:
    """Check counts and hashes of SHARDS (a folder or an address), and that every sample decodes.

    \b
        portrait-dist verify shards
        portrait-dist verify https://example.org/shards

    Ends with exit code 3 and names shard and sample where something is damaged, missing, or there but not in the manifest.
    """
    from portrait_dist.data.shards.verify import verify as verify_shards
    from portrait_dist.errors import DamagedDataError

    result = verify_shards(shards, workers)
    if result["ok"]:
        return result
    for line in result["errors"][1:]:
        click.echo(line, err=True)
    number = len(result["errors"])
    more = f" (and {number - 1} more, above)" if number > 1 else ""
    mend = "copy the shards again from where they are whole, or pack them again"
    raise DamagedDataError(f"{result['errors'][0]}{more}; {mend}", result=result)
