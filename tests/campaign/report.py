"""The table of a campaign, as it stands in ``benchmarks/results``."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence

from portrait_dist.system import info
from tests.campaign.case import Tally


def table(tallies: Mapping[str, Tally], arguments: Sequence[str], minutes: float) -> str:
    """Return a Markdown page: what ran where, a row for each area, and what broke.

    Args:
        tallies: by area.
        arguments: of the command line.
        minutes: that it took.
    """
    words = [word for word in arguments if word != "--out" and not word.endswith(".md")]
    found = info.versions()
    lines = [
        f"# Attack campaign, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python -m tests.campaign {shlex.join(words)}` on commit {_commit()}: "
        f"{minutes:.0f} minutes; {info.cpu_name()}, {info.cores()} cores; "
        f"Python {found.get('python', '')}, torch {found.get('torch', '')}.",
        "",
        "Held: one clear line and the right exit code, nothing half-written, no wrong sample, no",
        "other weights. `tests/campaign/areas.py` says what each area does.",
        "",
        "| area | tried | held | broken |",
        "|---|---|---|---|",
    ]
    for name, tally in tallies.items():
        lines.append(f"| {name} | {tally.tried:,} | {tally.held:,} | {len(tally.broken):,} |")
    tried = sum(tally.tried for tally in tallies.values())
    held = sum(tally.held for tally in tallies.values())
    lines += [f"| all | {tried:,} | {held:,} | {tried - held:,} |", ""]
    broken = [f"- {name}: {one}" for name, tally in tallies.items() for one in tally.broken]
    return "\n".join([*lines, *(broken or ["Nothing broke."])]) + "\n"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty=+"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
