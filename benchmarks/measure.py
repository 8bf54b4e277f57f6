"""What the benchmarks share: alternating repeats, medians with spread, a description of the machine, JSON and tables.

Cases are run in turn, round after round, so that a slow minute of a shared machine hits all of them; each figure is the median
of the rounds, its spread the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Also where the package is not installed, with its dependencies on PYTHONPATH.
sys.path.insert(0, str(REPOSITORY))

from portrait_dist.system import info  # noqa: E402
from portrait_dist.system.info import cores  # noqa: E402, F401

MORE_PACKAGES = ("pillow", "opencv-python-headless", "litdata", "mosaicml-streaming")
"""Whose versions matter besides those that portrait_dist.system.info names."""

Row = dict[str, Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Parser with the options that every benchmark has."""
    first, _, rest = (description or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="write rows, machine and versions to this file"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument(
        "--repeats", type=int, help="rounds; the median of them is reported (default 5)"
    )
    return parser


def description() -> dict[str, Any]:
    """Processor, cores, memory, GPU and load of this machine."""
    found = info.machine()
    memory = round(found.pop("memory_bytes") / 1e9, 1)
    return {**found, "memory_gb": memory, "load_at_start": round(os.getloadavg()[0], 2)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on; absent ones are left out."""
    return {
        name: found
        for name, found in info.versions(*MORE_PACKAGES).items()
        if found != "not installed"
    }


def commit() -> str:
    """Commit of the working tree, with a + where tracked files differ from it; 'unknown' outside of a repository."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def alternate(
    cases: dict[str, Callable[[], float]], repeats: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Run all cases in turn, ``repeats`` times over.

    Args:
        cases: name → a function that does the work once and returns a rate, such as images per second.
        warm_up: run each once before, unmeasured.

    Returns:
        name → its rates, one a round. Every round begins with another case.
    """
    names = list(cases)
    if warm_up:
        for name in names:
            cases[name]()
    rates: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repeats):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            rates[name].append(cases[name]())
        print(f"  round {round_ + 1} of {repeats} done", file=sys.stderr, flush=True)
    return rates


def row(name: str, rates: Sequence[float], unit: str = "images_per_second", **facts: Any) -> Row:
    """One line of the result: the median of the rates as ``unit``, with ``low``, ``high`` and ``runs``."""
    return {
        "name": name,
        unit: _short(statistics.median(rates)),
        "low": _short(min(rates)),
        "high": _short(max(rates)),
        "runs": len(rates),
        **facts,
    }


def absent(name: str, why: str, **facts: Any) -> Row:
    """A line for what could not be measured here."""
    return {"name": name, "images_per_second": None, "note": why, **facts}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def seconds_of(
    work: Callable[[], Any], synchronize: Callable[[], Any] = lambda: None, at_least: float = 0.0
) -> float:
    """Mean seconds of one call, over as many calls as fill ``at_least`` seconds."""
    synchronize()
    begin, calls = time.perf_counter(), 0
    while True:
        work()
        calls += 1
        if at_least == 0.0 or (calls % 8 == 0 and _elapsed(begin, synchronize) > at_least):
            return _elapsed(begin, synchronize) / calls


def _elapsed(begin: float, synchronize: Callable[[], Any]) -> float:
    synchronize()
    return time.perf_counter() - begin


def result(benchmark: str, rows: list[Row], **facts: Any) -> dict[str, Any]:
    """The JSON object of a benchmark: rows, machine, versions, commit, date and command."""
    return {
        "benchmark": benchmark,
        "rows": rows,
        **facts,
        "machine": description(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "command": " ".join(["python", *map(_short_path, sys.argv)]),
    }


def _short_path(word: str) -> str:
    """Files of the repository as they lie in it, other paths by their name: where they lie on a machine says nothing."""
    path = Path(word)
    if path.resolve().is_relative_to(REPOSITORY) and path.exists():
        return str(path.resolve().relative_to(REPOSITORY))
    return path.name if "/" in word else word


def publish(found: dict[str, Any], out: Path | None) -> None:
    """Print the rows as a table and write the JSON file where asked."""
    print(
        f"\n{found['benchmark']}: {found['machine']['cpu']}, {found['machine']['cores']} cores, commit {found['commit']}"
    )
    print(table(found["rows"]))
    for name, value in found.get("aims", {}).items():
        print(f"  {name}: {value}")
    write(found, out)


def write(found: dict[str, Any], out: Path | None) -> None:
    """Write the JSON file where asked."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table; low, high and runs become one column."""
    columns = list(
        dict.fromkeys(key for line in rows for key in line if key not in ("low", "high", "runs"))
    )
    if any("low" in line for line in rows):
        columns.insert(2, "low to high")
    cells = [[_cell(line, column) for column in columns] for line in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| "
        + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _cell(line: Row, column: str) -> str:
    if column == "low to high":
        return f"{line['low']:g} to {line['high']:g}" if "low" in line else ""
    value = line.get(column)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
